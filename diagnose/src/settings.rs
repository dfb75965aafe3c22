//! Limits of the kernel that bound a socket's buffers, and how much the host's processes wait.

#![allow(
    missing_docs,
    reason = "fields have the names of the kernel's settings"
)]

use std::fs;

use serde::Serialize;

/// Limits in one namespace; what a kernel does not show there is that of the host, or none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Most that SO_RCVBUF grants, before the kernel doubles it, bytes.
    pub rmem_max: Option<u64>,
    pub wmem_max: Option<u64>,
    /// Least, first and largest receive buffer that autotuning gives, bytes.
    pub tcp_rmem: Option<[u64; 3]>,
    pub tcp_wmem: Option<[u64; 3]>,
    /// Whether receive buffers are tuned at all.
    pub tcp_moderate_rcvbuf: Option<u64>,
    pub tcp_window_scaling: Option<u64>,
}

/// Share of the last ten seconds in which some process waited (PSI), 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Pressure {
    pub cpu: f64,
    pub memory: f64,
    pub io: f64,
}

impl Settings {
    /// Reads those of the calling thread's namespace.
    pub fn read() -> Self {
        Self {
            rmem_max: one("core/rmem_max"),
            wmem_max: one("core/wmem_max"),
            tcp_rmem: three("ipv4/tcp_rmem"),
            tcp_wmem: three("ipv4/tcp_wmem"),
            tcp_moderate_rcvbuf: one("ipv4/tcp_moderate_rcvbuf"),
            tcp_window_scaling: one("ipv4/tcp_window_scaling"),
        }
    }

    /// Fills what this namespace does not show from another's.
    pub fn or(mut self, other: &Self) -> Self {
        self.rmem_max = self.rmem_max.or(other.rmem_max);
        self.wmem_max = self.wmem_max.or(other.wmem_max);
        self
    }
}

impl Pressure {
    /// None when the kernel does not keep it (boot with psi=1).
    pub fn read() -> Option<Self> {
        let share = |what| some_avg10(&fs::read_to_string(format!("/proc/pressure/{what}")).ok()?);
        Some(Self {
            cpu: share("cpu")?,
            memory: share("memory")?,
            io: share("io")?,
        })
    }
}

fn some_avg10(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let mut fields = line.split(' ');
    let percent: f64 = fields
        .find_map(|field| field.strip_prefix("avg10="))?
        .parse()
        .ok()?;
    Some(percent / 100.0)
}

fn one(name: &str) -> Option<u64> {
    numbers(name)?.pop()
}

fn three(name: &str) -> Option<[u64; 3]> {
    numbers(name)?.try_into().ok()
}

fn numbers(name: &str) -> Option<Vec<u64>> {
    let text = fs::read_to_string(format!("/proc/sys/net/{name}")).ok()?;
    text.split_whitespace()
        .map(|word| word.parse().ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_read() {
        let settings = Settings::read();
        let [least, first, largest] = settings.tcp_rmem.unwrap();
        assert!(least <= first && first <= largest);
        assert!(settings.rmem_max.unwrap() > 0);
    }

    #[test]
    fn pressure_is_a_share() {
        let text = "some avg10=12.50 avg60=1.74 avg300=13.85 total=1703\nfull avg10=0.00\n";
        assert_eq!(some_avg10(text), Some(0.125));
        assert_eq!(some_avg10("full avg10=1.00"), None);
    }
}
