//! The machine and kernel settings that a figure depends on, for the report.

use std::fs;
use std::thread;

use anyhow::Result;
use jiff::Timestamp;
use penstock_flags::quoted;
use serde::{Deserialize, Serialize};

use penstock_testbed::command::run;

/// Where and how a run was made.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Environment {
    pub date: String,
    pub command_line: String,
    pub version: String,
    pub kernel: String,
    pub cpu_model: String,
    pub cpus: usize,
    pub rmem_max: String,
    pub wmem_max: String,
    pub tcp_rmem: String,
    pub tcp_wmem: String,
    pub congestion_control: String,
}

impl Environment {
    /// Reads it; the TCP settings are those of the namespace where the workload runs, if that is not
    /// the lab's own.
    pub fn read(namespace: Option<&str>, started: Timestamp) -> Result<Self> {
        let tcp = |name: &str| match namespace {
            Some(namespace) => {
                let path = format!("/proc/sys/net/ipv4/{name}");
                run(&["ip", "netns", "exec", namespace, "cat", &path]).map(|text| one_line(&text))
            }
            None => Ok(sysctl(&format!("net/ipv4/{name}"))),
        };
        Ok(Self {
            date: started.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
            command_line: std::env::args()
                .map(|a| quoted(&a))
                .collect::<Vec<_>>()
                .join(" "),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: sysctl("kernel/osrelease"),
            cpu_model: cpu_model(),
            cpus: thread::available_parallelism()?.get(),
            rmem_max: sysctl("net/core/rmem_max"),
            wmem_max: sysctl("net/core/wmem_max"),
            tcp_rmem: tcp("tcp_rmem")?,
            tcp_wmem: tcp("tcp_wmem")?,
            congestion_control: tcp("tcp_congestion_control")?,
        })
    }
}

fn sysctl(name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/sys/{name}"));
    text.map_or_else(|error| format!("unknown ({error})"), |text| one_line(&text))
}

fn cpu_model() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    info.lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':'))
        .map_or_else(|| "unknown".to_owned(), |(_, name)| name.trim().to_owned())
}

/// Tabs and line ends as single spaces.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_become_one_line() {
        assert_eq!(one_line("4096\t131072\t33554432\n"), "4096 131072 33554432");
    }
}
