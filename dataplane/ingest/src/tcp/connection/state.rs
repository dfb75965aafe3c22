//! The batch that a connection receives, and where its next bytes go.

use std::time::{Duration, Instant};

use penstock_log::Reservation;
use penstock_wire::batch::Batch;

use crate::session::claims::{RingClaim, Spill, WaitingBatch};

/// A batch that is being received.
#[derive(Debug)]
pub(super) struct IncomingBatch {
    pub(super) header: Batch,
    pub(super) received: u32,
    /// When its first byte could arrive, plus the time that it waited for the broker.
    started_at: Instant,
    /// The bytes received outside the ring.
    pub(super) spill: Option<Box<Spill>>,
}

/// Where the next bytes go.
#[derive(Debug)]
pub(super) enum State {
    /// To the header of the next frame.
    Header,
    /// Nowhere: the batch waits until others have left its place in the ring. A batch without a claim is
    /// complete.
    AwaitingGrant {
        batch: IncomingBatch,
        reservation: Reservation,
        claim: Option<RingClaim>,
        paused_at: Instant,
    },
    /// To the batch's place in the ring.
    InRing {
        batch: IncomingBatch,
        reservation: Reservation,
        claim: Option<RingClaim>,
    },
    /// To memory outside the ring: the shares of the ring are used up, or the publisher is slow.
    Spilled { batch: IncomingBatch },
    /// Nowhere: the shares of both ring and memory are used up.
    AwaitingShare {
        batch: IncomingBatch,
        paused_at: Instant,
        waiting: WaitingBatch,
    },
    /// Nowhere: the publisher has ended the stream, and its last ack is being sent.
    Ended,
    /// Nowhere: an error is being sent, and the peer has until `close_at` to read it.
    Failed { close_at: Instant },
}

impl IncomingBatch {
    pub(super) fn new(header: Batch, now: Instant) -> Self {
        Self {
            header,
            received: 0,
            started_at: now,
            spill: None,
        }
    }

    pub(super) fn missing(&self) -> u32 {
        self.header.payload_len - self.received
    }

    /// How long it has been arriving.
    pub(super) fn elapsed(&self, now: Instant) -> Duration {
        now - self.started_at
    }

    /// Excludes a wait for the broker from the time that the batch takes.
    pub(super) fn exclude_wait(&mut self, wait: Duration) {
        self.started_at += wait;
    }

    /// The bytes received outside the ring.
    ///
    /// # Panics
    /// If the batch has no spill.
    pub(super) fn spill_mut(&mut self) -> &mut Spill {
        let spill = self.spill.as_mut();
        spill.expect("a batch outside the ring has a spill")
    }
}

impl State {
    /// Whether the batch waits for room in the ring or memory outside it.
    pub(super) fn is_blocked(&self) -> bool {
        matches!(
            self,
            Self::AwaitingGrant { .. } | Self::AwaitingShare { .. }
        )
    }

    /// Whether nothing more is received: the stream has ended or failed.
    pub(super) fn is_over(&self) -> bool {
        matches!(self, Self::Ended | Self::Failed { .. })
    }

    pub(super) fn is_failed(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }
}
