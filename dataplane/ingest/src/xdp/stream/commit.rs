//! Commits complete batches in the stream's order.

use std::collections::VecDeque;

use penstock_log::Reservation;
use penstock_wire::packet::BatchInfo;
use penstock_wire::reply::Fault;

use super::placement::Placement;
use super::{Context, Stream};
use crate::session::commit::Committed;
use crate::session::stats::PathStage;
use crate::xdp::close_reason::CloseReason;

/// Maximum number of complete batches in the queue; others stay with the receiver.
const MAX_COMPLETE: usize = 64;
/// Initial capacity of the queue.
const MIN_CAPACITY: usize = 8;

/// Complete batches that wait for room in the ring, and the progress of the stream's commits.
#[derive(Debug)]
pub(super) struct CommitQueue {
    complete: VecDeque<(BatchInfo, Placement)>,
    /// Number of committed batches of the stream.
    committed: u64,
    /// Number of batches that readers can see.
    visible: u64,
    /// Index in the log of the last committed batch and the number of batches up to it, while readers cannot
    /// see it.
    invisible: Option<(u64, u64)>,
    /// Committed over this connection.
    here: Committed,
}

impl CommitQueue {
    pub(super) fn new(first_batch: u64) -> Self {
        Self {
            complete: VecDeque::with_capacity(MIN_CAPACITY),
            committed: first_batch,
            visible: first_batch,
            invisible: None,
            here: Committed::default(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.complete.is_empty()
    }

    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    pub(super) fn visible(&self) -> u64 {
        self.visible
    }

    /// Counts committed batches beyond this number as never received.
    pub(super) fn roll_back(&mut self, batches: u64) {
        self.visible = batches;
    }

    /// Index in the log of the last committed batch, while readers cannot see it.
    pub(super) fn invisible(&self) -> Option<u64> {
        self.invisible.map(|(index, _)| index)
    }

    /// What was committed over this connection.
    pub(super) fn here(&self) -> &Committed {
        &self.here
    }

    /// Frees memory that a burst needed.
    pub(super) fn shrink(&mut self) {
        self.complete.shrink_to(MIN_CAPACITY);
    }

    /// The placements of all queued batches.
    pub(super) fn into_placements(self) -> impl Iterator<Item = Placement> {
        self.complete.into_iter().map(|(_, placement)| placement)
    }
}

impl Stream {
    /// Commits batches that are complete and have room.
    pub(in crate::xdp) fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        self.queue_complete(cx);
        while let Some((info, placement)) = self.commits.complete.front_mut() {
            if !placement.settle(cx, info.len) {
                break;
            }
            let start = cx.stats.stages.now();
            let front = self.commits.complete.pop_front();
            let (info, placement) = front.expect("checked above");
            let reservation = placement.reservation.expect("the batch is in the ring");
            self.commit_one(cx, &info, reservation)?;
            cx.stats.stages.lap(PathStage::Commit, start);
        }
        if self.receiver.is_empty() && self.memory.release() {
            self.receiver.allow_memory(0);
        }
        self.check_frontier(cx);
        Ok(())
    }

    fn queue_complete(&mut self, cx: &mut Context<'_>) {
        while self.commits.complete.len() < MAX_COMPLETE
            && let Some((info, mut placement)) = self.receiver.next_complete()
        {
            // The batch is complete, so it blocks no other.
            placement.waiting = None;
            if let Some(claim) = placement.claim.take() {
                claim.complete();
            }
            placement
                .reservation
                .get_or_insert_with(|| cx.writer.reserve(info.len));
            self.commits.complete.push_back((info, placement));
        }
    }

    fn commit_one(
        &mut self,
        cx: &mut Context<'_>,
        info: &BatchInfo,
        reservation: Reservation,
    ) -> Result<(), CloseReason> {
        let here = &mut self.commits.here;
        let index = here
            .commit(cx.writer, reservation, &self.admission, info, cx.verify)
            .map_err(|text| CloseReason::Fault(Fault::Checksum, text))?;
        self.commits.committed += 1;
        self.memory.is_short = false;
        self.commits.invisible = Some((index, self.commits.committed));
        cx.stats.batches += 1;
        Ok(())
    }

    fn check_frontier(&mut self, cx: &Context<'_>) {
        if let Some((index, batches)) = self.commits.invisible
            && cx.writer.frontier() > index
        {
            self.commits.invisible = None;
            self.commits.visible = batches;
            self.acks.at_once(cx.now);
        }
    }
}
