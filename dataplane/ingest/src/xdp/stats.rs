//! Counters of the xdp path: packets by outcome.

use penstock_transport::ArrivalOrder;
use penstock_wire::packet::Pause;
use penstock_xsk::XskRxStats;
use serde::Serialize;

use crate::session::stats::WorkerStats;

/// Figures of one worker, or of all together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct XdpStats {
    /// Packets whose payload was placed.
    pub placed: u64,
    /// Packets that only ask for an ACK.
    pub pings: u64,
    /// Packets that could not be parsed: not UDP, too short, or not this protocol.
    pub malformed: u64,
    /// Packets with a wrong checksum.
    pub corrupt: u64,
    /// Packets of streams that this worker does not have.
    pub unknown_stream: u64,
    /// Packets from a host other than the stream's publisher: placed, but not answered.
    pub foreign_source: u64,
    /// Packets whose whole payload had arrived before.
    pub duplicates: u64,
    /// Packets refused because they ignore a limit or contradict others.
    pub refused: u64,
    /// Packets dropped because the memory shares of their host, of their key or of all publishers were
    /// used up; publishers retransmit them.
    pub no_memory: u64,
    /// Packets that later ones overtook; with [`Self::late`] taken off, those that were lost.
    pub skipped: u64,
    /// Packets that arrived after later ones.
    pub late: u64,
    /// ACK packets sent.
    pub acks: u64,
    /// Batches that were received outside the ring because it had no room.
    pub aside: u64,
    /// Times that the worker looked and found packets.
    pub polls: u64,
    /// Those of them that found as many as it takes at a time: more were waiting.
    pub full_polls: u64,
    /// Times that a publisher had nothing to send.
    pub pauses_idle: u64,
    /// Times that a publisher had no credit left.
    pub pauses_credit: u64,
    /// Times that a publisher's congestion window was full.
    pub pauses_congestion: u64,
    /// Times that the worker looked and found no packet.
    pub empty_polls: u64,
    /// Times that the worker slept.
    pub sleeps: u64,
    /// Times that a control connection was read.
    pub control_reads: u64,
    /// What the sockets count.
    #[serde(flatten)]
    pub socket: XskRxStats,
}

/// What a worker is doing.
#[derive(Debug, Clone, Default)]
pub struct WorkerSnapshot {
    /// What it has done so far.
    pub stats: WorkerStats,
    /// What it has done with packets.
    pub xdp: XdpStats,
    /// Streams that it serves.
    pub streams: usize,
    /// Those of them that wait for room in the shared buffer.
    pub blocked: usize,
    /// Bytes that each stream may have on its way.
    pub window: u64,
}

impl XdpStats {
    /// Adds another worker's figures.
    pub fn merge(&mut self, other: &Self) {
        self.placed += other.placed;
        self.pings += other.pings;
        self.malformed += other.malformed;
        self.corrupt += other.corrupt;
        self.unknown_stream += other.unknown_stream;
        self.duplicates += other.duplicates;
        self.refused += other.refused;
        self.foreign_source += other.foreign_source;
        self.no_memory += other.no_memory;
        self.skipped += other.skipped;
        self.late += other.late;
        self.acks += other.acks;
        self.aside += other.aside;
        self.polls += other.polls;
        self.full_polls += other.full_polls;
        self.pauses_idle += other.pauses_idle;
        self.pauses_credit += other.pauses_credit;
        self.pauses_congestion += other.pauses_congestion;
        self.empty_polls += other.empty_polls;
        self.sleeps += other.sleeps;
        self.control_reads += other.control_reads;
        self.add_socket(&other.socket);
    }

    /// Counts how a packet follows on those before it.
    pub(super) fn note_order(&mut self, order: ArrivalOrder) {
        match order {
            ArrivalOrder::InOrder => {}
            ArrivalOrder::Ahead(skipped) => self.skipped += skipped,
            ArrivalOrder::Reordered => self.late += 1,
        }
    }

    /// Counts why a publisher paused.
    pub(super) fn note_pause(&mut self, pause: Pause) {
        *match pause {
            Pause::Idle => &mut self.pauses_idle,
            Pause::Credit => &mut self.pauses_credit,
            Pause::Congestion => &mut self.pauses_congestion,
        } += 1;
    }

    /// Adds a socket's figures.
    pub fn add_socket(&mut self, other: &XskRxStats) {
        let socket = &mut self.socket;
        socket.packets += other.packets;
        socket.bytes += other.bytes;
        socket.multi_buffer += other.multi_buffer;
        socket.sent += other.sent;
        socket.no_frame += other.no_frame;
        socket.kicks += other.kicks;
        socket.rx_dropped += other.rx_dropped;
        socket.rx_ring_full += other.rx_ring_full;
        socket.rx_fill_ring_empty += other.rx_fill_ring_empty;
        socket.invalid += other.invalid;
    }
}
