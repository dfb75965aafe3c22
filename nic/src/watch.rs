//! Follows an interface's name and addresses as they change.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::netlink::{Address, Netlink};

/// `RTMGRP_LINK`, `RTMGRP_IPV4_IFADDR` and `RTMGRP_IPV6_IFADDR` (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// State of an interface at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its name; empty when it is gone.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Addresses of the loopback interface that are valid beyond this host.
    pub of_loopback: Vec<Address>,
}

/// Learns of changes from the kernel. Needs no privilege, and opens no further descriptor.
#[derive(Debug)]
pub struct Watch {
    events: Socket,
    netlink: Netlink,
    index: u32,
    loopback: u32,
}

impl Watch {
    /// Follows an interface by its index; changes from now on end a [`Self::wait`].
    ///
    /// # Errors
    /// The kernel's error.
    pub fn new(index: u32) -> io::Result<Self> {
        let mut events = Socket::new(NETLINK_ROUTE)?;
        events.bind(&SocketAddr::new(0, GROUPS))?;
        let mut netlink = Netlink::open()?;
        let loopback = netlink.find("lo").map_or(1, |lo| lo.index);
        Ok(Self {
            events,
            netlink,
            index,
            loopback,
        })
    }

    /// Its present state.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn look(&mut self) -> io::Result<Seen> {
        let name = match self.netlink.by_index(self.index) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                return Ok(Seen::default());
            }
            found => found?.name,
        };
        let mut of_loopback = self.netlink.addresses(self.loopback)?;
        of_loopback.retain(|address| address.beyond_host);
        Ok(Seen {
            name,
            addresses: self.netlink.addresses(self.index)?,
            of_loopback,
        })
    }

    /// Waits until something may have changed. Lost events count as a change (netlink(7), `ENOBUFS`).
    ///
    /// # Errors
    /// The kernel's error.
    pub fn wait(&self) -> io::Result<()> {
        let mut flags = 0;
        loop {
            // The event's content is ignored and the state queried anew: later events may have outdated
            // it.
            match self.receive(flags) {
                Ok(()) => {}
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {}
                    Some(libc::EINTR) => continue,
                    Some(libc::EAGAIN) if flags != 0 => return Ok(()),
                    _ => return Err(error),
                },
            }
            flags = libc::MSG_DONTWAIT;
        }
    }

    /// As [`Self::wait`], but for `limit` at most; returns whether something may have changed.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn wait_for(&self, limit: Duration) -> io::Result<bool> {
        let mut events = [PollFd::new(self.events.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut events, limit) {
            Ok(0) | Err(Errno::EINTR) => Ok(false),
            // An error of the socket, too, is what `wait` returns.
            Ok(_) => self.wait().map(|()| true),
            Err(error) => Err(error.into()),
        }
    }

    fn receive(&self, flags: libc::c_int) -> io::Result<()> {
        let mut bytes = [0u8; 64];
        // The kernel drops what does not fit.
        self.events.recv(&mut &mut bytes[..], flags).map(drop)
    }
}
