//! Loads the program, fills its maps, attaches it.

use std::io;
use std::mem::MaybeUninit;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::Error;
use crate::addresses::{Addresses, MAX_ADDRESSES};
use crate::attached::{self, Attached, Mode, check, index_of};
use crate::counter::counter;
use crate::error;
use crate::outcome::{OUTCOMES, Outcomes};
use crate::skeleton::SteerSkelBuilder;
use crate::streams::{Streams, places_for};

/// The program's name, by which another broker's is known.
pub const NAME: &str = "penstock_steer";

/// Which packets are the broker's.
#[derive(Debug, Clone)]
pub struct Config {
    /// Addresses that payload may be sent to, at most [`MAX_ADDRESSES`].
    pub addresses: Vec<IpAddr>,
    /// UDP port.
    pub port: u16,
    /// First four bytes of a payload packet.
    pub magic: [u8; 4],
    /// Number of receive queues, up to the last one that gets sockets.
    pub queues: u32,
    /// Workers that share each receive queue.
    pub sockets_per_queue: u32,
    /// Most streams at a time.
    pub streams: usize,
}

/// The program in the kernel; dropping it takes it out again.
#[derive(Debug)]
pub struct Steering {
    program: OwnedFd,
    sockets: MapHandle,
    outcomes: MapHandle,
    streams: MapHandle,
    addresses: MapHandle,
    sockets_per_queue: u32,
    /// Holds the program on the interface.
    link: Option<OwnedFd>,
}

/// Which of `workers` sockets of a queue a stream's packets go to, as the program works it out.
#[must_use]
pub fn worker_of(key: u64, stream: u16, workers: u32) -> u32 {
    let mixed = (key ^ u64::from(stream)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (mixed >> 32) as u32 % workers
}

impl Steering {
    /// Loads the program; it sees nothing before [`Self::attach`].
    ///
    /// # Errors
    /// [`Error::Load`] when the kernel refuses it, [`Error::Addresses`] when there are too many.
    ///
    /// # Panics
    /// If there are no sockets, or more than the kernel can number.
    pub fn load(config: &Config) -> Result<Self, Error> {
        let sockets = config.queues.checked_mul(config.sockets_per_queue);
        let sockets = sockets.expect("no interface has that many queues");
        assert_ne!(sockets, 0);
        let load = |e| Error::Load {
            source: error::io(e),
        };
        let mut object = MaybeUninit::uninit();
        let mut open = SteerSkelBuilder::default()
            .open(&mut object)
            .map_err(load)?;
        let constants = open
            .maps
            .rodata_data
            .as_mut()
            .expect("the program has constants");
        constants.port = config.port.to_be();
        constants.magic = u32::from_ne_bytes(config.magic);
        constants.sockets_per_queue = config.sockets_per_queue;
        let places = places_for(config.streams);
        constants.last_place = places - 1;
        open.maps.sockets.set_max_entries(sockets).map_err(load)?;
        open.maps.streams.set_max_entries(places).map_err(load)?;
        let loaded = open.load().map_err(load)?;
        let program = loaded.progs.penstock_steer.as_fd().try_clone_to_owned();
        let program = program.map_err(|source| Error::Load { source })?;
        let steering = Self {
            program,
            sockets: MapHandle::try_from(&loaded.maps.sockets).map_err(load)?,
            outcomes: MapHandle::try_from(&loaded.maps.outcomes).map_err(load)?,
            streams: MapHandle::try_from(&loaded.maps.streams).map_err(load)?,
            addresses: MapHandle::try_from(&loaded.maps.addresses).map_err(load)?,
            sockets_per_queue: config.sockets_per_queue,
            link: None,
        };
        if !steering.addresses()?.set(&config.addresses) {
            return Err(Error::Addresses {
                count: config.addresses.len(),
                most: MAX_ADDRESSES,
            });
        }
        Ok(steering)
    }

    /// Sends the packets of a receive queue's streams to this AF_XDP socket.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel refuses it.
    ///
    /// # Panics
    /// If `worker` is not below `sockets_per_queue`.
    pub fn insert(&self, queue: u32, worker: u32, socket: BorrowedFd<'_>) -> Result<(), Error> {
        assert!(worker < self.sockets_per_queue);
        let key = queue * self.sockets_per_queue + worker;
        let value = socket.as_raw_fd();
        self.sockets
            .update(&key.to_ne_bytes(), &value.to_ne_bytes(), MapFlags::ANY)
            .map_err(|e| Error::Map {
                what: "cannot name an AF_XDP socket to the XDP program",
                source: error::io(e),
            })
    }

    /// The streams whose packets it lets through: none yet.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel does not share the memory.
    pub fn streams(&self) -> Result<Streams, Error> {
        Streams::of(self.streams.as_fd(), self.streams.max_entries()).map_err(|source| Error::Map {
            what: "cannot share the list of streams with the XDP program",
            source,
        })
    }

    /// The addresses that it accepts packets to; at first those that it was loaded with.
    ///
    /// # Errors
    /// [`Error::Map`] if the kernel does not share the memory.
    pub fn addresses(&self) -> Result<Addresses, Error> {
        Addresses::of(self.addresses.as_fd()).map_err(|source| Error::Map {
            what: "cannot share the list of addresses with the XDP program",
            source,
        })
    }

    /// Lets the program see the packets of an interface. Another program there stays, and is
    /// named in the error, unless `force`.
    ///
    /// # Errors
    /// [`Error::OtherBroker`], [`Error::Occupied`], [`Error::Attach`] and what asking may bring.
    pub fn attach(&mut self, interface: &str, mode: Mode, force: bool) -> Result<Attached, Error> {
        let index = index_of(interface)?;
        if !force {
            check_free(interface)?;
        } else if let Some(found) = attached::attached(interface)? {
            attached::detach(index, &found).map_err(|source| Error::Replace {
                interface: interface.to_owned(),
                id: found.id,
                source,
            })?;
        }
        let options = libbpf_sys::bpf_link_create_opts {
            sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
            flags: mode.flags(),
            ..Default::default()
        };
        // SAFETY: the program's descriptor is open, the options outlive the call and say their size.
        let fd = unsafe {
            libbpf_sys::bpf_link_create(
                self.program.as_raw_fd(),
                index,
                libbpf_sys::BPF_XDP,
                &raw const options,
            )
        };
        check(fd).map_err(|source| explain(interface, mode, source))?;
        // SAFETY: the descriptor is new and has no other owner.
        self.link = Some(unsafe { OwnedFd::from_raw_fd(fd) });
        attached::attached(interface)?.ok_or_else(|| {
            let gone = io::Error::other("it was taken off at once");
            explain(interface, mode, gone)
        })
    }

    /// What became of packets so far.
    ///
    /// # Errors
    /// [`Error::Map`] when the kernel does not report it.
    ///
    /// # Panics
    /// Never: the kernel's counters are of the size that the program declares.
    pub fn outcomes(&self) -> Result<Outcomes, Error> {
        let mut counts = [0; OUTCOMES.len()];
        for (key, count) in (0u32..).zip(&mut counts) {
            *count = counter(&self.outcomes, key).map_err(|e| Error::Map {
                what: "cannot read the XDP program's counters",
                source: error::io(e),
            })?;
        }
        Ok(Outcomes::of(counts))
    }

    #[cfg(test)]
    pub(crate) fn program(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }
}

/// Whether the interface has no XDP program yet.
///
/// # Errors
/// [`Error::OtherBroker`] or [`Error::Occupied`] names the one that it has.
pub fn check_free(interface: &str) -> Result<(), Error> {
    let Some(Attached { id, name, mode }) = attached::attached(interface)? else {
        return Ok(());
    };
    let interface = interface.to_owned();
    Err(if name == NAME {
        Error::OtherBroker { interface, id }
    } else {
        Error::Occupied {
            interface,
            id,
            name,
            mode,
        }
    })
}

fn explain(interface: &str, mode: Mode, source: io::Error) -> Error {
    let hint = match source.raw_os_error() {
        Some(libc::EOPNOTSUPP) => "; its driver has no native XDP: use --xdp-mode generic",
        Some(libc::EPERM) => "; it needs CAP_NET_ADMIN: run with sudo",
        Some(libc::EBUSY) => "; another program came first",
        Some(libc::ENOSPC) => {
            "; a veth needs as many receive queues as its other end has transmit queues (ethtool -l shows both)"
        }
        Some(libc::EINVAL | libc::ERANGE | libc::E2BIG) => {
            "; the driver refuses its present settings, often MTU, LRO or the number of queues: dmesg may say which, --xdp-mode generic works with all"
        }
        _ => "",
    };
    Error::Attach {
        interface: interface.to_owned(),
        mode,
        source,
        hint,
    }
}
