//! The publisher that callers hold: fills batches and hands them to streams.

use std::num::NonZero;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, TrySendError};
use penstock_runtime::poison::lock;
use penstock_runtime::profile::{StageReport, StageTimer};
use penstock_wire::crc32c::Joiner;
use penstock_wire::message::{self, OVERHEAD};
use tracing::warn;

use crate::batch::open_batch::{Appender, Extent, Watermark};
use crate::batch::payload::Payload;
use crate::batch::pool::{BufferPlan, Pool};
use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::failure::Failure;
use crate::latency::AckLatencyHistogram;
use crate::shared::Shared;
use crate::stream::connect::Location;
use crate::stream::connection::{StreamConnection, StreamContext, StreamId};
use crate::stream::io_thread::{IoThread, StreamResult};
use crate::stream::waker::Waker;
use crate::summary::{BrokerSummary, PublishStage, StreamSummary, Summary};
use crate::{Config, Error};

/// Of the messages that take more than a copy, one in so many is timed; a power of two.
const SAMPLE: u32 = 8;
/// How often a blocked publisher looks whether a stream has failed.
const LOOK: Duration = Duration::from_millis(50);

/// Pause between attempts to reach a broker that is not running yet.
const RETRY: Duration = Duration::from_millis(50);

/// Publishes messages; see the crate's documentation.
///
/// Closing it ([`Publisher::close`]) is the only way to know that everything arrived; dropping it
/// gives up at once.
pub struct Publisher {
    /// To the memory of the open batch, which `open` owns.
    appender: Appender,
    open: Arc<Mutex<BatchBuilder>>,
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    /// One for each stream.
    results: Vec<Receiver<StreamResult>>,
    io_threads: Vec<JoinHandle<()>>,
    wakers: Vec<Arc<Waker>>,
    linger: Option<Linger>,
    brokers: Vec<(String, u64)>,
    threads_per_broker: usize,
}

/// Figures of a running publisher.
#[derive(Debug, Clone)]
pub struct Progress {
    shared: Arc<Shared>,
}

impl Progress {
    /// Messages acknowledged so far.
    #[must_use]
    pub fn messages_acked(&self) -> u64 {
        self.shared.acked_messages.load(Ordering::Relaxed)
    }
}

/// Cancels a publisher from another thread, whatever it waits for.
#[derive(Debug, Clone)]
pub struct Canceller {
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    wakers: Vec<Arc<Waker>>,
}

impl Canceller {
    /// Gives up unacknowledged messages at once: [`Publisher::publish`] and [`Publisher::flush`] fail
    /// from now on, and [`Publisher::close`] returns what was acknowledged.
    pub fn cancel(&self) {
        self.shared.abandoned.store(true, Ordering::Release);
        self.failure.cancel();
        for waker in &self.wakers {
            // A stream that cannot be woken checks by itself a little later.
            let _ = waker.wake();
        }
    }
}

/// The batch that is being filled, and the way out.
///
/// The publisher's thread appends to the batch without this lock ([`Appender`]), so `payload` and
/// `messages` are complete only from [`BatchBuilder::check_in`] to [`BatchBuilder::check_out`].
struct BatchBuilder {
    payload: Payload,
    watermark: Arc<Watermark>,
    /// What the linger thread has sent of the open batch.
    sent: Extent,
    /// For the parts of it that fill a packet each.
    packets: Option<Arc<Joiner>>,
    /// Empty buffers for the next.
    spare: Vec<Payload>,
    messages: u32,
    timing: Timing,
    /// Rises with each batch, so that the linger thread knows one that it has seen before.
    generation: u64,
    batch_size: usize,
    max_message: usize,
    next_stream: usize,
    /// Batches that `next_stream` got without a break.
    in_a_row: usize,
    most_in_a_row: usize,
    streams: Vec<(Sender<Job>, Arc<Waker>)>,
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    /// Of batches that were handed over.
    total_messages: u64,
    first: Option<Instant>,
    stages: StageTimer<PublishStage>,
}

/// Time that filling the open batch took, measured on a sample: reading the clock costs as much as
/// copying a small message.
#[derive(Debug, Default, Clone, Copy)]
struct Timing {
    /// Messages that took more than a copy.
    slow: u32,
    copies: u32,
    copy_ticks: u64,
    sums: u32,
    timed_sums: u32,
    sum_ticks: u64,
}

struct Linger {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Publisher {
    /// Connects to every broker and opens every stream.
    ///
    /// # Errors
    /// The first broker that cannot be reached or says no, and what to do.
    pub fn connect(config: Config) -> Result<Self, Error> {
        config.check()?;
        let config = Arc::new(config);
        let streams = config.brokers.len() * config.threads_per_broker as usize;
        let buffers = BufferPlan::new(&config);
        let shared = Arc::new(Shared::new(Pool::new(buffers, config.batch_size)));
        let failure = Arc::new(Failure::default());
        let mut io_threads = Vec::new();
        for _ in 0..io_thread_count(&config, streams) {
            io_threads.push(IoThread::new(&shared, &failure)?);
        }
        let mut opening = ClientHandshake {
            config: &config,
            shared: &shared,
            first: FirstAttempts::new(config.connect_timeout.min(config.timeout)),
            most_queued: buffers.most_queued,
            max_payload: u32::MAX,
            streams: Vec::with_capacity(streams),
            results: Vec::with_capacity(streams),
        };
        let mut brokers = Vec::with_capacity(config.brokers.len());
        for broker in &config.brokers {
            let session = opening.open_session(broker, &mut io_threads)?;
            brokers.push((broker.clone(), session));
        }
        let ClientHandshake {
            max_payload,
            streams,
            results,
            ..
        } = opening;
        let max_payload = max_payload as usize;
        let watermark = Arc::<Watermark>::default();
        let appender = Appender::new(Arc::clone(&watermark));
        let front = BatchBuilder {
            payload: Payload::with_capacity(config.batch_size),
            watermark,
            sent: Extent::default(),
            packets: None,
            spare: Vec::with_capacity(buffers.total),
            messages: 0,
            timing: Timing::default(),
            generation: 0,
            batch_size: config.batch_size.min(max_payload),
            max_message: max_payload.saturating_sub(OVERHEAD),
            next_stream: 0,
            in_a_row: 0,
            most_in_a_row: buffers.in_a_row,
            streams,
            shared: Arc::clone(&shared),
            failure: Arc::clone(&failure),
            total_messages: 0,
            first: None,
            stages: StageTimer::default(),
        };
        let wakers = io_threads.iter().map(|thread| Arc::clone(thread.waker()));
        let mut publisher = Self {
            appender,
            open: Arc::new(Mutex::new(front)),
            shared,
            failure,
            results,
            wakers: wakers.collect(),
            io_threads: Vec::with_capacity(io_threads.len()),
            linger: None,
            brokers,
            threads_per_broker: config.threads_per_broker as usize,
        };
        for thread in io_threads {
            publisher.io_threads.push(thread.spawn()?);
        }
        publisher.linger = Some(Linger::start(config.linger, Arc::clone(&publisher.open))?);
        Ok(publisher)
    }

    /// Largest message that fits in a batch that every broker accepts, bytes.
    #[must_use]
    pub fn max_message(&self) -> usize {
        lock(&self.open).max_message
    }

    /// Adds a message to the open batch; sends the batch when it is full. AckLatencyHistogram while every stream
    /// has all that it may take: that is the brokers' back-pressure.
    ///
    /// # Errors
    /// [`Error::MessageTooLarge`] leaves everything as it was; any other error is a stream's, after
    /// which the publisher accepts nothing more.
    #[inline]
    pub fn publish(&mut self, message: &[u8]) -> Result<(), Error> {
        if self.appender.append(message) {
            Ok(())
        } else {
            self.publish_with_lock(message)
        }
    }

    #[inline(never)]
    fn publish_with_lock(&mut self, message: &[u8]) -> Result<(), Error> {
        let mut front = lock(&self.open);
        front.check_in(&mut self.appender);
        let published = front.publish(message);
        front.check_out(&mut self.appender);
        published
    }

    /// Sends the open batch and waits until everything published so far is acked (at ack level 0:
    /// written to the sockets).
    ///
    /// # Errors
    /// The failure of a stream.
    pub fn flush(&mut self) -> Result<(), Error> {
        let mut front = lock(&self.open);
        front.check_in(&mut self.appender);
        let sealed = front.seal();
        front.check_out(&mut self.appender);
        sealed?;
        let (done, waiting) = crossbeam_channel::unbounded();
        for number in 0..front.streams.len() {
            front.hand_over_to(number, Job::Flush(done.clone()))?;
        }
        drop((done, front));
        for _ in 0..self.results.len() {
            loop {
                match waiting.recv_timeout(LOOK) {
                    Ok(()) => break,
                    Err(_) => self.failure.check()?,
                }
            }
        }
        Ok(())
    }

    /// Sends the rest, ends every stream and waits until everything is acknowledged, unless cancelled.
    ///
    /// # Errors
    /// The failure of a stream; what was acked before it is in [`Publisher::progress`].
    pub fn close(mut self) -> Result<Summary, Error> {
        self.stop_linger();
        let mut front = lock(&self.open);
        front.check_in(&mut self.appender);
        match front.seal() {
            Err(Error::Failed) if self.is_cancelled() => {}
            sealed => sealed?,
        }
        // Without senders the streams see that no more comes.
        front.streams.clear();
        self.shared.closed.store(true, Ordering::Release);
        let total_messages = front.total_messages + u64::from(front.messages);
        let first = front.first;
        let mut stages = front.stages.clone();
        drop(front);
        self.wake_all();
        let mut waits = AckLatencyHistogram::default();
        let mut results = Vec::with_capacity(self.results.len());
        for result in std::mem::take(&mut self.results) {
            let result = match result.recv() {
                Ok(result) => result,
                // Its thread is gone.
                Err(_) => return Err(self.failure.take()),
            };
            match result {
                Ok(closed) => {
                    stages.merge(&closed.stages);
                    if let Some(more) = &closed.waits {
                        waits.merge(more);
                    }
                    results.push(closed.summary);
                }
                // Its error was returned earlier.
                Err(Error::Failed) if self.is_cancelled() => results.push(StreamSummary::default()),
                Err(Error::Failed) => return Err(self.failure.take()),
                Err(error) => return Err(error),
            }
        }
        let elapsed = first.map_or(Duration::ZERO, |first| first.elapsed());
        let mut summary = self.sum_up(total_messages, elapsed, &stages, results);
        summary.ack_latency_us = waits.sum_up();
        Ok(summary)
    }

    /// Figures that can be looked at from another thread.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            shared: Arc::clone(&self.shared),
        }
    }

    /// The handle that cancels this publisher from another thread.
    #[must_use]
    pub fn canceller(&self) -> Canceller {
        Canceller {
            shared: Arc::clone(&self.shared),
            failure: Arc::clone(&self.failure),
            wakers: self.wakers.clone(),
        }
    }

    fn is_cancelled(&self) -> bool {
        self.shared.abandoned.load(Ordering::Acquire)
    }

    fn sum_up(
        &self,
        messages_sent: u64,
        elapsed: Duration,
        stages: &StageTimer<PublishStage>,
        results: Vec<StreamSummary>,
    ) -> Summary {
        let batches = results.iter().map(|stream| stream.batches).sum();
        let payload_bytes: u64 = results.iter().map(|stream| stream.payload_bytes).sum();
        let seconds = elapsed.as_secs_f64();
        let mut results = results.into_iter();
        let brokers = self.brokers.iter().map(|(address, session)| BrokerSummary {
            address: address.clone(),
            session: format!("{session:016x}"),
            streams: results.by_ref().take(self.threads_per_broker).collect(),
        });
        Summary {
            messages_sent,
            messages_acked: self.progress().messages_acked(),
            batches,
            payload_bytes,
            seconds,
            bandwidth_mb_per_s: if seconds > 0.0 {
                payload_bytes as f64 / seconds / 1e6
            } else {
                0.0
            },
            ack_latency_us: None,
            stages: pipeline_shares(stages, batches),
            brokers: brokers.collect(),
        }
    }

    fn stop_linger(&mut self) {
        if let Some(Linger { stop, thread }) = self.linger.take() {
            drop(stop);
            // It only ever fails by panicking, which a stream's failure tells better.
            let _ = thread.join();
        }
    }

    fn wake_all(&self) {
        for waker in &self.wakers {
            // A stream that cannot be woken looks around by itself, a little later.
            let _ = waker.wake();
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        self.canceller().cancel();
        self.stop_linger();
        if let Ok(mut front) = self.open.lock() {
            front.streams.clear();
        }
        for thread in self.io_threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

impl BatchBuilder {
    /// Takes over what the publisher's thread has appended, and drops what the linger thread has sent.
    fn check_in(&mut self, appender: &mut Appender) {
        // After a panic nothing was attached: what was at hand then still is.
        let Some(filled) = appender.detach() else {
            return;
        };
        // SAFETY: `check_out` made room for what the appender has written.
        unsafe { self.payload.set_len(filled.len) };
        self.messages = filled.messages;
        let sent = std::mem::take(&mut self.sent);
        if sent.messages > 0 {
            self.payload.remove_first(sent.len);
            self.messages -= sent.messages;
            self.timing = Timing::default();
            self.follow_packet_size();
        }
    }

    /// Lets the publisher's thread append until a message takes more than a copy.
    fn check_out(&mut self, appender: &mut Appender) {
        let limit = if self.messages == 0 {
            0
        } else {
            let next_sum = self.payload.next_sum(self.packets.as_deref());
            next_sum.min(self.batch_size)
        };
        let start = self.payload.room_for(limit);
        let filled = Extent {
            len: self.payload.len(),
            messages: self.messages,
        };
        // SAFETY: there is room, which nothing uses before `check_in`: the linger thread does not touch
        // the payload, except to read what is below the watermark.
        unsafe { appender.attach(start, filled, limit) };
    }

    fn publish(&mut self, message: &[u8]) -> Result<(), Error> {
        if message.len() > self.max_message {
            return Err(Error::MessageTooLarge {
                len: message.len(),
                max: self.max_message,
            });
        }
        let len = message::encoded_len(message.len());
        if self.payload.len() + len > self.batch_size && self.messages > 0 {
            self.seal()?;
        }
        if self.first.is_none() {
            self.first = Some(Instant::now());
        }
        self.append(message);
        if self.payload.len() >= self.batch_size {
            self.seal()
        } else {
            Ok(())
        }
    }

    fn append(&mut self, message: &[u8]) {
        self.messages += 1;
        let timing = &mut self.timing;
        let is_timed = timing.slow.is_multiple_of(SAMPLE);
        timing.slow += 1;
        if !is_timed {
            self.payload.append(message);
            timing.sums += u32::from(self.payload.sum_complete(self.packets.as_deref()));
            return;
        }
        let start = self.stages.now();
        self.payload.append(message);
        let copied = self.stages.now();
        timing.copies += 1;
        timing.copy_ticks += copied.ticks_since(start);
        if self.payload.sum_complete(self.packets.as_deref()) {
            timing.sums += 1;
            timing.timed_sums += 1;
            timing.sum_ticks += self.stages.now().ticks_since(copied);
        }
    }

    /// Hands the open batch to a stream and begins another.
    fn seal(&mut self) -> Result<(), Error> {
        if self.messages == 0 {
            return self.failure.check();
        }
        // Before waiting for a buffer: a batch that cannot be handed over yet waits already.
        let sealed = self.stages.now();
        let ticks = std::mem::take(&mut self.timing).ticks(self.messages);
        self.stages
            .credit(PublishStage::BufferWrite, ticks, u64::from(self.messages));
        let checksum = self.payload.seal();
        self.stages.lap(PublishStage::BufferWrite, sealed);
        let next = self.take_free()?;
        let payload = std::mem::replace(&mut self.payload, next);
        let messages = std::mem::take(&mut self.messages);
        self.follow_packet_size();
        self.hand_over_batch(SealedBatch {
            payload,
            messages,
            checksum,
            sealed,
        })
    }

    /// Sends a copy of what is in the open batch and not yet sent, while the publisher's thread may
    /// append to it.
    fn send_rest(&mut self, filled: Extent) -> Result<(), Error> {
        let sealed = self.stages.now();
        let mut payload = self.take_free()?;
        let start = self.stages.now();
        // SAFETY: everything below the watermark is initialised, and is not written again before the
        // appender is detached, which takes the lock that is held here.
        let rest = unsafe { self.payload.filled(self.sent.len..filled.len) };
        payload.append_encoded(rest);
        payload.sum_complete(self.packets.as_deref());
        let checksum = payload.seal();
        self.stages.lap(PublishStage::BufferWrite, start);
        let messages = filled.messages - self.sent.messages;
        self.sent = filled;
        self.hand_over_batch(SealedBatch {
            payload,
            messages,
            checksum,
            sealed,
        })
    }

    fn hand_over_batch(&mut self, batch: SealedBatch) -> Result<(), Error> {
        self.generation += 1;
        self.total_messages += u64::from(batch.messages);
        self.hand_over(Job::Batch(batch))
    }

    /// The next batch is summed in parts of what a packet carries now.
    fn follow_packet_size(&mut self) {
        let len = self.shared.packet_payload.load(Ordering::Relaxed) as usize;
        if self.packets.as_ref().map_or(0, |packets| packets.len()) != len {
            self.packets = (len > 0).then(|| self.shared.joiner(len));
        }
    }

    fn take_free(&mut self) -> Result<Payload, Error> {
        loop {
            if let Some(buffer) = self.spare.pop() {
                return Ok(buffer);
            }
            self.shared.pool.take(&mut self.spare, LOOK);
            if self.spare.is_empty() {
                self.failure.check()?;
            }
        }
    }

    /// Gives the batch to the next stream in turn that can take it at once; if none can, to the
    /// first that can.
    fn hand_over(&mut self, job: Job) -> Result<(), Error> {
        let mut job = job;
        let count = self.streams.len();
        for offset in 0..count {
            let number = (self.next_stream + offset) % count;
            match self.streams[number].0.try_send(job) {
                Ok(()) => return self.sent_to(number),
                Err(TrySendError::Full(back)) => job = back,
                Err(TrySendError::Disconnected(_)) => return Err(self.failure.take()),
            }
        }
        let mut select = Select::new();
        for (sender, _) in &self.streams {
            select.send(sender);
        }
        let operation = select.select();
        let number = operation.index();
        let sent = operation.send(&self.streams[number].0, job);
        drop(select);
        sent.map_err(|_| self.failure.take())?;
        self.sent_to(number)
    }

    fn hand_over_to(&mut self, number: usize, job: Job) -> Result<(), Error> {
        self.streams[number]
            .0
            .send(job)
            .map_err(|_| self.failure.take())?;
        self.wake(number)
    }

    fn sent_to(&mut self, number: usize) -> Result<(), Error> {
        // A few batches in a row to one stream: it is woken once for all of them.
        self.in_a_row = if number == self.next_stream {
            self.in_a_row + 1
        } else {
            1
        };
        self.next_stream = number;
        if self.in_a_row >= self.most_in_a_row {
            self.next_stream = (number + 1) % self.streams.len();
            self.in_a_row = 0;
        }
        self.wake(number)
    }

    fn wake(&self, number: usize) -> Result<(), Error> {
        let woken = self.streams[number].1.job_queued();
        woken.map_err(|e| Error::Thread(e.to_string()))
    }
}

/// As many I/O threads as the settings ask for. The kernel's work on a packet that is sent is most of a
/// thread's time, and brokers have different links: a thread for each, as long as there are cores.
fn io_thread_count(config: &Config, streams: usize) -> usize {
    let count = match config.io_threads {
        Some(count) => count as usize,
        None => {
            let cores = thread::available_parallelism().map_or(1, NonZero::get);
            config
                .brokers
                .len()
                .min(cores)
                .min(Config::MAX_IO_THREADS as usize)
        }
    };
    count.min(streams)
}

/// Opens every stream.
struct ClientHandshake<'a> {
    config: &'a Arc<Config>,
    shared: &'a Arc<Shared>,
    first: FirstAttempts,
    most_queued: usize,
    /// Bytes of the largest batch that every broker accepts.
    max_payload: u32,
    streams: Vec<(Sender<Job>, Arc<Waker>)>,
    results: Vec<Receiver<StreamResult>>,
}

impl ClientHandshake<'_> {
    /// Opens the streams to a broker; returns the key of their session.
    fn open_session(&mut self, broker: &str, threads: &mut [IoThread]) -> Result<u64, Error> {
        let mut target = StreamId {
            broker: broker.to_owned(),
            session: 0,
            number: 0,
            location: Location::default(),
        };
        for number in 0..self.config.threads_per_broker {
            target.number = number;
            let (link, session, max) = self.first.open(self.config, &target, self.shared)?;
            target.session = session;
            self.max_payload = self.max_payload.min(max);
            let (sender, jobs) = crossbeam_channel::bounded(self.most_queued);
            let context = StreamContext {
                config: Arc::clone(self.config),
                target: target.clone(),
                jobs,
                shared: Arc::clone(self.shared),
            };
            // In turn, so that each thread has about as many streams to each broker.
            let thread = self.streams.len() % threads.len();
            let thread = &mut threads[thread];
            self.streams.push((sender, Arc::clone(thread.waker())));
            self.results.push(thread.add(context, link)?);
        }
        Ok(target.session)
    }
}

/// Opens the first connections. Retries while nothing listens, because the broker may have been started
/// at the same moment.
struct FirstAttempts {
    deadline: Instant,
    warned: bool,
}

impl FirstAttempts {
    fn new(patience: Duration) -> Self {
        Self {
            deadline: Instant::now() + patience,
            warned: false,
        }
    }

    fn open(
        &mut self,
        config: &Config,
        target: &StreamId,
        shared: &Arc<Shared>,
    ) -> Result<(StreamConnection, u64, u32), Error> {
        loop {
            let error = match StreamConnection::open(config, target, shared) {
                Err(error) if error.nobody_listens() => error,
                done => return done,
            };
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(error);
            }
            if !self.warned {
                warn!("{error}; trying again for {:.1} s", left.as_secs_f64());
                self.warned = true;
            }
            thread::sleep(RETRY.min(left));
        }
    }
}

impl Timing {
    /// Time that all messages of a batch took.
    fn ticks(self, messages: u32) -> u64 {
        let scaled = |ticks: u64, by: u32, of: u32| ticks * u64::from(by) / u64::from(of.max(1));
        let copies = scaled(self.copy_ticks, messages, self.copies);
        copies + scaled(self.sum_ticks, self.sums, self.timed_sums)
    }
}

impl Linger {
    /// Looks twice in the time that a batch may linger, and sends one that it has seen before.
    fn start(linger: Duration, front: Arc<Mutex<BatchBuilder>>) -> Result<Self, Error> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let interval = (linger / 2).max(Duration::from_micros(50));
        let body = move || {
            let mut seen = None;
            while stopped
                .recv_timeout(interval)
                .is_err_and(|e| e.is_timeout())
            {
                // The publisher's thread holds it while it begins or ends a batch, or waits to.
                let mut front = match front.try_lock() {
                    Ok(front) => front,
                    Err(TryLockError::WouldBlock) => continue,
                    Err(TryLockError::Poisoned(_)) => return,
                };
                let filled = front.watermark.extent();
                let waits = filled.messages > front.sent.messages;
                let generation = waits.then_some(front.generation);
                if generation.is_some()
                    && generation == seen
                    && let Err(error) = front.send_rest(filled)
                {
                    // To be told to whoever publishes next.
                    front.failure.note(error);
                }
                seen = generation;
            }
        };
        let thread = thread::Builder::new()
            .name("linger".to_owned())
            .spawn(body)
            .map_err(|e| Error::Thread(e.to_string()))?;
        Ok(Self { stop, thread })
    }
}

/// The profile with percentages of the time that all stages took together.
fn pipeline_shares(stages: &StageTimer<PublishStage>, batches: u64) -> Vec<StageReport> {
    let total: u64 = stages
        .report(1, batches)
        .iter()
        .map(|stage| stage.total_ns)
        .sum();
    stages.report(total, batches)
}
