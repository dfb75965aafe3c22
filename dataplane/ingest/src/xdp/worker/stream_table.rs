//! The streams of a worker: which one a packet belongs to, and what it changes.

use std::collections::HashMap;
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
use penstock_xsk::frame;
use penstock_xsk::{FragmentReader, Fragments, MAX_BUFFERS};
use quanta::Clock;
use tracing::{debug, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::WorkerConfig;
use crate::session::FIRST_CREDIT;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::pending_streams::PendingStreams;
use crate::session::stats::{Counters, PathStage, Shared, WorkerStats};
use crate::session::stream_filter::FilterEntry;
use crate::xdp::ack_route::Arrival;
use crate::xdp::close_reason::CloseReason;
use crate::xdp::key_hasher::KeyHash;
use crate::xdp::stats::XdpStats;
use crate::xdp::stream::{Context, Stream};

/// The worker times one packet in this number, which is odd so that it is not always the same one of a burst.
const SAMPLE: u64 = 61;
/// Bytes of batches that a stream may have on their way, at least and at most.
const MIN_WINDOW: u64 = FIRST_CREDIT;
const MAX_WINDOW: u64 = 4 << 20;

/// The state of a worker apart from its sockets.
#[derive(Debug)]
pub(super) struct StreamTable {
    pub(super) config: WorkerConfig,
    pub(super) pending_streams: Arc<PendingStreams>,
    pub(super) shared: Arc<Shared>,
    pub(super) poller: Arc<Poller>,
    pub(super) clock: Clock,
    pub(super) start: u64,
    pub(super) writers: Writers,
    pub(super) streams: Vec<Option<Entry>>,
    pub(super) free: Vec<usize>,
    pub(super) by_key: HashMap<StreamKey, usize, KeyHash>,
    /// The stream of the last packet.
    pub(super) latest: Option<(StreamKey, usize)>,
    /// Streams that got a packet in this round.
    pub(super) dirty: Vec<usize>,
    pub(super) feedback: Feedback,
    pub(super) frame: Vec<u8>,
    pub(super) stats: WorkerStats,
    pub(super) xdp: XdpStats,
    pub(super) first_packet: Option<Tick>,
    pub(super) last_commit: Option<Tick>,
    /// Packets until the next that is timed.
    pub(super) until_sample: u64,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) stream: Stream,
    pub(super) writer: usize,
    pub(super) dirty: bool,
}

/// One packet of a datagram.
struct Packet<'a> {
    header: &'a Data,
    tag: Option<Tag>,
    /// What follows, in the buffers that it lies in.
    rest: &'a [&'a [u8]],
}

impl StreamTable {
    pub(super) fn new(
        config: WorkerConfig,
        pending_streams: Arc<PendingStreams>,
        shared: Arc<Shared>,
        poller: Arc<Poller>,
    ) -> Self {
        let clock = Clock::new();
        Self {
            config,
            pending_streams,
            shared,
            poller,
            start: clock.raw(),
            clock,
            writers: Writers::default(),
            streams: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::default(),
            latest: None,
            dirty: Vec::with_capacity(64),
            feedback: Feedback::new(StreamKey { key: 0, stream: 0 }),
            frame: vec![0; 128 + MAX_ACK_LEN + ACK_SEAL_LEN],
            stats: WorkerStats::default(),
            xdp: XdpStats::default(),
            first_packet: None,
            last_commit: None,
            until_sample: 0,
        }
    }

    /// The moment, counted from the worker's creation.
    pub(super) fn now(&self) -> Timestamp {
        Timestamp::from_nanos(self.clock.delta_as_nanos(self.start, self.clock.raw()))
    }

    /// Handles a datagram that arrived on a socket. It has one packet or several: if the kernel leaves
    /// segmentation (`UDP_SEGMENT`) to the interface, a generic XDP program runs before it.
    pub(super) fn datagram(&mut self, socket: usize, buffers: &[&[u8]], now: Timestamp) {
        let total = buffers.iter().map(|fragment| fragment.len()).sum();
        let Some(datagram) = frame::parse(buffers[0], total) else {
            self.xdp.malformed += 1;
            return;
        };
        let mut reader = FragmentReader::new(buffers, datagram.start, datagram.len);
        let arrival = Arrival {
            socket,
            frame: buffers[0],
            datagram: &datagram,
            now,
        };
        let mut whole = true;
        while whole && !reader.is_empty() {
            whole = self.packet(arrival, &mut reader);
        }
    }

    /// The next packet of a datagram. Returns whether the one behind it can be found.
    fn packet(&mut self, arrival: Arrival<'_>, reader: &mut FragmentReader<'_>) -> bool {
        let start = self.sample();
        // Read where it lies, if that is one buffer: nobody writes to a frame that was received.
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
        let known = self.number_of(header.stream());
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
        self.xdp.malformed += 1;
        false
    }

    /// Places the next packet in order of a stream without keys, as nearly all are; returns whether its
    /// checksum is right, or `None` with nothing changed if it is another one.
    #[inline]
    fn place_next(
        &mut self,
        arrival: Arrival<'_>,
        packet: &Packet<'_>,
        number: usize,
        start: Option<Tick>,
    ) -> Option<bool> {
        let parsed = start.map(|_| self.stats.stages.now());
        let (entry, mut cx) = self.entry(number, arrival.now);
        let stream = &mut entry.stream;
        let is_intact = stream.payload_if_next(&mut cx, arrival, packet.header, packet.rest)?;
        match is_intact {
            true => self.done(number, start, parsed),
            false => self.xdp.corrupt += 1,
        }
        Some(is_intact)
    }

    /// Places any packet: the first of a stream, one out of order, one with a tag. Returns whether the
    /// packet behind it can be found.
    fn place_any(
        &mut self,
        arrival: Arrival<'_>,
        packet: &Packet<'_>,
        known: Option<usize>,
        start: Option<Tick>,
    ) -> bool {
        let Packet { header, tag, rest } = packet;
        let waiting;
        let keys = match known.and_then(|number| self.streams[number].as_ref()) {
            Some(entry) => entry.stream.keys.as_deref(),
            None => {
                waiting = self.pending_streams.keys_of(header.stream());
                waiting.as_deref()
            }
        };
        if known.is_none() && keys.is_none() && tag.is_some() {
            // Nobody could tell whether it is authentic.
            self.xdp.unknown_stream += 1;
            return true;
        }
        let Ok(received) = check(header, tag.as_ref(), rest, keys) else {
            self.xdp.corrupt += 1;
            return false;
        };
        let Some(number) = known.or_else(|| self.claim(received.stream, arrival)) else {
            return true;
        };
        self.update_source(arrival, &received, number);
        let parsed = start.map(|_| self.stats.stages.now());
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

    /// Makes the pending stream with this key one of this worker's.
    fn claim(&mut self, key: StreamKey, arrival: Arrival<'_>) -> Option<usize> {
        let Some((opened, filter_entry)) = self.pending_streams.claim(key) else {
            self.xdp.unknown_stream += 1;
            return None;
        };
        self.adopt(opened, filter_entry, arrival.socket, arrival.now)
    }

    /// Records where the newest packet of a stream came from.
    fn update_source(&mut self, arrival: Arrival<'_>, received: &Received, number: usize) {
        let entry = self.streams[number].as_mut().expect("it was just found");
        let stream = &mut entry.stream;
        if !stream.is_newest(received.packet) {
            return;
        }
        if !stream.update_source(arrival) {
            self.xdp.foreign_source += 1;
        }
        if let Some(pause) = received.pause {
            self.xdp.note_pause(pause);
        }
    }

    /// The stream with this key.
    fn number_of(&mut self, key: StreamKey) -> Option<usize> {
        // Mostly it is that of the packet before.
        if let Some((latest, number)) = self.latest
            && latest == key
        {
            return Some(number);
        }
        let number = *self.by_key.get(&key)?;
        self.latest = Some((key, number));
        Some(number)
    }

    /// A stream that exists, with what it needs.
    fn entry(&mut self, number: usize, now: Timestamp) -> (&mut Entry, Context<'_>) {
        let entry = self.streams[number].as_mut().expect("it was just found");
        let cx = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.stats,
            xdp: &mut self.xdp,
            verify: self.config.verify_on_receive,
            idle_timeout: self.config.idle_timeout.into(),
            now,
        };
        (entry, cx)
    }

    /// A packet of this stream is dealt with: its commits and its ACK are due after this round. If it is
    /// one that is timed, it stands for all since the one before.
    #[inline]
    fn done(&mut self, number: usize, start: Option<Tick>, parsed: Option<Tick>) {
        let entry = self.streams[number].as_mut().expect("it was just found");
        if !entry.dirty {
            entry.dirty = true;
            self.dirty.push(number);
        }
        let (Some(start), Some(parsed)) = (start, parsed) else {
            return;
        };
        self.first_packet.get_or_insert(start);
        let stages = &mut self.stats.stages;
        let end = stages.now();
        let (header, payload) = (parsed.ticks_since(start), end.ticks_since(parsed));
        stages.credit(PathStage::DrainHeader, header * SAMPLE, SAMPLE);
        stages.credit(PathStage::DrainPayloadToBuffer, payload * SAMPLE, SAMPLE);
    }

    /// When a packet begins, if it is one of those that are timed.
    fn sample(&mut self) -> Option<Tick> {
        if self.until_sample > 0 {
            self.until_sample -= 1;
            return None;
        }
        self.until_sample = SAMPLE - 1;
        Some(self.stats.stages.now())
    }

    pub(super) fn commit_dirty(&mut self, now: Timestamp) {
        for index in 0..self.dirty.len() {
            let before = self.stats.batches;
            self.with(self.dirty[index], now, Stream::commit);
            if self.stats.batches > before {
                self.last_commit = Some(self.stats.stages.now());
            }
        }
    }

    /// Passes each due ACK to `send`, with the index of its socket; returns whether there was one.
    pub(super) fn write_acks(
        &mut self,
        now: Timestamp,
        mut send: impl FnMut(usize, &[u8]),
    ) -> bool {
        let acks = self.xdp.acks;
        let Self {
            dirty,
            streams,
            feedback,
            frame,
            xdp,
            ..
        } = self;
        dirty.retain(|&number| {
            let Some(entry) = &mut streams[number] else {
                return false;
            };
            if let Some(len) = entry.stream.ack(now, feedback, frame) {
                send(entry.stream.route.socket(), &frame[..len]);
                xdp.acks += 1;
            }
            entry.dirty = entry.stream.ack_due().is_some();
            entry.dirty
        });
        self.xdp.acks > acks
    }

    fn adopt(
        &mut self,
        opened: AcceptedStream,
        filter_entry: FilterEntry,
        socket: usize,
        now: Timestamp,
    ) -> Option<usize> {
        let writer = self.writers.join(&opened.admission.log);
        let number = self.free.pop().unwrap_or_else(|| {
            self.streams.push(None);
            self.streams.len() - 1
        });
        debug!(peer = %opened.peer, "first packet of a stream");
        let claims = &self.shared.claims;
        let stream = Stream::new(opened, filter_entry, claims, socket, MIN_WINDOW, now);
        // It is deleted in `remove`, before its number is free.
        let edges = Interest::READABLE.edges();
        if let Err(error) = self.poller.add(stream.control.socket(), number, edges) {
            warn!(%error, "cannot watch a control connection; the stream is dropped");
            self.free.push(number);
            self.writers.leave(writer);
            self.pending_streams.ended();
            return None;
        }
        self.by_key.insert(stream.key(), number);
        self.streams[number] = Some(Entry {
            stream,
            writer,
            dirty: false,
        });
        self.rebalance_windows();
        Some(number)
    }

    /// Makes the largest slow batch give way if it holds what others were denied.
    pub(super) fn relieve(&mut self, now: Timestamp) {
        if self
            .streams
            .iter()
            .flatten()
            .any(|entry| entry.stream.is_blocked())
        {
            // The workers that block them may be asleep.
            self.shared.claims.wake_others();
        }
        if !self.shared.claims.is_pressed(Instant::now()) {
            return;
        }
        let (mut ring, mut memory) = ((0, 0), (0, 0));
        for (number, entry) in self.streams.iter_mut().enumerate() {
            let Some(entry) = entry else { continue };
            let writer = &mut self.writers[entry.writer];
            let has = entry.stream.reclaimable(writer, now);
            ring = ring.max((has.ring, number));
            memory = memory.max((has.memory, number));
        }
        if ring.0 > 0 {
            self.with(ring.1, now, Stream::give_way);
        }
        if memory.0 > 0 {
            self.with(memory.1, now, Stream::give_up);
        }
    }

    /// Gives each stream its share of the capacity of the rings.
    fn rebalance_windows(&mut self) {
        let window = self.window();
        for entry in self.streams.iter_mut().flatten() {
            entry.stream.set_window(window);
        }
    }

    pub(super) fn window(&self) -> u64 {
        let count = self.by_key.len().max(1) as u64;
        (self.config.capacity / count).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// Runs `action` on a stream with all that it needs; ends the stream if that says so.
    pub(super) fn with(
        &mut self,
        number: usize,
        now: Timestamp,
        action: impl FnOnce(&mut Stream, &mut Context<'_>) -> Result<(), CloseReason>,
    ) {
        if self.streams[number].is_none() {
            return;
        }
        let (entry, mut cx) = self.entry(number, now);
        if let Err(ending) = action(&mut entry.stream, &mut cx) {
            self.remove(number, &ending);
        } else if entry.stream.ack_due().is_some() && !entry.dirty {
            entry.dirty = true;
            self.dirty.push(number);
        }
    }

    pub(super) fn remove(&mut self, number: usize, ending: &CloseReason) {
        let Some(entry) = self.streams[number].take() else {
            return;
        };
        // A descriptor that is not watched any more is what is wanted.
        let _ = self.poller.delete(entry.stream.control.socket());
        self.by_key.remove(&entry.stream.key());
        self.latest = None;
        let counters = &self.shared.counters;
        Counters::count(match ending {
            CloseReason::Completed => &counters.streams_completed,
            CloseReason::Fault(Fault::Checksum, _) => &counters.checksum_errors,
            CloseReason::Fault(Fault::Protocol, _) => &counters.protocol_errors,
            CloseReason::Fault(Fault::Stalled, _) => &counters.stalled,
            CloseReason::Fault(Fault::Authentication, _) => &counters.forged,
            _ => &counters.streams_cut,
        });
        let report = entry.stream.finish(&mut self.writers[entry.writer], ending);
        self.writers.leave(entry.writer);
        let is_complete = matches!(ending, CloseReason::Completed);
        self.shared.stream_ended(report, is_complete);
        self.pending_streams.ended();
        self.free.push(number);
        self.rebalance_windows();
    }
}

/// Whether a packet is as it was sent, by its tag if its stream has keys, by its checksum otherwise.
fn check(
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
