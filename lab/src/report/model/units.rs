//! Units of figures in reports.

/// 1 GB = 10^9 bytes, as 1 MB = 10^6 bytes.
const BYTES_PER_GB: f64 = 1e9;

/// CPU seconds per 10^9 bytes of payload.
pub fn per_gb(seconds: f64, bytes: u64) -> f64 {
    if bytes == 0 {
        return 0.0;
    }
    seconds * BYTES_PER_GB / bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_per_billion_bytes() {
        assert_eq!(per_gb(3.0, 2_000_000_000), 1.5);
        assert_eq!(per_gb(3.0, 0), 0.0);
    }
}
