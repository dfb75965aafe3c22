//! `struct tcp_info` as include/uapi/linux/tcp.h lays it out. The kernel only ever appends to it, so
//! an older kernel's is a prefix of this one, and what is missing is zero.

#![allow(
    missing_docs,
    reason = "fields have the names of the kernel's struct tcp_info"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use zerocopy::{FromBytes, FromZeros, IntoBytes, KnownLayout};

/// `TCPI_OPT_WSCALE`.
const OPTION_WSCALE: u8 = 4;

/// The part that is used here; later fields are left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout)]
#[repr(C)]
pub struct TcpInfo {
    pub state: u8,
    pub ca_state: u8,
    pub retransmits: u8,
    pub probes: u8,
    pub backoff: u8,
    pub options: u8,
    /// Scale that the peer asked for in the low half, our own in the high one.
    scales: u8,
    /// Lowest bit: the last delivery rate was limited by the application.
    flags: u8,
    pub rto: u32,
    pub ato: u32,
    pub snd_mss: u32,
    pub rcv_mss: u32,
    /// Packets on their way.
    pub unacked: u32,
    pub sacked: u32,
    pub lost: u32,
    pub retrans: u32,
    pub fackets: u32,
    pub last_data_sent: u32,
    pub last_ack_sent: u32,
    pub last_data_recv: u32,
    pub last_ack_recv: u32,
    pub pmtu: u32,
    pub rcv_ssthresh: u32,
    /// Microseconds.
    pub rtt: u32,
    pub rttvar: u32,
    pub snd_ssthresh: u32,
    /// Packets.
    pub snd_cwnd: u32,
    pub advmss: u32,
    pub reordering: u32,
    /// Microseconds.
    pub rcv_rtt: u32,
    pub rcv_space: u32,
    pub total_retrans: u32,
    pub pacing_rate: u64,
    pub max_pacing_rate: u64,
    pub bytes_acked: u64,
    pub bytes_received: u64,
    pub segs_out: u32,
    pub segs_in: u32,
    pub notsent_bytes: u32,
    /// Microseconds.
    pub min_rtt: u32,
    pub data_segs_in: u32,
    pub data_segs_out: u32,
    pub delivery_rate: u64,
    /// Microseconds in which data was waiting or on its way.
    pub busy_time: u64,
    /// Microseconds of these in which the peer's window was closed.
    pub rwnd_limited: u64,
    /// Microseconds of these in which the send buffer was too small.
    pub sndbuf_limited: u64,
    pub delivered: u32,
    pub delivered_ce: u32,
    pub bytes_sent: u64,
    pub bytes_retrans: u64,
    pub dsack_dups: u32,
    pub reord_seen: u32,
    pub rcv_ooopack: u32,
    pub snd_wnd: u32,
    /// Since Linux 6.2; 0 before.
    pub rcv_wnd: u32,
    padding: u32,
}

impl TcpInfo {
    /// The figures of a TCP socket.
    ///
    /// # Errors
    /// The kernel's error, for example if it is no TCP socket.
    pub fn of(socket: impl AsFd) -> io::Result<Self> {
        let mut info = Self::new_zeroed();
        let mut len = size_of::<Self>() as libc::socklen_t;
        // SAFETY: the descriptor is open; the kernel writes at most `len` bytes to `info`, for whose fields
        // any bytes are valid.
        let result = unsafe {
            libc::getsockopt(
                socket.as_fd().as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut len,
            )
        };
        match result {
            0 => Ok(info),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Reads what the kernel says, however much it is.
    #[must_use]
    pub fn read(bytes: &[u8]) -> Self {
        let mut info = Self::new_zeroed();
        let length = bytes.len().min(size_of::<Self>());
        info.as_mut_bytes()[..length].copy_from_slice(&bytes[..length]);
        info
    }

    /// Bits that the peer's windows are shifted by: what it asked for in its SYN.
    #[must_use]
    pub fn snd_wscale(&self) -> u8 {
        self.scales & 0xf
    }

    /// Bits that our own windows are shifted by.
    #[must_use]
    pub fn rcv_wscale(&self) -> u8 {
        self.scales >> 4
    }

    /// Whether both SYNs announced window scaling; without it no window exceeds 65,535 bytes.
    #[must_use]
    pub fn scales_windows(&self) -> bool {
        self.options & OPTION_WSCALE != 0
    }

    #[must_use]
    pub fn is_app_limited(&self) -> bool {
        self.flags & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn a_connection_has_figures_and_a_datagram_socket_none() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        for end in [&peer, &socket] {
            let info = TcpInfo::of(end).unwrap();
            assert!(info.snd_mss > 0 && info.snd_cwnd > 0 && info.rcv_ssthresh > 0);
        }
        let datagrams = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(TcpInfo::of(&datagrams).is_err());
    }

    #[test]
    fn fields_lie_where_the_kernel_has_them() {
        assert_eq!(offset_of!(TcpInfo, rto), 8);
        assert_eq!(offset_of!(TcpInfo, rcv_ssthresh), 64);
        assert_eq!(offset_of!(TcpInfo, rtt), 68);
        assert_eq!(offset_of!(TcpInfo, rcv_space), 96);
        assert_eq!(offset_of!(TcpInfo, bytes_received), 128);
        assert_eq!(offset_of!(TcpInfo, min_rtt), 148);
        assert_eq!(offset_of!(TcpInfo, busy_time), 168);
        assert_eq!(offset_of!(TcpInfo, bytes_retrans), 208);
        assert_eq!(offset_of!(TcpInfo, rcv_wnd), 232);
    }

    #[test]
    fn an_older_kernel_says_less() {
        let mut bytes = [0; 104];
        bytes[5] = 7;
        bytes[6] = 0x7a;
        bytes[96..100].copy_from_slice(&43_690_u32.to_ne_bytes());
        let info = TcpInfo::read(&bytes);
        assert_eq!((info.snd_wscale(), info.rcv_wscale()), (10, 7));
        assert!(info.scales_windows() && !TcpInfo::read(&[3; 6]).scales_windows());
        assert_eq!((info.rcv_space, info.rwnd_limited), (43_690, 0));
        assert_eq!(TcpInfo::read(&[0xff; 400]).rcv_wnd, u32::MAX);
    }
}
