//! The batches that a connection keeps until they are committed.

use std::collections::VecDeque;

use crate::batch::sealed_batch::SealedBatch;

/// Unacknowledged batches of a stream.
pub(super) struct Batches {
    /// Batches that the transport has, oldest first.
    pub(super) pushed: VecDeque<SealedBatch>,
    /// Batches of an earlier connection, which go first.
    pub(super) leftover: VecDeque<SealedBatch>,
    /// Batches that may be pushed.
    limit: usize,
    /// Bytes of a full batch.
    batch_size: usize,
}

impl Batches {
    pub(super) fn new(limit: usize, batch_size: usize) -> Self {
        Self {
            pushed: VecDeque::with_capacity(limit),
            leftover: VecDeque::new(),
            limit,
            batch_size,
        }
    }

    /// Whether one more may be pushed.
    pub(super) fn has_room(&self) -> bool {
        self.pushed.len() < self.limit
    }

    /// Bytes of all that may be pushed.
    pub(super) fn max_bytes(&self) -> usize {
        self.limit * self.batch_size
    }

    pub(super) fn len(&self) -> usize {
        self.pushed.len() + self.leftover.len()
    }

    /// Messages in all of them.
    pub(super) fn messages(&self) -> u64 {
        let batches = self.pushed.iter().chain(&self.leftover);
        batches.map(|batch| u64::from(batch.messages)).sum()
    }

    /// All of them, for another connection.
    pub(super) fn take(&mut self) -> VecDeque<SealedBatch> {
        let mut all = std::mem::take(&mut self.pushed);
        all.append(&mut self.leftover);
        all
    }
}
