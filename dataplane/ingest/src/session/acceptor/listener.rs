//! The listening socket, and which failures of accept(2) concern one peer only.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, Socket, Type};

use crate::session::buffers::RequestedBuffers;

/// Connections that the kernel queues before accept; it caps this at `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Opens a listening socket with its buffer already sized.
///
/// # Errors
/// The kernel's answer: the address is in use, or not one of this host's.
pub fn listen(address: SocketAddr, buffers: &RequestedBuffers) -> io::Result<TcpListener> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        // [::] also accepts IPv4, whatever the value of net.ipv6.bindv6only.
        socket.set_only_v6(false)?;
    }
    buffers.apply_to_listener(&socket)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

pub(super) fn is_about_the_peer(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
    ) || matches!(
        error.raw_os_error(),
        Some(libc::EPROTO | libc::ENETDOWN | libc::EHOSTUNREACH)
    )
}
