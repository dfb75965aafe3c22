//! Processes that are not observed, and the CPU time that they used during the observation.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use nix::unistd::{SysconfVar, sysconf};
use serde::Serialize;

use super::cpu::Core;
use super::processes;

/// Processes named in a sample; there may be thousands.
const NAMED: usize = 5;
/// A process that uses less of a core is not named.
const WORTH_NAMING: f64 = 0.02;

/// CPU time of all processes at one moment.
#[derive(Debug, Clone, Default)]
pub struct OthersSnapshot(HashMap<u32, ProcessSnapshot>);

#[derive(Debug, Clone)]
struct ProcessSnapshot {
    name: String,
    ticks: u64,
    /// Distinguishes a process from a later one with the same number.
    started: u64,
}

/// What the rest of the host did.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Others {
    /// Cores that it kept busy, including processes that are not visible or that came and went.
    pub cores: f64,
    /// The busiest ones, by name.
    pub busiest: Vec<Other>,
}

/// Processes of one name that are not observed: builds and servers have many.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Other {
    /// The busiest of them.
    pub pid: u32,
    /// Their name.
    pub name: String,
    /// How many there are.
    pub processes: usize,
    /// All of them together.
    pub cores: f64,
}

impl OthersSnapshot {
    /// Reads `/proc/PID/stat` of all processes.
    pub fn now() -> Self {
        let all = processes::all().into_iter();
        Self(all.filter_map(|pid| Some((pid, read(pid)?))).collect())
    }

    /// What the processes not in `observed` did in `seconds` since `start`.
    pub fn since(
        &self,
        start: &Self,
        observed: &BTreeSet<u32>,
        observed_run: f64,
        cores: &[Core],
        seconds: f64,
    ) -> Others {
        let per_second = sysconf(SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100) as f64;
        let used = |(pid, end): (&u32, &ProcessSnapshot)| {
            let before = start.0.get(pid).filter(|at| at.started == end.started);
            let ticks = end.ticks.saturating_sub(before.map_or(0, |at| at.ticks));
            Other {
                pid: *pid,
                name: end.name.clone(),
                processes: 1,
                cores: ticks as f64 / per_second / seconds,
            }
        };
        let this = std::process::id();
        let rest = self.0.iter();
        let rest = rest.filter(|(pid, _)| !observed.contains(pid) && **pid != this);
        let seen: Vec<Other> = rest.map(used).collect();
        let mut busiest = by_name(&seen);
        let seen: f64 = seen.iter().map(|other| other.cores).sum();
        busiest.retain(|other| other.cores >= WORTH_NAMING);
        busiest.truncate(NAMED);
        let host: f64 = cores.iter().map(|core| core.user + core.system).sum();
        Others {
            cores: seen.max(host - observed_run),
            busiest,
        }
    }
}

/// Groups processes by name, the busiest name first.
fn by_name(processes: &[Other]) -> Vec<Other> {
    let mut sorted: Vec<&Other> = processes.iter().collect();
    sorted.sort_by(|a, b| b.cores.total_cmp(&a.cores).then(a.pid.cmp(&b.pid)));
    let mut names: BTreeMap<&str, Other> = BTreeMap::new();
    for process in sorted {
        names
            .entry(&process.name)
            .and_modify(|all| {
                all.cores += process.cores;
                all.processes += process.processes;
            })
            .or_insert_with(|| process.clone());
    }
    let mut names: Vec<Other> = names.into_values().collect();
    names.sort_by(|a, b| b.cores.total_cmp(&a.cores).then(a.pid.cmp(&b.pid)));
    names
}

fn read(pid: u32) -> Option<ProcessSnapshot> {
    let process = procfs::process::Process::new(pid.try_into().ok()?).ok()?;
    let stat = process.stat().ok()?;
    Some(ProcessSnapshot {
        ticks: stat.utime + stat.stime,
        started: stat.starttime,
        name: stat.comm,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(processes: &[(u32, u64, u64)]) -> OthersSnapshot {
        let processes = processes.iter().map(|(pid, ticks, started)| {
            let name = format!("p{pid}");
            let (ticks, started) = (*ticks, *started);
            (
                *pid,
                ProcessSnapshot {
                    name,
                    ticks,
                    started,
                },
            )
        });
        OthersSnapshot(processes.collect())
    }

    #[test]
    fn only_what_others_did_meanwhile_counts() {
        let second = sysconf(SysconfVar::CLK_TCK).unwrap().unwrap() as u64;
        let start = at(&[(1, 500, 7), (2, 0, 7), (3, 900, 7)]);
        // The third is another process with an old number.
        let end = at(&[(1, 500 + second, 7), (2, second, 7), (3, second / 2, 8)]);
        let others = end.since(&start, &[2].into(), 1.0, &[], 1.0);
        let named: Vec<_> = others.busiest.iter().map(|o| (o.pid, o.cores)).collect();
        assert_eq!(named, [(1, 1.0), (3, 0.5)]);
        assert_eq!(others.cores, 1.5);
    }

    #[test]
    fn what_the_host_did_and_nobody_is_seen_to_have_done_counts() {
        let core = Core {
            user: 0.7,
            system: 0.3,
            ..Core::default()
        };
        let none = OthersSnapshot::default();
        let others = none.since(&none, &BTreeSet::new(), 0.25, &[core], 1.0);
        assert_eq!((others.cores, others.busiest.len()), (0.75, 0));
    }

    #[test]
    fn processes_of_one_name_count_together() {
        let other = |pid, name: &str, cores| Other {
            pid,
            name: name.to_owned(),
            processes: 1,
            cores,
        };
        let all = [
            other(1, "one", 0.5),
            other(2, "many", 0.3),
            other(3, "many", 0.4),
        ];
        let named = by_name(&all);
        assert_eq!((named[0].pid, named[0].processes), (3, 2));
        assert!((named[0].cores - 0.7).abs() < 1e-9);
        assert_eq!(named[1], all[0]);
    }

    #[test]
    fn this_host_s_processes_are_read() {
        assert!(OthersSnapshot::now().0.contains_key(&std::process::id()));
    }
}
