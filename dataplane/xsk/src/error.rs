//! Errors of AF_XDP sockets, with hints at their most frequent causes.

use std::io;

use thiserror::Error;

/// An AF_XDP socket could not be set up or used.
#[derive(Debug, Error)]
pub enum Error {
    /// The UMEM, which holds the frames, could not be registered.
    #[error("cannot make {bytes} bytes of packet memory (UMEM): {source}{hint}")]
    Umem {
        /// Requested bytes.
        bytes: u64,
        /// The kernel's answer.
        source: io::Error,
        /// How to fix it.
        hint: &'static str,
    },
    /// The socket could not be created or bound.
    #[error("cannot open an AF_XDP socket on {interface} queue {queue}: {source}{hint}")]
    Socket {
        /// The interface.
        interface: String,
        /// The receive queue.
        queue: u32,
        /// The kernel's answer.
        source: io::Error,
        /// How to fix it.
        hint: &'static str,
    },
    /// The name cannot belong to an interface.
    #[error("invalid interface name {interface:?}")]
    Interface {
        /// The name.
        interface: String,
    },
    /// The kernel refused a socket option.
    #[error("{what}: {source}")]
    Option {
        /// The failed operation.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// What a socket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// The socket of a broker, to which an XDP program redirects packets.
    Receive,
    /// The socket of a publisher, without an XDP program.
    Transmit,
}

impl Error {
    pub(super) fn umem(bytes: u64, source: io::Error) -> Self {
        Self::Umem {
            bytes,
            // The hint does not depend on the purpose.
            hint: hint(&source, Purpose::Receive),
            source,
        }
    }
}

/// The most frequent cause of an error of bind(2) or socket(2).
pub(super) fn hint(source: &io::Error, purpose: Purpose) -> &'static str {
    match (source.raw_os_error(), purpose) {
        (Some(libc::EBUSY), _) => {
            "; another AF_XDP socket has the queue: stop what holds it (ss --xdp shows it)"
        }
        (Some(libc::EPERM | libc::EACCES), Purpose::Receive) => {
            "; it needs CAP_NET_RAW, and CAP_NET_ADMIN for the program: run with sudo"
        }
        (Some(libc::EPERM | libc::EACCES), Purpose::Transmit) => {
            "; it needs CAP_NET_RAW: run with sudo, or use --tx udp, which needs no privilege"
        }
        (Some(libc::ENOBUFS | libc::ENOMEM), _) => {
            "; the limit of locked memory is too low: ulimit -l unlimited, or CAP_IPC_LOCK"
        }
        (Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT), Purpose::Receive) => {
            "; the driver, or the kernel's configuration (CONFIG_XDP_SOCKETS), does not do it: try --xdp-copy, or --mode tcp"
        }
        (
            Some(libc::EOPNOTSUPP | libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT),
            Purpose::Transmit,
        ) => "; the kernel's configuration (CONFIG_XDP_SOCKETS) does not do it: use --tx udp",
        (Some(libc::EINVAL), _) => {
            "; the interface has no such queue (ethtool -l shows them), or its MTU does not fit"
        }
        (Some(libc::ENODEV), _) => "; no such interface (ip link shows them)",
        _ => "",
    }
}
