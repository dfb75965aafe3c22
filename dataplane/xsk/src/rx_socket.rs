//! One receive queue of an interface: packet memory, rings, and the rules that keep them turning.
//!
//! A frame of the packet memory is at any time in exactly one place: the fill ring (the kernel may
//! receive into it), a receive ring (a packet waits for us), in our hands, a transmit ring, the
//! completion ring, or a list of free ones. What was received goes back to the fill ring at once,
//! so that it never runs dry; answers have frames of their own, which no flood can take.
//!
//! Several ports may share a queue, for a queue may bring more than one worker can take. They have
//! receive and transmit rings of their own, but the kernel gives a queue one fill and one completion
//! ring (`XDP_SHARED_UMEM`, Documentation/networking/af_xdp.rst): whoever needs them looks whether
//! they are free, does all that is to be done in one go, and otherwise comes back in its next round.

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
use super::socket::{Memory, Rings};

/// Packets taken from the receive ring at a time.
pub const BURST: usize = 64;
/// Frames for answers, of each port.
const ANSWERS: u32 = 256;
/// Maximum number of buffers of one datagram: 64 KiB in frames of 4 KiB.
pub const MAX_BUFFERS: usize = 18;
/// Longest IP packet. In generic mode a program may get one that is longer than the MTU: several
/// datagrams that the interface was to cut apart.
pub const LONGEST_PACKET: u32 = 65_535;
/// What a frame loses to the kernel (`XDP_PACKET_HEADROOM`).
pub const HEADROOM: u32 = 256;
/// An Ethernet header with two VLAN tags.
pub const ETHERNET: u32 = 22;
const SMALL_FRAME: u32 = 2048;
const LARGE_FRAME: u32 = 4096;

/// Bytes of a frame for IP packets of up to `longest` bytes: as small as may be, for what is small
/// stays in the cache. `zero_copy`: the driver may receive into the frames itself.
#[must_use]
pub fn frame_size(longest: u32, zero_copy: bool) -> u32 {
    if fits(longest, SMALL_FRAME, zero_copy) {
        SMALL_FRAME
    } else {
        LARGE_FRAME
    }
}

/// Bytes of packet memory of a queue that `count` sockets share. It is locked: without CAP_IPC_LOCK
/// it counts against RLIMIT_MEMLOCK.
#[must_use]
pub fn packet_memory(ring: u32, frame_size: u32, count: u32) -> u64 {
    u64::from(ring + answers(count)) * u64::from(frame_size)
}

/// Whether an IP packet of `longest` bytes takes one frame. Some NICs are told a frame's room in KiB,
/// rounded down, and put the rest of a longer packet into the next one (`igb_setup_srrctl` in the driver
/// of Linux 6.14).
#[must_use]
pub fn fits(longest: u32, frame_size: u32, zero_copy: bool) -> bool {
    let room = frame_size - HEADROOM;
    let room = if zero_copy { room / 1024 * 1024 } else { room };
    longest + ETHERNET <= room
}

/// Frames for answers of all ports of a queue.
fn answers(count: u32) -> u32 {
    (ANSWERS * count).next_power_of_two()
}

/// Settings of a port.
#[derive(Debug, Clone)]
pub struct PortConfig {
    /// Interface.
    pub interface: String,
    /// Receive queue.
    pub queue: u32,
    /// Entries of the fill ring and of each receive ring, a power of two.
    pub ring: u32,
    /// Bytes of a frame, 2048 or 4096.
    pub frame_size: u32,
    /// Take packets that need several frames (`XDP_USE_SG`, Linux 6.6). Many drivers then copy: they
    /// do without a copy only where each packet has one buffer.
    pub several_buffers: bool,
    /// Copy mode, even if the driver could do without.
    pub copy: bool,
    /// Packets that a call may drive the interface's queue by (`SO_PREFER_BUSY_POLL`); none leaves
    /// that to interrupts.
    pub busy_poll: Option<u16>,
}

/// What the kernel counts of a socket (`XDP_STATISTICS`), and what we do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct PortStats {
    /// Packets received.
    pub packets: u64,
    /// Bytes received, with all headers.
    pub bytes: u64,
    /// Packets in more than one buffer.
    pub multi_buffer: u64,
    /// Packets sent.
    pub sent: u64,
    /// Answers for which there was no free frame.
    pub no_frame: u64,
    /// System calls that drove the rings.
    pub kicks: u64,
    /// Dropped by the kernel for other reasons.
    pub rx_dropped: u64,
    /// Dropped because the receive ring was full: the worker is too slow.
    pub rx_ring_full: u64,
    /// Dropped because the fill ring was empty.
    pub rx_fill_ring_empty: u64,
    /// Descriptors that the kernel refused.
    pub invalid: u64,
}

/// What the ports of a queue share.
#[derive(Debug)]
struct Queue {
    fill: FillQueue,
    completed: CompQueue,
    /// Frames for answers that no port has.
    free: Vec<FrameDesc>,
    done: [FrameDesc; BURST],
}

/// One of the sockets of a receive queue.
#[derive(Debug)]
pub struct Port {
    umem: Umem,
    rx: RxQueue,
    tx: TxQueue,
    queue: Arc<Mutex<Queue>>,
    received: [FrameDesc; BURST],
    /// Buffers of a packet whose rest has not come yet.
    open: Vec<FrameDesc>,
    /// On their way back to the fill ring.
    returning: Vec<FrameDesc>,
    free: Vec<FrameDesc>,
    unsent: bool,
    busy_poll: bool,
    zero_copy: bool,
    stats: PortStats,
}

impl Port {
    /// Opens `count` sockets of a queue; its packets come once an XDP program sends them here.
    ///
    /// # Errors
    /// [`Error`] says what the kernel did not give.
    ///
    /// # Panics
    /// If a size in the configuration is not a power of two in its range, or `count` is 0.
    pub fn open(config: &PortConfig, count: u32) -> Result<Vec<Self>, Error> {
        let answers = answers(count);
        let memory = Memory {
            frames: config.ring + answers,
            frame_size: config.frame_size,
            fill: config.ring,
            completed: answers,
        };
        let (umem, mut frames) = memory.make()?;
        let mut flags = BindFlags::XDP_USE_NEED_WAKEUP;
        flags.set(BindFlags::XDP_USE_SG, config.several_buffers);
        flags.set(BindFlags::XDP_COPY, config.copy);
        let rings = Rings {
            interface: &config.interface,
            queue: config.queue,
            received: config.ring,
            sent: ANSWERS,
            flags,
            purpose: Purpose::Receive,
        };
        let free = frames.split_off(config.ring as usize);
        let mut unfilled = Some(frames);
        let mut queue = None;
        let mut ports = Vec::with_capacity(count as usize);
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
            let mut returning = Vec::with_capacity(config.ring as usize);
            returning.extend(unfilled.take().unwrap_or_default());
            let mut port = Self {
                umem: umem.clone(),
                rx,
                tx,
                queue: Arc::clone(queue),
                received: [FrameDesc::default(); BURST],
                open: Vec::with_capacity(MAX_BUFFERS),
                returning,
                free: Vec::with_capacity(2 * BURST),
                unsent: false,
                busy_poll: config.busy_poll.is_some(),
                zero_copy: false,
                stats: PortStats::default(),
            };
            if let Some(budget) = config.busy_poll {
                prefer_busy_poll(port.fd(), budget)?;
            }
            port.zero_copy = is_zero_copy(port.fd())?;
            port.give_back();
            if port.zero_copy && !port.busy_poll {
                port.let_driver_take_frames();
            }
            ports.push(port);
        }
        Ok(ports)
    }

    /// The socket, for the XDP program's map.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the socket lives as long as its rings, which this owns.
        unsafe { BorrowedFd::borrow_raw(self.rx.fd().as_raw_fd()) }
    }

    /// Whether the driver writes packets straight to the packet memory.
    #[must_use]
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Hands up to [`BURST`] buffers of packets to `take`, each packet as its buffers in order;
    /// returns how many packets there were.
    pub fn receive(&mut self, mut take: impl FnMut(&[&[u8]])) -> usize {
        // SAFETY: the rings were made with this packet memory.
        let count = unsafe { self.rx.consume(&mut self.received) };
        let mut packets = 0;
        for index in 0..count {
            if let Some(later) = self.received[..count].get(index + prefetch::AHEAD) {
                // SAFETY: as below.
                prefetch::frame(unsafe { self.umem.data(later) }.contents());
            }
            let buffer = self.received[index];
            if self.open.is_empty() && !buffer.has_more_frames() {
                // The whole packet, as nearly always.
                // SAFETY: as below.
                let part = unsafe { self.umem.data(&buffer) }.contents();
                self.stats.bytes += part.len() as u64;
                take(&[part]);
                packets += 1;
                self.returning.push(buffer);
                continue;
            }
            self.open.push(buffer);
            if buffer.has_more_frames() {
                continue;
            }
            self.stats.multi_buffer += u64::from(self.open.len() > 1);
            let mut parts: [&[u8]; MAX_BUFFERS] = [&[]; MAX_BUFFERS];
            // A packet in more buffers than any interface's MTU needs is dropped.
            if self.open.len() <= MAX_BUFFERS {
                for (part, buffer) in parts.iter_mut().zip(&self.open) {
                    // SAFETY: the descriptor came from the receive ring of this memory and has not
                    // gone back yet, so the kernel does not write to its frame.
                    *part = unsafe { self.umem.data(buffer) }.contents();
                }
                let parts = &parts[..self.open.len()];
                self.stats.bytes += parts.iter().map(|part| part.len() as u64).sum::<u64>();
                take(parts);
                packets += 1;
            }
            self.returning.append(&mut self.open);
        }
        self.stats.packets += packets as u64;
        if !self.returning.is_empty() {
            self.give_back();
        }
        packets
    }

    /// Sends one packet of at most a frame. Returns whether there was a frame for it; it leaves with
    /// [`Self::flush`] at the latest.
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
        // SAFETY: a free frame is ours alone; the descriptor is of this memory.
        let mut data = unsafe { self.umem.data_mut(&mut frame) };
        let mut cursor = data.cursor();
        cursor.set_pos(0);
        cursor.write_all(packet).expect("a packet fits in a frame");
        // SAFETY: the descriptor is of this memory, and nothing touches its frame until it comes
        // back through the completion ring.
        if unsafe { self.tx.produce_one(&frame) } == 0 {
            self.free.push(frame);
            self.stats.no_frame += 1;
            return false;
        }
        self.stats.sent += 1;
        self.unsent = true;
        true
    }

    /// Lets the kernel send what waits in the transmit ring: one system call, if it needs one.
    ///
    /// # Errors
    /// The kernel's answer, unless it is that the interface is down or gone.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.unsent {
            self.unsent = false;
            if self.tx.needs_wakeup() {
                self.stats.kicks += 1;
                match self.wake_sender() {
                    // The interface is gone: that is a packet lost like any other.
                    Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
                    woken => woken?,
                }
            }
            self.collect_completed();
        }
        Ok(())
    }

    /// The driver looked for frames when the socket was bound, before there were any, and igb does not
    /// look again before a packet comes, for which it has no frame. Polling once makes it look.
    fn let_driver_take_frames(&self) {
        // Without the privilege, or before Linux 5.11, it goes as it goes.
        if set_option(self.fd(), libc::SO_BUSY_POLL, 1).is_ok() {
            self.receive_nothing();
            let _ = set_option(self.fd(), libc::SO_BUSY_POLL, 0);
        }
    }

    /// The call by which the kernel works on the queue.
    fn receive_nothing(&self) {
        // SAFETY: a receive of no bytes has no buffer.
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
        // Then send(2) leaves it to the busy poll of the receive queue, which does not send where the
        // transmit queue has an interrupt of its own (igb with few queues); poll(2) wakes the driver
        // in any case (`xsk_poll`).
        let mut wanted = libc::pollfd {
            fd: self.rx.fd().as_raw_fd(),
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: takes one pollfd, which outlives the call.
        match unsafe { libc::poll(&raw mut wanted, 1, 0) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Lets the kernel work on the queue on this core, where it waits for that: one system call.
    pub fn drive(&mut self) {
        let needs_wakeup = || {
            let queue = self.queue.try_lock();
            queue.is_ok_and(|queue| queue.fill.needs_wakeup())
        };
        if self.busy_poll || needs_wakeup() {
            self.stats.kicks += 1;
            self.receive_nothing();
        }
    }

    /// What was counted so far.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn stats(&self) -> io::Result<PortStats> {
        let kernel = self.rx.fd().xdp_statistics()?;
        Ok(PortStats {
            rx_dropped: kernel.rx_dropped(),
            rx_ring_full: kernel.rx_ring_full(),
            rx_fill_ring_empty: kernel.rx_fill_ring_empty_descs(),
            invalid: kernel.rx_invalid_descs() + kernel.tx_invalid_descs(),
            ..self.stats
        })
    }

    /// Puts what was received back into the fill ring, which has room for all frames, unless
    /// another port is at it: then in the next round.
    fn give_back(&mut self) {
        let Ok(mut queue) = self.queue.try_lock() else {
            return;
        };
        // SAFETY: the frames are of this memory, and nobody looks at them any more.
        let taken = unsafe { queue.fill.produce(&self.returning) };
        // All or none; none only if the kernel is about to take some.
        self.returning.drain(..taken);
    }

    /// Gets some frames for answers: what the kernel has sent, and what no port has.
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
            // SAFETY: the ring is that of this memory.
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

/// Lets system calls of this socket drive the queue instead of interrupts, so many packets a call.
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

/// `XDP_OPTIONS` tells in which mode the socket was bound.
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
    fn frames_take_the_largest_packet_where_they_can() {
        assert_eq!(frame_size(1770, false), SMALL_FRAME);
        assert_eq!(frame_size(1771, false), LARGE_FRAME);
        assert!(fits(3818, LARGE_FRAME, false) && !fits(3819, LARGE_FRAME, false));
        // 1 KiB of a small frame, and 3 KiB of a large one, is what some NICs use.
        assert_eq!(frame_size(1002, true), SMALL_FRAME);
        assert_eq!(frame_size(1500, true), LARGE_FRAME);
        assert!(fits(3050, LARGE_FRAME, true) && !fits(3051, LARGE_FRAME, true));
        assert_eq!(packet_memory(1024, SMALL_FRAME, 1), 2560 << 10);
    }
}
