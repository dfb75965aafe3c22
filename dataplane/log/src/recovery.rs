//! Recovers a log after its last writer.

use std::sync::atomic::Ordering;

use super::layout::{self, MAX_POSITION};
use super::mapping::Mapping;
use super::ring::Ring;
use super::slot::{Found, Slot};
use super::sync::crash_point;

/// Recovers a log, at whatever step its last writer ended.
///
/// Batches below the frontier stay, and so do those that are published directly behind it. Reserved and partly
/// received batches are dropped; they were never acknowledged. Nothing changes if the control page is invalid.
pub(super) fn recover(mapping: &Mapping) -> Result<(), &'static str> {
    let ring = mapping.ring();
    check_control(&ring)?;
    ring.advance();
    crash_point();
    let frontier = ring.frontier();
    for slot in ring.slots {
        slot.discard_from(frontier);
        crash_point();
    }
    ring.control.index_tail.store(frontier, Ordering::Release);
    crash_point();
    let kept = frontier.saturating_sub(ring.geometry.index_slots())..frontier;
    let end = kept.filter_map(|index| match ring.slot(index).read(index) {
        Found::Published(d, _) if ring.geometry.may_hold(&d) => {
            Some(d.position + u64::from(d.payload_len))
        }
        _ => None,
    });
    // The tail is at or beyond every batch, unless the file was damaged.
    let end = end.max().unwrap_or(0).next_multiple_of(layout::ALIGNMENT);
    ring.control.tail.fetch_max(end, Ordering::AcqRel);
    crash_point();
    ring.control.granted.store(0, Ordering::Release);
    crash_point();
    mapping.epoch().fetch_add(1, Ordering::AcqRel);
    Ok(())
}

/// Whether the control page is consistent with the index. Check words cover the index; the control page can only
/// be compared with it.
fn check_control(ring: &Ring<'_>) -> Result<(), &'static str> {
    let tail = ring.control.tail.load(Ordering::Acquire);
    if tail > MAX_POSITION || !tail.is_multiple_of(layout::ALIGNMENT) {
        return Err("the next position");
    }
    let frontier = ring.frontier();
    if frontier > MAX_POSITION {
        return Err("the frontier");
    }
    // The newest batch is not overwritten before a newer one exists.
    if frontier > 0 && !ring.slot(frontier - 1).holds(frontier - 1) {
        return Err("the newest batch below its frontier is not in the index");
    }
    // No batch is published a whole round of the index behind the frontier.
    let newest = ring.slots.iter().filter_map(Slot::held).max();
    if newest.is_some_and(|newest| newest >= frontier + ring.geometry.index_slots()) {
        return Err("the index is ahead of its frontier");
    }
    Ok(())
}
