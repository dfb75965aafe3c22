//! What all streams of a publisher share.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, TryRecvError};
use penstock_runtime::poison::lock;
use penstock_transport::Timestamp;
use penstock_wire::crc32c::Joiner;

use crate::batch::pool::Pool;
use crate::batch::sealed_batch::Job;
use crate::net::tx_queues::TxQueues;

/// What a stream shares with the publisher.
#[derive(Debug)]
pub(crate) struct Shared {
    /// Where buffers go once they are acked.
    pub(crate) pool: Pool,
    pub(crate) tx_queues: Arc<TxQueues>,
    /// Bytes of the largest batch that there may be; 0 while streams are opened.
    pub(crate) max_payload: AtomicU32,
    pub(crate) start: Instant,
    pub(crate) acked_messages: AtomicU64,
    /// Bytes of payload that a full packet carries, over xdp; 0 while that is not known.
    pub(crate) packet_payload: AtomicU32,
    /// One for each length of payload in use, so that all streams find the same table in the CPU's cache.
    joiners: Mutex<Vec<Arc<Joiner>>>,
    /// The publisher is closed: no stream gets more jobs.
    pub(crate) closed: AtomicBool,
    /// The publisher is dropped: stop at once.
    pub(crate) abandoned: AtomicBool,
}

impl Shared {
    pub(crate) fn new(pool: Pool) -> Self {
        Self {
            pool,
            tx_queues: Arc::default(),
            max_payload: AtomicU32::new(0),
            start: Instant::now(),
            acked_messages: AtomicU64::new(0),
            packet_payload: AtomicU32::new(0),
            joiners: Mutex::default(),
            closed: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        }
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::Acquire)
    }

    /// The next job of a stream. The queue of a publisher that was dropped, not closed, has no end: its
    /// streams must not look whole.
    pub(crate) fn next_job(&self, jobs: &Receiver<Job>) -> Result<Job, TryRecvError> {
        match jobs.try_recv() {
            Err(TryRecvError::Disconnected) if self.is_abandoned() => Err(TryRecvError::Empty),
            next => next,
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Joins checksums of parts, the second of `len` bytes.
    pub(crate) fn joiner(&self, len: usize) -> Arc<Joiner> {
        let mut joiners = lock(&self.joiners);
        if let Some(joiner) = joiners.iter().find(|joiner| joiner.len() == len) {
            return Arc::clone(joiner);
        }
        joiners.retain(|joiner| Arc::strong_count(joiner) > 1);
        let joiner = Arc::new(Joiner::new(len));
        joiners.push(Arc::clone(&joiner));
        joiner
    }

    /// The moment, counted from the publisher's start: the same for all its streams.
    pub(crate) fn timestamp(&self, now: Instant) -> Timestamp {
        now.saturating_duration_since(self.start).into()
    }
}
