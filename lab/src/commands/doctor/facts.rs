//! Everything that the checks need. Plain data, so that a check can be tested with a machine that
//! is made up. What could not be seen is `None`; [`Seen::unseen`] says why.

use std::net::IpAddr;
use std::ops::BitOr;
use std::path::PathBuf;

use penstock_ebpf::Mode;
use penstock_ebpf::{Attached, Features};
use penstock_nic::{Fitness, choose, fitness};
use penstock_process::memory::Limit;
use penstock_xsk::frame_size;

use crate::measure::host_load::HostLoad;

/// A set of capabilities, as the kernel's bits (linux/capability.h).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Capabilities(pub u64);

impl Capabilities {
    pub const NET_ADMIN: Self = Self(1 << 12);
    pub const NET_RAW: Self = Self(1 << 13);
    pub const IPC_LOCK: Self = Self(1 << 14);
    pub const SYS_ADMIN: Self = Self(1 << 21);
    pub const BPF: Self = Self(1 << 39);
    /// Those that a broker may use, by their names.
    const NAMES: [(Self, &'static str); 4] = [
        (Self::BPF, "cap_bpf"),
        (Self::NET_ADMIN, "cap_net_admin"),
        (Self::NET_RAW, "cap_net_raw"),
        (Self::IPC_LOCK, "cap_ipc_lock"),
    ];

    /// What the broker's `--mode xdp` does not start without.
    pub fn for_xdp() -> Self {
        Self::BPF | Self::NET_ADMIN | Self::NET_RAW
    }

    pub fn has(self, other: Self) -> bool {
        // CAP_SYS_ADMIN stands in for CAP_BPF (capabilities(7)).
        let implied = match self.0 & Self::SYS_ADMIN.0 {
            0 => 0,
            _ => Self::BPF.0,
        };
        (self.0 | implied) & other.0 == other.0
    }

    /// The names of those of `wanted` that are not here.
    pub fn missing(self, wanted: Self) -> Vec<&'static str> {
        let names = Self::NAMES.into_iter();
        names
            .filter(|(one, _)| wanted.has(*one) && !self.has(*one))
            .map(|(_, name)| name)
            .collect()
    }
}

impl BitOr for Capabilities {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The running kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// Its first two numbers.
    pub version: (u32, u32),
}

/// The broker's program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerFile {
    pub path: PathBuf,
    /// Capabilities that it grants.
    pub capabilities: Capabilities,
    /// Its file system is mounted so that they do not count.
    pub nosuid: bool,
}

/// Huge pages of the default size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HugePages {
    pub total: u64,
    pub free: u64,
    /// Bytes of one.
    pub size: u64,
}

/// A NUMA node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub number: u32,
    pub cpus: Vec<usize>,
}

/// The machine, and this process on it.
#[derive(Debug, Clone)]
pub struct Host {
    pub kernel: Option<Kernel>,
    /// Whether the kernel has AF_XDP sockets.
    pub af_xdp: Option<bool>,
    /// Whether it tells its own types (/sys/kernel/btf/vmlinux).
    pub btf: bool,
    /// `net.core.bpf_jit_enable`.
    pub jit: Option<u64>,
    /// `net.core.busy_poll` and `net.core.busy_read`, microseconds.
    pub busy_poll: Option<u64>,
    pub busy_read: Option<u64>,
    /// `net.core.rmem_max` and `net.core.wmem_max`, bytes.
    pub rmem_max: Option<u64>,
    pub wmem_max: Option<u64>,
    /// Whether this is the superuser, whom sudo could give nothing more.
    pub root: bool,
    pub capabilities: Capabilities,
    pub broker: Option<BrokerFile>,
    /// RLIMIT_MEMLOCK, bytes; `u64::MAX` is no limit.
    pub memlock: u64,
    pub huge_pages: Option<HugePages>,
    /// Bytes free where logs lie by default.
    pub shared_memory: Option<u64>,
    /// The limit that leaves least memory: that of a control group or of the host.
    pub memory: Option<Limit>,
    pub ethtool: bool,
    /// Cores that this process may run on.
    pub cpus: Vec<usize>,
    /// What this host is doing at the moment.
    pub load: Option<HostLoad>,
    pub nodes: Vec<Node>,
}

/// The interface that payload is to come in on.
#[derive(Debug, Clone)]
pub struct Interface {
    pub nic: penstock_nic::Facts,
    pub addresses: Vec<IpAddr>,
    /// Its XDP program; the name is empty if this process may not ask for it.
    pub program: Option<Attached>,
    /// NUMA node that it is attached to.
    pub node: Option<u32>,
}

impl Interface {
    /// The driver's support for XDP, if the broker may run its program in the driver.
    pub fn native_xdp(&self) -> Option<Features> {
        let any_mode = matches!(fitness(&self.nic), Ok(Fitness::Any));
        self.nic.xdp.filter(|_| any_mode)
    }

    /// The same, if the broker would choose to do so.
    pub fn chosen_native(&self) -> Option<Features> {
        let is_chosen = choose(&self.nic).is_ok_and(|choice| choice.mode != Mode::Generic);
        self.native_xdp().filter(|xdp| is_chosen && xdp.native)
    }

    /// Whether the broker would let the driver receive into its memory.
    pub fn zero_copy(&self) -> bool {
        self.chosen_native().is_some_and(|xdp| xdp.zero_copy)
    }

    /// Bytes of the frames that the broker would use.
    pub fn frame_size(&self) -> u32 {
        frame_size(self.nic.mtu, self.zero_copy())
    }
}

/// All that was seen, and what was not.
#[derive(Debug, Clone)]
pub struct Seen {
    pub host: Host,
    pub interface: Option<Interface>,
    /// Interfaces that could be used, when none was asked for.
    pub candidates: Vec<Interface>,
    /// What could not be seen, with the reason and what would show it.
    pub unseen: Vec<String>,
}
