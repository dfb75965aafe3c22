//! Memory of a stream outside the ring: for the state of open batches, and for batches outside the ring.

use super::placement::Placement;
use crate::session::claims::{ClaimPriority, Claimant, MemoryCharge};

/// Memory for the state of open batches is charged in steps of this size, bytes.
const CHARGE_STEP: usize = 16 << 10;

/// What a stream is charged for, and which requests for more were denied.
#[derive(Debug, Default)]
pub(super) struct StreamMemory {
    /// Charges for the state of open batches beyond the free allowance of every stream.
    charges: Vec<MemoryCharge>,
    /// Whether a packet of the next batch was dropped for lack of memory. Similar packets are dropped as
    /// well, until the next tick.
    next_denied: bool,
    /// The same for packets of later batches.
    later_denied: bool,
    /// Whether the last request was denied.
    pub(super) is_short: bool,
}

impl StreamMemory {
    /// Bytes charged for the state of open batches.
    pub(super) fn charged(&self) -> u64 {
        self.charges.iter().map(MemoryCharge::bytes).sum()
    }

    /// Charges more for the state of open batches; returns whether the shares allowed it.
    pub(super) fn grow(&mut self, claimant: &Claimant) -> bool {
        if self.next_denied {
            return false;
        }
        let step = self.charges.len().max(1) * CHARGE_STEP;
        let Some(more) = claimant.charge(step as u64) else {
            self.next_denied = true;
            return false;
        };
        self.charges.push(more);
        self.is_short = false;
        true
    }

    /// Releases the charges; returns whether there were any.
    pub(super) fn release(&mut self) -> bool {
        let had_any = !self.charges.is_empty();
        if had_any {
            self.is_short = false;
            self.charges.clear();
        }
        had_any
    }

    /// Allows requests that were denied before.
    pub(super) fn reset_denials(&mut self) {
        (self.next_denied, self.later_denied) = (false, false);
    }

    /// Reserves memory for a packet of a batch outside the ring. Without memory, the next batch waits for
    /// room in the ring.
    pub(super) fn reserve(
        &mut self,
        claimant: &Claimant,
        placement: &mut Placement,
        offset: u32,
        len: u32,
        priority: ClaimPriority,
    ) -> bool {
        let Some(spill) = &mut placement.spill else {
            return true;
        };
        if spill.has(offset, len) {
            return true;
        }
        let is_denied = match priority {
            ClaimPriority::Later => &mut self.later_denied,
            ClaimPriority::Next | ClaimPriority::Waiting => &mut self.next_denied,
        };
        if !*is_denied && spill.reserve(offset, len, priority).is_ok() {
            self.is_short = false;
            return true;
        }
        *is_denied = true;
        if placement.reservation.is_none() && priority == ClaimPriority::Next {
            placement.waiting.get_or_insert_with(|| claimant.wait());
        }
        false
    }
}
