//! The batch that is being filled, and its way to a stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Select, Sender, TrySendError};
use penstock_runtime::profile::StageTimer;
use penstock_wire::crc32c::Joiner;
use penstock_wire::message::{self, OVERHEAD};

use crate::batch::open_batch::{Appender, Extent, Watermark};
use crate::batch::payload::Payload;
use crate::batch::pool::BufferPlan;
use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::failure::Failure;
use crate::shared::Shared;
use crate::stream::waker::Waker;
use crate::summary::PublishStage;
use crate::{Config, Error};

/// Of the messages that take more than a copy, one in this number is timed; a power of two.
const SAMPLE: u32 = 8;
/// How often a blocked publisher looks whether a stream has failed.
pub(crate) const FAILURE_CHECK: Duration = Duration::from_millis(50);

/// The batch that is being filled, and the way out.
///
/// The publisher's thread appends to the batch without this lock ([`Appender`]), so `payload` and
/// `messages` are complete only from [`BatchBuilder::check_in`] to [`BatchBuilder::check_out`].
pub(crate) struct BatchBuilder {
    payload: Payload,
    watermark: Arc<Watermark>,
    /// What the linger thread has sent of the open batch.
    sent: Extent,
    /// For the parts of it that fill a packet each.
    packets: Option<Arc<Joiner>>,
    /// Empty buffers for the next.
    spare: Vec<Payload>,
    pub(crate) messages: u32,
    timing: Timing,
    /// Rises with each batch, so that the linger thread knows one that it has seen before.
    generation: u64,
    batch_size: usize,
    pub(crate) max_message: usize,
    next_stream: usize,
    /// Batches that `next_stream` got without a break.
    in_a_row: usize,
    most_in_a_row: usize,
    pub(crate) streams: Vec<StreamQueue>,
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    /// Of batches that were handed over.
    pub(crate) total_messages: u64,
    pub(crate) first: Option<Instant>,
    pub(crate) stages: StageTimer<PublishStage>,
}

/// The queue in front of a stream.
pub(crate) struct StreamQueue {
    pub(crate) jobs: Sender<Job>,
    pub(crate) waker: Arc<Waker>,
    /// The stream has lost the broker that it belongs to: others take what comes, as long as they can.
    pub(crate) is_away: Arc<AtomicBool>,
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

impl BatchBuilder {
    pub(crate) fn new(
        config: &Config,
        buffers: &BufferPlan,
        max_payload: u32,
        streams: Vec<StreamQueue>,
        shared: &Arc<Shared>,
        failure: &Arc<Failure>,
    ) -> Self {
        let max_payload = max_payload as usize;
        Self {
            payload: Payload::with_capacity(config.batch_size),
            watermark: Arc::default(),
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
            shared: Arc::clone(shared),
            failure: Arc::clone(failure),
            total_messages: 0,
            first: None,
            stages: StageTimer::default(),
        }
    }

    /// The way of the publisher's thread to the open batch.
    pub(crate) fn appender(&self) -> Appender {
        Appender::new(Arc::clone(&self.watermark))
    }

    /// Takes over what the publisher's thread has appended, and drops what the linger thread has sent.
    pub(crate) fn check_in(&mut self, appender: &mut Appender) {
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
    pub(crate) fn check_out(&mut self, appender: &mut Appender) {
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

    pub(crate) fn publish(&mut self, message: &[u8]) -> Result<(), Error> {
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
    pub(crate) fn seal(&mut self) -> Result<(), Error> {
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

    /// The open batch, if it holds what has not been sent, and how much there is of it.
    pub(crate) fn lingering(&self) -> (Option<u64>, Extent) {
        let filled = self.watermark.extent();
        let waits = filled.messages > self.sent.messages;
        (waits.then_some(self.generation), filled)
    }

    /// Sends what there is of the open batch.
    pub(crate) fn send_lingering(&mut self, filled: Extent) {
        if let Err(error) = self.send_rest(filled) {
            // The next call of the publisher's thread returns it.
            self.failure.note(error);
        }
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
            self.shared.pool.take(&mut self.spare, FAILURE_CHECK);
            if self.spare.is_empty() {
                self.failure.check()?;
            }
        }
    }

    /// Gives the batch to the next stream in turn that can take it at once, preferably one whose broker is
    /// not lost; if none can, to the first that can.
    fn hand_over(&mut self, job: Job) -> Result<(), Error> {
        let mut job = job;
        let count = self.streams.len();
        for is_away in [false, true] {
            for offset in 0..count {
                let number = (self.next_stream + offset) % count;
                let stream = &self.streams[number];
                if stream.is_away.load(Ordering::Relaxed) != is_away {
                    continue;
                }
                match stream.jobs.try_send(job) {
                    Ok(()) => return self.sent_to(number),
                    Err(TrySendError::Full(back)) => job = back,
                    Err(TrySendError::Disconnected(_)) => return Err(self.failure.take()),
                }
            }
        }
        let mut select = Select::new();
        for stream in &self.streams {
            select.send(&stream.jobs);
        }
        let operation = select.select();
        let number = operation.index();
        let sent = operation.send(&self.streams[number].jobs, job);
        drop(select);
        sent.map_err(|_| self.failure.take())?;
        self.sent_to(number)
    }

    pub(crate) fn hand_over_to(&mut self, number: usize, job: Job) -> Result<(), Error> {
        self.streams[number]
            .jobs
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
        let woken = self.streams[number].waker.job_queued();
        woken.map_err(|e| Error::Thread(e.to_string()))
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
