//! The UDP socket of a stream over xdp: many packets a system call, cut apart by the kernel.

use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use penstock_runtime::address::canonical;
use penstock_wire::packet::{ACK_SEAL_LEN, MAX_ACK_LEN};
use socket2::SockRef;

/// Packets that one call may send: `UDP_MAX_SEGMENTS` of kernels before 6.9.
pub(crate) const MAX_SEGMENTS: usize = 64;
/// Bytes that one call may send: what an IP datagram holds, less headers.
pub(crate) const MAX_BYTES: usize = 65_000;
/// ACK packets taken with one call.
const ACKS: usize = 16;
const LONGEST_ACK: usize = MAX_ACK_LEN + ACK_SEAL_LEN;
/// What the kernel may hold of packets to be sent.
const SNDBUF: usize = 4 << 20;
/// Headers of IP and UDP.
const V4_HEADERS: u32 = 28;
const V6_HEADERS: u32 = 48;

/// A UDP socket that is connected to a broker.
#[derive(Debug)]
pub(crate) struct Datagrams {
    socket: UdpSocket,
    /// Whether the kernel, or the interface, cuts a long buffer into packets.
    segments: bool,
    calls: u64,
    acks: Box<[[u8; LONGEST_ACK + 1]; ACKS]>,
    lens: [usize; ACKS],
}

impl Datagrams {
    /// A socket for datagrams to `broker`, from any port of `own`. That is the local address of the
    /// connection that opened the stream, because the broker answers no other.
    pub(crate) fn connect(mut own: SocketAddr, broker: SocketAddr) -> io::Result<Self> {
        own.set_port(0);
        let socket = UdpSocket::bind(own)?;
        socket.connect(broker)?;
        // The kernel gives what wmem_max allows, which is enough.
        SockRef::from(&socket).set_send_buffer_size(SNDBUF)?;
        // Never fragments, whatever a router said: the transport finds out what fits.
        let (level, name, value) = match broker {
            SocketAddr::V4(_) => (
                libc::IPPROTO_IP,
                libc::IP_MTU_DISCOVER,
                libc::IP_PMTUDISC_PROBE,
            ),
            SocketAddr::V6(_) => (
                libc::IPPROTO_IPV6,
                libc::IPV6_MTU_DISCOVER,
                libc::IPV6_PMTUDISC_PROBE,
            ),
        };
        set_int(socket.as_fd(), level, name, value)?;
        Ok(Self {
            socket,
            segments: true,
            calls: 0,
            acks: Box::new([[0; LONGEST_ACK + 1]; ACKS]),
            lens: [0; ACKS],
        })
    }

    /// Largest UDP payload that the interface towards the broker takes, bytes.
    pub(crate) fn max_datagram(&self) -> io::Result<u32> {
        let (level, name, headers) = match self.socket.peer_addr()? {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU, V4_HEADERS),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_MTU, V6_HEADERS),
        };
        let mtu = get_int(self.socket.as_fd(), level, name)?;
        Ok((mtu as u32).saturating_sub(headers).min(MAX_BYTES as u32))
    }

    /// The socket, to be watched.
    pub(crate) fn socket(&self) -> &UdpSocket {
        &self.socket
    }

    /// Whether several packets may go out with one call.
    pub(crate) fn has_segments(&self) -> bool {
        self.segments
    }

    /// Its own address and the broker's; those of IPv4 in their own form, also on an IPv6 socket.
    pub(crate) fn ends(&self) -> io::Result<(SocketAddr, SocketAddr)> {
        let own = self.socket.local_addr()?;
        Ok((canonical(own), canonical(self.socket.peer_addr()?)))
    }

    /// System calls made to send.
    pub(crate) fn calls(&self) -> u64 {
        self.calls
    }

    /// Sends packets, each in two parts: all as long as the first, but the last may be shorter. Does
    /// not wait: the error is `WouldBlock` while the kernel holds as much as it may.
    ///
    /// An interface that cannot do this is remembered: the error is `Unsupported`, then, nothing
    /// was sent, and [`Self::has_segments`] says no from now on.
    pub(crate) fn send(&mut self, packets: &[[IoSlice<'_>; 2]]) -> io::Result<()> {
        let parts = packets.as_flattened();
        let segment = packets[0][0].len() + packets[0][1].len();
        let several = packets.len() > 1;
        let mut control = [0u64; 4];
        // SAFETY: a msghdr of zeros is valid: no name, no control data, no buffers.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        // An IoSlice has the layout of an iovec.
        message.msg_iov = parts.as_ptr().cast_mut().cast();
        message.msg_iovlen = parts.len();
        if several {
            message.msg_control = control.as_mut_ptr().cast();
            // SAFETY: computes sizes only.
            message.msg_controllen = unsafe { libc::CMSG_SPACE(size_of::<u16>() as u32) } as usize;
            // SAFETY: the control buffer is aligned, zeroed and larger than one header with a u16.
            unsafe {
                let header = libc::CMSG_FIRSTHDR(&raw const message);
                (*header).cmsg_level = libc::SOL_UDP;
                (*header).cmsg_type = libc::UDP_SEGMENT;
                (*header).cmsg_len = libc::CMSG_LEN(size_of::<u16>() as u32) as usize;
                libc::CMSG_DATA(header)
                    .cast::<u16>()
                    .write_unaligned(segment as u16);
            }
        }
        loop {
            self.calls += 1;
            // SAFETY: the descriptor is open; all buffers outlive the call.
            let sent = unsafe {
                libc::sendmsg(
                    self.socket.as_raw_fd(),
                    &raw const message,
                    libc::MSG_DONTWAIT,
                )
            };
            if sent >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                // No checksum offload to rely on (udp(7)).
                Some(libc::EIO | libc::EOPNOTSUPP) if several => {
                    self.segments = false;
                    return Err(io::Error::new(io::ErrorKind::Unsupported, error));
                }
                _ => return Err(error),
            }
        }
    }

    /// Takes ACK packets that have come; returns how many. More may wait when it is [`Self::BATCH`].
    pub(crate) fn receive(&mut self) -> io::Result<usize> {
        let mut buffers: [libc::iovec; ACKS] = std::array::from_fn(|index| libc::iovec {
            iov_base: self.acks[index].as_mut_ptr().cast(),
            iov_len: self.acks[index].len(),
        });
        // SAFETY: an mmsghdr of zeros is valid: no name, no control data, no buffers.
        let mut messages: [libc::mmsghdr; ACKS] = unsafe { std::mem::zeroed() };
        for (message, buffer) in messages.iter_mut().zip(&mut buffers) {
            message.msg_hdr.msg_iov = buffer;
            message.msg_hdr.msg_iovlen = 1;
        }
        // SAFETY: the descriptor is open; messages and buffers outlive the call, the count is theirs.
        let count = unsafe {
            libc::recvmmsg(
                self.socket.as_raw_fd(),
                messages.as_mut_ptr(),
                ACKS as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        let Ok(count) = usize::try_from(count) else {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(error),
            };
        };
        for (len, message) in self.lens.iter_mut().zip(&messages[..count]) {
            *len = message.msg_len as usize;
        }
        Ok(count)
    }

    /// Most packets that [`Self::receive`] takes.
    pub(crate) const BATCH: usize = ACKS;

    /// A packet that [`Self::receive`] took.
    pub(crate) fn ack(&self, index: usize) -> &[u8] {
        &self.acks[index][..self.lens[index]]
    }
}

fn set_int(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    // SAFETY: the option's value is an int, whose address and size are given.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<i32>() as libc::socklen_t,
        )
    };
    if code == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn get_int(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value = 0i32;
    let mut len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the option's value is an int, whose address and size are given.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    if code == 0 {
        Ok(value)
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_cut_into_packets_and_answers_come_back() {
        let broker = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own: SocketAddr = "127.0.0.7:1".parse().unwrap();
        let mut datagrams = Datagrams::connect(own, broker.local_addr().unwrap()).unwrap();
        assert!(datagrams.max_datagram().unwrap() >= 65_000);
        let part = |len| IoSlice::new(&[1; 200][..len]);
        let packets = [
            [part(50), part(150)],
            [part(50), part(150)],
            [part(50), part(100)],
        ];
        datagrams.send(&packets).unwrap();
        assert_eq!(datagrams.calls(), 1);
        let mut packet = [0; 1000];
        let mut lens = Vec::new();
        for _ in 0..3 {
            let (len, from) = broker.recv_from(&mut packet).unwrap();
            assert_eq!(from.ip(), own.ip());
            lens.push(len);
            broker.send_to(&packet[..len], from).unwrap();
        }
        assert_eq!(lens, [200, 200, 150]);
        let mut got = 0;
        while got < 3 {
            let count = datagrams.receive().unwrap();
            for index in 0..count {
                assert_eq!(datagrams.ack(index).len(), lens[got + index]);
            }
            got += count;
        }
        assert_eq!(datagrams.receive().unwrap(), 0);
    }
}
