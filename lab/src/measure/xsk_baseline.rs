//! The most that an AF_XDP socket of this host can take in: one thread receives packets and copies
//! each payload once, another feeds it from an ordinary UDP socket with `UDP_SEGMENT`, each in a
//! namespace of the testbed. No protocol, no checksum, no log: what a broker is measured against.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use penstock_ebpf::{Config, Mode, Steering};
use penstock_xsk::{XskRxConfig, XskRxSocket};

use penstock_process::interrupt::Interrupt;
use penstock_testbed::netns::{self, BROKER_END, Net, enter};

/// Where payload is copied to, round and round: as much as a broker's ring by default.
const MEMORY: usize = 256 << 20;
/// First bytes of every packet, by which the program knows it.
const MAGIC: [u8; 4] = *b"PNSR";
/// Of its stream, likewise.
const KEY: u64 = 1;
const PORT: u16 = 1215;
/// Entries of the receiver's rings, as a broker has them.
const RING: u32 = 1024;
/// Most bytes of one call, and packets cut from it.
const MAX_BYTES: usize = 65_000;
const MAX_SEGMENTS: usize = 64;
/// Headers of Ethernet, IPv4 and UDP, and of the latter two alone.
const HEADERS: usize = 42;
const IP_UDP: usize = 28;
/// What the kernel keeps of each frame of packet memory (`XDP_PACKET_HEADROOM`).
const HEADROOM: usize = 256;
/// Packets in flight count as lost when none arrives for this long.
const LOST: Duration = Duration::from_millis(5);
/// Nothing comes any more when nothing came for so long after the end.
const QUIET: Duration = Duration::from_millis(50);
const READY_LIMIT: Duration = Duration::from_secs(10);

/// What one run brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Payload copied, 10^6 bytes a second, first packet to last.
    pub mb_per_s: f64,
    /// UDP payload of a packet, bytes.
    pub datagram: usize,
    /// Packets that were sent but did not arrive.
    pub lost: u64,
    /// Packets sent.
    pub sent: u64,
}

/// What sender and receiver tell each other.
#[derive(Debug, Default)]
struct Shared {
    ready: AtomicBool,
    /// Packets that arrived.
    arrived: AtomicU64,
    /// Nothing more is sent.
    over: AtomicBool,
}

/// Tells the receiver that nothing more is sent, whichever way the run ends.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Release);
    }
}

/// A receiver's result.
#[derive(Debug, Default)]
struct Received {
    packets: u64,
    bytes: u64,
    /// Packets that lack a part, or hold other bytes than were sent.
    damaged: u64,
    time: Duration,
}

/// Measures for `time` on the link to broker 0, with packets as large as `mtu` allows.
///
/// Where packets that take several buffers arrive damaged, they are made to fit into one.
pub fn measure(
    net: &Net,
    mode: Mode,
    mtu: u32,
    time: Duration,
    interrupt: &Interrupt,
) -> Result<Outcome> {
    let whole = mtu as usize - IP_UDP;
    let (outcome, damaged) = run(net, mode, whole, time, interrupt)?;
    let one_buffer = frame_size(whole) as usize - HEADROOM - HEADERS;
    if damaged == 0 {
        return Ok(outcome);
    }
    ensure!(
        one_buffer < whole,
        "{damaged} packets arrived damaged ({mode} mode, MTU {mtu})"
    );
    let (outcome, damaged) = run(net, mode, one_buffer, time, interrupt)?;
    ensure!(
        damaged == 0,
        "{damaged} packets of {one_buffer} bytes arrived damaged ({mode} mode)"
    );
    Ok(outcome)
}

fn run(
    net: &Net,
    mode: Mode,
    datagram: usize,
    time: Duration,
    interrupt: &Interrupt,
) -> Result<(Outcome, u64)> {
    let shared = Shared::default();
    let packet = packet_of(datagram);
    let (sent, received) = thread::scope(|scope| {
        let ending = Ending(&shared);
        let receiver = scope.spawn(|| receive(net.broker(0), mode, &packet, &shared));
        let started = Instant::now();
        while !shared.ready.load(Ordering::Acquire) {
            if receiver.is_finished() {
                joined(receiver)?;
                bail!("the receiver ended before it was ready");
            }
            interrupt.pause()?;
            ensure!(started.elapsed() < READY_LIMIT, "the receiver is not ready");
        }
        let sender = scope.spawn(|| send(net.publisher(), &packet, time, &shared, interrupt));
        let sent = joined(sender)?;
        drop(ending);
        Ok((sent, joined(receiver)?))
    })?;
    interrupt.check()?;
    let seconds = received.time.as_secs_f64();
    ensure!(
        seconds > 0.0,
        "no packet arrived: {} were sent ({mode} mode, {datagram} bytes each)",
        sent
    );
    let outcome = Outcome {
        mb_per_s: received.bytes as f64 / seconds / 1e6,
        datagram,
        lost: sent.saturating_sub(received.packets),
        sent,
    };
    Ok((outcome, received.damaged))
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().map_err(|_| anyhow!("a thread panicked"))?
}

/// Bytes of a packet memory's frame, as a broker chooses it.
fn frame_size(datagram: usize) -> u32 {
    if datagram + HEADERS + HEADROOM <= 2048 {
        2048
    } else {
        4096
    }
}

/// The payload of every packet: its bytes differ, so that a part in the wrong place shows.
fn packet_of(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|at| (at / 4 % 251) as u8).collect();
    packet[..MAGIC.len()].copy_from_slice(&MAGIC);
    packet[8..16].copy_from_slice(&KEY.to_le_bytes());
    packet
}

fn receive(namespace: &str, mode: Mode, packet: &[u8], shared: &Shared) -> Result<Received> {
    enter(namespace)?;
    let mut steering = Steering::load(&Config {
        addresses: vec![netns::broker_address(0).into()],
        port: PORT,
        magic: MAGIC,
        queues: 1,
        sockets_per_queue: 1,
        streams: 1,
    })?;
    ensure!(steering.streams()?.admit(KEY), "a key was refused");
    let settings = XskRxConfig {
        interface: BROKER_END.to_owned(),
        queue: 0,
        ring: RING,
        frame_size: frame_size(packet.len()),
        several_buffers: packet.len() + HEADERS + HEADROOM > frame_size(packet.len()) as usize,
        copy: false,
        busy_poll: None,
    };
    let mut port = XskRxSocket::open(&settings, 1)?.remove(0);
    steering.insert(0, 0, port.fd())?;
    steering.attach(BROKER_END, mode, false)?;
    let mut memory = Memory::new(packet.len());
    let mut received = Received::default();
    let (mut first, mut last) = (None, Instant::now());
    shared.ready.store(true, Ordering::Release);
    loop {
        port.drive();
        let packets = port.receive(|parts| memory.copy(parts));
        if packets > 0 {
            last = Instant::now();
            first.get_or_insert(last);
            received.packets += packets as u64;
            shared.arrived.store(received.packets, Ordering::Release);
        } else if shared.over.load(Ordering::Acquire) && last.elapsed() > QUIET {
            break;
        }
    }
    received.time = first.map_or(Duration::ZERO, |first| last - first);
    received.bytes = memory.copied * packet.len() as u64;
    received.damaged = memory.cut + memory.wrong(packet);
    Ok(received)
}

/// Where packets of one length are copied to, one behind the other.
struct Memory {
    bytes: Vec<u8>,
    packet: usize,
    at: usize,
    copied: u64,
    /// Packets of another length.
    cut: u64,
}

impl Memory {
    fn new(packet: usize) -> Self {
        Self {
            // Not zeros: those would be mapped only when the first packets come.
            bytes: vec![1; MEMORY / packet * packet],
            packet,
            at: 0,
            copied: 0,
            cut: 0,
        }
    }

    fn copy(&mut self, parts: &[&[u8]]) {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        if total != HEADERS + self.packet || parts[0].len() < HEADERS {
            self.cut += 1;
            return;
        }
        let mut at = self.at;
        for part in [&parts[0][HEADERS..]]
            .into_iter()
            .chain(parts[1..].iter().copied())
        {
            self.bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        self.copied += 1;
        self.at = if at == self.bytes.len() { 0 } else { at };
    }

    /// Packets of the last round that are not as they were sent.
    fn wrong(&self, packet: &[u8]) -> u64 {
        let slots = self.bytes.chunks_exact(self.packet);
        let filled = slots.take(usize::try_from(self.copied).unwrap_or(usize::MAX));
        filled.filter(|slot| *slot != packet).count() as u64
    }
}

/// Sends as fast as the receiver takes it; returns how many packets.
fn send(
    namespace: &str,
    packet: &[u8],
    time: Duration,
    shared: &Shared,
    interrupt: &Interrupt,
) -> Result<u64> {
    enter(namespace)?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot open a UDP socket")?;
    let to = SocketAddr::from((netns::broker_address(0), PORT));
    socket.connect(to).context("cannot reach the receiver")?;
    let segment = i32::try_from(packet.len()).context("a packet is too long")?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &segment).context("UDP_SEGMENT")?;
    let per_call = (MAX_BYTES / packet.len()).min(MAX_SEGMENTS);
    let call = packet.repeat(per_call);
    let window = window(packet.len());
    let started = Instant::now();
    let (mut sent, mut lost) = (0u64, 0u64);
    let mut progress = (0, started);
    while started.elapsed() < time {
        interrupt.check()?;
        let arrived = shared.arrived.load(Ordering::Acquire);
        if sent.saturating_sub(arrived + lost) < window {
            match socket.send(&call) {
                Ok(_) => sent += per_call as u64,
                Err(error) if passes(&error) => {}
                Err(error) => return Err(error).context("cannot send"),
            }
            continue;
        }
        if arrived != progress.0 {
            progress = (arrived, Instant::now());
        } else if progress.1.elapsed() > LOST {
            lost = sent - arrived;
        }
    }
    Ok(sent)
}

/// Maximum number of packets in flight: half of what the rings hold.
fn window(datagram: usize) -> u64 {
    let buffers = (datagram + HEADERS).div_ceil(frame_size(datagram) as usize - HEADROOM);
    u64::from(RING) / buffers as u64 / 2
}

/// What a full queue says, or an earlier packet that nobody took.
fn passes(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::ConnectionRefused | ErrorKind::WouldBlock
    ) || error.raw_os_error() == Some(libc::ENOBUFS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A frame in buffers of this size.
    fn copied(memory: &mut Memory, packet: &[u8], buffer: usize) {
        let frame = [&[0; HEADERS], packet].concat();
        memory.copy(&frame.chunks(buffer).collect::<Vec<_>>());
    }

    #[test]
    fn packets_lie_whole_one_behind_the_other() {
        let packet = packet_of(1000);
        let mut memory = Memory::new(1000);
        for buffer in [4096, 300, 512] {
            copied(&mut memory, &packet, buffer);
        }
        assert_eq!(
            (memory.copied, memory.cut, memory.wrong(&packet)),
            (3, 0, 0)
        );
        assert_eq!(memory.bytes[2000..3000], packet);
    }

    #[test]
    fn a_part_that_is_missing_or_wrong_is_found() {
        let packet = packet_of(1000);
        let mut memory = Memory::new(1000);
        copied(&mut memory, &packet[..900], 4096);
        memory.copy(&[&[0; 10]]);
        assert_eq!((memory.copied, memory.cut), (0, 2));
        copied(&mut memory, &packet, 4096);
        let swapped = [&packet[500..], &packet[..500]].concat();
        copied(&mut memory, &swapped, 4096);
        assert_eq!((memory.copied, memory.wrong(&packet)), (2, 1));
    }

    #[test]
    fn the_last_packet_of_a_round_is_followed_by_the_first_of_the_next() {
        let packet = packet_of(MEMORY / 3);
        let mut memory = Memory::new(packet.len());
        for _ in 0..4 {
            copied(&mut memory, &packet, 1 << 20);
        }
        assert_eq!((memory.copied, memory.at), (4, packet.len()));
        assert_eq!(memory.wrong(&packet), 0);
    }

    #[test]
    fn what_is_on_its_way_fits_into_the_rings() {
        assert_eq!(window(1472), 512);
        assert_eq!(window(8972), 1024 / 3 / 2);
    }
}
