//! A worker: one thread, its own poller, its own writers, many connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use penstock_log::{Writer, Writers};
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::{Rounds, SNAPSHOT_INTERVAL, SnapshotCell, Tick};
use slab::Slab;
use tracing::warn;

use super::connection::{CloseReason, Connection, Context, Need, SCRATCH_LEN};
use crate::session;
use crate::session::accepted_stream::AcceptedStream;
use crate::session::stats::{Shared, WorkerStats};
use crate::session::work_queue::StreamQueue;

/// Interval of time-based work and of snapshots.
const TICK_INTERVAL: Duration = SNAPSHOT_INTERVAL;
/// Sleep time while a connection waits for room in the ring.
const BLOCKED_POLL_INTERVAL: Duration = Duration::from_millis(1);
/// Interval of the check for batches that block others, while there may be any.
const RECLAIM_INTERVAL: Duration = Duration::from_millis(1);
/// Sleep time while a batch of this worker grows old in the ring.
const OLD_BATCH_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Compare each batch with its checksum before it is committed.
    pub verify_on_receive: bool,
    /// Time limit for the next byte of a batch. It is also the time that a batch may take beyond what
    /// its bytes need at [`crate::session::claims::MIN_RATE`].
    pub stall_timeout: Duration,
    /// Interval of the heartbeats to a publisher that waits for room.
    pub heartbeat: Duration,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            verify_on_receive: false,
            stall_timeout: Duration::from_secs(30),
            heartbeat: Duration::from_secs(1),
        }
    }
}

/// State of a worker.
#[derive(Debug, Clone, Default)]
pub struct WorkerSnapshot {
    /// Counters so far.
    pub stats: WorkerStats,
    /// Connections that it serves.
    pub connections: usize,
    /// Those of them that wait for room in the shared buffer.
    pub blocked: usize,
}

/// Access to a running worker.
pub type WorkerHandle = session::WorkerHandle<WorkerSnapshot>;

/// A worker that does not run yet.
#[derive(Debug)]
pub struct Worker {
    resources: Resources,
    stop: Arc<AtomicBool>,
    inbox: Receiver<AcceptedStream>,
    poller: Arc<Poller>,
    queue: StreamQueue,
    connections: Slab<Entry>,
    /// Connections to drive in the next round without an event.
    queued: Vec<usize>,
    /// Connections that the last round queued.
    due: Vec<usize>,
    /// Time of the next check for batches that block others.
    next_reclaim: Instant,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    /// Counts rounds of the loop, so that other threads see progress.
    rounds: Rounds,
}

/// What all connections of a worker use.
#[derive(Debug)]
struct Resources {
    config: WorkerConfig,
    shared: Arc<Shared>,
    writers: Writers,
    /// Buffer for received bytes of a batch outside the ring.
    scratch: Box<[u8]>,
    /// Number of the loop's current round.
    round: u64,
    stats: WorkerStats,
    first_frame: Option<Tick>,
    last_commit: Option<Tick>,
}

impl Resources {
    /// What a connection with this writer may use.
    fn context(&mut self, writer: usize, now: Instant) -> Context<'_> {
        Context {
            writer: &mut self.writers[writer],
            stats: &mut self.stats,
            first_frame: &mut self.first_frame,
            last_commit: &mut self.last_commit,
            shared: &self.shared,
            config: &self.config,
            scratch: &mut self.scratch,
            round: self.round,
            now,
        }
    }

    fn sum_up(&self) -> WorkerStats {
        let mut stats = self.stats.clone();
        if let (Some(first), Some(last)) = (self.first_frame, self.last_commit) {
            stats.active_ns = stats.stages.nanos_between(first, last);
        }
        stats
    }
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    writer: usize,
    need: Need,
    watched: Interest,
    is_queued: bool,
    /// Round of the loop in which it was last driven.
    driven_in: u64,
}

impl Worker {
    /// A worker that runs until `stop` is set.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
    pub fn new(
        config: WorkerConfig,
        shared: Arc<Shared>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, WorkerHandle)> {
        let poller = Arc::new(Poller::new()?);
        shared.claims.register_worker(&poller);
        let (queue, inbox) = StreamQueue::new(Arc::clone(&poller));
        let handle = WorkerHandle::new(&poller);
        let resources = Resources {
            config,
            shared,
            writers: Writers::default(),
            scratch: vec![0; SCRATCH_LEN].into(),
            round: 0,
            stats: WorkerStats::default(),
            first_frame: None,
            last_commit: None,
        };
        let worker = Self {
            resources,
            stop,
            inbox,
            poller,
            queue,
            connections: Slab::new(),
            queued: Vec::new(),
            due: Vec::new(),
            next_reclaim: Instant::now(),
            snapshot: handle.snapshot(),
            rounds: handle.rounds(),
        };
        Ok((worker, handle))
    }

    /// The queue of accepted streams for this worker.
    #[must_use]
    pub fn queue(&self) -> StreamQueue {
        self.queue.clone()
    }

    /// Serves connections until the stop flag is set; returns its counters.
    ///
    /// # Errors
    /// If the poller fails, which no peer can cause.
    pub fn run(mut self) -> io::Result<WorkerStats> {
        let mut events = Events::default();
        let mut next_tick = Instant::now() + TICK_INTERVAL;
        while !self.stop.load(Ordering::Relaxed) {
            self.poller
                .wait(&mut events, self.poll_timeout(next_tick))?;
            self.resources.stats.polls += 1;
            self.resources.round += 1;
            self.rounds.count();
            std::mem::swap(&mut self.queued, &mut self.due);
            let now = Instant::now();
            while let Ok(accepted) = self.inbox.try_recv() {
                self.add(accepted, now);
            }
            for event in events.iter() {
                self.drive(event.key, now);
            }
            self.drive_queued(now);
            self.reclaim(now);
            if now >= next_tick {
                self.tick(now);
                next_tick = now + TICK_INTERVAL;
            }
        }
        self.shut_down();
        Ok(self.resources.sum_up())
    }

    fn publish_snapshot(&self) {
        let is_blocked = |(_, entry): &(usize, &Entry)| entry.connection.is_blocked();
        self.snapshot.publish(WorkerSnapshot {
            stats: self.resources.sum_up(),
            connections: self.connections.len(),
            blocked: self.connections.iter().filter(is_blocked).count(),
        });
    }

    fn poll_timeout(&self, next_tick: Instant) -> Duration {
        let need = |key: &usize| self.connections.get(*key).map(|entry| entry.need);
        let at_once = |need: &Need| matches!(need, Need::Yield | Need::Ack);
        match self
            .queued
            .iter()
            .filter_map(need)
            .min_by_key(|need| !at_once(need))
        {
            Some(need) if at_once(&need) => Duration::ZERO,
            Some(_) => BLOCKED_POLL_INTERVAL,
            None => {
                let tick = next_tick.saturating_duration_since(Instant::now());
                match self.resources.writers.iter().any(is_half_a_round_old) {
                    true => tick.min(OLD_BATCH_POLL_INTERVAL),
                    false => tick,
                }
            }
        }
    }

    /// Moves blocking batches out of the ring, or ends their streams: slow batches that have been in the ring
    /// for half a round, and the largest slow batch that holds what others were denied.
    fn reclaim(&mut self, now: Instant) {
        let any_is_old = self.resources.writers.iter().any(is_half_a_round_old);
        let is_pressed = self.resources.shared.claims.is_pressed(now);
        if now < self.next_reclaim || (!any_is_old && !is_pressed) {
            return;
        }
        self.next_reclaim = now + RECLAIM_INTERVAL;
        if any_is_old {
            for key in 0..self.connections.capacity() {
                let writer = self.connections.get(key).map(|entry| entry.writer);
                let writer = writer.map(|writer| &self.resources.writers[writer]);
                if writer.is_some_and(is_half_a_round_old)
                    && self.with(key, now, |connection, cx| connection.blocks_ring(cx))
                        == Some(true)
                {
                    self.spill_or_end(key, now);
                }
            }
        }
        if is_pressed {
            let mut largest = (0, 0);
            for key in 0..self.connections.capacity() {
                let bytes = self.with(key, now, |connection, cx| connection.reclaimable(cx));
                largest = largest.max((bytes.unwrap_or(0), key));
            }
            if largest.0 > 0 {
                self.spill_or_end(largest.1, now);
            }
        }
    }

    fn spill_or_end(&mut self, key: usize, now: Instant) {
        match self.with(key, now, Connection::spill_or_end) {
            // The batch may be complete now, or the stream may have an error to send.
            Some(Ok(())) => self.drive(key, now),
            Some(Err(reason)) => self.remove(key, now, &reason),
            None => {}
        }
    }

    fn add(&mut self, accepted: AcceptedStream, now: Instant) {
        let connection = Connection::new(accepted, &self.resources.shared, now);
        let vacant = self.connections.vacant_entry();
        let key = vacant.key();
        let watched = Interest::READABLE;
        // It is deleted in `remove`, before its key is free.
        if let Err(error) = self.poller.add(&connection.socket, key, watched) {
            warn!(%error, "cannot watch a connection; it is dropped");
            self.queue.ended();
            return;
        }
        let writer = self.resources.writers.join(connection.log());
        let need = Need::Readable;
        vacant.insert(Entry {
            connection,
            writer,
            need,
            watched,
            is_queued: false,
            driven_in: 0,
        });
    }

    /// Runs `action` on a connection with what it needs from this worker.
    fn with<R>(
        &mut self,
        key: usize,
        now: Instant,
        action: impl FnOnce(&mut Connection, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let entry = self.connections.get_mut(key)?;
        let mut context = self.resources.context(entry.writer, now);
        Some(action(&mut entry.connection, &mut context))
    }

    fn drive(&mut self, key: usize, now: Instant) {
        let need = self.with(key, now, Connection::drive);
        self.apply(key, now, need);
    }

    /// Does what a connection needs, or ends it.
    fn apply(&mut self, key: usize, now: Instant, need: Option<Result<Need, CloseReason>>) {
        match need {
            None => {}
            Some(Ok(need)) => self.rearm(key, need),
            Some(Err(reason)) => self.remove(key, now, &reason),
        }
    }

    /// Drives the connections that the last round queued.
    fn drive_queued(&mut self, now: Instant) {
        let mut due = std::mem::take(&mut self.due);
        for key in due.drain(..) {
            let Some(entry) = self.connections.get_mut(key) else {
                continue;
            };
            entry.is_queued = false;
            match entry.need {
                // It has just received more, so the ack may wait.
                Need::Ack if entry.driven_in == self.resources.round => self.rearm(key, Need::Ack),
                Need::Ack => {
                    let need = self.with(key, now, Connection::acknowledge);
                    self.apply(key, now, need);
                }
                Need::Yield | Need::Space => self.drive(key, now),
                Need::Readable | Need::Nothing => {}
            }
        }
        self.due = due;
    }

    /// Watches the socket for what the connection needs; a blocked connection is not read.
    fn rearm(&mut self, key: usize, need: Need) {
        let Some(entry) = self.connections.get_mut(key) else {
            return;
        };
        entry.need = need;
        entry.driven_in = self.resources.round;
        let mut wanted = match need {
            Need::Readable | Need::Yield | Need::Ack => Interest::READABLE,
            Need::Space | Need::Nothing => Interest::NOTHING,
        };
        if entry.connection.wants_to_write() {
            wanted = wanted.and(Interest::WRITABLE);
        }
        if wanted != entry.watched {
            entry.watched = wanted;
            let socket = &entry.connection.socket;
            if let Err(error) = self.poller.modify(socket, key, wanted) {
                warn!(%error, "cannot watch a connection; it is dropped");
                return self.remove(key, Instant::now(), &CloseReason::Io(error));
            }
        }
        if matches!(need, Need::Yield | Need::Space | Need::Ack) && !entry.is_queued {
            entry.is_queued = true;
            self.queued.push(key);
        }
    }

    fn remove(&mut self, key: usize, now: Instant, reason: &CloseReason) {
        let Some(entry) = self.connections.try_remove(key) else {
            return;
        };
        // Best effort: the descriptor may not be watched any more.
        let _ = self.poller.delete(&entry.connection.socket);
        let mut context = self.resources.context(entry.writer, now);
        let report = entry.connection.finish(&mut context, reason);
        self.resources.writers.leave(entry.writer);
        let is_complete = matches!(reason, CloseReason::Completed);
        self.resources.shared.stream_ended(report, is_complete);
        self.queue.ended();
    }

    fn tick(&mut self, now: Instant) {
        let shared = &self.resources.shared;
        let held = shared.claims.memory_held();
        let counters = &shared.counters;
        counters.evacuated_bytes.store(held, Ordering::Relaxed);
        for key in 0..self.connections.capacity() {
            match self.with(key, now, Connection::tick) {
                None | Some(Ok(())) => {}
                Some(Err(reason)) => self.remove(key, now, &reason),
            }
        }
        self.publish_snapshot();
    }

    fn shut_down(&mut self) {
        let now = Instant::now();
        for key in 0..self.connections.capacity() {
            self.with(key, now, Connection::shut_down);
            self.remove(key, now, &CloseReason::Closed);
        }
    }
}

/// Whether its oldest unfinished batch began at least half a round of the ring ago.
fn is_half_a_round_old(writer: &Writer) -> bool {
    writer.oldest_open_age() > writer.log().geometry().ring_bytes() / 2
}
