//! Batches outside the ring, and which batches have to leave it.

use penstock_log::Writer;
use penstock_transport::{Nanos, OpenBatch, Timestamp};
use penstock_wire::reply::Fault;

use super::{Context, Stream};
use crate::session::claims::{self, ClaimPriority, SPILL_TIMEOUT};
use crate::xdp::close_reason::CloseReason;

/// Number of open batches, in order, to settle per tick.
const SETTLE_PER_TICK: usize = 64;

/// Which slow batches have to leave the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SpillScope {
    /// Those that have been in the ring for half a round.
    HalfRoundOld,
    All,
}

/// What a stream holds that others need.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::xdp) struct Reclaimable {
    /// Bytes of the ring that its slow batches occupy.
    pub(in crate::xdp) ring: u64,
    /// Bytes of memory, if one of its batches hardly makes progress.
    pub(in crate::xdp) memory: u64,
}

impl Stream {
    /// Moves open batches into the ring if they have room there now, and claims room for those that
    /// have no memory.
    pub(super) fn settle_open(&mut self, cx: &mut Context<'_>) {
        self.has_unsettled = false;
        for batch in self.receiver.open_batches().take(SETTLE_PER_TICK) {
            let OpenBatch {
                info, placement, ..
            } = batch;
            if placement.waiting.is_some()
                && let Some(claim) = self.claimant.claim(info.len, ClaimPriority::Waiting)
            {
                placement.waiting = None;
                placement.claim = Some(claim.with_received_before(batch.received));
                placement.reservation = Some(cx.writer.reserve(info.len));
            }
            self.has_unsettled |= !placement.settle(cx, info.len);
        }
        self.memory.is_short &= self.has_unsettled;
    }

    /// Moves slow batches out of the ring: those that are half a round old, because they block all
    /// others, or all of them, because others wait for a share. Only the bytes received so far take
    /// memory, and none if the batch lies outside the ring already. If no memory is available for a
    /// while, the stream ends in the first case, and in the second if the batch hardly makes progress.
    pub(super) fn spill_slow(
        &mut self,
        cx: &mut Context<'_>,
        scope: SpillScope,
    ) -> Result<(), CloseReason> {
        let clock = self.readers.clock(cx.now);
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        let mut is_denied = false;
        for batch in self.receiver.open_batches() {
            let Some(reservation) = &batch.placement.reservation else {
                continue;
            };
            let elapsed = batch.placement.age(clock);
            let is_in_scope = scope == SpillScope::All || cx.writer.age(reservation) > half;
            if !is_in_scope || !claims::is_slow(elapsed, batch.received) {
                continue;
            }
            let (parts, received) = (batch.parts, batch.received);
            if batch
                .placement
                .leave_ring(cx, &self.claimant, parts, received)
            {
                self.has_unsettled = true;
            } else {
                is_denied |=
                    scope == SpillScope::HalfRoundOld || claims::is_stalling(elapsed, received);
            }
        }
        if !is_denied {
            self.spill_denied_since = None;
            return Ok(());
        }
        // Streams that hold more memory than this one needs may release it.
        let since = *self.spill_denied_since.get_or_insert(cx.now);
        if cx.now - since < Nanos::from(SPILL_TIMEOUT) {
            return Ok(());
        }
        let text = "batches arrive so slowly that they block others, and the memory for such batches is used up; send smaller batches (--batch-size)";
        Err(CloseReason::Fault(Fault::Stalled, text.to_owned()))
    }

    /// What this stream holds that others wait for, in batches that arrive below a fair rate: no memory
    /// while it waits for room itself, and nothing of a ring that readers block.
    pub(in crate::xdp) fn reclaimable(
        &mut self,
        writer: &mut Writer,
        now: Timestamp,
    ) -> Reclaimable {
        let mut sum = Reclaimable::default();
        let mut pressure = self.claimant.pressure();
        pressure.memory &= !self.is_blocked();
        if !pressure.ring && !pressure.memory {
            return sum;
        }
        let clock = self.readers.clock(now);
        let mut stalls = false;
        for batch in self.receiver.open_batches() {
            let elapsed = batch.placement.age(clock);
            stalls |= claims::is_stalling(elapsed, batch.received);
            if let Some(spill) = &batch.placement.spill {
                sum.memory += spill.held();
            }
            if batch.placement.reservation.is_some() && claims::is_slow(elapsed, batch.received) {
                sum.ring += u64::from(batch.info.len);
            }
        }
        sum.memory += self.memory.charged();
        if !pressure.ring || sum.ring == 0 || writer.waits_for_readers(now.as_nanos()) {
            sum.ring = 0;
        }
        if !pressure.memory || !stalls {
            sum.memory = 0;
        }
        sum
    }

    /// Releases room in the ring: slow batches continue outside it.
    pub(in crate::xdp) fn release_ring(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        self.spill_slow(cx, SpillScope::All)
    }

    /// Releases memory by ending the stream.
    pub(in crate::xdp) fn release_memory(
        &mut self,
        _: &mut Context<'_>,
    ) -> Result<(), CloseReason> {
        let text = "a batch hardly makes progress, and others need its memory; send smaller batches (--batch-size)";
        Err(CloseReason::Fault(Fault::Stalled, text.to_owned()))
    }
}
