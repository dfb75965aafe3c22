//! Checks of the machine: pure functions from facts to verdicts. One whose facts could not be seen
//! says nothing.

use std::path::Path;

use bytesize::ByteSize;
use penstock_xsk::{frame_size, packet_memory};

use super::check::{Check, Topic};
use super::facts::{BrokerFile, Capabilities, Host, Interface};
use crate::measure::host_load::{MAX_OTHERS, MAX_STEAL, MIN_CPUS};

/// Linux that the broker's xdp path takes: programs for packets in several buffers (`xdp.frags`).
const XDP_SINCE: (u32, u32) = (5, 18);
/// AF_XDP sockets that take packets in several buffers (`XDP_USE_SG`).
pub const SEVERAL_BUFFERS_SINCE: (u32, u32) = (6, 6);
/// The kernel tells what drivers do of XDP (netlink family netdev).
pub const FEATURES_SINCE: (u32, u32) = (6, 3);
/// The broker's defaults: packets of a ring, socket buffers, memory of one topic.
const RING: u32 = 1024;
const SOCKET_BUFFER: u64 = 32 << 20;
const TOPIC: u64 = 264 << 20;
/// Memory that the broker reserves for itself before it creates a topic.
const BROKER: u64 = 32 << 20;
/// MTU and queues if no interface is known.
const USUAL_MTU: u32 = 1500;

/// All checks of the machine, as far as something is known.
pub fn checks(host: &Host, interface: Option<&Interface>) -> Vec<Check> {
    let need = memory_needed(interface);
    let checks = [
        kernel(host),
        af_xdp(host),
        btf(host),
        jit(host),
        capabilities(host),
        memlock(host, need),
        huge_pages(host, need),
        shared_memory(host),
        memory(host),
        socket_buffers(host),
        busy_poll(host),
        ethtool(host),
        cpu(host),
    ];
    checks.into_iter().flatten().collect()
}

/// Packet memory of all queues, and of the largest of them.
fn memory_needed(interface: Option<&Interface>) -> Memory {
    let (frame, queues) = match interface {
        Some(interface) => (interface.frame_size(), u64::from(interface.nic.queues)),
        None => (frame_size(USUAL_MTU, false), 1),
    };
    let queue = packet_memory(RING, frame, 1);
    Memory {
        queue,
        queues,
        all: queue * queues,
    }
}

/// Bytes.
#[derive(Debug, Clone, Copy)]
struct Memory {
    queue: u64,
    queues: u64,
    all: u64,
}

fn kernel(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "kernel",
        why: "a bpf_link attaches the XDP program (Linux 5.9); packets in several buffers need 5.18, and 6.6 for sockets; drivers report their XDP features since 6.3",
    };
    let kernel = host.kernel.as_ref()?;
    let found = format!("Linux {}", kernel.release);
    let lacking = [
        (SEVERAL_BUFFERS_SINCE, "packets in several buffers (6.6)"),
        (
            FEATURES_SINCE,
            "drivers that report their XDP features (6.3)",
        ),
    ];
    let lacking: Vec<_> = lacking
        .into_iter()
        .filter(|(since, _)| kernel.version < *since)
        .map(|(_, what)| what)
        .collect();
    Some(if kernel.version < XDP_SINCE {
        topic.fail(
            format!("{found} is too old for --mode xdp"),
            "use Linux 5.18 or newer; --mode tcp works with this kernel",
        )
    } else if lacking.is_empty() {
        topic.ok(found)
    } else {
        topic.warn(
            format!("{found}, without {}", lacking.join(" and ")),
            "use Linux 6.6 or newer (Debian 12: apt-get install -t bookworm-backports linux-image-amd64)",
        )
    })
}

fn af_xdp(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "af_xdp",
        why: "the xdp path receives payload through AF_XDP sockets",
    };
    Some(match host.af_xdp? {
        true => topic.ok("the kernel has AF_XDP sockets"),
        false => topic.fail(
            "the kernel has no AF_XDP sockets",
            "use a kernel built with CONFIG_XDP_SOCKETS=y; --mode tcp works with this one",
        ),
    })
}

fn btf(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "btf",
        why: "the broker does not need it, but bpftool and tracing need it to show what a program does",
    };
    Some(match host.btf {
        true => topic.ok("the kernel has type information (BTF)"),
        false => topic.warn(
            "there is no /sys/kernel/btf/vmlinux",
            "use a kernel built with CONFIG_DEBUG_INFO_BTF=y, if you want to inspect programs",
        ),
    })
}

fn jit(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "bpf_jit",
        why: "each packet runs through the XDP program, which is several times slower if it is interpreted",
    };
    Some(match host.jit? {
        0 => topic.warn(
            "programs are interpreted",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        _ => topic.ok("programs are compiled"),
    })
}

/// Who can start a broker with the capabilities that it needs.
enum Starter<'a> {
    /// This process.
    Process,
    /// Any user, because the program's file grants them.
    File(&'a BrokerFile),
    /// Someone with more privileges.
    SomeoneElse,
}

fn starter(host: &Host) -> Starter<'_> {
    let needed = Capabilities::for_xdp();
    let file = host.broker.as_ref();
    let file = file.filter(|file| file.capabilities.has(needed) && !file.nosuid);
    match file {
        _ if host.capabilities.has(needed) => Starter::Process,
        Some(file) => Starter::File(file),
        None => Starter::SomeoneElse,
    }
}

fn capabilities(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "capabilities",
        why: "--mode xdp loads a program, attaches it and opens sockets; the broker drops these capabilities afterwards",
    };
    let missing = host.capabilities.missing(Capabilities::for_xdp());
    Some(match (starter(host), &host.broker) {
        (Starter::Process, _) => topic.ok("this process has all of them"),
        (Starter::File(file), _) => {
            topic.ok(format!("{} has all of them", file.path.display()))
        }
        (Starter::SomeoneElse, _) if host.root => topic.fail(
            format!("root lacks {} here", missing.join(", ")),
            "grant them to the container or unit (AmbientCapabilities=, --cap-add); in a user namespace, start the broker outside it",
        ),
        (Starter::SomeoneElse, Some(file)) if file.nosuid => topic.warn(
            format!(
                "this process lacks {}, and the file system of {} ignores file capabilities (nosuid)",
                missing.join(", "),
                file.path.display()
            ),
            "run sudo penstock-broker ..., or install it on a file system without nosuid",
        ),
        (Starter::SomeoneElse, file) => topic.warn(
            format!("neither this process nor the broker's file has {}", missing.join(", ")),
            setcap(file.as_ref()),
        ),
    })
}

fn setcap(file: Option<&BrokerFile>) -> String {
    let path = file.map_or(Path::new("penstock-broker"), |file| &file.path);
    format!(
        "sudo setcap cap_bpf,cap_net_admin,cap_net_raw,cap_ipc_lock+ep {}",
        path.display()
    )
}

fn memlock(host: &Host, need: Memory) -> Option<Check> {
    let topic = Topic {
        name: "memlock",
        why: "packet memory is locked and, without CAP_IPC_LOCK, counts against this limit",
    };
    let limit = host.memlock;
    let wanted = format!("{} for {} queues", ByteSize(need.all), need.queues);
    let may_lock = match starter(host) {
        Starter::Process => host.capabilities.has(Capabilities::IPC_LOCK),
        Starter::File(file) => file.capabilities.has(Capabilities::IPC_LOCK),
        // Probably root.
        Starter::SomeoneElse => !host.root,
    };
    let found = format!(
        "{} may be locked, and the broker needs {wanted}",
        ByteSize(limit)
    );
    let kib = need.all.div_ceil(1024);
    Some(match starter(host) {
        _ if limit >= need.all => topic.ok(match limit {
            u64::MAX => "there is no limit".to_owned(),
            _ => found,
        }),
        Starter::SomeoneElse if may_lock => topic.warn(
            found,
            format!("ulimit -l {kib}, or start the broker with CAP_IPC_LOCK, for example as root"),
        ),
        _ if may_lock => topic.ok(format!(
            "CAP_IPC_LOCK lifts the limit of {}",
            ByteSize(limit)
        )),
        Starter::File(file) => topic.fail(found, setcap(Some(file))),
        _ => topic.fail(
            found,
            format!("ulimit -l {kib}; LimitMEMLOCK={kib}K in a systemd unit"),
        ),
    })
}

fn huge_pages(host: &Host, need: Memory) -> Option<Check> {
    let topic = Topic {
        name: "huge_pages",
        why: "the broker puts packet memory into huge pages if enough are free, which saves the CPU address translation; it works without them",
    };
    let pages = host.huge_pages?;
    let wanted = need.queue.div_ceil(pages.size) * need.queues;
    let found = format!(
        "{} huge pages of {} are free",
        pages.free,
        ByteSize(pages.size)
    );
    Some(if pages.free >= wanted {
        topic.ok(found)
    } else {
        let total = pages.total + wanted - pages.free;
        topic.warn(
            format!("{found}, {wanted} would be used"),
            format!("sysctl -w vm.nr_hugepages={total}"),
        )
    })
}

fn shared_memory(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "shared_memory",
        why: "each topic's log allocates its ring (256 MiB by default) and its index in /dev/shm when it is created",
    };
    let free = host.shared_memory?;
    let found = format!("{} free in /dev/shm", ByteSize(free));
    Some(if free >= TOPIC {
        topic.ok(found)
    } else {
        topic.fail(
            format!("{found}, and a topic needs {}", ByteSize(TOPIC)),
            "mount -o remount,size=1G /dev/shm; or use a smaller --ring-size or another --buffer-dir",
        )
    })
}

fn memory(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "memory",
        why: "a log in /dev/shm counts against the memory limits of the broker's control groups; the broker refuses topics that do not fit",
    };
    let limit = host.memory.as_ref()?;
    let found = format!(
        "{} is {}, with {} left",
        limit.name,
        ByteSize(limit.bytes),
        ByteSize(limit.free)
    );
    Some(if limit.free >= TOPIC + BROKER {
        topic.ok(found)
    } else {
        topic.fail(
            format!("{found}, and a topic needs {}", ByteSize(TOPIC)),
            "use a smaller --ring-size, a --buffer-dir on a disk, or a higher limit (MemoryMax= in a systemd unit, --memory of a container)",
        )
    })
}

fn socket_buffers(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "socket_buffers",
        why: "the tcp path asks for 32 MiB of socket buffer, which the kernel caps at these limits; a window smaller than the path's bandwidth × delay limits throughput",
    };
    let limits = [
        ("net.core.rmem_max", host.rmem_max?),
        ("net.core.wmem_max", host.wmem_max?),
    ];
    let shown = limits.map(|(name, limit)| format!("{name} is {}", ByteSize(limit)));
    let found = shown.join(", ");
    let small = limits.iter().filter(|(_, limit)| *limit < SOCKET_BUFFER);
    let commands: Vec<_> = small
        .map(|(name, _)| format!("sysctl -w {name}={SOCKET_BUFFER}"))
        .collect();
    Some(if commands.is_empty() {
        topic.ok(found)
    } else {
        topic.warn(found, commands.join("; "))
    })
}

fn busy_poll(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "busy_poll",
        why: "with these, every socket of the host spins before it sleeps, which takes cores from the workers; the broker's --busy-poll does not need them",
    };
    let settings = [
        ("net.core.busy_poll", host.busy_poll?),
        ("net.core.busy_read", host.busy_read?),
    ];
    let on: Vec<_> = settings.iter().filter(|(_, us)| *us > 0).collect();
    if on.is_empty() {
        return Some(topic.ok("net.core.busy_poll and net.core.busy_read are off"));
    }
    let found: Vec<_> = on
        .iter()
        .map(|(name, us)| format!("{name} is {us} µs"))
        .collect();
    let fix: Vec<_> = on
        .iter()
        .map(|(name, _)| format!("sysctl -w {name}=0"))
        .collect();
    Some(topic.warn(found.join(", "), fix.join("; ")))
}

fn cpu(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "cpu",
        why: "measurements say little if other programs or virtual machines use the cores, or if there are too few cores",
    };
    let load = host.load.as_ref()?;
    let average = load
        .load_average
        .map_or_else(String::new, |average| format!(", load average {average}"));
    let found = format!(
        "{} cores, {:.1} of them busy, {:.0} % taken by the hypervisor (steal){average}",
        load.cpus,
        load.others_cores,
        100.0 * load.steal
    );
    let mut fixes = Vec::new();
    if load.others() >= MAX_OTHERS {
        fixes.push("measure while nothing else runs (top -o %CPU shows what does)");
    }
    if load.steal >= MAX_STEAL {
        fixes.push("use a machine that does not share its cores");
    }
    if load.cpus < MIN_CPUS {
        fixes.push("use four cores or more; with fewer, only ratios within one run are meaningful");
    }
    Some(match fixes.is_empty() {
        true => topic.ok(found),
        false => topic.warn(found, fixes.join("; ")),
    })
}

fn ethtool(host: &Host) -> Option<Check> {
    let topic = Topic {
        name: "ethtool",
        why: "the broker's --configure-nic, the lab and the commands in this report use it",
    };
    Some(match host.ethtool {
        true => topic.ok("ethtool is installed"),
        false => topic.warn("ethtool is not installed", "apt-get install ethtool"),
    })
}
