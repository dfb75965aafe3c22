//! What can be wrong with an interface, and what to do about it.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// An interface could not be asked or changed.
#[derive(Debug, Error)]
pub enum Error {
    /// There is no such interface in this network namespace.
    #[error("no interface {0} here; ip link shows them")]
    NoInterface(String),
    /// /sys belongs to another network namespace than this process.
    #[error(
        "/sys shows the interfaces of another network namespace, so nothing can be read about {0}; start this with ip netns exec, or mount a sysfs of the namespace's own"
    )]
    OtherNamespace(String),
    /// The kernel does not tell what it should.
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
    /// The program that makes changes is not there.
    #[error("{command}: the program ethtool is not installed (apt-get install ethtool)")]
    NoEthtool {
        /// What was tried, as one would type it.
        command: String,
    },
    /// The file that tells how to undo changes cannot be used.
    #[error("cannot {action} {path}, which tells how to undo changes: {source}")]
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
    #[error("{interface} is down; ip link set dev {interface} up")]
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
}
