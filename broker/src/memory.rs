//! Checks that there is memory for one more log before it is created. A publisher must not get the
//! broker killed by the OOM killer by naming topics.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytesize::ByteSize;
use penstock_process::memory::{self, Limit};
use tracing::warn;

/// What the broker itself may still need: packets, batches outside the rings, its threads.
const RESERVE: u64 = 32 << 20;
/// Unit of `st_blocks` (inode(7)).
const BLOCK: u64 = 512;

/// Whether a log of this size may be created at `path`. Space that an existing log already occupies is
/// not counted again.
///
/// # Errors
/// What is short, and what the user can do.
pub fn check(path: &Path, bytes: u64) -> Result<(), String> {
    let need = bytes.saturating_sub(allocated(path));
    let directory = path.parent().unwrap_or(Path::new("."));
    // If free space is unknown, creating the log will show it.
    let free = memory::free_space(directory).ok().flatten();
    if let Some(free) = free.filter(|free| *free < need) {
        return Err(format!(
            "{path}: no room for {need} bytes, only {free} are free; free some space, or choose a smaller --ring-size or another --buffer-dir",
            path = path.display()
        ));
    }
    match memory::is_in_memory(directory) {
        Ok(true) => check_limits(path, need, &memory::limits()),
        _ => Ok(()),
    }
}

fn check_limits(path: &Path, need: u64, limits: &[Limit]) -> Result<(), String> {
    // A log whose memory is already allocated needs no more.
    let tight = limits
        .iter()
        .find(|limit| need > 0 && limit.free < need.saturating_add(RESERVE));
    let Some(limit) = tight else { return Ok(()) };
    Err(format!(
        "{path}: not enough memory for a log of {need}: {name} is {bytes}, {free} of it are free, and the broker reserves {reserve} for itself; lower --ring-size or --max-topics, raise the limit, or choose a --buffer-dir on a disk",
        path = path.display(),
        need = ByteSize(need),
        name = limit.name,
        bytes = ByteSize(limit.bytes),
        free = ByteSize(limit.free),
        reserve = ByteSize(RESERVE),
    ))
}

/// Warns if memory does not suffice for all topics that the broker may create.
pub fn warn_if_short(directory: &Path, log_bytes: u64, more_topics: u64) {
    if !memory::is_in_memory(directory).unwrap_or(false) {
        return;
    }
    let Some(limit) = memory::limits().into_iter().next() else {
        return;
    };
    let fit = limit.free.saturating_sub(RESERVE) / log_bytes.max(1);
    if fit < more_topics {
        warn!(
            "{} leaves {}, enough for {fit} more topics of {}, but --max-topics allows {more_topics} more; the broker will refuse to create topics beyond that",
            limit.name,
            ByteSize(limit.free),
            ByteSize(log_bytes)
        );
    }
}

/// Bytes that an existing file already occupies; 0 if it does not exist.
fn allocated(path: &Path) -> u64 {
    let found = fs::symlink_metadata(path);
    let blocks = found.map_or(0, |found| if found.is_file() { found.blocks() } else { 0 });
    blocks * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn limit(free: u64) -> Limit {
        Limit {
            name: "/sys/fs/cgroup/x/memory.max".to_owned(),
            bytes: 128 * MIB,
            free: free * MIB,
        }
    }

    #[test]
    fn a_log_that_a_limit_leaves_no_memory_for_is_refused_with_the_flags_to_lower() {
        let path = Path::new("/dev/shm/penstock/t.log");
        let check = |need: u64, free| check_limits(path, need * MIB, &[limit(free), limit(999)]);
        check(40, 72).unwrap();
        let error = check(40, 71).unwrap_err();
        for word in [
            "memory.max is 128.0 MiB",
            "40.0 MiB",
            "71.0 MiB",
            "--ring-size",
            "--max-topics",
        ] {
            assert!(error.contains(word), "{error}");
        }
        check_limits(path, u64::MAX, &[limit(9)]).unwrap_err();
        // A log that has its memory is opened, however little is left.
        check(0, 0).unwrap();
    }

    #[test]
    fn more_than_the_file_system_has_free_is_refused_before_it_is_tried() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.log");
        let error = check(&path, 1 << 60).unwrap_err();
        assert!(error.contains("--ring-size"), "{error}");
        assert!(!path.exists());
    }

    #[test]
    fn what_a_log_has_already_is_not_counted_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.log");
        assert_eq!(allocated(&path), 0);
        fs::write(&path, vec![1; 100_000]).unwrap();
        assert!(allocated(&path) >= 100_000);
        std::os::unix::fs::symlink(&path, dir.path().join("link")).unwrap();
        assert_eq!(allocated(&dir.path().join("link")), 0);
    }
}
