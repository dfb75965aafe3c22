//! What this process has used so far: CPU time and peak memory.

use std::fs;
use std::io;
use std::mem::MaybeUninit;

use serde::{Deserialize, Serialize};

/// Resources that this process has used since it started.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ProcessUsage {
    /// CPU time, user and system, all threads, seconds (getrusage(2)).
    pub cpu_seconds: f64,
    /// Peak resident set, shared mappings included, bytes (`VmHWM`, proc_pid_status(5)).
    pub peak_rss_bytes: u64,
}

impl ProcessUsage {
    /// Reads the figures of the calling process.
    ///
    /// # Errors
    /// If /proc is not mounted or not readable.
    pub fn now() -> io::Result<Self> {
        Ok(Self {
            cpu_seconds: cpu_seconds()?,
            peak_rss_bytes: peak_rss_bytes()?,
        })
    }
}

fn cpu_seconds() -> io::Result<f64> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: getrusage writes one rusage to the pointer, which is valid for that.
    if unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: getrusage returned 0, so it has filled the whole struct.
    let usage = unsafe { usage.assume_init() };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    Ok(seconds(usage.ru_utime) + seconds(usage.ru_stime))
}

fn peak_rss_bytes() -> io::Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let kib = status.lines().find_map(|line| {
        line.strip_prefix("VmHWM:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()
    });
    kib.map(|kib: u64| kib * 1024)
        .ok_or_else(|| io::Error::other("/proc/self/status has no VmHWM line"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_has_used_cpu_time() {
        let usage = ProcessUsage::now().unwrap();
        assert!(usage.peak_rss_bytes > 100_000);
        assert!(usage.cpu_seconds >= 0.0);
    }
}
