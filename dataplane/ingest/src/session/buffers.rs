//! Socket buffers: requested sizes, effective sizes, and the window that follows from them.
//!
//! Kernel facts (socket(7), tcp(7), `net/core/sock.c`, `net/ipv4/tcp_input.c`):
//! `SO_RCVBUF` is silently capped at `net.core.rmem_max` and then doubled; setting it switches
//! receive autotuning off; an accepted socket inherits its listener's value; the window scale is
//! fixed by the SYN exchange, so only the listener's buffer can raise it. `SO_RCVBUFFORCE` is not
//! capped and needs CAP_NET_ADMIN.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::str::FromStr;

use penstock_runtime::tcp_info::TcpInfo;
use serde::Serialize;
use socket2::SockRef;

/// Which sockets get the receive buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RcvbufOn {
    /// None: the kernel tunes the buffer up to `tcp_rmem[2]`.
    None,
    /// The listener, before any connection: accepted sockets inherit it, and the window scale and
    /// the first window follow from it.
    Listener,
    /// Each accepted socket: window scale and first window are those of the default buffer.
    Accepted,
    /// Both.
    Both,
}

impl FromStr for RcvbufOn {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "none" => Ok(Self::None),
            "listener" => Ok(Self::Listener),
            "accepted" => Ok(Self::Accepted),
            "both" => Ok(Self::Both),
            _ => Err(format!(
                "{name:?} is none of: none, listener, accepted, both"
            )),
        }
    }
}

/// Buffer sizes to request.
#[derive(Debug, Clone, Copy)]
pub struct RequestedBuffers {
    /// `SO_RCVBUF`, bytes, before the kernel doubles it.
    pub rcvbuf: u32,
    /// `SO_SNDBUF`, bytes, before the kernel doubles it.
    pub sndbuf: u32,
    /// Which sockets get `rcvbuf`; accepted ones get `sndbuf` always.
    pub rcvbuf_on: RcvbufOn,
    /// Use `SO_RCVBUFFORCE`, which ignores `net.core.rmem_max`.
    pub force: bool,
}

/// Buffer sizes of one socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct EffectiveBuffers {
    /// Requested, bytes; none if the kernel tunes the buffer.
    pub rcvbuf_requested: Option<u32>,
    /// Read back, bytes; twice what was granted, for the kernel's bookkeeping.
    pub rcvbuf_effective: u32,
    /// Whether the kernel granted less than requested, because of `net.core.rmem_max`.
    pub rcvbuf_capped: bool,
    /// Requested, bytes.
    pub sndbuf_requested: u32,
    /// Read back, bytes; twice what was granted.
    pub sndbuf_effective: u32,
    /// Shift that the peer applies to our announced windows (RFC 7323), 0 to 14.
    pub window_scale: u8,
    /// Largest window that may be announced right after accept, bytes; it grows later.
    pub rcv_ssthresh_first: u32,
    /// Start value of autotuning, right after accept, bytes.
    pub rcv_space_first: u32,
}

impl RequestedBuffers {
    /// Sets the buffer of a listener before listen(2): the SYN exchange takes the window scale from it.
    ///
    /// # Errors
    /// The kernel's error; with `force`, that CAP_NET_ADMIN is missing.
    pub fn apply_to_listener(&self, listener: impl AsFd) -> io::Result<()> {
        match self.rcvbuf_on {
            RcvbufOn::Listener | RcvbufOn::Both => self.set_rcvbuf(listener.as_fd()),
            RcvbufOn::None | RcvbufOn::Accepted => Ok(()),
        }
    }

    /// Sets the buffers of an accepted socket and reads back the effective sizes.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn apply_to_accepted(&self, socket: impl AsFd) -> io::Result<EffectiveBuffers> {
        let fd = socket.as_fd();
        if matches!(self.rcvbuf_on, RcvbufOn::Accepted | RcvbufOn::Both) {
            self.set_rcvbuf(fd)?;
        }
        let socket = SockRef::from(&fd);
        socket.set_send_buffer_size(self.sndbuf as usize)?;
        let rcvbuf_requested = (self.rcvbuf_on != RcvbufOn::None).then_some(self.rcvbuf);
        let rcvbuf_effective = to_u32(socket.recv_buffer_size()?);
        let info = TcpInfo::of(fd)?;
        Ok(EffectiveBuffers {
            rcvbuf_requested,
            rcvbuf_effective,
            rcvbuf_capped: rcvbuf_requested
                .is_some_and(|requested| rcvbuf_effective / 2 < requested),
            sndbuf_requested: self.sndbuf,
            sndbuf_effective: to_u32(socket.send_buffer_size()?),
            window_scale: info.rcv_wscale(),
            rcv_ssthresh_first: info.rcv_ssthresh,
            rcv_space_first: info.rcv_space,
        })
    }

    fn set_rcvbuf(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self.force {
            true => force_rcvbuf(fd, self.rcvbuf),
            false => SockRef::from(&fd).set_recv_buffer_size(self.rcvbuf as usize),
        }
    }
}

/// `net.core.rmem_max`, bytes, if /proc has it.
#[must_use]
pub fn rmem_max() -> Option<u32> {
    fs::read_to_string("/proc/sys/net/core/rmem_max")
        .ok()?
        .trim()
        .parse()
        .ok()
}

fn to_u32(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

fn force_rcvbuf(fd: BorrowedFd<'_>, bytes: u32) -> io::Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is open, and the option value is one int that outlives the call.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVBUFFORCE,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
