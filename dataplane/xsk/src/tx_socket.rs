//! An AF_XDP socket that transmits on a queue of its own: it writes complete packets, including headers,
//! into packet memory, and one system call sends many of them.
//!
//! The socket works in copy mode (`XDP_COPY`): the kernel copies the frames into skbs and gives these to the
//! driver without the network stack. So it needs no XDP program, which drivers require before they send
//! from the frames themselves.
//!
//! Each frame is in the list of free frames, in the transmit ring, or in the completion ring, which has
//! room for all of them. The most recently completed frame is used first, because the CPU's cache still
//! holds it.

use std::ffi::c_int;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use xsk_rs::config::BindFlags;
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, TxQueue, Umem};

use super::error::{Error, Purpose};
use super::frame::{FrameTemplate, MAX_HEADERS};
use super::rings::{Bound, Rings, UmemSizes};
use super::rx_socket::MAX_BUFFERS;

/// Frames, and entries of the rings that carry them.
const FRAMES: u32 = 1024;
/// Entries of the receive and fill rings, which the socket must have but does not use.
const UNUSED: u32 = 1;
const FRAME_SIZES: [u32; 2] = [2048, 4096];
/// Bytes that the kernel reserves at the start of each frame (`XDP_PACKET_HEADROOM`).
const HEADROOM: u32 = 256;
/// Frames taken from the completion ring at a time.
const BURST: usize = 64;
/// Descriptor option: the packet continues in the next descriptor.
const XDP_PKT_CONTD: u32 = 1;
/// Socket option for the number of packets that one call may send (linux/if_xdp.h, since 6.17); otherwise
/// 32.
const XDP_MAX_TX_SKB_BUDGET: c_int = 9;
/// Time without progress after which the interface counts as stopped and packets are dropped.
const STALL_TIMEOUT: Duration = Duration::from_millis(10);
/// Interval of the checks for progress.
const STALL_POLL_INTERVAL: Duration = Duration::from_micros(50);

/// Settings of a transmit socket.
#[derive(Debug, Clone)]
pub struct XskTxConfig {
    /// Interface.
    pub interface: String,
    /// Transmit queue; no other AF_XDP socket may use it.
    pub queue: u32,
    /// Largest packet to send, bytes including all headers.
    pub largest: usize,
}

/// Counters of a transmit socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct XskTxStats {
    /// Packets handed to the kernel.
    pub packets: u64,
    /// System calls that sent them.
    pub kicks: u64,
    /// Packets dropped because the interface made no progress.
    pub dropped: u64,
}

/// A socket with a transmit queue of its own.
#[derive(Debug)]
pub struct XskTxSocket {
    umem: Umem,
    tx: TxQueue,
    completed: CompQueue,
    /// Unused, but the socket lives only as long as all of its rings.
    _unused: (RxQueue, FillQueue),
    free: Vec<FrameDesc>,
    done: [FrameDesc; BURST],
    /// Bytes of a frame that a packet can use.
    usable: usize,
    largest: usize,
    stats: XskTxStats,
}

impl XskTxSocket {
    /// Opens the socket of a queue.
    ///
    /// # Errors
    /// [`Error`] says which resource the kernel refused.
    pub fn open(config: &XskTxConfig) -> Result<Self, Error> {
        let frame_size = frame_size(config.largest);
        let usable = usable_bytes(frame_size);
        let sizes = UmemSizes {
            frames: FRAMES,
            frame_size,
            fill: UNUSED,
            completed: FRAMES,
        };
        let (umem, free) = sizes.register()?;
        let ((tx, rx, shared), buffers) = bind(config, &umem, config.largest > usable)?;
        let (fill, completed) = shared.expect("a queue's first socket has its rings");
        let socket = Self {
            umem,
            tx,
            completed,
            _unused: (rx, fill),
            free,
            done: [FrameDesc::default(); BURST],
            usable,
            largest: config.largest.min(buffers * usable),
            stats: XskTxStats::default(),
        };
        // Both reduce the number of system calls; the socket works without them.
        let memory = (FRAMES * frame_size) as c_int;
        socket.try_set_option(libc::SOL_SOCKET, libc::SO_SNDBUF, memory);
        socket.try_set_option(libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, FRAMES as c_int);
        Ok(socket)
    }

    /// Largest packet that can be sent, bytes including all headers: the configured size, or one frame if
    /// the kernel does not support packets in several frames (before Linux 6.6).
    #[must_use]
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Puts a packet into the transmit ring; [`Self::flush`] sends it. The payload has two parts, the first
    /// of an even length. Waits while the interface holds all frames; returns false if it drops the packet
    /// because the interface has stopped.
    ///
    /// # Errors
    /// The kernel's error, for example if the interface is gone.
    ///
    /// # Panics
    /// If the packet is larger than [`Self::largest`].
    pub fn send(&mut self, headers: &FrameTemplate, payload: [&[u8]; 2]) -> io::Result<bool> {
        let total = headers.len() + payload[0].len() + payload[1].len();
        assert!(total <= self.largest, "a packet of {total} bytes");
        let buffers = total.div_ceil(self.usable);
        if self.free.len() < buffers {
            self.collect_completed();
            if self.free.len() < buffers && !self.drive(|socket| socket.free.len() >= buffers)? {
                self.stats.dropped += 1;
                return Ok(false);
            }
        }
        let first = self.free.len() - buffers;
        self.write(first, headers, payload);
        // SAFETY: the descriptors belong to this memory, and nothing touches their frames until the
        // completion ring returns them.
        if unsafe { self.tx.produce(&self.free[first..]) } == 0 {
            // The kernel has completed frames whose ring entries it still holds: the link is down.
            self.stats.dropped += 1;
            return Ok(false);
        }
        self.free.truncate(first);
        self.stats.packets += 1;
        Ok(true)
    }

    /// Writes a packet to the free frames from index `first` on, exactly as many as it needs.
    fn write(&mut self, first: usize, headers: &FrameTemplate, payload: [&[u8]; 2]) {
        let mut head = [0; MAX_HEADERS];
        headers.write(&mut head, &payload);
        let mut pieces = [&head[..headers.len()], payload[0], payload[1]];
        let frames = &mut self.free[first..];
        let last = frames.len() - 1;
        for (index, frame) in frames.iter_mut().enumerate() {
            // SAFETY: this socket alone owns a free frame; the descriptor belongs to this memory.
            let mut data = unsafe { self.umem.data_mut(frame) };
            let mut cursor = data.cursor();
            cursor.set_pos(0);
            write_pieces(&mut pieces, cursor);
            frame.set_options(if index < last { XDP_PKT_CONTD } else { 0 });
        }
    }

    /// Makes the kernel send what is in the transmit ring, with one system call if possible. A later call
    /// sends what the kernel does not accept in time.
    ///
    /// # Errors
    /// The kernel's error, for example if the interface is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.tx.nb_free_exact() < FRAMES {
            self.drive(|socket| socket.tx.nb_free_exact() == FRAMES)?;
        }
        Ok(())
    }

    /// Counters so far.
    #[must_use]
    pub fn stats(&self) -> XskTxStats {
        self.stats
    }

    /// Makes the kernel send until `is_done`; returns false if the interface has stopped.
    fn drive(&mut self, is_done: impl Fn(&mut Self) -> bool) -> io::Result<bool> {
        let mut stuck_since = None;
        loop {
            let before = (self.tx.nb_free_exact(), self.free.len());
            if self.tx.needs_wakeup() {
                self.stats.kicks += 1;
                self.tx.wakeup()?;
            }
            self.collect_completed();
            if is_done(self) {
                return Ok(true);
            }
            if (self.tx.nb_free_exact(), self.free.len()) != before {
                stuck_since = None;
                continue;
            }
            if stuck_since.get_or_insert_with(Instant::now).elapsed() > STALL_TIMEOUT {
                return Ok(false);
            }
            thread::sleep(STALL_POLL_INTERVAL);
        }
    }

    /// Takes sent frames from the completion ring.
    fn collect_completed(&mut self) {
        loop {
            // SAFETY: the ring belongs to this memory.
            let count = unsafe { self.completed.consume(&mut self.done) };
            self.free.extend_from_slice(&self.done[..count]);
            if count < BURST {
                return;
            }
        }
    }

    /// Sets a socket option, if the kernel supports it.
    fn try_set_option(&self, level: c_int, name: c_int, value: c_int) {
        // SAFETY: the option's value is an int, whose address and size are given.
        unsafe {
            libc::setsockopt(
                self.tx.fd().as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of::<c_int>() as libc::socklen_t,
            );
        }
    }
}

/// Binds a socket; also returns the maximum number of buffers of a packet.
fn bind(config: &XskTxConfig, umem: &Umem, large: bool) -> Result<(Bound, usize), Error> {
    let copy = BindFlags::XDP_USE_NEED_WAKEUP | BindFlags::XDP_COPY;
    let bind = |flags| {
        let rings = Rings {
            interface: &config.interface,
            queue: config.queue,
            received: UNUSED,
            sent: FRAMES,
            flags,
            purpose: Purpose::Transmit,
        };
        rings.bind(umem)
    };
    if !large {
        return Ok((bind(copy)?, 1));
    }
    match bind(copy | BindFlags::XDP_USE_SG) {
        // The kernel does not know the flag, or the queue does not exist; then it fails again.
        Err(Error::Socket { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
            Ok((bind(copy)?, 1))
        }
        bound => Ok((bound?, MAX_BUFFERS)),
    }
}

/// The smallest frame that has room for a packet, or the largest one.
fn frame_size(packet: usize) -> u32 {
    let [small, large] = FRAME_SIZES;
    if packet <= usable_bytes(small) {
        small
    } else {
        large
    }
}

/// Bytes of a frame that a packet can use.
fn usable_bytes(frame_size: u32) -> usize {
    (frame_size - HEADROOM) as usize
}

/// Writes as much of `pieces` as fits, and leaves the rest in them.
fn write_pieces(pieces: &mut [&[u8]], mut into: impl Write) {
    for piece in pieces {
        let written = into.write(piece).expect("memory takes what fits");
        *piece = &piece[written..];
        if !piece.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_uses_the_smallest_frame_that_fits() {
        assert_eq!(frame_size(1514), 2048);
        assert_eq!(frame_size(1792), 2048);
        assert_eq!(frame_size(1793), 4096);
        assert_eq!(frame_size(9014), 4096);
    }

    #[test]
    fn pieces_are_spread_over_frames_in_order() {
        let bytes: Vec<u8> = (0..100).collect();
        // Boundaries inside a piece, at its end, and beyond the last one.
        for room in [7, 10, 30, 50, 99, 100, 101] {
            let mut pieces = [&bytes[..10], &bytes[10..30], &bytes[30..30], &bytes[30..]];
            let mut got: Vec<u8> = Vec::new();
            for _ in 0..bytes.len().div_ceil(room) {
                let mut frame = vec![0; room];
                let mut rest = &mut frame[..];
                write_pieces(&mut pieces, &mut rest);
                let used = room - rest.len();
                got.extend(&frame[..used]);
            }
            assert_eq!(got, bytes, "frames of {room}");
        }
    }
}
