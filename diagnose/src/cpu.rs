//! What CPUs and threads did over an interval: run, waited for a core, were held back.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
use procfs::process::Task;
use procfs::{CpuTime, CurrentSI, KernelStats};
use serde::Serialize;

/// A process's threads at one moment.
#[derive(Debug, Clone, Default)]
pub struct ProcessSnapshot {
    threads: BTreeMap<u32, ThreadSnapshot>,
    quota: Option<QuotaAt>,
    is_stopped: bool,
}

/// What a control group had of its CPU quota (`cpu.stat`).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct QuotaAt {
    /// Time out of quota; a stretch of it is counted at its end.
    throttled_ns: u64,
    /// Periods in which somebody wanted to run, and those of them at whose end the group was out of quota.
    periods: u64,
    throttled_periods: u64,
}

#[derive(Debug, Clone, Default)]
struct ThreadSnapshot {
    name: String,
    is_stopped: bool,
    run_ns: u64,
    wait_ns: u64,
    user_ticks: u64,
    system_ticks: u64,
    voluntary: u64,
    involuntary: u64,
}

/// What a process did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its name.
    pub name: String,
    /// Busiest first.
    pub threads: Vec<Thread>,
    /// CPU time of all threads, and their time waiting for a core, in cores: 1 is one core all the
    /// time.
    pub run: f64,
    /// Time waiting for a core, in cores.
    pub wait: f64,
    /// Share of the interval in which its control group was out of quota, summed over cores; none
    /// without a quota.
    pub throttled: Option<f64>,
    /// Stopped by a signal or a debugger at the end of the interval.
    pub stopped: bool,
}

/// What a thread did; shares of the interval, 0 to 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Thread {
    /// Its number.
    pub tid: u32,
    /// Its name.
    pub name: String,
    /// On a core.
    pub run: f64,
    /// Ready to run, and no core for it.
    pub wait: f64,
    /// Of its time on a core, the kernel's part (sampled at ticks).
    pub system: f64,
    /// Times per second that it gave up its core, to wait for something.
    pub voluntary_switches: f64,
    /// Times per second that its core was taken away.
    pub involuntary_switches: f64,
}

/// The host's cores at one moment: ticks by kind, and packets.
#[derive(Debug, Clone, Default)]
pub struct CoresSnapshot {
    ticks: Vec<[u64; 8]>,
    packets: BTreeMap<usize, PacketsSnapshot>,
}

/// What came through a core's receive queue, all interfaces and namespaces together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct PacketsSnapshot {
    received: u64,
    dropped: u64,
}

/// What a core did; shares of the interval, 0 to 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Core {
    /// Its number.
    pub core: usize,
    /// In user space.
    pub user: f64,
    /// In the kernel, interrupts included.
    pub system: f64,
    /// In softirqs.
    pub softirq: f64,
    /// In hardware interrupts.
    pub irq: f64,
    /// Idle, or waiting for a device.
    pub idle: f64,
    /// Taken by the hypervisor.
    pub steal: f64,
    /// Packets that the kernel received on it, all interfaces and namespaces together; some drivers'
    /// are counted twice, first as the driver's and then as the core's own queue's.
    pub packets: u64,
    /// Packets that the core's own queue (net.core.netdev_max_backlog) had no room for.
    pub backlog_dropped: u64,
}

impl ProcessSnapshot {
    /// Reads `/proc/PID/task` (proc_pid_task(5)), which any user may.
    pub fn now(pid: u32) -> Option<Self> {
        let process = procfs::process::Process::new(pid.try_into().ok()?).ok()?;
        // A thread that ends meanwhile is left out.
        let threads = process.tasks().ok()?.filter_map(|task| {
            let task = task.ok()?;
            Some((task.tid.try_into().ok()?, ThreadSnapshot::read(&task)?))
        });
        let threads: BTreeMap<u32, ThreadSnapshot> = threads.collect();
        Some(Self {
            is_stopped: threads.values().any(|thread| thread.is_stopped),
            threads,
            quota: quota(pid),
        })
    }

    /// What it did since `start`, `seconds` ago.
    pub fn since(&self, start: &Self, pid: u32, name: String, seconds: f64) -> Process {
        let threads = self.threads.iter();
        let mut threads: Vec<Thread> = threads
            .map(|(tid, end)| end.since(start.threads.get(tid), *tid, seconds))
            .collect();
        threads.sort_by(|a, b| (b.run + b.wait).total_cmp(&(a.run + a.wait)));
        let throttled = self.quota.zip(start.quota);
        Process {
            pid,
            name,
            run: threads.iter().map(|thread| thread.run).sum(),
            wait: threads.iter().map(|thread| thread.wait).sum(),
            threads,
            stopped: self.is_stopped,
            throttled: throttled.map(|(end, start)| end.throttled_since(start, seconds)),
        }
    }
}

impl ThreadSnapshot {
    fn read(task: &Task) -> Option<Self> {
        let (stat, status) = (task.stat().ok()?, task.status().ok()?);
        // Kernels without CONFIG_SCHED_INFO have no such file.
        let times = task.schedstat().ok();
        Some(Self {
            name: stat.comm,
            // `T`: by a signal, `t`: by a debugger (proc_pid_stat(5)).
            is_stopped: stat.state.eq_ignore_ascii_case(&'t'),
            run_ns: times.as_ref().map_or(0, |times| times.sum_exec_runtime),
            wait_ns: times.map_or(0, |times| times.run_delay),
            user_ticks: stat.utime,
            system_ticks: stat.stime,
            voluntary: status.voluntary_ctxt_switches?,
            involuntary: status.nonvoluntary_ctxt_switches?,
        })
    }

    fn since(&self, start: Option<&Self>, tid: u32, seconds: f64) -> Thread {
        // A thread that is new did all of it in the interval.
        let none = Self::default();
        let start = start.unwrap_or(&none);
        let user = self.user_ticks.saturating_sub(start.user_ticks) as f64;
        let system = self.system_ticks.saturating_sub(start.system_ticks) as f64;
        let rate = |end: u64, start: u64| end.saturating_sub(start) as f64 / seconds;
        Thread {
            tid,
            name: self.name.clone(),
            run: share(self.run_ns.saturating_sub(start.run_ns), seconds),
            wait: share(self.wait_ns.saturating_sub(start.wait_ns), seconds),
            system: system / (user + system).max(1.0),
            voluntary_switches: rate(self.voluntary, start.voluntary),
            involuntary_switches: rate(self.involuntary, start.involuntary),
        }
    }
}

fn share(ns: u64, seconds: f64) -> f64 {
    ns as f64 * 1e-9 / seconds
}

impl QuotaAt {
    /// Share of the interval that the group was out of quota, summed over cores. One that has used up much at
    /// once stays so for seconds, and all that tells of it meanwhile is the count of periods.
    fn throttled_since(self, start: Self, seconds: f64) -> f64 {
        let ns = self.throttled_ns.saturating_sub(start.throttled_ns);
        let periods = self.periods.saturating_sub(start.periods);
        let throttled = self
            .throttled_periods
            .saturating_sub(start.throttled_periods);
        match ns {
            0 => throttled as f64 / periods.max(1) as f64,
            ns => share(ns, seconds),
        }
    }
}

/// The quota of the process's control group, if it has one.
fn quota(pid: u32) -> Option<QuotaAt> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    groups.lines().find_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, group) = (parts.next()?, parts.next()?);
        let roots: &[&str] = match controllers {
            "" => &["/sys/fs/cgroup", "/sys/fs/cgroup/unified"],
            _ if controllers.split(',').any(|name| name == "cpu") => {
                &["/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu,cpuacct"]
            }
            _ => return None,
        };
        let mut files = roots.iter().map(|root| format!("{root}{group}/cpu.stat"));
        files.find_map(|file| quota_in(&fs::read_to_string(file).ok()?))
    })
}

/// The second version of control groups counts microseconds, the first one nanoseconds.
fn quota_in(stat: &str) -> Option<QuotaAt> {
    let value = |wanted: &str| {
        let mut lines = stat.lines().filter_map(|line| line.split_once(' '));
        let (_, value) = lines.find(|(name, _)| *name == wanted)?;
        value.parse::<u64>().ok()
    };
    let microseconds = value("throttled_usec").map(|us| us * 1000);
    Some(QuotaAt {
        throttled_ns: microseconds.or_else(|| value("throttled_time"))?,
        periods: value("nr_periods")?,
        throttled_periods: value("nr_throttled")?,
    })
}

impl CoresSnapshot {
    /// Reads `/proc/stat` and `/proc/net/softnet_stat`.
    pub fn now() -> Result<Self> {
        let stats = KernelStats::current().context("cannot read /proc/stat")?;
        let packets = fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
        Ok(Self {
            ticks: stats.cpu_time.iter().map(ticks_of).collect(),
            packets: packets_in(&packets),
        })
    }

    /// What each core did since `start`, `seconds` ago.
    pub fn since(&self, start: &Self, seconds: f64) -> Result<Vec<Core>> {
        let ticks = sysconf(SysconfVar::CLK_TCK)?.context("the kernel reports no clock tick")?;
        let packets = |of: &Self, core| of.packets.get(&core).copied().unwrap_or_default();
        let pairs = self.ticks.iter().zip(&start.ticks).enumerate();
        Ok(pairs
            .map(|(core, (end, first))| {
                let (came, before) = (packets(self, core), packets(start, core));
                let share = |kind: usize| {
                    end[kind].saturating_sub(first[kind]) as f64 / ticks as f64 / seconds
                };
                Core {
                    core,
                    user: share(0) + share(1),
                    system: share(2),
                    idle: share(3) + share(4),
                    irq: share(5),
                    softirq: share(6),
                    steal: share(7),
                    packets: came.received.saturating_sub(before.received),
                    backlog_dropped: came.dropped.saturating_sub(before.dropped),
                }
            })
            .collect())
    }
}

/// Ticks by kind, in the order of proc_stat(5).
fn ticks_of(cpu: &CpuTime) -> [u64; 8] {
    let since_2_6 = [cpu.iowait, cpu.irq, cpu.softirq, cpu.steal].map(Option::unwrap_or_default);
    let [iowait, irq, softirq, steal] = since_2_6;
    [
        cpu.user, cpu.nice, cpu.system, cpu.idle, iowait, irq, softirq, steal,
    ]
}

/// A line for each core that is on: packets and those dropped first, the core's number 13th (since Linux
/// 5.10, before that lines are in order), all in hexadecimal (net/core/net-procfs.c).
fn packets_in(text: &str) -> BTreeMap<usize, PacketsSnapshot> {
    let lines = text.lines().enumerate().filter_map(|(line, text)| {
        let words = text
            .split_whitespace()
            .map(|word| u64::from_str_radix(word, 16).ok());
        let words = words.collect::<Option<Vec<u64>>>()?;
        let core = words.get(12).map_or(line, |core| *core as usize);
        let packets = PacketsSnapshot {
            received: *words.first()?,
            dropped: *words.get(1)?,
        };
        Some((core, packets))
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_read() {
        let pid = std::process::id();
        let start = ProcessSnapshot::now(pid).unwrap();
        let end = ProcessSnapshot::now(pid).unwrap();
        let did = end.since(&start, pid, "me".to_owned(), 1.0);
        assert!(!did.threads.is_empty());
        assert!(did.threads.iter().all(|thread| !thread.name.is_empty()));
        assert!(ProcessSnapshot::now(u32::MAX).is_none());
    }

    #[test]
    fn both_versions_of_control_groups_tell_throttling() {
        let quota = QuotaAt {
            throttled_ns: 250_000,
            periods: 3,
            throttled_periods: 1,
        };
        let second = "nr_periods 3\nnr_throttled 1\nthrottled_usec 250\n";
        assert_eq!(quota_in(second), Some(quota));
        let first = "nr_periods 3\nnr_throttled 1\nthrottled_time 250000\n";
        assert_eq!(quota_in(first), Some(quota));
        assert_eq!(quota_in("usage_usec 1\n"), None);
    }

    #[test]
    fn a_group_that_is_out_of_quota_all_the_time_is_seen_before_that_ends() {
        let at = |throttled_ns, periods, throttled_periods| QuotaAt {
            throttled_ns,
            periods,
            throttled_periods,
        };
        let start = at(5_000_000_000, 40, 30);
        assert_eq!(at(5_000_000_000, 60, 50).throttled_since(start, 2.0), 1.0);
        assert_eq!(at(5_500_000_000, 60, 50).throttled_since(start, 2.0), 0.25);
        assert_eq!(at(5_000_000_000, 60, 30).throttled_since(start, 2.0), 0.0);
        assert_eq!(start.throttled_since(start, 2.0), 0.0);
    }

    #[test]
    fn each_core_is_read() {
        let cores = CoresSnapshot::now().unwrap();
        let count = std::thread::available_parallelism().unwrap().get();
        assert!(cores.ticks.len() >= count, "{cores:?}");
        assert!(
            cores
                .ticks
                .iter()
                .all(|ticks| ticks.iter().sum::<u64>() > 0)
        );
    }

    #[test]
    fn packets_of_a_core_are_found_by_its_number() {
        let packets = |received, dropped| PacketsSnapshot { received, dropped };
        let new = "000000ff 00000003 0 0 0 0 0 0 0 0 0 0 00000002 0 0\n";
        assert_eq!(packets_in(new), [(2, packets(255, 3))].into());
        let old = "00000001 00000000 0 0 0 0 0 0 0 0 0\n00000002 00000001 0 0 0 0 0 0 0 0 0\n";
        assert_eq!(
            packets_in(old),
            [(0, packets(1, 0)), (1, packets(2, 1))].into()
        );
        assert!(packets_in("").is_empty());
    }
}
