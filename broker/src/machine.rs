//! What the broker asks of the machine: cores for its threads, descriptors for its sockets.

use std::io;

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;

/// Reads a list of cores such as `0,2-3`.
pub fn parse_cpus(list: &str) -> Result<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let cpu: usize = text.trim().parse().with_context(|| {
                format!("--cpus: {part:?} is neither a core nor a range of cores")
            })?;
            if cpu >= CpuSet::count() {
                bail!("--cpus: core {cpu} is beyond {}", CpuSet::count() - 1);
            }
            Ok(cpu)
        };
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            bail!("--cpus: {part:?} runs backwards");
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

/// Pins the calling thread to one core (sched_setaffinity(2)).
pub fn pin_to(cpu: usize) -> io::Result<()> {
    let mut cpus = CpuSet::new();
    cpus.set(cpu)?;
    Ok(sched_setaffinity(Pid::from_raw(0), &cpus)?)
}

/// Raises the soft limit of open files to the hard one; returns the limit in force.
pub fn raise_open_files() -> io::Result<u64> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores() {
        assert_eq!(parse_cpus("0,2-4").unwrap(), [0, 2, 3, 4]);
        for bad in ["", "a", "3-1", "1,,2", "99999"] {
            assert!(parse_cpus(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn pinning_to_a_core_that_is_not_there_fails() {
        assert!(pin_to(CpuSet::count() - 1).is_err());
        std::thread::spawn(|| pin_to(0)).join().unwrap().unwrap();
    }
}
