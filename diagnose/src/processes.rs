//! Which process has a socket, and what it is called.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use penstock_process::text::foreign_bytes;

/// Name of a process, or nothing when it has gone.
pub fn name_of(pid: u32) -> String {
    comm(&format!("/proc/{pid}/comm"))
}

/// Name of a thread, or nothing when it has gone.
pub fn name_of_thread(pid: u32, tid: u32) -> String {
    comm(&format!("/proc/{pid}/task/{tid}/comm"))
}

fn comm(file: &str) -> String {
    // A process chooses its own name (prctl(2), PR_SET_NAME).
    let text = fs::read(file).unwrap_or_default();
    foreign_bytes(text.trim_ascii_end())
}

/// Whether this program sees all of the host's processes: outside any PID namespace, whose numbers are
/// unknown to the kernel's tracing (pid_namespaces(7)).
pub fn sees_the_host() -> bool {
    /// Inode of the initial PID namespace (`PROC_PID_INIT_INO`, include/linux/proc_ns.h).
    const FIRST: u64 = 0xEFFF_FFFC;
    fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == FIRST)
}

/// Inodes of the sockets that a process has open.
pub fn sockets_of(pid: u32) -> io::Result<HashSet<u32>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    Ok(entries
        .filter_map(|entry| {
            let link = fs::read_link(entry.ok()?.path()).ok()?;
            socket_inode(link.to_str()?)
        })
        .collect())
}

/// Processes by the sockets that they have; those of other users only for root.
#[derive(Debug, Default)]
pub struct Owners {
    by_inode: HashMap<u32, u32>,
    /// Looked for in vain: perhaps another user's.
    unknown: HashSet<u32>,
}

impl Owners {
    /// Finds the owners of these sockets; looks through all processes only if some are new.
    pub fn find(&mut self, inodes: impl Iterator<Item = u32>) {
        let is_new = |inode: &u32| {
            *inode != 0 && !self.by_inode.contains_key(inode) && !self.unknown.contains(inode)
        };
        let missing: HashSet<u32> = inodes.filter(is_new).collect();
        if missing.is_empty() {
            return;
        }
        for pid in all() {
            let theirs = sockets_of(pid).unwrap_or_default();
            // The first wins: a child that inherited the socket comes later.
            for inode in theirs.intersection(&missing) {
                self.by_inode.entry(*inode).or_insert(pid);
            }
        }
        let unknown = missing
            .into_iter()
            .filter(|inode| !self.by_inode.contains_key(inode));
        self.unknown.extend(unknown);
    }

    pub fn of(&self, inode: u32) -> Option<u32> {
        self.by_inode.get(&inode).copied()
    }
}

/// Numbers of all visible processes.
pub fn all() -> Vec<u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten();
    let mut pids: Vec<u32> = entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids
}

fn socket_inode(link: &str) -> Option<u32> {
    let number = link.strip_prefix("socket:[")?.strip_suffix(']')?;
    number.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_socket_is_this_process_s() {
        let _listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pid = std::process::id();
        let inodes = sockets_of(pid).unwrap();
        let mut owners = Owners::default();
        owners.find(inodes.iter().copied());
        assert!(inodes.iter().any(|inode| owners.of(*inode) == Some(pid)));
        assert_eq!(owners.of(0), None);
        assert!(!name_of(pid).is_empty());
    }
}
