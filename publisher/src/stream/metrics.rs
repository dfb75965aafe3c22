//! What one stream has done so far, over all its connections.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;
use penstock_runtime::profile::StageTimer;
use penstock_wire::handshake::AckLevel;
use penstock_wire::message::{Messages, OVERHEAD};
use sha2::{Digest, Sha256};

use crate::Config;
use crate::batch::sealed_batch::SealedBatch;
use crate::latency::{AckLatencyHistogram, Stopwatch};
use crate::shared::Shared;
use crate::stream::connection::{Holdings, ResumeState};
use crate::summary::{PublishStage, StreamSummary, TransportSummary};

/// Figures of a stream, and who waits for them.
#[derive(Default)]
pub(crate) struct StreamMetrics {
    pub(crate) summary: StreamSummary,
    pub(crate) stages: StageTimer<PublishStage>,
    digest: Option<Sha256>,
    /// None where nothing but the end is acked.
    stopwatch: Option<Stopwatch>,
    /// Flushes that wait until this number of batches is done.
    flushes: Vec<(u64, Sender<()>)>,
}

/// What is left of a stream that is over.
#[derive(Debug)]
pub(crate) struct Closed {
    pub(crate) summary: StreamSummary,
    pub(crate) stages: StageTimer<PublishStage>,
    pub(crate) waits: Option<AckLatencyHistogram>,
}

/// How often a stream went to other brokers, and how long that took.
#[derive(Debug, Default)]
pub(crate) struct RerouteMetrics {
    pub(crate) reroutes: u64,
    pub(crate) returns: u64,
    /// The longest times.
    detection: Option<Duration>,
    recovery: Option<Duration>,
    /// The loss that the stream has not recovered from.
    loss: Option<Loss>,
}

/// The loss of a broker.
#[derive(Debug)]
struct Loss {
    at: Instant,
    detection: Option<Duration>,
    /// Acknowledged batches then.
    done: u64,
    /// Whether another broker took the stream over.
    is_elsewhere: bool,
}

impl RerouteMetrics {
    /// A connection was lost.
    pub(crate) fn on_lost(&mut self, now: Instant, left: &ResumeState) {
        self.loss = Some(Loss {
            at: now,
            detection: left.quiet,
            done: left.first,
            is_elsewhere: false,
        });
    }

    /// A broker took the stream over: another one, or the same again.
    pub(crate) fn on_found(&mut self, is_another: bool) {
        match &mut self.loss {
            Some(loss) if is_another => loss.is_elsewhere = true,
            _ => self.loss = None,
        }
    }

    /// Follows a connected stream: it has recovered once a batch is acknowledged, or none is owed.
    pub(crate) fn follow(&mut self, now: Instant, holdings: Holdings) {
        let Some(loss) = &self.loss else { return };
        if holdings.done <= loss.done && holdings.held > 0 {
            return;
        }
        if loss.is_elsewhere {
            let recovery = now.saturating_duration_since(loss.at);
            self.recovery = self.recovery.max(Some(recovery));
            self.detection = self.detection.max(loss.detection);
        }
        self.loss = None;
    }

    pub(crate) fn sum_up(&self, summary: &mut StreamSummary) {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        summary.reroutes = self.reroutes;
        summary.returns = self.returns;
        summary.detection_ms = self.detection.map(ms);
        summary.recovery_ms = self.recovery.map(ms);
    }
}

impl StreamMetrics {
    pub(crate) fn new(config: &Config, stream: u32) -> Self {
        Self {
            summary: StreamSummary {
                stream,
                ..StreamSummary::default()
            },
            digest: config.digest.then(Sha256::new),
            stopwatch: (config.ack == AckLevel::Committed)
                .then(|| Stopwatch::new(config.in_flight)),
            ..Self::default()
        }
    }

    /// A batch is on its way for the first time.
    pub(crate) fn sent(&mut self, batch: &SealedBatch) {
        if let Some(digest) = &mut self.digest {
            for message in Messages::new(&batch.payload).filter_map(Result::ok) {
                digest.update(message);
                digest.update(b"\n");
            }
        }
        if let Some(stopwatch) = &mut self.stopwatch {
            stopwatch.start(batch.sealed);
        }
        self.summary.batches += 1;
        self.summary.messages += u64::from(batch.messages);
        self.summary.payload_bytes +=
            (batch.payload.len() - batch.messages as usize * OVERHEAD) as u64;
    }

    /// This many more batches and messages are acked.
    pub(crate) fn acked(&mut self, batches: u64, messages: u64, shared: &Shared) {
        if let Some(stopwatch) = &mut self.stopwatch {
            let now = self.stages.now();
            stopwatch.stop(batches, |sealed| self.stages.nanos_between(sealed, now));
        }
        self.summary.messages_acked += messages;
        shared.acked_messages.fetch_add(messages, Ordering::Relaxed);
    }

    /// Tells `waiter` once all batches below `seq` are done.
    pub(crate) fn flush(&mut self, seq: u64, waiter: Sender<()>) {
        self.flushes.push((seq, waiter));
    }

    /// This number of batches is done.
    pub(crate) fn answer_flushes(&mut self, done: u64) {
        if self.flushes.is_empty() {
            return;
        }
        self.flushes.retain(|(seq, waiter)| {
            let waits = *seq > done;
            if !waits {
                // Nobody may be listening any more, which is as well.
                let _ = waiter.send(());
            }
            waits
        });
    }

    /// Adds what a connection over xdp did.
    pub(crate) fn add_transport(&mut self, sender: &penstock_transport::Sender, send_calls: u64) {
        let stats = sender.stats();
        let sum = self
            .summary
            .transport
            .get_or_insert(TransportSummary::default());
        sum.packets += stats.packets;
        sum.send_calls += send_calls;
        sum.retransmits += stats.retransmits;
        sum.lost += stats.lost;
        sum.spurious += stats.spurious;
        sum.probe_timeouts += stats.probe_timeouts;
        sum.credit_stalls += stats.credit_stalls;
        sum.black_holes += stats.black_holes;
        sum.rtt_us = sender.rtt().smoothed().as_nanos() as f64 / 1e3;
        sum.datagram = u64::from(sender.segment());
    }

    /// The stream is over.
    pub(crate) fn close(mut self) -> Closed {
        self.summary.sha256 = self.digest.take().map(|digest| hex(&digest.finalize()));
        Closed {
            summary: self.summary,
            stages: self.stages,
            waits: self.stopwatch.map(|stopwatch| stopwatch.waits),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}
