//! Batches in the ring: room for them, and their commit.

use penstock_wire::packet::BatchInfo;
use penstock_wire::reply::Fault;

use super::batch::{Incoming, State};
use super::close::CloseReason;
use super::{Connection, Context};
use crate::session::claims::{RingClaim, Turn};
use crate::session::stats::{Counters, PathStage};

impl Connection {
    /// Takes room in the ring for a batch; the batch waits if others still need the room.
    pub(super) fn enter_ring(
        &mut self,
        cx: &mut Context<'_>,
        batch: Incoming,
        claim: Option<RingClaim>,
    ) {
        let reservation = cx.writer.reserve(batch.batch.payload_len);
        if batch.spill.is_none() && cx.writer.is_granted(&reservation) {
            self.state = State::Payload {
                batch,
                reservation,
                claim,
            };
            return;
        }
        Counters::count(&cx.shared.counters.waits_for_space);
        self.state = State::Waiting {
            batch,
            reservation,
            claim,
            paused: cx.now,
        };
    }

    /// Continues if there is room now.
    pub(super) fn retry_space(&mut self, cx: &mut Context<'_>) -> Result<bool, CloseReason> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Waiting {
                batch,
                reservation,
                claim,
                paused,
            } => {
                if !cx.writer.is_granted(&reservation) {
                    // The workers that block it may be asleep.
                    cx.shared.claims.wake_others();
                    self.state = State::Waiting {
                        batch,
                        reservation,
                        claim,
                        paused,
                    };
                    return Ok(false);
                }
                let mut batch = batch.go_on(paused, cx.now);
                if let Some(spill) = batch.spill.take() {
                    for (offset, part) in spill.parts(batch.received) {
                        cx.writer.place(&reservation, offset, part);
                    }
                }
                let is_complete = batch.missing() == 0;
                self.last_progress = cx.now;
                self.state = State::Payload {
                    batch,
                    reservation,
                    claim,
                };
                if is_complete {
                    self.commit(cx)?;
                }
                Ok(true)
            }
            State::Starved {
                batch,
                paused,
                turn,
            } => {
                let len = batch.batch.payload_len;
                if let Some(claim) = self.claimant.claim(len, Turn::Waiting) {
                    let batch = batch.go_on(paused, cx.now);
                    let claim = claim.after(batch.received.into());
                    self.enter_ring(cx, batch, Some(claim));
                    return Ok(true);
                }
                let mut batch = batch;
                let spill = batch
                    .spill
                    .as_mut()
                    .expect("a batch outside the ring has a spill");
                if spill.reserve(batch.received, 1, Turn::Next).is_err() {
                    self.state = State::Starved {
                        batch,
                        paused,
                        turn,
                    };
                    return Ok(false);
                }
                self.last_progress = cx.now;
                let batch = batch.go_on(paused, cx.now);
                self.state = State::Aside { batch };
                Ok(true)
            }
            other => {
                self.state = other;
                Ok(true)
            }
        }
    }

    pub(super) fn commit(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        let State::Payload {
            batch: Incoming {
                batch, received, ..
            },
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Header)
        else {
            unreachable!("only a batch in the ring can be committed");
        };
        if let Some(claim) = claim {
            claim.fill();
        }
        self.evicted = None;
        let start = cx.stats.stages.now();
        if self.keys.is_some()
            && let Err(ending) = self.verify(cx.writer.placed(&reservation, received))
        {
            cx.writer.abort(reservation);
            return Err(ending);
        }
        let info = BatchInfo {
            seq: batch.batch_seq,
            len: batch.payload_len,
            messages: batch.messages,
            checksum: batch.checksum,
        };
        let (admission, verify) = (&self.admission, cx.config.verify_on_receive);
        let committed = &mut self.committed;
        let index = committed
            .commit(cx.writer, reservation, admission, &info, verify)
            .map_err(|text| CloseReason::Fault(Fault::Checksum, text))?;
        self.next_seq += 1;
        self.unacked_bytes += u64::from(received);
        self.unseen = Some(index);
        cx.stats.batches += 1;
        *cx.last_commit = Some(cx.stats.stages.lap(PathStage::Commit, start));
        Ok(())
    }

    pub(super) fn return_to_ring(&mut self, cx: &mut Context<'_>) {
        if let State::Aside { batch } = std::mem::replace(&mut self.state, State::Header) {
            // The batch is complete, so it blocks no other.
            self.enter_ring(cx, batch, None);
        }
    }
}
