//! Where a batch lies: in the ring, or outside it.

use std::time::Duration;

use penstock_log::Reservation;
use penstock_transport::Timestamp;

use super::Context;
use crate::session::claims::{ClaimPriority, Claimant, RingClaim, Spill, WaitingBatch};

/// Where a batch lies.
#[derive(Debug)]
pub(super) struct Placement {
    /// Its room in the ring, if any, and its claim to that room while it is incomplete.
    pub(super) reservation: Option<Reservation>,
    pub(super) claim: Option<RingClaim>,
    /// Its bytes, while they are outside the ring.
    pub(super) spill: Option<Box<Spill>>,
    /// Its precedence, while it has a share of neither ring nor memory.
    pub(super) waiting: Option<WaitingBatch>,
    /// When its first packet arrived, on the stream's own clock.
    since: Timestamp,
}

impl Placement {
    /// Places a new batch: in the ring if the shares allow it, otherwise outside. If others still need its
    /// room in the ring, its bytes go outside as well.
    pub(super) fn new(
        cx: &mut Context<'_>,
        claimant: &Claimant,
        len: u32,
        priority: ClaimPriority,
        clock: Timestamp,
    ) -> Self {
        let claim = claimant.claim(len, priority);
        let reservation = claim.as_ref().map(|_| cx.writer.reserve(len));
        let is_granted = reservation
            .as_ref()
            .is_some_and(|reservation| cx.writer.is_granted(reservation));
        let spill = (!is_granted).then(|| {
            cx.xdp.aside += 1;
            Box::new(claimant.spill())
        });
        Self {
            reservation,
            claim,
            spill,
            waiting: None,
            since: clock,
        }
    }

    /// How long the batch has been arriving. The whole time since the last tick counts as blocked, so a
    /// batch that began within it may seem to begin later than now.
    pub(super) fn age(&self, clock: Timestamp) -> Duration {
        (clock - self.since).into()
    }

    /// Writes a packet's payload to its offset in the batch.
    pub(super) fn write(&mut self, cx: &mut Context<'_>, offset: u32, fragments: &[&[u8]]) {
        let mut at = offset;
        for fragment in fragments {
            match (&mut self.spill, &self.reservation) {
                (Some(spill), _) => spill.write(at, fragment),
                (None, Some(reservation)) => cx.writer.place(reservation, at, fragment),
                (None, None) => unreachable!("a batch is in the ring or outside it"),
            }
            at += fragment.len() as u32;
        }
    }

    /// Moves a batch of `len` bytes into the ring once it has room there; returns whether it is in the ring.
    pub(super) fn settle(&mut self, cx: &mut Context<'_>, len: u32) -> bool {
        let Some(reservation) = &self.reservation else {
            return false;
        };
        if self.spill.is_some() && !cx.writer.is_granted(reservation) {
            return false;
        }
        if let Some(spill) = self.spill.take() {
            for (offset, bytes) in spill.written_pieces(len) {
                cx.writer.place(reservation, offset, bytes);
            }
        }
        true
    }

    /// Moves a batch out of the ring, if there is memory for its received `parts`, `received` bytes in total.
    pub(super) fn leave_ring(
        &mut self,
        cx: &mut Context<'_>,
        claimant: &Claimant,
        parts: &[(u64, u64)],
        received: u64,
    ) -> bool {
        let Some(reservation) = self.reservation.take() else {
            return true;
        };
        if self.spill.is_none() {
            let mut spill = Box::new(claimant.spill());
            if !copy_parts(cx, &reservation, parts, &mut spill) {
                self.reservation = Some(reservation);
                return false;
            }
            cx.xdp.aside += 1;
            self.spill = Some(spill);
        }
        if let Some(claim) = self.claim.take() {
            claim.release(received);
        }
        cx.writer.abort(reservation);
        true
    }
}

/// Copies the received parts of a batch out of the ring, if there is memory for them.
fn copy_parts(
    cx: &Context<'_>,
    reservation: &Reservation,
    parts: &[(u64, u64)],
    spill: &mut Spill,
) -> bool {
    for &(low, high) in parts {
        let (low, len) = (low as u32, (high - low + 1) as u32);
        if spill.reserve(low, len, ClaimPriority::Next).is_err() {
            return false;
        }
        let placed = cx.writer.placed(reservation, reservation.len());
        spill.write(low, &placed[low as usize..][..len as usize]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_that_began_while_the_stream_was_blocked_is_not_old() {
        let placement = Placement {
            reservation: None,
            claim: None,
            spill: None,
            waiting: None,
            since: Timestamp::from_nanos(1_000),
        };
        let age = |nanos| placement.age(Timestamp::from_nanos(nanos));
        assert_eq!(age(999), Duration::ZERO);
        assert_eq!(age(1_500), Duration::from_nanos(500));
    }
}
