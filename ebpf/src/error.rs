//! What can go wrong between the program and an interface, and what to do about it.

use std::io;

use thiserror::Error;

use crate::{Mode, quote};

/// A failure to load, attach or fill the program.
#[derive(Debug, Error)]
pub enum Error {
    /// The kernel did not take the program.
    #[error(
        "cannot load the XDP program: {source}; it needs CAP_BPF and CAP_NET_ADMIN (run with sudo), and Linux 5.18 or newer"
    )]
    Load {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The interface has more addresses than the program compares with.
    #[error("cannot serve {count} addresses (at most {most}); choose one with --listen")]
    Addresses {
        /// Addresses asked for.
        count: usize,
        /// The addresses that the program accepts packets to.
        most: usize,
    },
    /// Another broker steers packets of this interface.
    #[error(
        "another penstock-broker serves {interface} (XDP program {id}); stop it, or give this one another interface"
    )]
    OtherBroker {
        /// The interface.
        interface: String,
        /// The kernel's number of its program.
        id: u32,
    },
    /// Another XDP program is there.
    #[error(
        "{interface} has another XDP program (id {id}, {}; bpftool net shows it); remove it (ip link set dev {} {} off), or replace it with --force",
        shown(name),
        quote(interface),
        mode.keyword()
    )]
    Occupied {
        /// The interface.
        interface: String,
        /// The kernel's number of the program.
        id: u32,
        /// The program's name; empty if the kernel does not report it.
        name: String,
        /// How it runs.
        mode: Mode,
    },
    /// The interface does not take the program in this mode.
    #[error("cannot attach the XDP program to {interface} in {mode} mode: {source}{hint}")]
    Attach {
        /// The interface.
        interface: String,
        /// The mode asked for.
        mode: Mode,
        /// The kernel's answer.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// A program that was to be replaced would not go.
    #[error("cannot remove XDP program {id} from {interface}: {source}")]
    Replace {
        /// The interface.
        interface: String,
        /// The kernel's number of the program.
        id: u32,
        /// The kernel's answer.
        source: io::Error,
    },
    /// There is no such interface in this network namespace.
    #[error("no interface {interface}: {source}; ip link shows them")]
    NoInterface {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The fault injector does not come into the kernel, or does not answer.
    #[error("{what}: {source}; the fault injector needs root, and Linux 6.6 or newer")]
    Injector {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// System calls cannot be counted.
    #[error(
        "cannot count system calls: {source}; it needs CAP_BPF and CAP_PERFMON (run with sudo)"
    )]
    Trace {
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel's work on packets cannot be measured.
    #[error(
        "cannot measure the kernel's work on packets: {source}; it needs CAP_BPF and CAP_PERFMON (run with sudo), and a kernel with BTF"
    )]
    HostTimes {
        /// The kernel's answer.
        source: io::Error,
    },
    /// A limit of the program's maps, or the kernel's refusal to fill them.
    #[error("{what}: {source}")]
    Map {
        /// What was to be done.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn shown(name: &str) -> String {
    match name {
        "" => "its name takes CAP_SYS_ADMIN to see".to_owned(),
        name => format!("{name:?}"),
    }
}

/// libbpf's error with the kernel's below it.
pub(crate) fn io(error: libbpf_rs::Error) -> io::Error {
    io::Error::other(format!("{error:#}"))
}
