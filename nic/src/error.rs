//! What can be wrong with an interface, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use penstock_ebpf::quote;
use thiserror::Error;

/// An interface could not be asked or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such interface in this network namespace.
    #[error("no interface {} here; ip link lists interfaces", quote(.0))]
    NoInterface(String),
    /// /sys belongs to another network namespace than this process.
    #[error(
        "/sys belongs to another network namespace; run this with ip netns exec or with CAP_SYS_ADMIN, or mount this namespace's own sysfs"
    )]
    OtherNamespace,
    /// The kernel does not report what it should.
    #[error("cannot read {what} of {interface}: {source}")]
    Read {
        /// What was asked for.
        what: &'static str,
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A change was refused.
    #[error("{command}: {reason}")]
    Refused {
        /// What was tried, as one would type it.
        command: String,
        /// The answer.
        reason: String,
    },
    /// The program that makes changes did not end; the change may still come about.
    #[error(
        "{command}: did not end within {limit:?} and was killed; dmesg may say what the driver waits for"
    )]
    NoAnswer {
        /// What was tried, as one would type it.
        command: String,
        /// How long.
        limit: Duration,
    },
    /// The program that makes changes is not there.
    #[error("{command}: the program ethtool is not installed (apt-get install ethtool)")]
    NoEthtool {
        /// What was tried, as one would type it.
        command: String,
    },
    /// The file with the changes to revert cannot be used.
    #[error("cannot {action} {path}, the list of changes to revert: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// An interface cannot do what is asked for.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum Unfit {
    /// It is switched off.
    #[error("{interface} is down; ip link set dev {} up", quote(interface))]
    Down {
        /// The interface.
        interface: String,
    },
    /// Queues that it neither has nor can have.
    #[error(
        "{interface} has no receive queue {queue}: it has {queues}, numbered from 0, and can have {most}"
    )]
    NoQueue {
        /// The interface.
        interface: String,
        /// The queue asked for.
        queue: u32,
        /// Queues that it has.
        queues: u32,
        /// Queues that it can have.
        most: u32,
    },
    /// Its packets have no Ethernet header.
    #[error(
        "{interface} carries no Ethernet frames ({what}), but the xdp path needs them; use the interface below it, or --mode tcp"
    )]
    NotEthernet {
        /// The interface.
        interface: String,
        /// Its kind or link type.
        what: String,
    },
    /// A master takes its packets.
    #[error(
        "{interface} is a port of {master} ({kind}), which takes its packets and has the addresses; use --iface {}",
        quote(master)
    )]
    Port {
        /// The interface.
        interface: String,
        /// The interface that it is a port of.
        master: String,
        /// The master's kind.
        kind: String,
    },
    /// XDP programs see no packets on it.
    #[error(
        "{interface} is a VRF, where an XDP program sees no packets; use --iface with the interface of the VRF on which packets arrive (ip link show vrf {})",
        quote(interface)
    )]
    Vrf {
        /// The interface.
        interface: String,
    },
    /// It runs programs in generic mode only.
    #[error(
        "{interface} runs the program in generic mode only: {why}; use --xdp-mode generic or auto"
    )]
    GenericOnly {
        /// The interface.
        interface: String,
        /// Why.
        why: String,
    },
}
