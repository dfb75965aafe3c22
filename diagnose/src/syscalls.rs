//! System calls of the observed process: how many, how long, how many bytes each.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use penstock_ebpf::{CallSum, Calls};
use serde::Serialize;
use syscalls::Sysno;

use super::processes;

/// Calls that receive and return how many bytes.
const RECEIVING: [Sysno; 5] = [
    Sysno::read,
    Sysno::readv,
    Sysno::recvfrom,
    Sysno::recvmsg,
    Sysno::splice,
];

/// Counts calls until [`Tracer::finish`].
pub struct Tracer {
    calls: Calls,
    pid: u32,
    began: Instant,
}

/// One thread's use of one system call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Syscall {
    pub tid: u32,
    pub thread: String,
    pub name: String,
    pub per_second: f64,
    /// From entry to return, waiting included, microseconds.
    pub mean_us: f64,
    /// Share of the thread's time, 0 to 1.
    pub time: f64,
    pub failed_per_second: f64,
    /// Of calls that receive: bytes, per successful call.
    pub bytes_per_call: Option<f64>,
}

/// All receive calls of a process together.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Receives {
    pub per_second: f64,
    pub bytes_per_call: f64,
}

impl Tracer {
    /// Begins to count the calls of a process.
    pub fn start(pid: u32) -> Result<Self> {
        Ok(Self {
            calls: Calls::count(pid)?,
            pid,
            began: Instant::now(),
        })
    }

    /// What it counted, the longest first.
    pub fn finish(self) -> Result<Vec<Syscall>> {
        let seconds = self.began.elapsed().as_secs_f64();
        let sums = self.calls.finish()?;
        let mut names = BTreeMap::new();
        let mut calls: Vec<Syscall> = sums
            .iter()
            .map(|sum| {
                let name = names
                    .entry(sum.thread)
                    .or_insert_with(|| processes::name_of_thread(self.pid, sum.thread));
                Syscall::new(sum, name.clone(), seconds)
            })
            .collect();
        calls.sort_by(|a, b| b.time.total_cmp(&a.time));
        Ok(calls)
    }
}

impl Syscall {
    fn new(sum: &CallSum, thread: String, seconds: f64) -> Self {
        let number = Sysno::new(sum.number as usize);
        let receives = number.is_some_and(|number| RECEIVING.contains(&number));
        let good = sum.count - sum.failed;
        Self {
            tid: sum.thread,
            thread,
            name: number.map_or(sum.number.to_string(), |number| number.name().to_owned()),
            per_second: sum.count as f64 / seconds,
            mean_us: sum.ns as f64 / sum.count.max(1) as f64 / 1e3,
            time: sum.ns as f64 * 1e-9 / seconds,
            failed_per_second: sum.failed as f64 / seconds,
            bytes_per_call: (receives && good > 0).then(|| sum.result as f64 / good as f64),
        }
    }
}

impl Receives {
    /// Sums up those among `calls`; none if there was no such call.
    pub fn of(calls: &[Syscall]) -> Option<Self> {
        let receiving = calls.iter().filter_map(|call| {
            let good = call.per_second - call.failed_per_second;
            Some((good, good * call.bytes_per_call?))
        });
        let (count, bytes) = receiving.fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        (count > 0.0).then(|| Self {
            per_second: count,
            bytes_per_call: bytes / count,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(number: Sysno, count: u64, failed: u64, result: u64) -> CallSum {
        CallSum {
            thread: 1,
            number: number as u32,
            count,
            ns: 5_000 * count,
            failed,
            result,
        }
    }

    #[test]
    fn calls_are_named_and_receive_calls_summed_up() {
        let call = |sum| Syscall::new(&sum, "worker".to_owned(), 2.0);
        let calls = [
            call(sum(Sysno::recvfrom, 100, 50, 5_000)),
            call(sum(Sysno::epoll_wait, 100, 0, 100)),
            call(sum(Sysno::read, 50, 0, 5_000)),
        ];
        assert_eq!(calls[0].name, "recvfrom");
        assert_eq!((calls[0].per_second, calls[0].mean_us), (50.0, 5.0));
        assert_eq!(calls[1].bytes_per_call, None);
        let all = Receives::of(&calls).unwrap();
        assert_eq!((all.per_second, all.bytes_per_call), (50.0, 100.0));
        assert_eq!(Receives::of(&calls[1..2]), None);
    }
}
