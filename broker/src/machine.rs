//! What the broker asks of the machine: cores for its threads, descriptors for its sockets.

use std::io;
use std::mem::MaybeUninit;

use anyhow::{Context, Result, bail};

/// Reads a list of cores such as `0,2-3`.
pub fn parse_cpus(list: &str) -> Result<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let number = |text: &str| {
            let cpu: usize = text.trim().parse().with_context(|| {
                format!("--cpus: {part:?} is neither a core nor a range of cores")
            })?;
            if cpu >= libc::CPU_SETSIZE as usize {
                bail!("--cpus: core {cpu} is beyond {}", libc::CPU_SETSIZE - 1);
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
    let mut set = MaybeUninit::<libc::cpu_set_t>::zeroed();
    // SAFETY: an all-zero cpu_set_t is the empty set, and `parse_cpus` has kept `cpu` below
    // CPU_SETSIZE, so CPU_SET stays inside it.
    let set = unsafe {
        libc::CPU_SET(cpu, set.assume_init_mut());
        set.assume_init()
    };
    // SAFETY: the set is initialised and its size is passed along; 0 is the calling thread.
    match unsafe { libc::sched_setaffinity(0, size_of_val(&set), &raw const set) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Raises the soft limit of open files to the hard one; returns the limit in force.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes one rlimit to a valid, exclusively borrowed place.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the call reads one initialised rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_cur)
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
        assert!(pin_to(libc::CPU_SETSIZE as usize - 1).is_err());
        std::thread::spawn(|| pin_to(0)).join().unwrap().unwrap();
    }
}
