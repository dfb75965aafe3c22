//! The publisher that callers hold: fills batches and hands them to streams.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::Receiver;
use penstock_runtime::poison::lock;
use penstock_runtime::profile::{StageReport, StageTimer};

use crate::batch::open_batch::Appender;
use crate::batch::pool::{BufferPlan, Pool};
use crate::batch::sealed_batch::Job;
use crate::batch_builder::{BatchBuilder, FAILURE_CHECK};
use crate::failure::Failure;
use crate::latency::AckLatencyHistogram;
use crate::linger::Linger;
use crate::session_opener::{OpenedSessions, SessionOpener, io_thread_count};
use crate::shared::Shared;
use crate::stream::io_thread::{IoThread, StreamResult};
use crate::stream::waker::Waker;
use crate::summary::{BrokerSummary, PublishStage, StreamSummary, Summary};
use crate::{Config, Error};

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
        let pool = Pool::new(buffers, config.batch_size);
        let shared = Arc::new(Shared::new(pool));
        let failure = Arc::new(Failure::default());
        let mut io_threads = Vec::new();
        for _ in 0..io_thread_count(&config, streams) {
            io_threads.push(IoThread::new(&shared, &failure)?);
        }
        let opener = SessionOpener::new(&config, &shared, buffers.most_queued);
        let OpenedSessions {
            keys,
            max_payload,
            streams,
            results,
        } = opener.open_all(&mut io_threads)?;
        let brokers = config.brokers.iter().cloned().zip(keys).collect();
        let front = BatchBuilder::new(&config, &buffers, max_payload, streams, &shared, &failure);
        let appender = front.appender();
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

    /// Adds a message to the open batch; sends the batch when it is full. Waits while every stream
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
                match waiting.recv_timeout(FAILURE_CHECK) {
                    Ok(()) => break,
                    Err(_) => self.failure.check()?,
                }
            }
        }
        Ok(())
    }

    /// Waits for the end of every stream; adds up where their time went.
    fn join_streams(
        &mut self,
        stages: &mut StageTimer<PublishStage>,
    ) -> Result<(Vec<StreamSummary>, AckLatencyHistogram), Error> {
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
        Ok((results, waits))
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
        let (results, waits) = self.join_streams(&mut stages)?;
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
        let longest = |of: fn(&StreamSummary) -> Option<f64>| {
            results.iter().filter_map(of).max_by(f64::total_cmp)
        };
        let detection_ms = longest(|stream| stream.detection_ms);
        let recovery_ms = longest(|stream| stream.recovery_ms);
        let reroutes = results.iter().map(|stream| stream.reroutes).sum();
        let returns = results.iter().map(|stream| stream.returns).sum();
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
            reroutes,
            returns,
            detection_ms,
            recovery_ms,
            stages: pipeline_shares(stages, batches),
            brokers: brokers.collect(),
        }
    }

    fn stop_linger(&mut self) {
        if let Some(linger) = self.linger.take() {
            linger.stop();
        }
    }

    fn wake_all(&self) {
        for waker in &self.wakers {
            // A stream that cannot be woken checks by itself a little later.
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

/// The profile with percentages of the time that all stages took together.
fn pipeline_shares(stages: &StageTimer<PublishStage>, batches: u64) -> Vec<StageReport> {
    let total: u64 = stages
        .report(1, batches)
        .iter()
        .map(|stage| stage.total_ns)
        .sum();
    stages.report(total, batches)
}
