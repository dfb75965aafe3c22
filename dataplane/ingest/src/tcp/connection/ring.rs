//! Batches in the ring: room for them, and their commit.

use penstock_wire::packet::BatchInfo;
use penstock_wire::reply::Fault;

use super::close::CloseReason;
use super::state::{IncomingBatch, State};
use super::{Connection, Context};
use crate::session::claims::{ClaimPriority, RingClaim};
use crate::session::stats::{Counters, PathStage};

impl Connection {
    /// Reserves room in the ring for a batch; the batch waits if others still need the room.
    pub(super) fn enter_ring(
        &mut self,
        cx: &mut Context<'_>,
        batch: IncomingBatch,
        claim: Option<RingClaim>,
    ) {
        let reservation = cx.writer.reserve(batch.header.payload_len);
        if batch.spill.is_none() && cx.writer.is_granted(&reservation) {
            self.state = State::InRing {
                batch,
                reservation,
                claim,
            };
            return;
        }
        Counters::count(&cx.shared.counters.waits_for_space);
        self.state = State::AwaitingGrant {
            batch,
            reservation,
            claim,
            paused_at: cx.now,
        };
    }

    /// Moves a complete batch into the ring.
    pub(super) fn return_to_ring(&mut self, cx: &mut Context<'_>) {
        if let State::Spilled { batch } = std::mem::replace(&mut self.state, State::Header) {
            // The batch is complete, so it blocks no other and needs no claim.
            self.enter_ring(cx, batch, None);
        }
    }

    /// Continues a blocked batch if there is room now; returns whether it did.
    pub(super) fn retry_space(&mut self, cx: &mut Context<'_>) -> Result<bool, CloseReason> {
        match self.state {
            State::AwaitingGrant { .. } => self.retry_grant(cx),
            State::AwaitingShare { .. } => Ok(self.retry_share(cx)),
            _ => Ok(true),
        }
    }

    fn retry_grant(&mut self, cx: &mut Context<'_>) -> Result<bool, CloseReason> {
        let State::AwaitingGrant { reservation, .. } = &self.state else {
            return Ok(true);
        };
        if !cx.writer.is_granted(reservation) {
            // The workers that block it may be asleep.
            cx.shared.claims.wake_others();
            return Ok(false);
        }
        let State::AwaitingGrant {
            mut batch,
            reservation,
            claim,
            paused_at,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("checked above");
        };
        batch.exclude_wait(cx.now - paused_at);
        if let Some(spill) = batch.spill.take() {
            for (offset, bytes) in spill.written_pieces(batch.received) {
                cx.writer.place(&reservation, offset, bytes);
            }
        }
        let is_complete = batch.missing() == 0;
        self.last_progress = cx.now;
        self.state = State::InRing {
            batch,
            reservation,
            claim,
        };
        if is_complete {
            self.commit(cx)?;
        }
        Ok(true)
    }

    fn retry_share(&mut self, cx: &mut Context<'_>) -> bool {
        let State::AwaitingShare { batch, .. } = &mut self.state else {
            return true;
        };
        let len = batch.header.payload_len;
        let claim = self.claimant.claim(len, ClaimPriority::Waiting);
        if claim.is_none() {
            let received = batch.received;
            let reserved = batch.spill_mut().reserve(received, 1, ClaimPriority::Next);
            if reserved.is_err() {
                return false;
            }
            self.last_progress = cx.now;
        }
        let State::AwaitingShare {
            mut batch,
            paused_at,
            waiting,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("checked above");
        };
        drop(waiting);
        batch.exclude_wait(cx.now - paused_at);
        match claim {
            Some(claim) => {
                let claim = claim.with_received_before(batch.received.into());
                self.enter_ring(cx, batch, Some(claim));
            }
            None => self.state = State::Spilled { batch },
        }
        true
    }

    /// Commits a complete batch in the ring.
    pub(super) fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let State::InRing {
            batch: IncomingBatch {
                header, received, ..
            },
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("only a batch in the ring can be committed");
        };
        if let Some(claim) = claim {
            claim.complete();
        }
        self.spill_denied_since = None;
        let start = cx.stats.stages.now();
        if self.parser.has_keys()
            && let Err(reason) = self.verify(cx.writer.placed(&reservation, received))
        {
            cx.writer.abort(reservation);
            return Err(reason);
        }
        let info = BatchInfo {
            seq: header.batch_seq,
            len: header.payload_len,
            messages: header.messages,
            checksum: header.checksum,
        };
        let (admission, verify) = (&self.admission, cx.config.verify_on_receive);
        let index = self
            .committed
            .commit(cx.writer, reservation, admission, &info, verify)
            .map_err(|text| CloseReason::Fault(Fault::Checksum, text))?;
        self.next_seq += 1;
        self.replies.note_commit(received);
        self.invisible = Some(index);
        cx.stats.batches += 1;
        *cx.last_commit = Some(cx.stats.stages.lap(PathStage::Commit, start));
        Ok(())
    }
}
