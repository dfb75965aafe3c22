//! What a remote subscriber tells its caller.

use std::ops::Deref;

use penstock_log::{Batch, ChecksumMismatch};
use penstock_wire::delivery::BatchInfo;

use super::deliveries::Payload;
use crate::Received;

/// What comes next.
#[derive(Debug)]
pub enum RemoteEvent<'a> {
    /// The next batch of its stream.
    Batch(Delivered<'a>),
    /// A broker overwrote batches before they were read.
    Lost {
        /// The broker.
        broker: &'a str,
        /// Batches lost.
        batches: u64,
        /// Messages lost, as far as the broker knows.
        messages: u64,
    },
    /// No broker has these batches of a stream.
    Missing {
        /// Session of the stream.
        session: u64,
        /// Its number in the session.
        stream: u32,
        /// Number of the first batch that is missing.
        first: u64,
        /// Batches that are missing.
        batches: u64,
    },
    /// A batch's entry in a broker's log is damaged; it was skipped.
    Damaged {
        /// The broker.
        broker: &'a str,
        /// Position of the batch in its log.
        index: u64,
    },
    /// A batch's bytes in a broker's log are not those that its publisher sent; it was skipped.
    Corrupt {
        /// The broker.
        broker: &'a str,
        /// The batch.
        mismatch: ChecksumMismatch,
    },
    /// A broker no longer waits for this subscriber, because it read nothing for too long.
    Evicted {
        /// The broker.
        broker: &'a str,
    },
    /// A broker has made its log anew; it is read from its beginning.
    NewLog {
        /// The broker.
        broker: &'a str,
    },
    /// Every broker has nothing more for now.
    CaughtUp,
    /// Nothing came for a moment. Call again.
    Idle,
}

/// A batch, and the broker that it came from.
#[derive(Debug, Clone, Copy)]
pub struct Delivered<'a> {
    /// The broker.
    pub broker: &'a str,
    batch: Received<'a>,
}

impl<'a> Deref for Delivered<'a> {
    type Target = Received<'a>;

    fn deref(&self) -> &Received<'a> {
        &self.batch
    }
}

/// A batch that the caller has not finished with.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) broker: usize,
    /// Its number among the outstanding deliveries.
    pub(super) number: u64,
    pub(super) info: BatchInfo,
    pub(super) payload: Payload,
    pub(super) bytes: u64,
}

/// [`RemoteEvent`], without borrowing.
#[derive(Debug)]
pub(super) enum Event {
    Batch(Pending),
    Lost {
        broker: usize,
        batches: u64,
        messages: u64,
    },
    Missing {
        stream: (u64, u32),
        first: u64,
        batches: u64,
    },
    Damaged {
        broker: usize,
        index: u64,
    },
    Corrupt {
        broker: usize,
        mismatch: ChecksumMismatch,
    },
    Evicted {
        broker: usize,
    },
    NewLog {
        broker: usize,
    },
    CaughtUp,
    Idle,
}

impl Event {
    /// The event for the caller; a batch is kept in `current` for as long as the caller uses it.
    pub(super) fn show<'a>(
        self,
        brokers: &'a [String],
        current: &'a mut Option<Pending>,
    ) -> RemoteEvent<'a> {
        let name = |broker: usize| brokers[broker].as_str();
        match self {
            Self::Batch(pending) => {
                let pending = current.insert(pending);
                RemoteEvent::Batch(pending.show(name(pending.broker)))
            }
            Self::Lost {
                broker,
                batches,
                messages,
            } => RemoteEvent::Lost {
                broker: name(broker),
                batches,
                messages,
            },
            Self::Damaged { broker, index } => RemoteEvent::Damaged {
                broker: name(broker),
                index,
            },
            Self::Corrupt { broker, mismatch } => RemoteEvent::Corrupt {
                broker: name(broker),
                mismatch,
            },
            Self::Evicted { broker } => RemoteEvent::Evicted {
                broker: name(broker),
            },
            Self::NewLog { broker } => RemoteEvent::NewLog {
                broker: name(broker),
            },
            Self::Missing {
                stream: (session, stream),
                first,
                batches,
            } => RemoteEvent::Missing {
                session,
                stream,
                first,
                batches,
            },
            Self::CaughtUp => RemoteEvent::CaughtUp,
            Self::Idle => RemoteEvent::Idle,
        }
    }
}

impl Pending {
    fn show<'a>(&'a self, broker: &'a str) -> Delivered<'a> {
        let info = &self.info;
        let batch = Received::new(Batch {
            index: info.index,
            session: info.session,
            stream: info.stream,
            batch_seq: info.batch_seq,
            messages: info.messages,
            checksum: info.checksum,
            arrival_unix_ns: info.arrival_unix_ns,
            payload: &self.payload,
        });
        Delivered { broker, batch }
    }
}
