//! A worker: one thread, its own poller, its own writers, many connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use penstock_log::{Writer, Writers};
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::{Rounds, SNAPSHOT_INTERVAL, SnapshotCell, Tick};
use tracing::warn;

use super::connection::{CloseReason, Connection, Context, Need, SCRATCH};
use crate::session;
use crate::session::accepted_stream::{AcceptedStream, StreamQueue};
use crate::session::stats::{Shared, WorkerStats};

/// How often time is looked after, and figures are shown.
const TICK: Duration = SNAPSHOT_INTERVAL;
/// How long a worker sleeps when a connection waits for room in the ring.
const SPACE_POLL: Duration = Duration::from_millis(1);
/// Interval in which a worker checks for batches that block others, while there may be any.
const RELIEF: Duration = Duration::from_millis(1);
/// Sleep time while a batch of its own grows old in the ring.
const OLD_BATCH_POLL: Duration = Duration::from_millis(10);

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Compare each batch with its checksum before it is committed.
    pub verify_on_receive: bool,
    /// Time limit for the next byte of a batch. It is also the time that a batch may take beyond what
    /// its bytes need at [`crate::session::claims::MIN_RATE`].
    pub stall_timeout: Duration,
    /// Interval in which a publisher that waits for room is told that the broker is alive.
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

/// What a worker is doing.
#[derive(Debug, Clone, Default)]
pub struct WorkerSnapshot {
    /// What it has done so far.
    pub stats: WorkerStats,
    /// Connections that it serves.
    pub connections: usize,
    /// Those of them that wait for room in the shared buffer.
    pub blocked: usize,
}

/// The way to a running worker.
pub type WorkerHandle = session::WorkerHandle<WorkerSnapshot>;

/// A worker, before it runs.
#[derive(Debug)]
pub struct Worker {
    config: WorkerConfig,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    inbox: Receiver<AcceptedStream>,
    poller: Arc<Poller>,
    queue: StreamQueue,
    writers: Writers,
    connections: Vec<Option<Entry>>,
    free: Vec<usize>,
    /// Connections that need another look without an event.
    again: Vec<usize>,
    /// Those of the last round, while they get it.
    due: Vec<usize>,
    /// Rounds of the loop.
    round: u64,
    /// Buffer for the first bytes of a batch outside the ring.
    scratch: Box<[u8]>,
    /// Time of the next check for batches that block others.
    next_relief: Instant,
    stats: WorkerStats,
    first_frame: Option<Tick>,
    last_commit: Option<Tick>,
    snapshot: Arc<SnapshotCell<WorkerSnapshot>>,
    /// Shows other threads that the loop makes progress.
    rounds: Rounds,
}

#[derive(Debug)]
struct Entry {
    connection: Connection,
    writer: usize,
    need: Need,
    watched: Interest,
    queued: bool,
    /// Round of the loop in which it was last driven.
    round: u64,
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
        shared.claims.wake_for_others(&poller);
        let (queue, inbox) = StreamQueue::new(Arc::clone(&poller));
        let handle = WorkerHandle::new(&poller);
        let worker = Self {
            config,
            shared,
            stop,
            inbox,
            poller,
            queue,
            writers: Writers::default(),
            connections: Vec::new(),
            free: Vec::new(),
            again: Vec::new(),
            due: Vec::new(),
            round: 0,
            scratch: vec![0; SCRATCH].into(),
            next_relief: Instant::now(),
            stats: WorkerStats::default(),
            first_frame: None,
            last_commit: None,
            snapshot: handle.snapshot(),
            rounds: handle.rounds(),
        };
        Ok((worker, handle))
    }

    /// The queue in which the accept loop leaves streams for this worker.
    #[must_use]
    pub fn queue(&self) -> StreamQueue {
        self.queue.clone()
    }

    /// Serves connections until told to stop; returns what it did.
    ///
    /// # Errors
    /// If the poller fails, which no peer can cause.
    pub fn run(mut self) -> io::Result<WorkerStats> {
        let mut events = Events::default();
        let mut next_tick = Instant::now() + TICK;
        while !self.stop.load(Ordering::Relaxed) {
            self.poller.wait(&mut events, self.patience(next_tick))?;
            self.stats.polls += 1;
            self.round += 1;
            self.rounds.count();
            std::mem::swap(&mut self.again, &mut self.due);
            let now = Instant::now();
            while let Ok(opened) = self.inbox.try_recv() {
                self.adopt(opened, now);
            }
            for event in events.iter() {
                self.drive(event.key, now);
            }
            self.drive_queued(now);
            self.relieve(now);
            if now >= next_tick {
                self.tick(now);
                next_tick = now + TICK;
            }
        }
        self.shut_down();
        Ok(self.sum_up())
    }

    fn sum_up(&self) -> WorkerStats {
        let mut stats = self.stats.clone();
        if let (Some(first), Some(last)) = (self.first_frame, self.last_commit) {
            stats.active_ns = stats.stages.nanos_between(first, last);
        }
        stats
    }

    fn show(&self) {
        let entries = || self.connections.iter().flatten();
        let blocked = |entry: &&Entry| entry.connection.is_blocked();
        self.snapshot.publish(WorkerSnapshot {
            stats: self.sum_up(),
            connections: entries().count(),
            blocked: entries().filter(blocked).count(),
        });
    }

    fn patience(&self, next_tick: Instant) -> Duration {
        let need = |key: &usize| self.connections[*key].as_ref().map(|entry| entry.need);
        let at_once = |need: &Need| matches!(need, Need::Turn | Need::Ack);
        match self
            .again
            .iter()
            .filter_map(need)
            .min_by_key(|need| !at_once(need))
        {
            Some(need) if at_once(&need) => Duration::ZERO,
            Some(_) => SPACE_POLL,
            None => {
                let tick = next_tick.saturating_duration_since(Instant::now());
                match self.writers.iter().any(is_half_a_round_old) {
                    true => tick.min(OLD_BATCH_POLL),
                    false => tick,
                }
            }
        }
    }

    /// Makes blocking batches give way: those in the ring that are half a round old and arrive slowly,
    /// and the largest slow batch that holds what others were denied.
    fn relieve(&mut self, now: Instant) {
        let any_is_old = self.writers.iter().any(is_half_a_round_old);
        let is_pressed = self.shared.claims.is_pressed(now);
        if now < self.next_relief || (!any_is_old && !is_pressed) {
            return;
        }
        self.next_relief = now + RELIEF;
        if any_is_old {
            for key in 0..self.connections.len() {
                let entry = self.connections[key].as_ref();
                if entry.is_some_and(|entry| is_half_a_round_old(&self.writers[entry.writer]))
                    && self.with(key, now, |connection, cx| connection.holds_up(cx)) == Some(true)
                {
                    self.make_give_way(key, now);
                }
            }
        }
        if is_pressed {
            let mut largest = (0, 0);
            for key in 0..self.connections.len() {
                let bytes = self.with(key, now, |connection, cx| connection.reclaimable(cx));
                largest = largest.max((bytes.unwrap_or(0), key));
            }
            if largest.0 > 0 {
                self.make_give_way(largest.1, now);
            }
        }
    }

    fn make_give_way(&mut self, key: usize, now: Instant) {
        match self.with(key, now, Connection::give_way) {
            // A batch that left the ring may be complete now, or the stream may have an error to send.
            Some(Ok(())) => self.drive(key, now),
            Some(Err(ending)) => self.remove(key, now, &ending),
            None => {}
        }
    }

    fn adopt(&mut self, opened: AcceptedStream, now: Instant) {
        let connection = Connection::new(opened, &self.shared, now);
        let writer = self.writers.join(connection.log());
        let key = self.free.pop().unwrap_or_else(|| {
            self.connections.push(None);
            self.connections.len() - 1
        });
        let watched = Interest::READABLE;
        // It is deleted in `remove`, before its key is free.
        if let Err(error) = self.poller.add(&connection.socket, key, watched) {
            warn!(%error, "cannot watch a connection; it is dropped");
            self.free.push(key);
            self.writers.leave(writer);
            self.queue.stream_ended();
            return;
        }
        let need = Need::Readable;
        self.connections[key] = Some(Entry {
            connection,
            writer,
            need,
            watched,
            queued: false,
            round: 0,
        });
    }

    /// Runs `action` on a connection with all that it needs from this worker.
    fn with<R>(
        &mut self,
        key: usize,
        now: Instant,
        action: impl FnOnce(&mut Connection, &mut Context<'_>) -> R,
    ) -> Option<R> {
        let entry = self.connections.get_mut(key)?.as_mut()?;
        let mut context = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.stats,
            first_frame: &mut self.first_frame,
            last_commit: &mut self.last_commit,
            shared: &self.shared,
            config: &self.config,
            scratch: &mut self.scratch,
            round: self.round,
            now,
        };
        Some(action(&mut entry.connection, &mut context))
    }

    fn drive(&mut self, key: usize, now: Instant) {
        let need = self.with(key, now, Connection::drive);
        self.go_on(key, now, need);
    }

    fn go_on(&mut self, key: usize, now: Instant, need: Option<Result<Need, CloseReason>>) {
        match need {
            None => {}
            Some(Ok(need)) => self.rearm(key, need),
            Some(Err(ending)) => self.remove(key, now, &ending),
        }
    }

    /// Looks again after those that asked for it in the last round.
    fn drive_queued(&mut self, now: Instant) {
        let mut due = std::mem::take(&mut self.due);
        for key in due.drain(..) {
            let Some(entry) = &mut self.connections[key] else {
                continue;
            };
            entry.queued = false;
            match entry.need {
                // It has just received more: the ack waits on.
                Need::Ack if entry.round == self.round => self.rearm(key, Need::Ack),
                Need::Ack => {
                    let need = self.with(key, now, Connection::acknowledge);
                    self.go_on(key, now, need);
                }
                Need::Turn | Need::Space => self.drive(key, now),
                Need::Readable | Need::Nothing => {}
            }
        }
        self.due = due;
    }

    /// Watches the socket for what the connection needs: one that waits for room is not read.
    fn rearm(&mut self, key: usize, need: Need) {
        let Some(entry) = &mut self.connections[key] else {
            return;
        };
        entry.need = need;
        entry.round = self.round;
        let mut wanted = match need {
            Need::Readable | Need::Turn | Need::Ack => Interest::READABLE,
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
        if matches!(need, Need::Turn | Need::Space | Need::Ack) && !entry.queued {
            entry.queued = true;
            self.again.push(key);
        }
    }

    fn remove(&mut self, key: usize, now: Instant, ending: &CloseReason) {
        let Some(entry) = self.connections[key].take() else {
            return;
        };
        // A descriptor that is not watched any more is what is wanted.
        let _ = self.poller.delete(&entry.connection.socket);
        let mut context = Context {
            writer: &mut self.writers[entry.writer],
            stats: &mut self.stats,
            first_frame: &mut self.first_frame,
            last_commit: &mut self.last_commit,
            shared: &self.shared,
            config: &self.config,
            scratch: &mut self.scratch,
            round: self.round,
            now,
        };
        let report = entry.connection.finish(&mut context, ending);
        self.writers.leave(entry.writer);
        let is_complete = matches!(ending, CloseReason::Completed);
        self.shared.stream_ended(report, is_complete);
        self.queue.stream_ended();
        self.free.push(key);
    }

    fn tick(&mut self, now: Instant) {
        let held = self.shared.claims.memory_held();
        let counters = &self.shared.counters;
        counters.evacuated_bytes.store(held, Ordering::Relaxed);
        for key in 0..self.connections.len() {
            match self.with(key, now, Connection::tick) {
                None | Some(Ok(())) => {}
                Some(Err(ending)) => self.remove(key, now, &ending),
            }
        }
        self.show();
    }

    fn shut_down(&mut self) {
        let now = Instant::now();
        for key in 0..self.connections.len() {
            self.with(key, now, Connection::shut_down);
            self.remove(key, now, &CloseReason::Closed);
        }
    }
}

/// Whether its oldest unfinished batch began at least half a round of the ring ago.
fn is_half_a_round_old(writer: &Writer) -> bool {
    writer.oldest_open_age() > writer.log().geometry().ring_bytes() / 2
}
