//! What the whole host did over an interval: CPU time of all processes and of the kernel, which
//! works on a packet on whichever core it comes, and what the network dropped or sent again.

use std::time::Instant;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
use procfs::{CpuTime, CurrentSI, KernelStats};

use penstock_testbed::command::run;

/// The host's CPUs at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    at: Instant,
    count: usize,
    /// Time that they were idle, waited for storage or were taken away by a hypervisor, seconds.
    unused: f64,
}

impl Cpus {
    /// Reads `/proc/stat` (proc_stat(5)).
    pub fn now() -> Result<Self> {
        let stats = KernelStats::current().context("cannot read /proc/stat")?;
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the kernel reports no clock tick")?;
        Ok(Self {
            at: Instant::now(),
            count: stats.cpu_time.len(),
            unused: unused(&stats.total) as f64 / ticks as f64,
        })
    }

    /// CPU seconds that the host was busy since `start`: all of the time but what was unused, which
    /// the kernel counts exactly; busy time it only samples at ticks.
    pub fn busy_since(&self, start: &Self) -> f64 {
        let all = (self.at - start.at).as_secs_f64() * self.count as f64;
        (all - (self.unused - start.unused)).max(0.0)
    }

    /// CPUs of the host.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Time since `start`.
    pub fn seconds_since(&self, start: &Self) -> f64 {
        (self.at - start.at).as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// The same as a share of the CPU time that there was, 0 to 1.
    pub fn busy_share_since(&self, start: &Self) -> f64 {
        let all = (self.at - start.at).as_secs_f64() * self.count as f64;
        self.busy_since(start) / all.max(f64::MIN_POSITIVE)
    }
}

/// Ticks of idle, iowait and steal together.
fn unused(cpus: &CpuTime) -> u64 {
    cpus.idle + cpus.iowait.unwrap_or(0) + cpus.steal.unwrap_or(0)
}

/// What network namespaces counted up to one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct NetCounters {
    /// Packets that interfaces dropped, at either end of a link.
    pub drops: u64,
    /// TCP segments sent again.
    pub retransmits: u64,
}

impl NetCounters {
    /// The sum over namespaces; `None` is the one that the lab runs in.
    pub fn read(namespaces: &[Option<&str>]) -> Result<Self> {
        let mut sum = Self::default();
        for namespace in namespaces {
            let files = ["/proc/net/dev", "/proc/net/snmp"];
            let text = match namespace {
                Some(name) => run(&["ip", "netns", "exec", name, "cat", files[0], files[1]])?,
                None => run(&["cat", files[0], files[1]])?,
            };
            sum.drops += drops(&text);
            sum.retransmits += retransmits(&text).context("/proc/net/snmp tells no RetransSegs")?;
        }
        Ok(sum)
    }

    pub fn since(&self, start: &Self) -> Self {
        Self {
            drops: self.drops.saturating_sub(start.drops),
            retransmits: self.retransmits.saturating_sub(start.retransmits),
        }
    }
}

/// Received and sent packets that were dropped, all interfaces of `/proc/net/dev`.
fn drops(text: &str) -> u64 {
    let interfaces = text.lines().filter_map(|line| {
        let (_, figures) = line.split_once(':')?;
        let figures: Option<Vec<u64>> =
            figures.split_whitespace().map(|f| f.parse().ok()).collect();
        // Only lines of interfaces have this many fields.
        let figures = figures.filter(|figures| figures.len() == 16)?;
        Some(figures[3] + figures[11])
    });
    interfaces.sum()
}

/// `RetransSegs` of `/proc/net/snmp`: a line of names, then one of values.
fn retransmits(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let at = lines
        .next()?
        .split_whitespace()
        .position(|name| name == "RetransSegs")?;
    lines.next()?.split_whitespace().nth(at)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_loop_shows() {
        let start = Cpus::now().unwrap();
        let busy = Instant::now();
        while busy.elapsed().as_millis() < 100 {
            std::hint::spin_loop();
        }
        let used = Cpus::now().unwrap().busy_since(&start);
        assert!(used > 0.0, "{used}");
    }

    #[test]
    fn drops_and_retransmits_are_found() {
        let text = "Inter-|   Receive                                                |  Transmit\n \
            face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n    \
            lo:     1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16\n  \
            eth0:   1  2  3 40  5  6  7  8  9 10 11  0 13 14 15 16\n\
            Ip: Forwarding DefaultTTL\nIp: 1 64\n\
            Tcp: RtoAlgorithm MaxConn RetransSegs InErrs\nTcp: 1 -1 17 0\nUdp: InDatagrams\nUdp: 5\n";
        assert_eq!(drops(text), 4 + 12 + 40);
        assert_eq!(retransmits(text), Some(17));
        assert_eq!(retransmits("Udp: x\n"), None);
    }

    #[test]
    fn counters_of_this_namespace_can_be_read() {
        let now = NetCounters::read(&[None]).unwrap();
        assert_eq!(now.since(&now), NetCounters::default());
    }
}
