//! One transmit queue of an interface, which nobody else uses: packets are written, headers and all,
//! into packet memory, and one system call covers many of them.
//!
//! The socket copies (`XDP_COPY`): the kernel makes packets of its own of what lies in the frames and
//! gives these to the driver, past its network stack. So no XDP program is needed, which drivers ask
//! for before they send from the frames themselves.
//!
//! A frame is in the list of free ones, in the transmit ring, or on its way back in the completion
//! ring, which has room for all of them. The last one to come back is the first to be used: what the
//! CPU's cache still holds.

use std::ffi::c_int;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::thread;
use std::time::{Duration, Instant};

use xsk_rs::config::BindFlags;
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, TxQueue, Umem};

use super::error::{Error, Purpose};
use super::frame::{Headers, MAX_HEADERS};
use super::port::MAX_BUFFERS;
use super::socket::{Bound, Memory, Rings};

/// Frames, and entries of the rings that carry them.
const FRAMES: u32 = 1024;
/// Entries of the rings for receiving, which must exist.
const UNUSED: u32 = 1;
const FRAME_SIZES: [u32; 2] = [2048, 4096];
/// What the kernel keeps free at the start of each frame (`XDP_PACKET_HEADROOM`).
const HEADROOM: u32 = 256;
/// Frames taken from the completion ring at a time.
const BURST: usize = 64;
/// In a descriptor: the packet goes on in the next one.
const XDP_PKT_CONTD: u32 = 1;
/// How many packets the kernel may take with one call (linux/if_xdp.h, since 6.17); 32 otherwise.
const XDP_MAX_TX_SKB_BUDGET: c_int = 9;
/// How long an interface that takes nothing is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_millis(10);
const NAP: Duration = Duration::from_micros(50);

/// Settings of a transmit port.
#[derive(Debug, Clone)]
pub struct TxPortConfig {
    /// Interface.
    pub interface: String,
    /// Transmit queue; no other AF_XDP socket may have it.
    pub queue: u32,
    /// Largest packet to be sent, bytes with all headers.
    pub largest: usize,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TxStats {
    /// Packets given to the kernel.
    pub packets: u64,
    /// System calls for it.
    pub kicks: u64,
    /// Packets dropped because the interface took nothing.
    pub dropped: u64,
}

/// A socket that has a transmit queue to itself.
#[derive(Debug)]
pub struct TxPort {
    umem: Umem,
    tx: TxQueue,
    completed: CompQueue,
    /// Nothing comes through these, but the socket lives as long as all of its rings.
    _unused: (RxQueue, FillQueue),
    free: Vec<FrameDesc>,
    done: [FrameDesc; BURST],
    /// Bytes of a frame that a packet can use.
    room: usize,
    largest: usize,
    stats: TxStats,
}

impl TxPort {
    /// Opens the socket of a queue.
    ///
    /// # Errors
    /// [`Error`] says what the kernel did not give.
    pub fn open(config: &TxPortConfig) -> Result<Self, Error> {
        let frame_size = frame_size(config.largest);
        let room = room(frame_size);
        let memory = Memory {
            frames: FRAMES,
            frame_size,
            fill: UNUSED,
            completed: FRAMES,
        };
        let (umem, free) = memory.make()?;
        let ((tx, rx, shared), buffers) = bind(config, &umem, config.largest > room)?;
        let (fill, completed) = shared.expect("a queue's first socket has its rings");
        let port = Self {
            umem,
            tx,
            completed,
            _unused: (rx, fill),
            free,
            done: [FrameDesc::default(); BURST],
            room,
            largest: config.largest.min(buffers * room),
            stats: TxStats::default(),
        };
        // Both make for fewer calls, but are no more than wishes.
        let memory = (FRAMES * frame_size) as c_int;
        port.wish(libc::SOL_SOCKET, libc::SO_SNDBUF, memory);
        port.wish(libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, FRAMES as c_int);
        Ok(port)
    }

    /// Largest packet that can be sent, bytes with all headers: what was asked for, or what fits in
    /// one frame where the kernel does not take packets in several (before Linux 6.6).
    #[must_use]
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// Puts a packet into the transmit ring, its payload in two parts, the first of which has an even
    /// number of bytes; it leaves with [`Self::flush`]. Waits a moment while the
    /// interface holds all frames; returns false when it goes on doing so and the packet is dropped.
    ///
    /// # Errors
    /// The kernel's answer, such as that the interface is gone.
    ///
    /// # Panics
    /// If the packet is larger than [`Self::largest`].
    pub fn send(&mut self, headers: &Headers, payload: [&[u8]; 2]) -> io::Result<bool> {
        let total = headers.len() + payload[0].len() + payload[1].len();
        assert!(total <= self.largest, "a packet of {total} bytes");
        let buffers = total.div_ceil(self.room);
        if self.free.len() < buffers {
            self.collect_completed();
            if self.free.len() < buffers && !self.drive(|port| port.free.len() >= buffers)? {
                self.stats.dropped += 1;
                return Ok(false);
            }
        }
        let first = self.free.len() - buffers;
        self.write(first, headers, payload);
        // SAFETY: the descriptors are of this memory, and nothing touches their frames until they
        // come back through the completion ring.
        if unsafe { self.tx.produce(&self.free[first..]) } == 0 {
            // The kernel has given frames back whose entries it still holds: the link is down.
            self.stats.dropped += 1;
            return Ok(false);
        }
        self.free.truncate(first);
        self.stats.packets += 1;
        Ok(true)
    }

    /// Writes a packet to the free frames from the one numbered `first`, which are as many as it
    /// needs.
    fn write(&mut self, first: usize, headers: &Headers, payload: [&[u8]; 2]) {
        let mut head = [0; MAX_HEADERS];
        headers.write(&mut head, &payload);
        let mut pieces = [&head[..headers.len()], payload[0], payload[1]];
        let frames = &mut self.free[first..];
        let last = frames.len() - 1;
        for (index, frame) in frames.iter_mut().enumerate() {
            // SAFETY: a free frame is ours alone; the descriptor is of this memory.
            let mut data = unsafe { self.umem.data_mut(frame) };
            let mut cursor = data.cursor();
            cursor.set_pos(0);
            pour(&mut pieces, cursor);
            frame.set_options(if index < last { XDP_PKT_CONTD } else { 0 });
        }
    }

    /// Lets the kernel send what is in the transmit ring, with one system call if it can. What it
    /// does not take within a moment goes out with a later call.
    ///
    /// # Errors
    /// The kernel's answer, such as that the interface is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.tx.nb_free_exact() < FRAMES {
            self.drive(|port| port.tx.nb_free_exact() == FRAMES)?;
        }
        Ok(())
    }

    /// What was sent so far.
    #[must_use]
    pub fn stats(&self) -> TxStats {
        self.stats
    }

    /// Lets the kernel work until `is_done`, but not for ever: an interface may have stopped.
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
            if stuck_since.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
                return Ok(false);
            }
            thread::sleep(NAP);
        }
    }

    /// Takes back the frames that the kernel has sent.
    fn collect_completed(&mut self) {
        loop {
            // SAFETY: the ring is that of this memory.
            let count = unsafe { self.completed.consume(&mut self.done) };
            self.free.extend_from_slice(&self.done[..count]);
            if count < BURST {
                return;
            }
        }
    }

    /// Sets an option, unless this kernel does not.
    fn wish(&self, level: c_int, name: c_int, value: c_int) {
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

/// Binds a socket; also returns how many buffers a packet may have.
fn bind(config: &TxPortConfig, umem: &Umem, large: bool) -> Result<(Bound, usize), Error> {
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
        // The kernel does not know the flag, or there is no such queue, which it says again.
        Err(Error::Socket { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
            Ok((bind(copy)?, 1))
        }
        bound => Ok((bound?, MAX_BUFFERS)),
    }
}

/// The smallest frame that a packet fits in, or the largest there is.
fn frame_size(packet: usize) -> u32 {
    let [small, large] = FRAME_SIZES;
    if packet <= room(small) { small } else { large }
}

/// Bytes of a frame that a packet can use.
fn room(frame_size: u32) -> usize {
    (frame_size - HEADROOM) as usize
}

/// Writes of `pieces` what there is room for; what is left of them is to follow.
fn pour(pieces: &mut [&[u8]], mut into: impl Write) {
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
    fn a_packet_goes_into_the_smallest_frame_that_takes_it() {
        assert_eq!(frame_size(1514), 2048);
        assert_eq!(frame_size(1792), 2048);
        assert_eq!(frame_size(1793), 4096);
        assert_eq!(frame_size(9014), 4096);
    }

    #[test]
    fn pieces_are_spread_over_frames_in_order() {
        let bytes: Vec<u8> = (0..100).collect();
        // Boundaries inside of a piece, at its end, and with nothing left at all.
        for room in [7, 10, 30, 50, 99, 100, 101] {
            let mut pieces = [&bytes[..10], &bytes[10..30], &bytes[30..30], &bytes[30..]];
            let mut got: Vec<u8> = Vec::new();
            for _ in 0..bytes.len().div_ceil(room) {
                let mut frame = vec![0; room];
                let mut rest = &mut frame[..];
                pour(&mut pieces, &mut rest);
                let used = room - rest.len();
                got.extend(&frame[..used]);
            }
            assert_eq!(got, bytes, "frames of {room}");
        }
    }
}
