//! Reads the facts that the checks need from the kernel. Nothing is changed, and a missing fact is no
//! error: it is listed, with the command that would show it.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{Pid, geteuid};
use penstock_ebpf::Attached;
use penstock_nic::Sysfs;
use procfs::process::Process;
use procfs::{Current, Meminfo};

use super::facts::{BrokerFile, Capabilities, Host, HugePages, Interface, Kernel, Node, Seen};
use crate::measure::host_load::HostWatch;
use penstock_testbed::netns;
use penstock_testbed::programs::Binaries;

/// How long to observe the host's load.
const LOAD_INTERVAL: Duration = Duration::from_millis(300);
const NODES: &str = "/sys/devices/system/node";
/// Where programs of the administrator are.
const SEARCH: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/sbin",
    "/sbin",
    "/usr/local/bin",
    "/usr/bin",
    "/bin",
];

/// Everything about the machine, and about an interface, or those that there are.
///
/// # Errors
/// If there is no such interface.
pub fn gather(interface: Option<&str>, bin_dir: Option<&Path>) -> Result<Seen> {
    let mut unseen = Vec::new();
    let host = host(bin_dir, &mut unseen);
    let (interface, candidates) = match interface {
        Some(name) => (Some(self::interface(name, &mut unseen)?), Vec::new()),
        None => (None, candidates(&mut unseen)),
    };
    if let Some(program) = interface.as_ref().and_then(|found| found.program.as_ref())
        && program.name.is_empty()
        && !host.capabilities.has(Capabilities::SYS_ADMIN)
    {
        unseen.push("the name of the XDP program: run this with sudo".to_owned());
    }
    Ok(Seen {
        host,
        interface,
        candidates,
        unseen,
    })
}

fn host(bin_dir: Option<&Path>, unseen: &mut Vec<String>) -> Host {
    let mut setting = |name: &str| {
        let found = number(&format!("/proc/sys/{}", name.replace('.', "/")));
        if found.is_none() {
            unseen.push(format!(
                "{name}: run this in the host's own network namespace"
            ));
        }
        found
    };
    let jit = setting("net.core.bpf_jit_enable");
    let (busy_poll, busy_read) = (setting("net.core.busy_poll"), setting("net.core.busy_read"));
    let (rmem_max, wmem_max) = (setting("net.core.rmem_max"), setting("net.core.wmem_max"));
    let broker = Binaries::find(bin_dir).map(|found| file(found.broker));
    if let Err(error) = &broker {
        unseen.push(format!("the broker's file capabilities: {error:#}"));
    }
    Host {
        kernel: kernel(),
        af_xdp: af_xdp(),
        btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
        jit,
        busy_poll,
        busy_read,
        rmem_max,
        wmem_max,
        root: geteuid().is_root(),
        capabilities: own_capabilities(),
        broker: broker.ok(),
        memlock: getrlimit(Resource::RLIMIT_MEMLOCK).map_or(u64::MAX, |(soft, _)| soft),
        huge_pages: huge_pages(),
        shared_memory: free_bytes(Path::new("/dev/shm")),
        memory: penstock_process::memory::limits().into_iter().next(),
        ethtool: SEARCH
            .iter()
            .any(|dir| Path::new(dir).join("ethtool").is_file()),
        cpus: own_cpus(),
        load: HostWatch::measure_for(LOAD_INTERVAL).ok(),
        nodes: nodes(),
    }
}

fn kernel() -> Option<Kernel> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    parse_kernel(release.trim())
}

/// `6.12.9+deb13-amd64`
fn parse_kernel(release: &str) -> Option<Kernel> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse().ok();
    Some(Kernel {
        version: (number()?, number()?),
        release: release.to_owned(),
    })
}

/// EPERM means that the kernel has such sockets (`xsk_create` checks the capability first).
fn af_xdp() -> Option<bool> {
    // SAFETY: takes numbers only.
    let code = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    match Errno::result(code) {
        Ok(descriptor) => {
            // SAFETY: the descriptor is new, and nobody else's.
            unsafe { libc::close(descriptor) };
            Some(true)
        }
        Err(Errno::EPERM) => Some(true),
        Err(Errno::EAFNOSUPPORT) => Some(false),
        Err(_) => None,
    }
}

fn own_capabilities() -> Capabilities {
    let status = Process::myself().and_then(|process| process.status());
    Capabilities(status.map_or(0, |status| status.capeff))
}

fn file(path: PathBuf) -> BrokerFile {
    let flags = statvfs(&path).map(|fs| fs.flags());
    BrokerFile {
        capabilities: Capabilities(file_capabilities(&path).unwrap_or_default()),
        nosuid: flags.is_ok_and(|flags| flags.contains(FsFlags::ST_NOSUID)),
        path,
    }
}

fn file_capabilities(path: &Path) -> Option<u64> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut bytes = [0u8; 24];
    // SAFETY: both names are C strings, and the buffer is as long as is said.
    let len = unsafe {
        libc::getxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            bytes.as_mut_ptr().cast(),
            bytes.len(),
        )
    };
    capabilities_of(&bytes[..usize::try_from(len).ok()?])
}

/// The capabilities in a `struct vfs_cap_data`: none, unless they become effective.
fn capabilities_of(bytes: &[u8]) -> Option<u64> {
    const EFFECTIVE: u32 = 1;
    let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    if word(0)? & EFFECTIVE == 0 {
        return Some(0);
    }
    // Permitted and inheritable ones by turns, the low halves first.
    Some(u64::from(word(4)?) | u64::from(word(12)?) << 32)
}

fn huge_pages() -> Option<HugePages> {
    let memory = Meminfo::current().ok()?;
    Some(HugePages {
        total: memory.hugepages_total?,
        free: memory.hugepages_free?,
        size: memory.hugepagesize?,
    })
}

fn free_bytes(directory: &Path) -> Option<u64> {
    let fs = statvfs(directory).ok()?;
    Some(fs.blocks_available() * fs.fragment_size())
}

fn own_cpus() -> Vec<usize> {
    let Ok(set) = sched_getaffinity(Pid::from_raw(0)) else {
        return Vec::new();
    };
    (0..CpuSet::count())
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect()
}

fn nodes() -> Vec<Node> {
    let names = netns::file_names(Path::new(NODES)).unwrap_or_default();
    let mut nodes: Vec<_> = names
        .iter()
        .filter_map(|name| {
            let number = name.strip_prefix("node")?.parse().ok()?;
            let list = fs::read_to_string(format!("{NODES}/{name}/cpulist")).ok()?;
            let cpus = parse_ranges(list.trim())?;
            Some(Node { number, cpus })
        })
        .collect();
    nodes.sort_by_key(|node| node.number);
    nodes
}

/// `0-3,8`, as the kernel writes it; nothing is an empty list.
fn parse_ranges(list: &str) -> Option<Vec<usize>> {
    let parts = list.split(',').filter(|part| !part.is_empty());
    let ranges = parts.map(|part| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    });
    let ranges: Option<Vec<_>> = ranges.collect();
    Some(ranges?.into_iter().flatten().collect())
}

fn interface(name: &str, unseen: &mut Vec<String>) -> Result<Interface> {
    let nic = penstock_nic::Facts::read(name)?;
    let program = program(&nic.interface, unseen);
    let sysfs = Sysfs::open();
    if let Err(error) = &sysfs {
        unseen.push(format!("settings of {}: {error}", nic.interface));
    }
    let node = sysfs
        .ok()
        .and_then(|sysfs| sysfs.number(&nic.interface, "device/numa_node"));
    let addresses = penstock_nic::addresses(nic.index);
    let addresses = addresses.context("cannot list the interface's addresses")?;
    Ok(Interface {
        addresses: addresses.into_iter().map(|address| address.ip).collect(),
        program,
        // -1 if the machine has no NUMA nodes or the device belongs to none; that is not a node number.
        node: node.and_then(|node| node.try_into().ok()),
        nic,
    })
}

fn program(name: &str, unseen: &mut Vec<String>) -> Option<Attached> {
    penstock_ebpf::attached(name).unwrap_or_else(|error| {
        unseen.push(format!("which XDP program {name} has: {error}"));
        None
    })
}

fn candidates(unseen: &mut Vec<String>) -> Vec<Interface> {
    let all = penstock_nic::interfaces().unwrap_or_else(|error| {
        unseen.push(format!("the interfaces of this host: {error}"));
        Vec::new()
    });
    let mut names: Vec<_> = all.into_iter().map(|interface| interface.name).collect();
    names.retain(|name| name != "lo");
    names.sort();
    let mut found = Vec::new();
    for name in names {
        match interface(&name, unseen) {
            Ok(interface) => found.push(interface),
            Err(error) => unseen.push(format!("{name}: {error:#}")),
        }
    }
    found
}

fn number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_known_by_two_numbers() {
        for (release, version) in [
            ("6.12.9+deb13-amd64", (6, 12)),
            ("5.4.0-rc1", (5, 4)),
            ("7.0-custom", (7, 0)),
        ] {
            assert_eq!(parse_kernel(release).unwrap().version, version);
        }
        assert_eq!(parse_kernel("custom"), None);
    }

    #[test]
    fn file_capabilities_are_those_that_become_effective() {
        // As `setcap cap_net_raw,cap_bpf+ep` writes it.
        let mut bytes = [0u8; 20];
        bytes[..4].copy_from_slice(&0x0200_0001u32.to_le_bytes());
        bytes[4..8].copy_from_slice(&(1u32 << 13).to_le_bytes());
        bytes[12..16].copy_from_slice(&(1u32 << 7).to_le_bytes());
        let wanted = Capabilities::NET_RAW | Capabilities::BPF;
        assert_eq!(capabilities_of(&bytes), Some(wanted.0));
        bytes[0] = 0;
        assert_eq!(capabilities_of(&bytes), Some(0));
        assert_eq!(capabilities_of(&bytes[..3]), None);
    }

    #[test]
    fn lists_of_cpus_are_parsed() {
        assert_eq!(parse_ranges("0-2,8"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_ranges(""), Some(Vec::new()));
        assert_eq!(parse_ranges("x"), None);
    }

    #[test]
    fn this_machine_can_be_looked_at() {
        let seen = gather(None, None).unwrap();
        assert!(seen.host.kernel.is_some() && !seen.host.cpus.is_empty());
        let error = gather(Some("no-such-iface"), None).unwrap_err();
        assert!(error.to_string().contains("ip link"), "{error}");
    }
}
