//! The AF_XDP sockets of a receive queue: packet memory, rings, and which of them owns a frame.
//!
//! A frame of the packet memory is at any time in exactly one place: the fill ring (the kernel may
//! receive into it), a receive ring, the socket's own lists, a transmit ring, the completion ring, or the
//! list of free frames. Received frames return to the fill ring at once, so that it never runs dry;
//! replies have frames of their own, so that no flood of packets uses them up.
//!
//! Several sockets may share a queue, because a queue may deliver more than one worker can process. They
//! have receive and transmit rings of their own, but the kernel gives a queue one fill and one completion
//! ring (`XDP_SHARED_UMEM`, Documentation/networking/af_xdp.rst). A socket that needs these rings tries
//! their lock; if another socket holds it, this one tries again in its next round.

use std::ffi::c_int;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use serde::Serialize;
use xsk_rs::config::BindFlags;
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, TxQueue, Umem};

use super::error::{Error, Purpose};
use super::prefetch;
use super::rings::{Rings, UmemSizes};

/// Packets taken from the receive ring at a time.
pub const BURST: usize = 64;
/// Frames for replies, per socket.
const REPLY_FRAMES: u32 = 256;
/// Maximum number of buffers of one datagram: 64 KiB in frames of 4 KiB.
pub const MAX_BUFFERS: usize = 18;
/// Longest IP packet. In generic mode a program may get one that is longer than the MTU: several
/// datagrams that the interface would have segmented.
pub const LONGEST_PACKET: u32 = 65_535;
/// Bytes of a frame that the kernel reserves (`XDP_PACKET_HEADROOM`).
pub const HEADROOM: u32 = 256;
/// An Ethernet header with two VLAN tags.
pub const ETHERNET: u32 = 22;
const SMALL_FRAME: u32 = 2048;
const LARGE_FRAME: u32 = 4096;

/// Bytes of a frame for IP packets of up to `longest` bytes: as small as possible, because small memory
/// stays in the cache. `zero_copy`: the driver may receive into the frames itself.
#[must_use]
pub fn frame_size(longest: u32, zero_copy: bool) -> u32 {
    if fits(longest, SMALL_FRAME, zero_copy) {
        SMALL_FRAME
    } else {
        LARGE_FRAME
    }
}

/// Bytes of packet memory of a queue that `count` sockets share. The memory is locked: without
/// CAP_IPC_LOCK it counts against RLIMIT_MEMLOCK.
#[must_use]
pub fn packet_memory(ring: u32, frame_size: u32, count: u32) -> u64 {
    u64::from(ring + reply_frames(count)) * u64::from(frame_size)
}

/// Whether an IP packet of `longest` bytes fits in one frame. Some drivers configure a frame's size in KiB,
/// rounded down, and the NIC puts the rest of a longer packet into the next frame (`igb_setup_srrctl` in
/// Linux 6.14).
#[must_use]
pub fn fits(longest: u32, frame_size: u32, zero_copy: bool) -> bool {
    let room = frame_size - HEADROOM;
    let room = if zero_copy { room / 1024 * 1024 } else { room };
    longest + ETHERNET <= room
}

/// Frames for replies of all sockets of a queue.
fn reply_frames(count: u32) -> u32 {
    (REPLY_FRAMES * count).next_power_of_two()
}

/// Settings of a receive socket.
#[derive(Debug, Clone)]
pub struct XskRxConfig {
    /// Interface.
    pub interface: String,
    /// Receive queue.
    pub queue: u32,
    /// Entries of the fill ring and of each receive ring, a power of two.
    pub ring: u32,
    /// Bytes of a frame, 2048 or 4096.
    pub frame_size: u32,
    /// Accept packets that need several frames (`XDP_USE_SG`, Linux 6.6). Many drivers then copy: they
    /// support zero-copy only if each packet has one buffer.
    pub several_buffers: bool,
    /// Use copy mode even if the driver supports zero-copy.
    pub copy: bool,
    /// Packets that one system call may process in the interface's queue (`SO_PREFER_BUSY_POLL`); `None`
    /// leaves the queue to interrupts.
    pub busy_poll: Option<u16>,
}

/// Counters of a socket: the kernel's (`XDP_STATISTICS`) and its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct XskRxStats {
    /// Packets received.
    pub packets: u64,
    /// Bytes received, with all headers.
    pub bytes: u64,
    /// Packets in more than one buffer.
    pub multi_buffer: u64,
    /// Packets sent.
    pub sent: u64,
    /// Replies dropped for lack of a free frame.
    pub no_frame: u64,
    /// System calls that drove the rings.
    pub kicks: u64,
    /// Packets that the kernel dropped for other reasons.
    pub rx_dropped: u64,
    /// Packets dropped because the receive ring was full: the worker is too slow.
    pub rx_ring_full: u64,
    /// Packets dropped because the fill ring was empty.
    pub rx_fill_ring_empty: u64,
    /// Descriptors that the kernel refused.
    pub invalid: u64,
}

/// Rings and frames that the sockets of a queue share.
#[derive(Debug)]
struct Queue {
    fill: FillQueue,
    completed: CompQueue,
    /// Frames for replies that no socket holds.
    free: Vec<FrameDesc>,
    done: [FrameDesc; BURST],
}

/// One of the sockets of a receive queue.
#[derive(Debug)]
pub struct XskRxSocket {
    umem: Umem,
    rx: RxQueue,
    tx: TxQueue,
    queue: Arc<Mutex<Queue>>,
    received: [FrameDesc; BURST],
    /// Buffers of a packet whose last buffer is not in the ring yet.
    partial: Vec<FrameDesc>,
    /// Processed frames that go back to the fill ring.
    to_refill: Vec<FrameDesc>,
    free: Vec<FrameDesc>,
    unsent: bool,
    busy_poll: bool,
    zero_copy: bool,
    stats: XskRxStats,
}

impl XskRxSocket {
    /// Opens `count` sockets of a queue. Packets arrive once an XDP program redirects them to these sockets.
    ///
    /// # Errors
    /// [`Error`] says which resource the kernel refused.
    ///
    /// # Panics
    /// If a size in the configuration is not a power of two in its range, or `count` is 0.
    pub fn open(config: &XskRxConfig, count: u32) -> Result<Vec<Self>, Error> {
        let replies = reply_frames(count);
        let sizes = UmemSizes {
            frames: config.ring + replies,
            frame_size: config.frame_size,
            fill: config.ring,
            completed: replies,
        };
        let (umem, mut frames) = sizes.register()?;
        let mut flags = BindFlags::XDP_USE_NEED_WAKEUP;
        flags.set(BindFlags::XDP_USE_SG, config.several_buffers);
        flags.set(BindFlags::XDP_COPY, config.copy);
        let rings = Rings {
            interface: &config.interface,
            queue: config.queue,
            received: config.ring,
            sent: REPLY_FRAMES,
            flags,
            purpose: Purpose::Receive,
        };
        let free = frames.split_off(config.ring as usize);
        let mut unfilled = Some(frames);
        let mut queue = None;
        let mut sockets = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let (tx, rx, shared) = rings.bind(&umem)?;
            if let Some((fill, completed)) = shared {
                queue = Some(Arc::new(Mutex::new(Queue {
                    fill,
                    completed,
                    free: free.clone(),
                    done: [FrameDesc::default(); BURST],
                })));
            }
            let queue = queue
                .as_ref()
                .expect("a queue's first socket has its rings");
            let mut to_refill = Vec::with_capacity(config.ring as usize);
            to_refill.extend(unfilled.take().unwrap_or_default());
            let mut socket = Self {
                umem: umem.clone(),
                rx,
                tx,
                queue: Arc::clone(queue),
                received: [FrameDesc::default(); BURST],
                partial: Vec::with_capacity(MAX_BUFFERS),
                to_refill,
                free: Vec::with_capacity(2 * BURST),
                unsent: false,
                busy_poll: config.busy_poll.is_some(),
                zero_copy: false,
                stats: XskRxStats::default(),
            };
            if let Some(budget) = config.busy_poll {
                prefer_busy_poll(socket.fd(), budget)?;
            }
            socket.zero_copy = is_zero_copy(socket.fd())?;
            socket.refill();
            if socket.zero_copy && !socket.busy_poll {
                socket.make_driver_read_fill_ring();
            }
            sockets.push(socket);
        }
        Ok(sockets)
    }

    /// The socket, for the XDP program's map.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket lives as long as its rings, which `self` owns.
        unsafe { BorrowedFd::borrow_raw(self.rx.fd().as_raw_fd()) }
    }

    /// Whether the driver writes packets straight to the packet memory.
    #[must_use]
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Passes up to [`BURST`] received buffers to `handle`, one call per packet with its buffers in order;
    /// returns the number of packets.
    pub fn receive(&mut self, mut handle: impl FnMut(&[&[u8]])) -> usize {
        // SAFETY: the rings belong to this packet memory.
        let count = unsafe { self.rx.consume(&mut self.received) };
        let mut packets = 0;
        for index in 0..count {
            if let Some(later) = self.received[..count].get(index + prefetch::AHEAD) {
                // SAFETY: as below.
                prefetch::frame(unsafe { self.umem.data(later) }.contents());
            }
            let buffer = self.received[index];
            if self.partial.is_empty() && !buffer.has_more_frames() {
                // The whole packet: the usual case.
                // SAFETY: as below.
                let part = unsafe { self.umem.data(&buffer) }.contents();
                self.stats.bytes += part.len() as u64;
                handle(&[part]);
                packets += 1;
                self.to_refill.push(buffer);
                continue;
            }
            self.partial.push(buffer);
            if buffer.has_more_frames() {
                continue;
            }
            self.stats.multi_buffer += u64::from(self.partial.len() > 1);
            let mut parts: [&[u8]; MAX_BUFFERS] = [&[]; MAX_BUFFERS];
            // A packet in more buffers than any MTU needs is dropped.
            if self.partial.len() <= MAX_BUFFERS {
                for (part, buffer) in parts.iter_mut().zip(&self.partial) {
                    // SAFETY: the descriptor came from the receive ring of this memory and is not in the
                    // fill ring again yet, so the kernel does not write to its frame.
                    *part = unsafe { self.umem.data(buffer) }.contents();
                }
                let parts = &parts[..self.partial.len()];
                self.stats.bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                handle(parts);
                packets += 1;
            }
            self.to_refill.append(&mut self.partial);
        }
        self.stats.packets += packets as u64;
        if !self.to_refill.is_empty() {
            self.refill();
        }
        packets
    }

    /// Queues one packet of at most one frame; [`Self::flush`] sends it. Returns false if it drops the
    /// packet for lack of a frame.
    ///
    /// # Panics
    /// If the packet is larger than a frame.
    pub fn send(&mut self, packet: &[u8]) -> bool {
        if self.free.is_empty() {
            self.collect_completed();
        }
        let Some(mut frame) = self.free.pop() else {
            self.stats.no_frame += 1;
            return false;
        };
        // SAFETY: this socket alone owns a free frame; the descriptor belongs to this memory.
        let mut data = unsafe { self.umem.data_mut(&mut frame) };
        let mut cursor = data.cursor();
        cursor.set_pos(0);
        cursor.write_all(packet).expect("a packet fits in a frame");
        // SAFETY: the descriptor belongs to this memory, and nothing touches its frame until the
        // completion ring returns it.
        if unsafe { self.tx.produce_one(&frame) } == 0 {
            self.free.push(frame);
            self.stats.no_frame += 1;
            return false;
        }
        self.stats.sent += 1;
        self.unsent = true;
        true
    }

    /// Makes the kernel send what is in the transmit ring: at most one system call.
    ///
    /// # Errors
    /// The kernel's error, unless the interface is down or gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unsent {
            self.unsent = false;
            if self.tx.needs_wakeup() {
                self.stats.kicks += 1;
                match self.wake_sender() {
                    // The interface is gone: the packet counts as lost in the network.
                    Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                    woken => woken?,
                }
            }
            self.collect_completed();
        }
        Ok(())
    }

    /// Makes the driver read the fill ring once. It does so at bind(2), when the ring is still empty, and
    /// igb reads it again only when a packet arrives, for which it has no frame then.
    fn make_driver_read_fill_ring(&self) {
        // Best effort: it needs CAP_NET_ADMIN and Linux 5.11.
        if set_option(self.fd(), libc::SO_BUSY_POLL, 1).is_ok() {
            self.kick_receive();
            let _ = set_option(self.fd(), libc::SO_BUSY_POLL, 0);
        }
    }

    /// The system call that makes the kernel process the queue.
    fn kick_receive(&self) {
        // SAFETY: a receive call of zero bytes needs no buffer.
        unsafe {
            libc::recvfrom(
                self.rx.fd().as_raw_fd(),
                std::ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
                std::ptr::null_mut(),
            );
        }
    }

    fn wake_sender(&mut self) -> io::Result<()> {
        if !(self.busy_poll && self.zero_copy) {
            return self.tx.wakeup();
        }
        // With busy polling, send(2) relies on the busy poll of the receive queue, which does not send if
        // the transmit queue has an interrupt of its own (igb with few queues). poll(2) always wakes the
        // driver (`xsk_poll` in net/xdp/xsk.c).
        let mut wanted = libc::pollfd {
            fd: self.rx.fd().as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: the call gets one pollfd, which outlives it.
        match unsafe { libc::poll(&raw mut wanted, 1, 0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the kernel process the queue on this core if it waits for a wake-up: at most one system call.
    pub fn drive(&mut self) {
        let needs_wakeup = || {
            let queue = self.queue.try_lock();
            queue.is_ok_and(|queue| queue.fill.needs_wakeup())
        };
        if self.busy_poll || needs_wakeup() {
            self.stats.kicks += 1;
            self.kick_receive();
        }
    }

    /// Counters so far.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn stats(&self) -> io::Result<XskRxStats> {
        let kernel = self.rx.fd().xdp_statistics()?;
        Ok(XskRxStats {
            rx_dropped: kernel.rx_dropped(),
            rx_ring_full: kernel.rx_ring_full(),
            rx_fill_ring_empty: kernel.rx_fill_ring_empty_descs(),
            invalid: kernel.rx_invalid_descs() + kernel.tx_invalid_descs(),
            ..self.stats
        })
    }

    /// Returns processed frames to the fill ring, which has room for all frames. If another socket holds the
    /// ring, they return in the next round.
    fn refill(&mut self) {
        let Ok(mut queue) = self.queue.try_lock() else {
            return;
        };
        // SAFETY: the frames belong to this memory, and nothing refers to their content any more.
        let taken = unsafe { queue.fill.produce(&self.to_refill) };
        // All or none; none only while the kernel is consuming entries.
        self.to_refill.drain(..taken);
    }

    /// Takes frames for replies: those that the kernel has sent, and those that no socket holds.
    fn collect_completed(&mut self) {
        let Ok(mut queue) = self.queue.try_lock() else {
            return;
        };
        let Queue {
            completed,
            free,
            done,
            ..
        } = &mut *queue;
        loop {
            // SAFETY: the ring belongs to this memory.
            let count = unsafe { completed.consume(done) };
            free.extend_from_slice(&done[..count]);
            if count < BURST {
                break;
            }
        }
        let wanted = BURST.saturating_sub(self.free.len()).min(free.len());
        self.free.extend(free.drain(free.len() - wanted..));
    }
}

/// Makes system calls of this socket process the queue instead of interrupts, `budget` packets per call.
fn prefer_busy_poll(socket: BorrowedFd<'_>, budget: u16) -> Result<(), Error> {
    let wait_us = 20;
    let options = [
        (libc::SO_PREFER_BUSY_POLL, 1),
        (libc::SO_BUSY_POLL, wait_us),
        (libc::SO_BUSY_POLL_BUDGET, c_int::from(budget)),
    ];
    let set = options
        .into_iter()
        .try_for_each(|(name, value)| set_option(socket, name, value));
    set.map_err(|source| Error::Option {
        what: "cannot switch busy polling on (it needs CAP_NET_ADMIN, and Linux 5.11)",
        source,
    })
}

fn set_option(socket: BorrowedFd<'_>, name: c_int, value: c_int) -> io::Result<()> {
    // SAFETY: the option's value is an int, whose address and size are given.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            name,
            (&raw const value).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    match code {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether the socket was bound in zero-copy mode (`XDP_OPTIONS`).
fn is_zero_copy(socket: BorrowedFd<'_>) -> Result<bool, Error> {
    let mut options = libc::xdp_options { flags: 0 };
    let mut len = size_of::<libc::xdp_options>() as libc::socklen_t;
    // SAFETY: the value is the option's struct, whose address and size are given.
    let code = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_XDP,
            libc::XDP_OPTIONS,
            (&raw mut options).cast(),
            &raw mut len,
        )
    };
    if code != 0 {
        return Err(Error::Option {
            what: "cannot ask whether the driver copies",
            source: io::Error::last_os_error(),
        });
    }
    Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_has_room_for_the_largest_packet_if_possible() {
        assert_eq!(frame_size(1770, false), SMALL_FRAME);
        assert_eq!(frame_size(1771, false), LARGE_FRAME);
        assert!(fits(3818, LARGE_FRAME, false) && !fits(3819, LARGE_FRAME, false));
        // Some NICs use only 1 KiB of a small frame and 3 KiB of a large one.
        assert_eq!(frame_size(1002, true), SMALL_FRAME);
        assert_eq!(frame_size(1500, true), LARGE_FRAME);
        assert!(fits(3050, LARGE_FRAME, true) && !fits(3051, LARGE_FRAME, true));
        assert_eq!(packet_memory(1024, SMALL_FRAME, 1), 2560 << 10);
    }
}
