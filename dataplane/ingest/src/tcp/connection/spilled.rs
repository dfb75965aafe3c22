//! Batches outside the ring: memory for their bytes, and what makes a slow batch leave the ring.

use std::time::Duration;

use penstock_wire::reply::Fault;

use super::batch::{Incoming, State};
use super::close::CloseReason;
use super::{Connection, Context};
use crate::session::claims::{self, Turn};
use crate::session::stats::Counters;

/// Maximum and minimum number of bytes that one receive call takes for a batch outside the ring.
pub(in crate::tcp) const SCRATCH: usize = 64 << 10;
const LEAST_SCRATCH: u32 = 4 << 10;
/// Time limit for a batch that must leave the ring to get memory outside it.
const EVICTION_WAIT: Duration = Duration::from_millis(200);

impl Connection {
    /// Takes memory for what the next receive call may bring to a batch outside the ring; returns its
    /// size. If there is none at all, the batch waits.
    pub(super) fn room_aside(&mut self, cx: &Context<'_>) -> usize {
        let State::Aside { batch } = &mut self.state else {
            return 0;
        };
        let wanted = batch.missing().min(SCRATCH as u32);
        let spill = batch
            .spill
            .get_or_insert_with(|| Box::new(self.claimant.spill()));
        // The rest of a piece that the batch already has needs no new one.
        let rest = LEAST_SCRATCH - batch.received % LEAST_SCRATCH;
        for room in [wanted, wanted.min(LEAST_SCRATCH), wanted.min(rest)] {
            if spill.reserve(batch.received, room, Turn::Next).is_ok() {
                return room as usize;
            }
        }
        if let State::Aside { batch } = std::mem::replace(&mut self.state, State::Header) {
            self.state = State::Starved {
                batch,
                paused: cx.now,
                turn: self.claimant.wait(),
            };
        }
        0
    }

    /// Whether its batch has been in the ring for half a round and arrives slowly, so that it will soon
    /// block all others, unless readers block them already.
    pub(in crate::tcp) fn holds_up(&self, cx: &mut Context<'_>) -> bool {
        let State::Payload {
            batch, reservation, ..
        } = &self.state
        else {
            return false;
        };
        let half = cx.writer.log().geometry().ring_bytes() / 2;
        cx.writer.age(reservation) > half
            && claims::is_slow(cx.now - batch.since, batch.received.into())
            && !cx.writer.waits_for_readers(cx.round)
    }

    /// Bytes of the ring or of memory that its batch holds and others wait for; 0 if it arrives at a
    /// fair rate, and nothing of a ring that readers hold up.
    pub(in crate::tcp) fn reclaimable(&self, cx: &mut Context<'_>) -> u64 {
        let now = cx.now;
        match &self.state {
            State::Payload {
                batch,
                claim: Some(_),
                ..
            } if self.claimant.pressure().ring
                && claims::is_slow(now - batch.since, batch.received.into())
                && !cx.writer.waits_for_readers(cx.round) =>
            {
                batch.batch.payload_len.into()
            }
            State::Aside { batch }
                if self.claimant.pressure().memory
                    && claims::is_stalling(now - batch.since, batch.received.into()) =>
            {
                batch.spill.as_ref().map_or(0, |spill| spill.held())
            }
            _ => 0,
        }
    }

    /// Releases what its batch holds. A batch in the ring continues outside it if its memory share has
    /// room for the bytes received so far. Otherwise the stream ends, unless only its share of the ring
    /// is needed and the batch still makes progress.
    pub(in crate::tcp) fn give_way(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        match std::mem::replace(&mut self.state, State::Header) {
            State::Payload {
                batch,
                reservation,
                claim,
            } => {
                let mut spill = self.claimant.spill();
                let fits = match batch.received {
                    0 => Ok(()),
                    received => spill.reserve(0, received, Turn::Next),
                };
                if fits.is_ok() {
                    Counters::count(&cx.shared.counters.evacuated_batches);
                    spill.write(0, cx.writer.placed(&reservation, batch.received));
                    cx.writer.abort(reservation);
                    if let Some(claim) = claim {
                        claim.leave(batch.received.into());
                    }
                    self.evicted = None;
                    self.state = State::Aside {
                        batch: Incoming {
                            spill: Some(Box::new(spill)),
                            ..batch
                        },
                    };
                    return Ok(());
                }
                let elapsed = cx.now - batch.since;
                let goes_on = !claims::is_stalling(elapsed, batch.received.into());
                self.state = State::Payload {
                    batch,
                    reservation,
                    claim,
                };
                if goes_on && !self.holds_up(cx) {
                    return Ok(());
                }
                // Streams with more memory than this one needs may give way.
                if cx.now - *self.evicted.get_or_insert(cx.now) < EVICTION_WAIT {
                    return Ok(());
                }
            }
            other => self.state = other,
        }
        let text = format!(
            "batch {} arrives too slowly and blocks others, and the memory for such batches is used up; send smaller batches",
            self.next_seq
        );
        self.fail(cx, Fault::Stalled, text);
        self.reply(cx)
    }
}
