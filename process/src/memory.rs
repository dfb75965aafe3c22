//! How much memory this process may still take, as limited by its control groups and the host.
//!
//! Pages of a tmpfs count against the memory limit of the control group that touches them first. A log
//! in /dev/shm can therefore get the whole group killed long before the file system is full. Swap does
//! not count as memory here, because a log in swap is of no use as a shared buffer. Sources:
//! Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst, proc_pid_mountinfo(5).

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One limit on this process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// What sets it: a file, or the host.
    pub name: String,
    /// The limit, bytes.
    pub bytes: u64,
    /// Bytes still available; the page cache counts as free.
    pub free: u64,
}

/// File names of one cgroup version.
struct Files {
    limits: &'static [&'static str],
    usage: &'static str,
    /// Counters in memory.stat of reclaimable memory.
    reclaimable: [&'static str; 2],
}

const V1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    reclaimable: ["total_inactive_file", "total_active_file"],
};
/// Above memory.high the kernel throttles a group until it hardly makes progress.
const V2: Files = Files {
    limits: &["memory.max", "memory.high"],
    usage: "memory.current",
    reclaimable: ["inactive_file", "active_file"],
};
/// Value that version 1 shows, rounded down to a page, if there is no limit (`PAGE_COUNTER_MAX`).
const UNLIMITED: u64 = 1 << 62;

/// All visible limits, the one with least memory left first.
#[must_use]
pub fn limits() -> Vec<Limit> {
    limits_below(Path::new("/"))
}

/// Whether files in this directory occupy memory: tmpfs or ramfs.
///
/// # Errors
/// The system's error.
pub fn is_in_memory(directory: &Path) -> std::io::Result<bool> {
    use nix::sys::statfs::{FsType, TMPFS_MAGIC, statfs};
    /// `RAMFS_MAGIC` in linux/magic.h.
    const RAMFS_MAGIC: FsType = FsType(0x8584_58f6_u32 as _);
    let found = statfs(directory)?.filesystem_type();
    Ok(found == TMPFS_MAGIC || found == RAMFS_MAGIC)
}

/// Bytes free on the file system of a directory; `None` if it has no limit of its own.
///
/// # Errors
/// The system's error.
pub fn free_space(directory: &Path) -> std::io::Result<Option<u64>> {
    let found = nix::sys::statvfs::statvfs(directory)?;
    // A tmpfs without a size has no blocks.
    let is_limited = found.blocks() > 0;
    Ok(is_limited.then(|| found.blocks_available() * found.fragment_size()))
}

/// Like [`limits`], with all files below `root`.
fn limits_below(root: &Path) -> Vec<Limit> {
    let mut limits = group_limits(root);
    limits.extend(host_limit(root));
    limits.sort_by_key(|limit| limit.free);
    limits
}

fn host_limit(root: &Path) -> Option<Limit> {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).ok()?;
    let field = |name| Some(counter(&meminfo, name)? * 1024);
    Some(Limit {
        name: "the memory of this host".to_owned(),
        bytes: field("MemTotal:")?,
        free: field("MemAvailable:")?,
    })
}

fn group_limits(root: &Path) -> Vec<Limit> {
    let read = |name| fs::read(root.join(name)).unwrap_or_default();
    let (groups, mounts) = (read("proc/self/cgroup"), read("proc/self/mountinfo"));
    let mut limits = Vec::new();
    for mount in lines(&mounts).filter_map(Mount::parse) {
        let is_mine = |(controllers, _): &(Vec<&[u8]>, _)| match mount.is_v2 {
            true => controllers == &[b""],
            false => controllers.contains(&&b"memory"[..]),
        };
        let Some((_, group)) = lines(&groups).filter_map(membership).find(is_mine) else {
            continue;
        };
        let files = if mount.is_v2 { &V2 } else { &V1 };
        let top = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
        // A group outside the mount, as in a container: the mount's root is the lowest visible group.
        let inside = group.strip_prefix(&mount.root).unwrap_or(Path::new(""));
        let is_plain = |part| matches!(part, std::path::Component::Normal(_));
        let inside = match inside.components().all(is_plain) {
            true => inside,
            false => Path::new(""),
        };
        for level in inside.ancestors() {
            limits.extend(level_limits(&top.join(level), files));
        }
    }
    limits
}

/// The limits that one directory sets.
fn level_limits(group: &Path, files: &Files) -> Vec<Limit> {
    let text = |name: &str| fs::read_to_string(group.join(name)).unwrap_or_default();
    let number = |name: &str| text(name).trim().parse::<u64>().ok();
    let Some(usage) = number(files.usage) else {
        return Vec::new();
    };
    let stat = text("memory.stat");
    let reclaimable: u64 = files
        .reclaimable
        .iter()
        .filter_map(|name| counter(&stat, name))
        .sum();
    let taken = usage.saturating_sub(reclaimable);
    let limits = files.limits.iter().filter_map(|name| {
        let bytes = number(name).filter(|bytes| *bytes < UNLIMITED)?;
        Some(Limit {
            name: group.join(name).display().to_string(),
            bytes,
            free: bytes.saturating_sub(taken),
        })
    });
    limits.collect()
}

/// The number after a name at the beginning of a line.
fn counter(text: &str, name: &str) -> Option<u64> {
    let mut words = text.lines().map(str::split_whitespace);
    let mut line = words.find_map(|mut words| (words.next()? == name).then_some(words))?;
    line.next()?.parse().ok()
}

/// A mounted hierarchy that can limit memory.
struct Mount {
    /// The group at the root of the mount.
    root: PathBuf,
    point: PathBuf,
    is_v2: bool,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut words = line.split(|byte| *byte == b' ');
        let (root, point) = (words.nth(3)?, words.next()?);
        // A hyphen ends the optional fields.
        let mut behind = words.skip_while(|word| *word != b"-").skip(1);
        let (kind, options) = (behind.next()?, behind.nth(1).unwrap_or_default());
        let is_v2 = kind == b"cgroup2";
        let has_memory = || options.split(|byte| *byte == b',').any(|o| o == b"memory");
        (is_v2 || kind == b"cgroup" && has_memory()).then(|| Self {
            root: unescape(root),
            point: unescape(point),
            is_v2,
        })
    }
}

/// Controllers and group from a line of /proc/self/cgroup.
fn membership(line: &[u8]) -> Option<(Vec<&[u8]>, &Path)> {
    let mut fields = line.splitn(3, |byte| *byte == b':');
    let controllers = fields.nth(1)?.split(|byte| *byte == b',').collect();
    Some((controllers, Path::new(OsStr::from_bytes(fields.next()?))))
}

fn lines(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.split(|byte| *byte == b'\n')
}

/// The kernel escapes blanks and similar characters as a backslash and three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut path = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, behind @ ..] = rest {
        let escaped = (*first == b'\\').then(|| behind.get(..3)).flatten();
        let octal = escaped.and_then(|digits| std::str::from_utf8(digits).ok());
        match octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                path.push(byte);
                rest = &behind[3..];
            }
            None => {
                path.push(*first);
                rest = behind;
            }
        }
    }
    PathBuf::from(OsString::from_vec(path))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A simulated machine: files by name.
    fn machine(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }

    /// Its limits, with names relative to its root.
    fn seen(files: &[(&str, &str)]) -> Vec<(String, u64, u64)> {
        let root = machine(files);
        let prefix = format!("{}/", root.path().display());
        let limits = limits_below(root.path()).into_iter();
        limits
            .map(|limit| (limit.name.replace(&prefix, ""), limit.bytes, limit.free))
            .collect()
    }

    const V2_MOUNT: &str = "31 23 0:28 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";

    #[test]
    fn every_level_up_to_the_root_counts() {
        let limits = seen(&[
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/self/mountinfo", V2_MOUNT),
            (
                "proc/meminfo",
                "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 900 kB\n",
            ),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.high", "4096\n"),
            ("sys/fs/cgroup/a/b/memory.current", "5000\n"),
            ("sys/fs/cgroup/a/memory.max", "9000\n"),
            ("sys/fs/cgroup/a/memory.current", "8000\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "file 7000\nshmem 5000\ninactive_file 1500\nactive_file 500\n",
            ),
        ]);
        let host = "the memory of this host".to_owned();
        assert_eq!(
            limits,
            [
                ("sys/fs/cgroup/a/b/memory.high".to_owned(), 4096, 0),
                ("sys/fs/cgroup/a/memory.max".to_owned(), 9000, 3000),
                (host, 1_024_000, 921_600),
            ]
        );
    }

    #[test]
    fn version_1_beside_an_empty_version_2_counts() {
        let mounts = "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory\\040x rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let limits = seen(&[
            ("proc/self/cgroup", "9:cpu:/\n4:hugetlb,memory:/g\n0::/\n"),
            ("proc/self/mountinfo", mounts),
            (
                "sys/fs/cgroup/memory x/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory x/memory.usage_in_bytes", "1\n"),
            (
                "sys/fs/cgroup/memory x/g/memory.limit_in_bytes",
                "134217728\n",
            ),
            (
                "sys/fs/cgroup/memory x/g/memory.usage_in_bytes",
                "34217728\n",
            ),
        ]);
        let name = "sys/fs/cgroup/memory x/g/memory.limit_in_bytes".to_owned();
        assert_eq!(limits, [(name, 134_217_728, 100_000_000)]);
    }

    #[test]
    fn a_container_sees_its_group_at_the_top_of_the_mount() {
        let at_top = [
            ("sys/fs/cgroup/memory.max", "100\n"),
            ("sys/fs/cgroup/memory.current", "1\n"),
        ];
        for (group, root) in [
            ("/docker/1", "/docker/1"),
            ("/", "/"),
            ("/../2", "/"),
            ("/x", "/y"),
        ] {
            let mount = V2_MOUNT.replace(" / ", &format!(" {root} "));
            let cgroup = format!("0::{group}\n");
            let own = [
                ("proc/self/cgroup", cgroup.as_str()),
                ("proc/self/mountinfo", mount.as_str()),
            ];
            let limits = seen(&[&own[..], &at_top].concat());
            let name = "sys/fs/cgroup/memory.max".to_owned();
            assert_eq!(limits, [(name, 100, 99)], "{group} in {root}");
        }
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        assert!(limits().iter().any(|limit| limit.free > 0));
        assert!(!is_in_memory(Path::new("/proc")).unwrap());
        assert!(is_in_memory(Path::new("/no/such/place")).is_err());
        assert!(free_space(Path::new("/")).unwrap() > Some(0));
    }
}
