//! A worker: one thread that drives its ports, its streams and their control connections.

pub mod bench_support;

use std::collections::HashMap;
use std::hint;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags};
use penstock_auth::PacketKeys;
use penstock_log::Writers;
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::{Rounds, SNAPSHOT_INTERVAL, SnapshotCell, Tick};
use penstock_runtime::sleep;
use penstock_wire::packet::{
    ACK_SEAL_LEN, Content, DATA_LEN, Data, Feedback, Invalid, MAX_ACK_LEN, Received, StreamKey, Tag,
};
use penstock_wire::reply::Fault;
use penstock_xsk::frame::{self, Datagram};
use penstock_xsk::{BURST, MAX_BUFFERS, Parts, Pieces, Port};
use quanta::Clock;
use tracing::{debug, info, warn};
use zerocopy::{FromBytes, IntoBytes};

use super::key_hasher::KeyHash;
use super::stats::{WorkerSnapshot, XdpStats};
use super::stream::{CloseReason, Context, Stream};
use crate::session::FIRST_CREDIT;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::pending_streams::PendingStreams;
use crate::session::stats::{Counters, PathStage, Shared, WorkerStats};
use crate::session::stream_filter::FilterEntry;

/// How often time is looked after, nanoseconds.
const TICK: u64 = 1_000_000;
/// Longest sleep.
const SLEEP: Duration = Duration::from_millis(50);
/// A worker that got a packet since its last pause need not be woken for the next: it lets some gather,
/// which costs the sender's core no wake-up and leaves this one to others. The rings hold what comes
/// meanwhile many times over. A worker that got none sleeps until the kernel wakes it.
const SHORT_PAUSE: Duration = Duration::from_micros(50);
/// Pause while packets arrive steadily: half as many rounds and ACKs, and no batch waits for its first
/// packet to be noticed.
const LONG_PAUSE: Duration = Duration::from_micros(100);
/// Pauses without a sleep between them after which packets count as arriving steadily.
const STEADY_AFTER: u32 = 16;
/// How often one that waits for room in the ring looks for it.
const BLOCKED: Duration = Duration::from_millis(1);
/// The worker times one packet in this number, which is odd so that it is not always the same one of a burst.
const SAMPLE: u64 = 61;
/// Bytes of batches that a stream may have on their way, at least and at most.
const MIN_WINDOW: u64 = FIRST_CREDIT;
const MAX_WINDOW: u64 = 4 << 20;

/// What a worker does while no packet comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Polling {
    /// Looks again at once: owns its core, answers fastest.
    Busy,
    /// Looks for a moment, then sleeps until the kernel has something.
    Adaptive,
}

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Compare each batch with its checksum before it is committed. Packets are always compared
    /// with theirs.
    pub verify_on_receive: bool,
    /// What to do while no packet comes.
    pub polling: Polling,
    /// A stream from which no packet comes for so long is ended.
    pub idle_timeout: Duration,
    /// Bytes of batches that may be on their way to this worker, all streams together: what its
    /// receive rings hold.
    pub capacity: u64,
}

/// The way to a running worker.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    poller: Arc<Poller>,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    rounds: Rounds,
}

impl WorkerHandle {
    /// What the worker is doing, at most [`SNAPSHOT_INTERVAL`] ago.
    #[must_use]
    pub fn now(&self) -> WorkerSnapshot {
        self.snapshot.load()
    }

    /// Round counter, which grows while the worker makes progress, with or without work.
    #[must_use]
    pub fn rounds(&self) -> Rounds {
        self.rounds.clone()
    }

    /// Makes the worker check its stop flag.
    ///
    /// # Errors
    /// If the poller cannot be notified.
    pub fn wake(&self) -> io::Result<()> {
        self.poller.notify()
    }
}

/// A worker, before it runs.
#[derive(Debug)]
pub struct Worker {
    ports: Vec<Port>,
    state: State,
    stop: Arc<AtomicBool>,
    events: Events,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    /// Shows other threads that the loop makes progress.
    rounds: Rounds,
    /// When figures are shown next.
    show_at: u64,
}

/// All but the ports: what a packet changes.
#[derive(Debug)]
struct State {
    config: WorkerConfig,
    pending_streams: Arc<PendingStreams>,
    shared: Arc<Shared>,
    poller: Arc<Poller>,
    clock: Clock,
    start: u64,
    writers: Writers,
    streams: Vec<Option<Entry>>,
    free: Vec<usize>,
    by_key: HashMap<StreamKey, usize, KeyHash>,
    /// The stream of the last packet.
    latest: Option<(StreamKey, usize)>,
    /// Streams that got a packet in this round.
    touched: Vec<usize>,
    feedback: Feedback,
    frame: Vec<u8>,
    stats: WorkerStats,
    xdp: XdpStats,
    first_packet: Option<Tick>,
    last_commit: Option<Tick>,
    /// Packets until the next that is timed.
    until_sample: u64,
}

#[derive(Debug)]
struct Entry {
    stream: Stream,
    writer: usize,
    touched: bool,
}

impl Worker {
    /// A worker that runs until `stop` is set, with streams of `pending_streams`.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
    pub fn new(
        config: WorkerConfig,
        ports: Vec<Port>,
        pending_streams: Arc<PendingStreams>,
        shared: Arc<Shared>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, WorkerHandle)> {
        let poller = Arc::new(Poller::new()?);
        shared.claims.wake_for_others(&poller);
        let snapshot = Arc::new(SnapshotCell::default());
        let rounds = Rounds::default();
        let handle = WorkerHandle {
            poller: Arc::clone(&poller),
            snapshot: Arc::clone(&snapshot),
            rounds: rounds.clone(),
        };
        let clock = Clock::new();
        let state = State {
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
            touched: Vec::with_capacity(64),
            feedback: Feedback::new(StreamKey { key: 0, stream: 0 }),
            frame: vec![0; 128 + MAX_ACK_LEN + ACK_SEAL_LEN],
            stats: WorkerStats::default(),
            xdp: XdpStats::default(),
            first_packet: None,
            last_commit: None,
            until_sample: 0,
        };
        let worker = Self {
            ports,
            state,
            stop,
            events: Events::default(),
            snapshot,
            rounds,
            show_at: 0,
        };
        Ok((worker, handle))
    }

    /// Serves streams until told to stop; returns what it did. An interface that is down or gone
    /// is no failure: nothing comes from it.
    ///
    /// # Errors
    /// If the kernel does not answer for a port.
    pub fn run(mut self) -> io::Result<(WorkerStats, XdpStats)> {
        sleep::minimize_timer_slack()?;
        let mut next_tick = 0;
        let (mut since_pause, mut pauses) = (0, 0_u32);
        while !self.stop.load(Ordering::Relaxed) {
            let mut packets = 0;
            for (number, port) in self.ports.iter_mut().enumerate() {
                port.drive();
                let now = self.state.now();
                packets += port.receive(|parts| self.state.datagram(number, parts, now));
            }
            let now = self.state.now();
            since_pause += packets as u64;
            if packets > 0 {
                self.state.xdp.polls += 1;
                self.state.xdp.full_polls += u64::from(packets >= BURST);
                self.state.commit_touched(now);
            } else {
                self.state.xdp.empty_polls += 1;
                hint::spin_loop();
            }
            self.send_acks(now)?;
            if now >= next_tick {
                self.tick(now)?;
                next_tick = now + TICK;
            }
            if packets == 0 && self.state.config.polling == Polling::Adaptive {
                if since_pause > 0 || self.owes_ack() {
                    pauses = pauses.saturating_add(1);
                    thread::sleep(pause(pauses));
                } else {
                    self.sleep()?;
                    (next_tick, pauses) = (0, 0);
                }
                since_pause = 0;
            }
        }
        self.shut_down()
    }

    /// Sends the ACKs that are due, one system call for all of a port.
    fn send_acks(&mut self, now: u64) -> io::Result<()> {
        let start = self.state.stats.stages.now();
        let ports = &mut self.ports;
        // An ACK for which there is no frame is like one that got lost.
        let are_sent = self.state.write_acks(now, |port, frame| {
            ports[port].send(frame);
        });
        if are_sent {
            for port in &mut self.ports {
                port.flush()?;
            }
            self.state.stats.stages.lap(PathStage::SendAck, start);
        }
        Ok(())
    }

    fn tick(&mut self, now: u64) -> io::Result<()> {
        self.rounds.count();
        self.look_at_controls()?;
        for number in 0..self.state.streams.len() {
            self.state.with(number, now, Stream::tick);
        }
        self.state.relieve(now);
        self.state.pending_streams.expire();
        if now >= self.show_at {
            self.show_at = now + SNAPSHOT_INTERVAL.as_nanos() as u64;
            self.show()?;
        }
        Ok(())
    }

    /// Finds the streams whose publishers have said something over the control connection.
    fn look_at_controls(&mut self) -> io::Result<()> {
        let poller = &self.state.poller;
        poller.wait(&mut self.events, Duration::ZERO)?;
        for event in self.events.iter() {
            if let Some(Some(entry)) = self.state.streams.get_mut(event.key) {
                entry.stream.control_ready();
            }
        }
        Ok(())
    }

    fn show(&self) -> io::Result<()> {
        let (stats, xdp) = self.sum_up()?;
        let state = &self.state;
        let streams = || state.streams.iter().flatten();
        self.snapshot.publish(WorkerSnapshot {
            stats,
            xdp,
            streams: streams().count(),
            blocked: streams().filter(|entry| entry.stream.is_blocked()).count(),
            window: state.window(),
        });
        Ok(())
    }

    fn sum_up(&self) -> io::Result<(WorkerStats, XdpStats)> {
        let state = &self.state;
        let (mut stats, mut xdp) = (state.stats.clone(), state.xdp);
        if let (Some(first), Some(last)) = (state.first_packet, state.last_commit) {
            stats.active_ns = stats.stages.nanos_between(first, last);
        }
        for port in &self.ports {
            xdp.add_port(&port.stats()?);
        }
        stats.polls = xdp.sleeps;
        stats.recv_calls = xdp.port.kicks;
        stats.recv_bytes = xdp.port.bytes;
        Ok((stats, xdp))
    }

    /// Whether an ACK is due, soon: before any sleep would end.
    fn owes_ack(&self) -> bool {
        let mut streams = self.state.streams.iter().flatten();
        streams.any(|entry| entry.stream.ack_due().is_some())
    }

    /// Until a packet comes, or somebody says something over a control connection.
    fn sleep(&mut self) -> io::Result<()> {
        let mut streams = self.state.streams.iter().flatten();
        let blocked = streams.any(|entry| entry.stream.is_blocked());
        let longest = if blocked { BLOCKED } else { SLEEP };
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut watched: Vec<_> = self.ports.iter().map(|port| readable(port.fd())).collect();
        watched.push(readable(self.state.poller.as_fd()));
        self.state.xdp.sleeps += 1;
        sleep::until_ready(&mut watched, longest)
    }

    fn shut_down(mut self) -> io::Result<(WorkerStats, XdpStats)> {
        let gone = self.state.pending_streams.is_closed();
        for number in 0..self.state.streams.len() {
            let ending = match gone {
                // The publisher goes on over another path when its connection just closes.
                true => CloseReason::Io(io::Error::from_raw_os_error(libc::ENETDOWN)),
                false => {
                    CloseReason::Fault(Fault::Shutdown, "the broker is shutting down".to_owned())
                }
            };
            self.state.remove(number, &ending);
        }
        let sums = self.sum_up();
        close(self.ports);
        sums
    }
}

/// The pause of a worker that has not slept for `pauses` of them.
fn pause(pauses: u32) -> Duration {
    match pauses <= STEADY_AFTER {
        true => SHORT_PAUSE,
        false => LONG_PAUSE,
    }
}

/// Closes the sockets, several at a time. Each close waits milliseconds for the kernel
/// (`synchronize_net` in `xsk_unbind_dev`); parallel closes share that wait.
fn close(mut ports: Vec<Port>) {
    const AT_A_TIME: usize = 16;
    let each = ports.len().div_ceil(AT_A_TIME);
    thread::scope(|scope| {
        while ports.len() > each {
            let some = ports.split_off(ports.len() - each);
            // Without a thread, close them here.
            let _ = thread::Builder::new().spawn_scoped(scope, move || drop(some));
        }
        drop(ports);
    });
}

impl State {
    /// Nanoseconds since the worker was made.
    fn now(&self) -> u64 {
        self.clock.delta_as_nanos(self.start, self.clock.raw())
    }

    /// A datagram came to a port. It is one packet, or a row of them: where a kernel leaves it to the
    /// interface to cut a long buffer apart (`UDP_SEGMENT`), a generic program comes before that.
    fn datagram(&mut self, port: usize, buffers: &[&[u8]], now: u64) {
        let total = buffers.iter().map(|part| part.len()).sum();
        let Some(datagram) = frame::parse(buffers[0], total) else {
            self.xdp.malformed += 1;
            return;
        };
        let mut pieces = Pieces::new(buffers, datagram.start, datagram.len);
        let mut whole = true;
        while whole && !pieces.is_empty() {
            whole = self.packet(port, buffers[0], &datagram, &mut pieces, now);
        }
    }

    /// The next packet of a datagram. Returns whether the one behind it can be found.
    fn packet(
        &mut self,
        port: usize,
        frame: &[u8],
        datagram: &Datagram,
        pieces: &mut Pieces<'_>,
        now: u64,
    ) -> bool {
        let start = self.sample();
        // Read where it lies, if that is one buffer: nobody writes to a frame that was received.
        let copy;
        let header = match pieces.take_whole(DATA_LEN) {
            Some(whole) => Data::ref_from_bytes(whole).expect("of its length"),
            None => {
                let Some(bytes) = pieces.take_array::<DATA_LEN>() else {
                    self.xdp.malformed += 1;
                    return false;
                };
                copy = Data::read_from_bytes(&bytes).expect("of its length");
                &copy
            }
        };
        let tag: Option<Tag> = match header.is_sealed() {
            true => match pieces.take_array() {
                Some(tag) => Some(tag),
                None => {
                    self.xdp.malformed += 1;
                    return false;
                }
            },
            false => None,
        };
        let (whole, mut parts): ([&[u8]; 1], Parts<'_>);
        let rest: &[&[u8]] = if let Some(rest) = pieces.take_whole(header.rest_len()) {
            whole = [rest];
            &whole
        } else {
            parts = [&[]; MAX_BUFFERS];
            let Some(count) = pieces.take(header.rest_len(), &mut parts) else {
                self.xdp.malformed += 1;
                return false;
            };
            &parts[..count]
        };
        let known = self.number_of(header.stream());
        if let (Some(number), None) = (known, &tag) {
            let parsed = start.map(|_| self.stats.stages.now());
            let (entry, mut cx) = self.entry(number, now);
            let stream = &mut entry.stream;
            match stream.payload_if_next(&mut cx, port, header, rest, frame, datagram) {
                Some(true) => {
                    self.done(number, start, parsed);
                    return true;
                }
                Some(false) => {
                    self.xdp.corrupt += 1;
                    return false;
                }
                None => {}
            }
        }
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
        let len = header.rest_len() as u32;
        let number = match known {
            Some(number) => number,
            None => match self.pending_streams.claim(received.stream) {
                Some((opened, filter_entry)) => match self.adopt(opened, filter_entry, port, now) {
                    Some(number) => number,
                    None => return true,
                },
                None => {
                    self.xdp.unknown_stream += 1;
                    return true;
                }
            },
        };
        let entry = self.streams[number].as_mut().expect("it was just found");
        if entry.stream.is_newest(received.packet) {
            if !entry.stream.heard(now, port, frame, datagram) {
                self.xdp.foreign_source += 1;
            }
            if let Some(pause) = received.pause {
                self.xdp.note_pause(pause);
            }
        }
        let parsed = start.map(|_| self.stats.stages.now());
        let (entry, mut cx) = self.entry(number, now);
        match &received.content {
            Content::Ping => entry.stream.ping(&mut cx, received.packet),
            Content::Payload(chunk) => {
                entry
                    .stream
                    .payload(&mut cx, received.packet, chunk, rest, len);
            }
        }
        self.done(number, start, parsed);
        true
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
    fn entry(&mut self, number: usize, now: u64) -> (&mut Entry, Context<'_>) {
        let entry = self.streams[number].as_mut().expect("it was just found");
        let cx = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.stats,
            xdp: &mut self.xdp,
            verify: self.config.verify_on_receive,
            idle_timeout: self.config.idle_timeout.as_nanos() as u64,
            now,
        };
        (entry, cx)
    }

    /// A packet of this stream is dealt with: its commits and its ACK are due after this round. If it is
    /// one that is timed, it stands for all since the one before.
    #[inline]
    fn done(&mut self, number: usize, start: Option<Tick>, parsed: Option<Tick>) {
        let entry = self.streams[number].as_mut().expect("it was just found");
        if !entry.touched {
            entry.touched = true;
            self.touched.push(number);
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

    fn commit_touched(&mut self, now: u64) {
        for index in 0..self.touched.len() {
            let before = self.stats.batches;
            self.with(self.touched[index], now, Stream::commit);
            if self.stats.batches > before {
                self.last_commit = Some(self.stats.stages.now());
            }
        }
    }

    /// Hands each ACK that is due to `send`, with the number of its port; returns whether there was one.
    fn write_acks(&mut self, now: u64, mut send: impl FnMut(usize, &[u8])) -> bool {
        let acks = self.xdp.acks;
        let Self {
            touched,
            streams,
            feedback,
            frame,
            xdp,
            ..
        } = self;
        touched.retain(|&number| {
            let Some(entry) = &mut streams[number] else {
                return false;
            };
            if let Some(len) = entry.stream.ack(now, feedback, frame) {
                send(entry.stream.port, &frame[..len]);
                xdp.acks += 1;
            }
            entry.touched = entry.stream.ack_due().is_some();
            entry.touched
        });
        self.xdp.acks > acks
    }

    fn adopt(
        &mut self,
        opened: AcceptedStream,
        filter_entry: FilterEntry,
        port: usize,
        now: u64,
    ) -> Option<usize> {
        let writer = self.writers.join(&opened.admission.log);
        let number = self.free.pop().unwrap_or_else(|| {
            self.streams.push(None);
            self.streams.len() - 1
        });
        debug!(peer = %opened.peer, "first packet of a stream");
        let claims = &self.shared.claims;
        let stream = Stream::new(opened, filter_entry, claims, port, MIN_WINDOW, now);
        // It is deleted in `remove`, before its number is free.
        let edges = Interest::READABLE.edges();
        if let Err(error) = self.poller.add(&stream.control, number, edges) {
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
            touched: false,
        });
        self.share_out();
        Some(number)
    }

    /// Makes the largest slow batch give way if it holds what others were denied.
    fn relieve(&mut self, now: u64) {
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

    /// Each stream gets its part of what the rings hold.
    fn share_out(&mut self) {
        let window = self.window();
        for entry in self.streams.iter_mut().flatten() {
            entry.stream.set_window(window);
        }
    }

    fn window(&self) -> u64 {
        let count = self.by_key.len().max(1) as u64;
        (self.config.capacity / count).clamp(MIN_WINDOW, MAX_WINDOW)
    }

    /// Runs `action` on a stream with all that it needs; ends the stream if that says so.
    fn with(
        &mut self,
        number: usize,
        now: u64,
        action: impl FnOnce(&mut Stream, &mut Context<'_>) -> Result<(), CloseReason>,
    ) {
        let Some(entry) = self.streams[number].as_mut() else {
            return;
        };
        let mut cx = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.stats,
            xdp: &mut self.xdp,
            verify: self.config.verify_on_receive,
            idle_timeout: self.config.idle_timeout.as_nanos() as u64,
            now,
        };
        if let Err(ending) = action(&mut entry.stream, &mut cx) {
            self.remove(number, &ending);
        } else if entry.stream.ack_due().is_some() && !entry.touched {
            entry.touched = true;
            self.touched.push(number);
        }
    }

    fn remove(&mut self, number: usize, ending: &CloseReason) {
        let Some(entry) = self.streams[number].take() else {
            return;
        };
        // A descriptor that is not watched any more is what is wanted.
        let _ = self.poller.delete(&entry.stream.control);
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
        match ending {
            CloseReason::Completed => {
                debug!(peer = %report.peer, stream = report.stream, "completed")
            }
            _ if !self.shared.lines.allows() => {}
            _ => info!(
                peer = %report.peer,
                stream = report.stream,
                batches = report.batches,
                "stream ended: {}",
                report.ended
            ),
        }
        self.shared.remember(report);
        self.pending_streams.ended();
        self.free.push(number);
        self.share_out();
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
            let mut parts: [&[u8]; MAX_BUFFERS + 1] = [&[]; MAX_BUFFERS + 1];
            parts[0] = header.as_bytes();
            parts[1..=rest.len()].copy_from_slice(rest);
            if !keys.verify_data(header.packet(), tag, &parts[..=rest.len()]) {
                return Err(Invalid::Seal);
            }
            header.parse_sealed(header.rest_len())
        }
        (None, Some(_)) | (Some(_), None) => Err(Invalid::Seal),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};

    use fastrand::Rng;
    use tempfile::TempDir;

    use super::*;
    use crate::session::admission::{Admission, StreamState};
    use crate::session::buffers::{RcvbufOn, RequestedBuffers};
    use crate::session::peer::{Host, Tenant};
    use crate::session::stream_filter::tests::OddKeys;
    use penstock_log::{Access, Geometry, Log, LogOptions, Reader, RingFullPolicy, Start};
    use penstock_wire::batch::{self, Header};
    use penstock_wire::handshake::{AckLevel, Path};
    use penstock_wire::packet::{BatchInfo, Chunk};
    use penstock_xsk::{Endpoint, Headers};

    mod claims;
    mod readers;

    const KEY: StreamKey = StreamKey {
        key: 0x5ec2e7,
        stream: 0,
    };

    /// The publisher's host: the peer of the control connection, as far as the worker knows.
    const PUBLISHER: u8 = 2;

    /// A worker without ports, and a stream that waits for its first packet.
    struct Bench {
        worker: Worker,
        log: Arc<Log>,
        filter: Arc<OddKeys>,
        /// The publisher's end of the control connection.
        control: TcpStream,
        dir: TempDir,
    }

    impl Bench {
        fn new() -> Self {
            Self::with_keys(None)
        }

        fn with_keys(keys: Option<PacketKeys>) -> Self {
            Self::with_log(
                Geometry::new(1 << 20, 1 << 16, 64).unwrap(),
                RingFullPolicy::Overwrite,
                keys,
            )
        }

        fn with_log(geometry: Geometry, full: RingFullPolicy, keys: Option<PacketKeys>) -> Self {
            let dir = TempDir::new().unwrap();
            let options = LogOptions {
                geometry,
                full,
                access: Access::default(),
                writers: 2,
            };
            let log = Arc::new(Log::open(&dir.path().join("topic.log"), &options).unwrap());
            let filter = Arc::new(OddKeys::default());
            let pending_streams = Arc::new(PendingStreams::new(Arc::clone(&filter) as _));
            let config = WorkerConfig {
                verify_on_receive: false,
                polling: Polling::Busy,
                idle_timeout: Duration::from_secs(30),
                capacity: 1 << 20,
            };
            let made = Worker::new(
                config,
                Vec::new(),
                pending_streams,
                Arc::default(),
                Arc::default(),
            );
            let (worker, _) = made.unwrap();
            let control = leave(&worker, &filter, &log, KEY, PUBLISHER, keys);
            Self {
                worker,
                log,
                filter,
                control,
                dir,
            }
        }

        /// Another stream, of a publisher on this host; returns the publisher's end of the control
        /// connection.
        fn open(&mut self, key: StreamKey, host: u8) -> TcpStream {
            leave(&self.worker, &self.filter, &self.log, key, host, None)
        }

        fn take(&mut self, frame: &[u8]) {
            let now = self.worker.state.now();
            self.worker.state.datagram(0, &[frame], now);
            self.worker.state.commit_touched(now);
        }

        /// What the stream's packets have brought about.
        fn stream(&self) -> (u64, SocketAddr) {
            let entry = self.worker.state.streams[0].as_ref().unwrap();
            let back = entry.stream.back.as_ref();
            (self.log.info().batches, back.unwrap().peer())
        }
    }

    /// A stream that waits for its first packet; returns the publisher's end of the control connection.
    fn leave(
        worker: &Worker,
        filter: &Arc<OddKeys>,
        log: &Arc<Log>,
        key: StreamKey,
        host: u8,
        keys: Option<PacketKeys>,
    ) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let control = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        socket.set_nonblocking(true).unwrap();
        let peer = address(host);
        let wanted = RequestedBuffers {
            rcvbuf: 1 << 16,
            sndbuf: 1 << 16,
            rcvbuf_on: RcvbufOn::None,
            force: false,
        };
        let opened = AcceptedStream {
            buffers: wanted.apply_to_accepted(&socket).unwrap(),
            socket,
            peer,
            admission: Admission {
                log: Arc::clone(log),
                topic: "t".to_owned(),
                tenant: Tenant {
                    host: Host::of(peer),
                    key: None,
                },
                session: key.key,
                stream: 0,
                ack: AckLevel::Committed,
                path: Path::Xdp,
                max_payload: log.geometry().max_payload(),
                max_datagram: 1472,
                lease: Arc::new(StreamState::new(0)).lease().unwrap(),
            },
            keys: keys.map(Arc::new),
        };
        let filter_entry = FilterEntry::of(&(Arc::clone(filter) as _), key).unwrap();
        worker.state.pending_streams.insert(filter_entry, opened);
        control
    }

    fn address(host: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, host], 1214))
    }

    /// A packet from a host of this network, as the broker's interface gets it.
    fn frame(from: u8, header: &Data, payload: &[u8]) -> Vec<u8> {
        let end = |host| Endpoint {
            mac: [host; 6],
            address: address(host),
        };
        let headers = Headers::new(&end(from), &end(1));
        let mut frame = vec![0; headers.len()];
        let parts = [header.as_bytes(), payload];
        headers.write(&mut frame, &parts);
        frame.extend(parts.concat());
        frame
    }

    /// Batch `seq`, of one message, as a packet carries it whole.
    fn batch_of_one(seq: u64) -> (Chunk, Vec<u8>) {
        let payload = [&4u32.to_le_bytes()[..], &(seq as u32).to_le_bytes()].concat();
        let chunk = Chunk {
            batch: BatchInfo {
                seq,
                len: payload.len() as u32,
                messages: 1,
                checksum: batch::checksum(seq, 1, &payload),
            },
            offset: 0,
        };
        (chunk, payload)
    }

    /// Batch `seq` in one packet.
    fn whole(from: u8, key: StreamKey, packet: u64, seq: u64) -> Vec<u8> {
        let (chunk, payload) = batch_of_one(seq);
        let header = Data::payload(key, packet, &chunk, None, &payload);
        frame(from, &header, &payload)
    }

    /// Several packets, as they come where no kernel has cut them apart.
    fn row(packets: &[Vec<u8>]) -> Vec<u8> {
        let headers = packets[0].len() - frame::parse(&packets[0], packets[0].len()).unwrap().len;
        let rest: Vec<&[u8]> = packets.iter().map(|packet| &packet[headers..]).collect();
        let rest = rest.concat();
        let (header, payload) = rest.split_at(DATA_LEN);
        frame(2, Data::ref_from_bytes(header).unwrap(), payload)
    }

    #[test]
    fn a_row_of_packets_counts_as_each_of_them() {
        let mut bench = Bench::new();
        let packets: Vec<_> = (0..5).map(|seq| whole(2, KEY, seq, seq)).collect();
        bench.take(&row(&packets[..3]));
        assert_eq!(bench.stream().0, 3);
        // What follows a damaged one cannot be found.
        let mut damaged = row(&packets[3..]);
        let end = damaged.len() - 1;
        damaged[end] ^= 1;
        bench.take(&damaged);
        assert_eq!(bench.stream().0, 4);
        damaged.truncate(end);
        bench.take(&damaged);
        let xdp = &bench.worker.state.xdp;
        assert_eq!((xdp.placed, xdp.corrupt, xdp.malformed), (4, 1, 1));
    }

    /// Damaged, repeated and late packets of batches that take several: whatever of them lies in the ring
    /// for a while, readers see what was sent.
    #[test]
    fn damaged_packets_of_long_batches_change_nothing() {
        const BATCHES: u64 = 36;
        const PARTS: u64 = 12;
        const PART: usize = 150;
        let mut bench = Bench::new();
        let mut rng = Rng::with_seed(3);
        let (mut packet, mut damaged) = (0, 0);
        // All of it within the first credit: no ACK is sent here.
        for seq in 0..BATCHES {
            let len = PARTS as usize * PART;
            let mut payload = ((len - 4) as u32).to_le_bytes().to_vec();
            payload.extend((4..len).map(|_| rng.u8(..)));
            let batch = BatchInfo {
                seq,
                len: len as u32,
                messages: 1,
                checksum: batch::checksum(seq, 1, &payload),
            };
            let mut order: Vec<usize> = (0..PARTS as usize).collect();
            for _ in 0..rng.usize(0..3) {
                order.swap(rng.usize(0..PARTS as usize), rng.usize(0..PARTS as usize));
            }
            for part in order {
                let offset = (part * PART) as u32;
                let bytes = &payload[part * PART..][..PART];
                let chunk = Chunk { batch, offset };
                let sent = frame(2, &Data::payload(KEY, packet, &chunk, None, bytes), bytes);
                packet += 1;
                let before = bench.worker.state.xdp.placed;
                for _ in 0..20 {
                    let mut changed = sent.clone();
                    let at = rng.usize(42..changed.len());
                    changed[at] ^= 1 << rng.u8(..8);
                    bench.take(&changed);
                    damaged += 1;
                }
                assert_eq!(bench.worker.state.xdp.placed, before);
                bench.take(&sent);
                assert_eq!(bench.worker.state.xdp.placed, before + 1);
                if rng.bool() {
                    bench.take(&sent);
                }
            }
            assert_eq!(bench.stream().0, seq + 1);
            let path = bench.dir.path().join("topic.log");
            let mut reader = Reader::open(&path, Start::Oldest).unwrap();
            let mut last = Vec::new();
            while let Some(batch) = reader.next().unwrap() {
                batch.verify().unwrap();
                last = batch.payload.to_vec();
            }
            assert_eq!(last, payload);
        }
        let xdp = &bench.worker.state.xdp;
        let bad = xdp.corrupt + xdp.malformed + xdp.unknown_stream;
        assert_eq!((xdp.placed, bad), (BATCHES * PARTS, damaged));
    }

    /// Batch `seq` in one packet, sealed.
    fn sealed(from: u8, keys: &PacketKeys, packet: u64, seq: u64) -> Vec<u8> {
        let (chunk, payload) = batch_of_one(seq);
        let header = Data::to_be_sealed(KEY, packet, Some(&chunk), None, payload.len() as u16);
        let tag = keys.seal_data(packet, &[header.as_bytes(), &payload]);
        frame(from, &header, &[&tag[..], &payload].concat())
    }

    #[test]
    fn only_packets_of_its_publisher_reach_a_stream_with_keys() {
        let keys = PacketKeys::new(&[1; 32]);
        let mut bench = Bench::with_keys(Some(PacketKeys::new(&[1; 32])));
        // Whoever sees its packets can make others with a good checksum, also before the first.
        let forged = whole(66, KEY, 0, 0);
        let other = sealed(66, &PacketKeys::new(&[2; 32]), 0, 0);
        bench.take(&forged);
        bench.take(&other);
        assert!(bench.worker.state.streams.is_empty(), "nothing takes it up");
        for seq in 0..20 {
            let honest = sealed(2, &keys, seq, seq);
            for bit in 42 * 8..honest.len() * 8 {
                let mut changed = honest.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                bench.take(&changed);
                assert_eq!(bench.log.info().batches, seq, "bit {bit}");
            }
            bench.take(&honest);
            bench.take(&forged);
            bench.take(&other);
            bench.take(&honest);
            assert_eq!(bench.stream(), (seq + 1, address(2)));
        }
        let packets: Vec<_> = (20..24).map(|seq| sealed(2, &keys, seq, seq)).collect();
        bench.take(&row(&packets));
        assert_eq!(bench.stream().0, 24);
        assert_eq!(bench.worker.state.xdp.placed, 24);
        // Nor is one without keys reached by sealed ones.
        let mut open = Bench::new();
        open.take(&sealed(2, &keys, 0, 0));
        open.take(&whole(2, KEY, 0, 0));
        open.take(&sealed(2, &keys, 1, 1));
        assert_eq!(open.stream().0, 1);
    }

    #[test]
    fn acks_of_a_stream_with_keys_are_sealed_each_with_a_counter_of_its_own() {
        let keys = PacketKeys::new(&[1; 32]);
        let mut bench = Bench::with_keys(Some(PacketKeys::new(&[1; 32])));
        let (mut frame, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
        for seq in 0..5 {
            bench.take(&sealed(2, &keys, seq, seq));
            let entry = bench.worker.state.streams[0].as_mut().unwrap();
            let len = entry
                .stream
                .ack(u64::MAX, &mut feedback, &mut frame)
                .unwrap();
            let datagram = frame::parse(&frame, len).unwrap();
            let answer = &frame[datagram.start..][..datagram.len];
            let (counter, ack) = keys.open_ack(answer).unwrap();
            let mut read = Feedback::new(KEY);
            read.read(ack).unwrap();
            assert_eq!((counter, read.committed), (seq + 1, seq + 1));
        }
    }

    #[test]
    fn strangers_and_repeaters_change_nothing() {
        const STRANGER: u8 = 66;
        let mut bench = Bench::new();
        let mut rng = Rng::with_seed(1);
        let mut sent = Vec::new();
        for seq in 0..40 {
            let honest = whole(PUBLISHER, KEY, seq, seq);
            bench.take(&honest);
            sent.push(honest);
            let before = bench.stream();
            assert_eq!(before.0, seq + 1, "an honest packet is placed");
            for _ in 0..500 {
                // Well made, but of a stream that the stranger can only guess.
                let guess = StreamKey {
                    key: rng.u64(..),
                    stream: rng.u16(..2),
                };
                bench.take(&whole(STRANGER, guess, rng.u64(..100), seq + 1));
                // Seen on the way, and changed.
                let mut changed = sent[rng.usize(0..sent.len())].clone();
                let at = rng.usize(50..changed.len());
                changed[at] ^= 1 << rng.u8(..8);
                bench.take(&changed);
                // Seen on the way, and repeated from elsewhere.
                let mut repeated = sent[rng.usize(0..sent.len())].clone();
                repeated[6..12].fill(STRANGER);
                repeated[29] = STRANGER;
                bench.take(&repeated);
            }
            assert_eq!(bench.stream(), before, "after batch {seq}");
        }
        let state = &bench.worker.state;
        let kept = (
            state.streams.len(),
            state.writers.iter().count(),
            state.by_key.len(),
        );
        assert_eq!(kept, (1, 1, 1), "strangers take no room");
        assert!(state.touched.len() <= 1);
        assert_eq!((state.xdp.placed, state.xdp.duplicates), (40, 40 * 500));
        assert_eq!(state.xdp.unknown_stream, 40 * 500);
        let bad = state.xdp.corrupt + state.xdp.malformed;
        assert_eq!(bad, 40 * 500);
        let mut reader = Reader::open(&bench.dir.path().join("topic.log"), Start::Oldest).unwrap();
        for seq in 0..40 {
            let batch = reader.next().unwrap().unwrap();
            batch.verify().unwrap();
            assert_eq!(batch.batch_seq, seq);
        }
    }

    #[test]
    fn repeated_packets_are_answered_now_and_then_only() {
        let mut bench = Bench::new();
        let batch = whole(2, KEY, 0, 0);
        let ping = frame(2, &Data::ping(KEY, 1, &[]), &[]);
        let (mut out, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
        let mut answers = |bench: &mut Bench, sent: &[u8], now: u64| {
            let state = &mut bench.worker.state;
            state.datagram(0, &[sent], now);
            state.commit_touched(now);
            let stream = &mut state.streams[0].as_mut().unwrap().stream;
            [now, now + 100_000].map(|now| stream.ack(now, &mut feedback, &mut out).is_some())
        };
        // A batch that is committed is told at once, as is a ping.
        assert_eq!(answers(&mut bench, &batch, 1), [true, false]);
        assert_eq!(answers(&mut bench, &ping, 2), [true, false]);
        for now in 3..100 {
            let repeated = [&batch, &ping][now as usize % 2];
            assert_eq!(answers(&mut bench, repeated, now), [false, true]);
        }
    }

    #[test]
    fn streams_whose_publishers_say_nothing_cost_no_system_call() {
        let mut bench = Bench::new();
        let key = |number: u64| StreamKey {
            key: 2 * number + 1,
            stream: 0,
        };
        let mut controls: Vec<_> = (0..64)
            .map(|number| bench.open(key(number), PUBLISHER))
            .collect();
        for number in 0..64 {
            bench.take(&whole(PUBLISHER, key(number), 0, 0));
        }
        let reads = |bench: &mut Bench, ticks| {
            let before = bench.worker.state.xdp.control_reads;
            for _ in 0..ticks {
                let now = bench.worker.state.now();
                bench.worker.tick(now).unwrap();
            }
            bench.worker.state.xdp.control_reads - before
        };
        reads(&mut bench, 10);
        assert_eq!(reads(&mut bench, 1000), 0);
        // The end that is said in two parts is heard all the same.
        let end = Header::for_end(1);
        let (first, second) = end.as_bytes().split_at(10);
        controls[7].write_all(first).unwrap();
        while reads(&mut bench, 1) == 0 {}
        assert_eq!(bench.worker.state.by_key.len(), 64);
        controls[7].write_all(second).unwrap();
        while bench.worker.state.by_key.contains_key(&key(7)) {
            reads(&mut bench, 1);
        }
        let mut answer = Vec::new();
        controls[7].read_to_end(&mut answer).unwrap();
        assert!(!answer.is_empty());
        let counters = &bench.worker.state.shared.counters;
        assert_eq!(counters.streams_completed.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_gate_is_open_as_long_as_the_stream() {
        let mut bench = Bench::new();
        let admitted = |bench: &Bench| bench.filter.0.lock().unwrap().contains(&KEY.key);
        assert!(admitted(&bench), "before its first packet");
        bench.take(&whole(2, KEY, 0, 0));
        assert!(admitted(&bench));
        bench.control.shutdown(Shutdown::Both).unwrap();
        while bench.worker.state.streams[0].is_some() {
            assert!(admitted(&bench));
            let now = bench.worker.state.now();
            bench.worker.tick(now).unwrap();
        }
        assert!(!admitted(&bench));
    }

    /// The same packet from another UDP port.
    fn from_port(mut sent: Vec<u8>, port: u16) -> Vec<u8> {
        sent[34..36].copy_from_slice(&port.to_be_bytes());
        sent
    }

    #[test]
    fn a_publisher_whose_port_changes_is_answered_there() {
        let mut bench = Bench::new();
        bench.take(&whole(PUBLISHER, KEY, 0, 0));
        bench.take(&from_port(whole(PUBLISHER, KEY, 1, 1), 4000));
        let before = (2, address(PUBLISHER));
        assert_eq!(bench.stream(), before, "one packet is not enough");
        bench.take(&from_port(whole(PUBLISHER, KEY, 2, 2), 4000));
        let mut there = address(PUBLISHER);
        there.set_port(4000);
        assert_eq!(bench.stream(), (3, there));
    }

    #[test]
    fn only_the_host_of_the_control_connection_is_answered() {
        const VICTIM: u8 = 66;
        let mut bench = Bench::new();
        let (mut out, mut feedback) = (vec![0; 2048], Feedback::new(KEY));
        let mut answers = |bench: &mut Bench| {
            let stream = &mut bench.worker.state.streams[0].as_mut().unwrap().stream;
            let len = stream.ack(u64::MAX, &mut feedback, &mut out)?;
            let datagram = frame::parse(&out[..len], len).unwrap();
            assert_eq!(datagram.len, out[datagram.start..len].len());
            Some(len)
        };
        // From the first packet on, for any number of packets.
        for packet in 0..20 {
            bench.take(&frame(VICTIM, &Data::ping(KEY, 2 * packet, &[]), &[]));
            assert_eq!(answers(&mut bench), None, "packet {packet}");
            let stream = &bench.worker.state.streams[0].as_ref().unwrap().stream;
            assert_eq!(stream.ack_due(), None, "nothing stays due");
        }
        for packet in 50..70 {
            bench.take(&frame(PUBLISHER, &Data::ping(KEY, 10 * packet, &[]), &[]));
            assert!(answers(&mut bench).is_some());
            for more in 1..5 {
                bench.take(&frame(
                    VICTIM,
                    &Data::ping(KEY, 10 * packet + more, &[]),
                    &[],
                ));
            }
            answers(&mut bench);
            assert_eq!(bench.stream().1, address(PUBLISHER));
        }
        assert_eq!(bench.worker.state.xdp.foreign_source, 20 + 20 * 4);
    }

    #[test]
    fn addresses_that_were_damaged_on_the_way_lead_no_answers_astray() {
        let mut bench = Bench::new();
        let mut rng = Rng::with_seed(2);
        // Even if it is the first: two good ones put it right.
        for packet in 0..200 {
            let mut sent = whole(2, KEY, packet, packet);
            if packet % 3 == 0 {
                // Source: hardware address, IP address or port.
                let at = [rng.usize(6..12), rng.usize(26..30), rng.usize(34..36)][rng.usize(0..3)];
                sent[at] ^= 1 << rng.u8(..8);
            }
            bench.take(&sent);
            assert_eq!(bench.log.info().batches, packet + 1);
            if packet >= 2 {
                let stream = &bench.worker.state.streams[0].as_ref().unwrap().stream;
                let back = stream.back.as_ref().unwrap();
                let good = whole(2, KEY, 0, 0);
                let datagram = frame::parse(&good, good.len()).unwrap();
                assert!(back.leads_back(&good, &datagram), "after packet {packet}");
            }
        }
    }
}
