//! The batch that a connection receives, and where its bytes go.

use std::time::Instant;

use penstock_log::Reservation;
use penstock_wire::batch::Batch;

use crate::session::claims::{RingClaim, Spill, Waiting};

/// A batch that is being received.
#[derive(Debug)]
pub(super) struct Incoming {
    pub(super) batch: Batch,
    pub(super) received: u32,
    /// When its first byte could arrive, postponed by the time that it waited for the broker.
    pub(super) since: Instant,
    /// The bytes received outside the ring.
    pub(super) spill: Option<Box<Spill>>,
}

/// Where the next bytes belong.
#[derive(Debug)]
pub(super) enum State {
    /// To the header of the next frame.
    Header,
    /// Nowhere yet: the batch waits for its place in the ring. Without a claim it is complete.
    Waiting {
        batch: Incoming,
        reservation: Reservation,
        claim: Option<RingClaim>,
        paused: Instant,
    },
    /// To a batch in the ring.
    Payload {
        batch: Incoming,
        reservation: Reservation,
        claim: Option<RingClaim>,
    },
    /// To a batch outside the ring: its shares of the ring are used up, or its publisher is slow.
    Aside { batch: Incoming },
    /// Nowhere yet: the shares of both ring and memory are used up.
    Starved {
        batch: Incoming,
        paused: Instant,
        turn: Waiting,
    },
    /// Nowhere: the stream has ended well and its last ack is going out.
    Ended,
    /// Nowhere: an error is going out, and the peer gets time to read it.
    Failed { until: Instant },
}

impl Incoming {
    pub(super) fn new(batch: Batch, now: Instant) -> Self {
        Self {
            batch,
            received: 0,
            since: now,
            spill: None,
        }
    }

    pub(super) fn missing(&self) -> u32 {
        self.batch.payload_len - self.received
    }

    /// Accounts for the time from `paused` to `now`, in which it waited for the broker.
    pub(super) fn go_on(mut self, paused: Instant, now: Instant) -> Self {
        self.since += now - paused;
        self
    }
}
