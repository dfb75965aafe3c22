//! The streams of a worker: passes each packet to its stream, and adds and removes streams.

use std::sync::Arc;
use std::time::Instant;

use penstock_auth::PacketKeys;
use penstock_log::Writers;
use penstock_runtime::poller::{Interest, Poller};
use penstock_runtime::profile::Tick;
use penstock_transport::Timestamp;
use penstock_wire::packet::{
    ACK_SEAL_LEN, Content, DATA_LEN, Data, Feedback, Invalid, MAX_ACK_LEN, Received, StreamKey, Tag,
};
use penstock_wire::reply::Fault;
use penstock_xsk::frame::{self, MAX_HEADERS};
use penstock_xsk::{FragmentReader, Fragments, MAX_BUFFERS};
use slab::Slab;
use tracing::{debug, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::WorkerConfig;
use super::clock::WorkerClock;
use super::metrics::Metrics;
use super::stream_index::StreamIndex;
use crate::session::FIRST_CREDIT;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::pending_streams::PendingStreams;
use crate::session::stats::{Counters, Shared};
use crate::session::stream_filter::FilterEntry;
use crate::xdp::ack_route::Arrival;
use crate::xdp::close_reason::CloseReason;
use crate::xdp::stream::{Context, Stream};

/// Minimum and maximum window of a stream: bytes of batches in flight.
const MIN_WINDOW: u64 = FIRST_CREDIT;
const MAX_WINDOW: u64 = 4 << 20;

/// The state of a worker apart from its sockets.
#[derive(Debug)]
pub(super) struct StreamTable {
    pub(super) config: WorkerConfig,
    pub(super) pending_streams: Arc<PendingStreams>,
    pub(super) shared: Arc<Shared>,
    pub(super) poller: Arc<Poller>,
    pub(super) clock: WorkerClock,
    pub(super) writers: Writers,
    pub(super) streams: Slab<Entry>,
    pub(super) index: StreamIndex,
    /// Streams with packets of this round, or with an ACK that is not due yet.
    pub(super) dirty: Vec<usize>,
    ack: AckBuffer,
    pub(super) metrics: Metrics,
}

/// Buffers for an ACK packet.
#[derive(Debug)]
struct AckBuffer {
    feedback: Feedback,
    frame: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stream: Stream,
    writer: usize,
    is_dirty: bool,
}

/// One packet of a datagram.
struct Packet<'a> {
    header: &'a Data,
    tag: Option<Tag>,
    /// Fragments of what follows the header.
    rest: &'a [&'a [u8]],
}

impl StreamTable {
    pub(super) fn new(
        config: WorkerConfig,
        pending_streams: Arc<PendingStreams>,
        shared: Arc<Shared>,
        poller: Arc<Poller>,
    ) -> Self {
        Self {
            config,
            pending_streams,
            shared,
            poller,
            clock: WorkerClock::new(),
            writers: Writers::default(),
            streams: Slab::new(),
            index: StreamIndex::default(),
            dirty: Vec::with_capacity(64),
            ack: AckBuffer {
                feedback: Feedback::new(StreamKey { key: 0, stream: 0 }),
                frame: vec![0; MAX_HEADERS + MAX_ACK_LEN + ACK_SEAL_LEN],
            },
            metrics: Metrics::default(),
        }
    }

    /// Time since the worker's creation.
    pub(super) fn now(&self) -> Timestamp {
        self.clock.now()
    }

    /// Handles a datagram that arrived on a socket. It has one packet or several: if the kernel leaves
    /// segmentation (`UDP_SEGMENT`) to the interface, a generic XDP program runs before it.
    pub(super) fn datagram(&mut self, socket: usize, buffers: &[&[u8]], now: Timestamp) {
        let total = buffers.iter().map(|fragment| fragment.len()).sum();
        let Some(datagram) = frame::parse(buffers[0], total) else {
            self.metrics.xdp.malformed += 1;
            return;
        };
        let mut reader = FragmentReader::new(buffers, datagram.start, datagram.len);
        let arrival = Arrival {
            socket,
            frame: buffers[0],
            datagram: &datagram,
            now,
        };
        let mut is_intact = true;
        while is_intact && !reader.is_empty() {
            is_intact = self.packet(arrival, &mut reader);
        }
    }

    /// Handles the next packet of a datagram; returns whether the boundary to the one behind it is known.
    fn packet(&mut self, arrival: Arrival<'_>, reader: &mut FragmentReader<'_>) -> bool {
        let start = self.metrics.sample();
        // In place if it lies in one buffer: nothing writes to a received frame.
        let copy;
        let header = match reader.take_whole(DATA_LEN) {
            Some(whole) => Data::ref_from_bytes(whole).expect("of its length"),
            None => {
                let Some(bytes) = reader.take_array::<DATA_LEN>() else {
                    return self.malformed();
                };
                copy = Data::read_from_bytes(&bytes).expect("of its length");
                &copy
            }
        };
        let tag: Option<Tag> = match header.is_sealed() {
            true => match reader.take_array() {
                Some(tag) => Some(tag),
                None => return self.malformed(),
            },
            false => None,
        };
        let (whole, mut fragments): ([&[u8]; 1], Fragments<'_>);
        let rest: &[&[u8]] = if let Some(rest) = reader.take_whole(header.rest_len()) {
            whole = [rest];
            &whole
        } else {
            fragments = [&[]; MAX_BUFFERS];
            let Some(count) = reader.take(header.rest_len(), &mut fragments) else {
                return self.malformed();
            };
            &fragments[..count]
        };
        let known = self.index.find(header.stream());
        let packet = Packet { header, tag, rest };
        if let (Some(number), None) = (known, &packet.tag)
            && let Some(is_intact) = self.place_next(arrival, &packet, number, start)
        {
            return is_intact;
        }
        self.place_any(arrival, &packet, known, start)
    }

    #[cold]
    fn malformed(&mut self) -> bool {
        self.metrics.xdp.malformed += 1;
        false
    }

    /// Places the next packet in order of a stream without keys, as nearly all are. Returns whether its
    /// checksum is right, or `None` with nothing changed if it is another packet.
    #[inline]
    fn place_next(
        &mut self,
        arrival: Arrival<'_>,
        packet: &Packet<'_>,
        number: usize,
        start: Option<Tick>,
    ) -> Option<bool> {
        let parsed = start.map(|_| self.metrics.stats.stages.now());
        let (entry, mut cx) = self.entry(number, arrival.now);
        let stream = &mut entry.stream;
        let is_intact = stream.payload_if_next(&mut cx, arrival, packet.header, packet.rest)?;
        match is_intact {
            true => self.done(number, start, parsed),
            false => self.metrics.xdp.corrupt += 1,
        }
        Some(is_intact)
    }

    /// Places any packet: the first of a stream, one out of order, one with a tag. Returns whether the
    /// boundary to the packet behind it is known.
    fn place_any(
        &mut self,
        arrival: Arrival<'_>,
        packet: &Packet<'_>,
        known: Option<usize>,
        start: Option<Tick>,
    ) -> bool {
        let Packet { header, tag, rest } = packet;
        let waiting;
        let keys = match known {
            Some(number) => self.streams[number].stream.keys.as_deref(),
            None => {
                waiting = self.pending_streams.keys_of(header.stream());
                waiting.as_deref()
            }
        };
        if known.is_none() && keys.is_none() && tag.is_some() {
            // No key could verify the tag.
            self.metrics.xdp.unknown_stream += 1;
            return true;
        }
        let Ok(received) = verify(header, tag.as_ref(), rest, keys) else {
            self.metrics.xdp.corrupt += 1;
            return false;
        };
        let Some(number) = known.or_else(|| self.claim(received.stream, arrival)) else {
            return true;
        };
        self.update_source(arrival, &received, number);
        let parsed = start.map(|_| self.metrics.stats.stages.now());
        let (entry, mut cx) = self.entry(number, arrival.now);
        match &received.content {
            Content::Ping => entry.stream.ping(&mut cx, received.packet),
            Content::Payload(chunk) => {
                let len = header.rest_len() as u32;
                let stream = &mut entry.stream;
                stream.payload(&mut cx, received.packet, chunk, rest, len);
            }
        }
        self.done(number, start, parsed);
        true
    }

    /// Claims the pending stream with this key for this worker.
    fn claim(&mut self, key: StreamKey, arrival: Arrival<'_>) -> Option<usize> {
        let Some((accepted, filter_entry)) = self.pending_streams.claim(key) else {
            self.metrics.xdp.unknown_stream += 1;
            return None;
        };
        self.add(accepted, filter_entry, arrival.socket, arrival.now)
    }

    /// Records the source of the newest packet of a stream.
    fn update_source(&mut self, arrival: Arrival<'_>, received: &Received, number: usize) {
        let stream = &mut self.streams[number].stream;
        if !stream.is_newest(received.packet) {
            return;
        }
        if !stream.update_source(arrival) {
            self.metrics.xdp.foreign_source += 1;
        }
        if let Some(pause) = received.pause {
            self.metrics.xdp.note_pause(pause);
        }
    }

    /// A stream, with what it needs from the worker.
    fn entry(&mut self, number: usize, now: Timestamp) -> (&mut Entry, Context<'_>) {
        let entry = &mut self.streams[number];
        let cx = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.metrics.stats,
            xdp: &mut self.metrics.xdp,
            verify: self.config.verify_on_receive,
            idle_timeout: self.config.idle_timeout.into(),
            now,
        };
        (entry, cx)
    }

    /// Notes that a packet of this stream was handled: commits and ACK are due after this round.
    #[inline]
    fn done(&mut self, number: usize, start: Option<Tick>, parsed: Option<Tick>) {
        let entry = &mut self.streams[number];
        if !entry.is_dirty {
            entry.is_dirty = true;
            self.dirty.push(number);
        }
        if let (Some(start), Some(parsed)) = (start, parsed) {
            self.metrics.credit_sample(start, parsed);
        }
    }

    pub(super) fn commit_dirty(&mut self, now: Timestamp) {
        for index in 0..self.dirty.len() {
            let before = self.metrics.stats.batches;
            self.with(self.dirty[index], now, Stream::commit);
            if self.metrics.stats.batches > before {
                self.metrics.last_commit = Some(self.metrics.stats.stages.now());
            }
        }
    }

    /// Passes each due ACK to `send`, with the index of its socket; returns whether there was one.
    pub(super) fn write_acks(
        &mut self,
        now: Timestamp,
        mut send: impl FnMut(usize, &[u8]),
    ) -> bool {
        let acks = self.metrics.xdp.acks;
        let Self {
            dirty,
            streams,
            ack: AckBuffer { feedback, frame },
            metrics: Metrics { xdp, .. },
            ..
        } = self;
        dirty.retain(|&number| {
            let Some(entry) = streams.get_mut(number) else {
                return false;
            };
            if let Some(len) = entry.stream.write_ack(now, feedback, frame) {
                send(entry.stream.route.socket(), &frame[..len]);
                xdp.acks += 1;
            }
            entry.is_dirty = entry.stream.ack_due().is_some();
            entry.is_dirty
        });
        self.metrics.xdp.acks > acks
    }

    fn add(
        &mut self,
        accepted: AcceptedStream,
        filter_entry: FilterEntry,
        socket: usize,
        now: Timestamp,
    ) -> Option<usize> {
        debug!(peer = %accepted.peer, "first packet of a stream");
        let log = Arc::clone(&accepted.admission.log);
        let claims = &self.shared.claims;
        let vacant = self.streams.vacant_entry();
        let number = vacant.key();
        let stream = Stream::new(accepted, filter_entry, claims, socket, MIN_WINDOW, now);
        // It is deleted in `remove`, before its number is free.
        let edges = Interest::READABLE.edges();
        if let Err(error) = self.poller.add(stream.control.socket(), number, edges) {
            warn!(%error, "cannot watch a control connection; the stream is dropped");
            self.pending_streams.ended();
            return None;
        }
        self.index.insert(stream.key(), number);
        vacant.insert(Entry {
            stream,
            writer: self.writers.join(&log),
            is_dirty: false,
        });
        self.rebalance_windows();
        Some(number)
    }

    /// Makes the largest slow holder release what others were denied.
    pub(super) fn reclaim(&mut self, now: Timestamp) {
        if self.streams().any(Stream::is_blocked) {
            // The workers that block them may be asleep.
            self.shared.claims.wake_others();
        }
        if !self.shared.claims.is_pressed(Instant::now()) {
            return;
        }
        let (mut ring, mut memory) = ((0, 0), (0, 0));
        for (number, entry) in &mut self.streams {
            let writer = &mut self.writers[entry.writer];
            let held = entry.stream.reclaimable(writer, now);
            ring = ring.max((held.ring, number));
            memory = memory.max((held.memory, number));
        }
        if ring.0 > 0 {
            self.with(ring.1, now, Stream::release_ring);
        }
        if memory.0 > 0 {
            self.with(memory.1, now, Stream::release_memory);
        }
    }

    /// Gives each stream its share of the capacity of the rings.
    fn rebalance_windows(&mut self) {
        let window = self.window();
        for (_, entry) in &mut self.streams {
            entry.stream.set_window(window);
        }
    }

    /// All streams.
    pub(super) fn streams(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().map(|(_, entry)| &entry.stream)
    }

    /// Window of each stream.
    pub(super) fn window(&self) -> u64 {
        let count = self.index.len().max(1) as u64;
        (self.config.capacity / count).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// Runs `action` on a stream with what it needs from the worker; ends the stream on an error.
    pub(super) fn with(
        &mut self,
        number: usize,
        now: Timestamp,
        action: impl FnOnce(&mut Stream, &mut Context<'_>) -> Result<(), CloseReason>,
    ) {
        if !self.streams.contains(number) {
            return;
        }
        let (entry, mut cx) = self.entry(number, now);
        if let Err(reason) = action(&mut entry.stream, &mut cx) {
            self.remove(number, &reason);
        } else if entry.stream.ack_due().is_some() && !entry.is_dirty {
            entry.is_dirty = true;
            self.dirty.push(number);
        }
    }

    pub(super) fn remove(&mut self, number: usize, reason: &CloseReason) {
        let Some(entry) = self.streams.try_remove(number) else {
            return;
        };
        // Best effort: the descriptor may not be watched any more.
        let _ = self.poller.delete(entry.stream.control.socket());
        self.index.remove(entry.stream.key());
        let counters = &self.shared.counters;
        Counters::count(match reason {
            CloseReason::Completed => &counters.streams_completed,
            CloseReason::Fault(Fault::Checksum, _) => &counters.checksum_errors,
            CloseReason::Fault(Fault::Protocol, _) => &counters.protocol_errors,
            CloseReason::Fault(Fault::Stalled, _) => &counters.stalled,
            CloseReason::Fault(Fault::Authentication, _) => &counters.forged,
            _ => &counters.streams_cut,
        });
        let report = entry.stream.finish(&mut self.writers[entry.writer], reason);
        self.writers.leave(entry.writer);
        let is_complete = matches!(reason, CloseReason::Completed);
        self.shared.stream_ended(report, is_complete);
        self.pending_streams.ended();
        self.rebalance_windows();
    }
}

/// Verifies a packet by its tag if its stream has keys, by its checksum otherwise.
fn verify(
    header: &Data,
    tag: Option<&Tag>,
    rest: &[&[u8]],
    keys: Option<&PacketKeys>,
) -> Result<Received, Invalid> {
    match (keys, tag) {
        (None, None) => header.parse(rest),
        (Some(keys), Some(tag)) => {
            let mut fragments: [&[u8]; MAX_BUFFERS + 1] = [&[]; MAX_BUFFERS + 1];
            fragments[0] = header.as_bytes();
            fragments[1..=rest.len()].copy_from_slice(rest);
            if !keys.verify_data(header.packet(), tag, &fragments[..=rest.len()]) {
                return Err(Invalid::Seal);
            }
            header.parse_sealed(header.rest_len())
        }
        (None, Some(_)) | (Some(_), None) => Err(Invalid::Seal),
    }
}
