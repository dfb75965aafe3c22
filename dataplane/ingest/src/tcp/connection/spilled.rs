//! Batches outside the ring: memory for their bytes, and when a slow batch has to leave the ring.

use penstock_wire::reply::Fault;

use super::close::CloseReason;
use super::state::State;
use super::{Connection, Context};
use crate::session::claims::{self, ClaimPriority, SPILL_TIMEOUT};
use crate::session::stats::Counters;

/// Maximum and minimum number of bytes that one receive call takes for a batch outside the ring.
pub(in crate::tcp) const SCRATCH_LEN: usize = 64 << 10;
const MIN_SPILL_READ_LEN: u32 = 4 << 10;

impl Connection {
    /// Reserves memory for what the next receive call may bring to a batch outside the ring; returns its
    /// size. Without any memory the batch waits.
    pub(super) fn reserve_spill(&mut self, cx: &Context<'_>) -> usize {
        let State::Spilled { batch } = &mut self.state else {
            return 0;
        };
        let wanted = batch.missing().min(SCRATCH_LEN as u32);
        let spill = batch
            .spill
            .get_or_insert_with(|| Box::new(self.claimant.spill()));
        // The rest of a piece that the batch already holds takes no new one.
        let rest = MIN_SPILL_READ_LEN - batch.received % MIN_SPILL_READ_LEN;
        for len in [wanted, wanted.min(MIN_SPILL_READ_LEN), wanted.min(rest)] {
            let reserved = spill.reserve(batch.received, len, ClaimPriority::Next);
            if reserved.is_ok() {
                return len as usize;
            }
        }
        if let State::Spilled { batch } = std::mem::replace(&mut self.state, State::Header) {
            self.state = State::AwaitingShare {
                batch,
                paused_at: cx.now,
                waiting: self.claimant.wait(),
            };
        }
        0
    }

    /// Whether its batch has been in the ring for half a round and arrives slowly, so that it will soon
    /// block all others, unless readers block them already.
    pub(in crate::tcp) fn blocks_ring(&self, cx: &mut Context<'_>) -> bool {
        let State::InRing {
            batch, reservation, ..
        } = &self.state
        else {
            return false;
        };
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        cx.writer.age(reservation) > half
            && claims::is_slow(batch.elapsed(cx.now), batch.received.into())
            && !cx.writer.waits_for_readers(cx.round)
    }

    /// Bytes of the ring or of memory that its batch holds and others wait for; 0 if it arrives at a
    /// fair rate, and nothing of a ring that readers block.
    pub(in crate::tcp) fn reclaimable(&self, cx: &mut Context<'_>) -> u64 {
        match &self.state {
            State::InRing {
                batch,
                claim: Some(_),
                ..
            } if self.claimant.pressure().ring
                && claims::is_slow(batch.elapsed(cx.now), batch.received.into())
                && !cx.writer.waits_for_readers(cx.round) =>
            {
                batch.header.payload_len.into()
            }
            State::Spilled { batch }
                if self.claimant.pressure().memory
                    && claims::is_stalling(batch.elapsed(cx.now), batch.received.into()) =>
            {
                batch.spill.as_ref().map_or(0, |spill| spill.held())
            }
            _ => 0,
        }
    }

    /// Releases what its batch holds. A batch in the ring continues outside it if its memory share has
    /// room for the bytes received so far. Otherwise the stream ends, unless only its share of the ring
    /// is needed and the batch still makes progress.
    pub(in crate::tcp) fn spill_or_end(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if let State::InRing { batch, .. } = &self.state {
            let stalls = claims::is_stalling(batch.elapsed(cx.now), batch.received.into());
            if self.try_spill(cx) || (!stalls && !self.blocks_ring(cx)) {
                return Ok(());
            }
            // Streams that hold more memory than this one needs may release it.
            if cx.now - *self.spill_denied_since.get_or_insert(cx.now) < SPILL_TIMEOUT {
                return Ok(());
            }
        }
        let text = format!(
            "batch {} arrives too slowly and blocks others, and the memory for such batches is used up; send smaller batches",
            self.next_seq
        );
        self.fail(cx, Fault::Stalled, text);
        self.send_replies(cx)
    }

    /// Moves its batch out of the ring, if there is memory for the bytes received so far.
    fn try_spill(&mut self, cx: &mut Context<'_>) -> bool {
        let State::InRing { batch, .. } = &self.state else {
            return false;
        };
        let mut spill = self.claimant.spill();
        if batch.received > 0
            && spill
                .reserve(0, batch.received, ClaimPriority::Next)
                .is_err()
        {
            return false;
        }
        let State::InRing {
            mut batch,
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("checked above");
        };
        Counters::count(&cx.shared.counters.evacuated_batches);
        spill.write(0, cx.writer.placed(&reservation, batch.received));
        cx.writer.abort(reservation);
        if let Some(claim) = claim {
            claim.release(batch.received.into());
        }
        self.spill_denied_since = None;
        batch.spill = Some(Box::new(spill));
        self.state = State::Spilled { batch };
        true
    }
}
