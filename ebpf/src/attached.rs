//! Which XDP program an interface has, and how to take it off.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libbpf_rs::query::{LinkInfoIter, LinkTypeInfo, ProgInfoIter};
use libbpf_sys::{XDP_ATTACHED_DRV, XDP_ATTACHED_HW, XDP_ATTACHED_NONE, XDP_ATTACHED_SKB};

use crate::Error;

/// How an interface runs an XDP program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Native where the driver has it, generic otherwise; what the kernel takes by itself.
    Auto,
    /// In the driver, before a socket buffer is made.
    Native,
    /// In the network stack, on a socket buffer; every interface can do it.
    Generic,
}

impl Mode {
    /// The flag of `bpf(2)` and of netlink.
    pub(crate) fn flags(self) -> u32 {
        match self {
            Self::Auto => 0,
            Self::Native => libbpf_sys::XDP_FLAGS_DRV_MODE,
            Self::Generic => libbpf_sys::XDP_FLAGS_SKB_MODE,
        }
    }

    /// What ip-link(8) calls a program of this mode; its `off` takes off no other.
    #[must_use]
    pub fn keyword(self) -> &'static str {
        match self {
            Self::Auto => "xdp",
            Self::Native => "xdpdrv",
            Self::Generic => "xdpgeneric",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Native => "native",
            Self::Generic => "generic",
        })
    }
}

/// An XDP program on an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// The kernel's number of the program.
    pub id: u32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// How it runs; never [`Mode::Auto`].
    pub mode: Mode,
}

/// The number of an interface in this network namespace.
///
/// # Errors
/// [`Error::NoInterface`].
pub fn index_of(interface: &str) -> Result<i32, Error> {
    let missing = |source| Error::NoInterface {
        interface: interface.to_owned(),
        source,
    };
    let name = CString::new(interface).map_err(|e| missing(io::Error::other(e)))?;
    // SAFETY: the name is a C string that outlives the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(missing(io::Error::last_os_error())),
        index => Ok(index as i32),
    }
}

/// What a driver does of XDP (linux/netdev.h, `enum netdev_xdp_act`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Runs programs, and redirects packets to sockets.
    pub native: bool,
    /// Receives into the memory of AF_XDP sockets.
    pub zero_copy: bool,
    /// Takes packets in several buffers.
    pub multi_buffer: bool,
}

/// What the driver of an interface does of XDP; `None` if it does nothing, or the kernel does not
/// tell (before Linux 6.3).
///
/// # Errors
/// [`Error::NoInterface`]; [`Error::Map`] when the kernel gives an error.
pub fn features(interface: &str) -> Result<Option<Features>, Error> {
    const BASIC_AND_REDIRECT: u64 = 1 | 2;
    const XSK_ZEROCOPY: u64 = 8;
    const RX_SG: u64 = 32;
    let flags = query(interface)?.feature_flags;
    Ok((flags != 0).then_some(Features {
        native: flags & BASIC_AND_REDIRECT == BASIC_AND_REDIRECT,
        zero_copy: flags & XSK_ZEROCOPY != 0,
        multi_buffer: flags & RX_SG != 0,
    }))
}

/// What is attached to an interface, if anything.
///
/// # Errors
/// [`Error::NoInterface`]; [`Error::Map`] when the kernel does not report it.
pub fn attached(interface: &str) -> Result<Option<Attached>, Error> {
    let options = query(interface)?;
    let (mode, id) = match u32::from(options.attach_mode) {
        XDP_ATTACHED_NONE => return Ok(None),
        XDP_ATTACHED_DRV => (Mode::Native, options.drv_prog_id),
        XDP_ATTACHED_SKB => (Mode::Generic, options.skb_prog_id),
        XDP_ATTACHED_HW => (Mode::Native, options.hw_prog_id),
        _ => (Mode::Native, options.prog_id),
    };
    Ok(Some(Attached {
        id,
        name: name_of(id),
        mode,
    }))
}

fn query(interface: &str) -> Result<libbpf_sys::bpf_xdp_query_opts, Error> {
    let index = index_of(interface)?;
    let mut options = libbpf_sys::bpf_xdp_query_opts {
        sz: size_of::<libbpf_sys::bpf_xdp_query_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    // SAFETY: the options are initialised and outlive the call; their size is theirs.
    let code = unsafe { libbpf_sys::bpf_xdp_query(index, 0, &raw mut options) };
    if code < 0 {
        return Err(Error::Map {
            what: "cannot ask about XDP on an interface",
            source: io::Error::from_raw_os_error(-code),
        });
    }
    Ok(options)
}

/// The name of a program; empty when it has gone, or may not be asked for.
fn name_of(id: u32) -> String {
    ProgInfoIter::default()
        .find(|program| program.id == id)
        .map(|program| program.name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Takes a program off an interface, whichever way it was attached.
pub(crate) fn detach(index: i32, found: &Attached) -> io::Result<()> {
    let link = LinkInfoIter::default().find(|link| {
        link.prog_id == found.id
            && matches!(&link.info, LinkTypeInfo::Xdp(xdp) if xdp.ifindex == index as u32)
    });
    match link {
        Some(link) => detach_link(link.id),
        None => {
            // SAFETY: no options are given.
            let code =
                unsafe { libbpf_sys::bpf_xdp_detach(index, found.mode.flags(), std::ptr::null()) };
            check(code)
        }
    }
}

fn detach_link(id: u32) -> io::Result<()> {
    // SAFETY: takes numbers only.
    let fd = unsafe { libbpf_sys::bpf_link_get_fd_by_id(id) };
    check(fd)?;
    // SAFETY: the descriptor is new and has no other owner.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: takes a descriptor that is open.
    check(unsafe { libbpf_sys::bpf_link_detach(link.as_raw_fd()) })
}

/// libbpf answers with a negative error number.
pub(crate) fn check(code: i32) -> io::Result<()> {
    if code < 0 {
        Err(io::Error::from_raw_os_error(-code))
    } else {
        Ok(())
    }
}
