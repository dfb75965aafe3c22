//! The algorithm of the shared buffer: reserve, grant, commit, and what a reader may trust.
//!
//! Positions count payload bytes from the log's beginning and never wrap (2^64 bytes outlast the
//! machine); position `p` lies at `p % ring_bytes`. A **reservation** is a range of positions taken
//! with one atomic add. It is **granted** once no byte that anybody still needs lies one ring below
//! it: until then the writer waits, and its peer feels back-pressure. The **limit** up to which
//! positions are granted is worked out about once per round of the ring, not once per batch.
//!
//! Three rules keep memory safe between threads and processes, each paired with its counterpart:
//! - a writer announces a lower bound of its open reservations *before* it adds to `tail`, so
//!   a thread that sees the addition sees the bound (`Ring::open`, `Ring::limits`);
//! - a committer publishes its descriptor, then looks whether the frontier can move, with a full
//!   fence between, so of two committers at least one sees both (`Ring::commit`);
//! - a registered reader announces its cursor, then reads the granted limit; a writer announces
//!   a limit, then reads the cursors again (`Ring::can_borrow`, `Ring::limits`).

use std::fmt;

use crossbeam_utils::CachePadded;

use super::layout::{ALIGNMENT, Geometry};
use super::slot::{Descriptor, Slot, Totals};
use super::sync::{AtomicU64, Ordering, crash_point, fence, yield_now};

/// Maximum number of readers that register with one log.
pub const MAX_READERS: usize = 64;
/// Cursor of a free reader slot.
pub const FREE: u64 = u64::MAX;
/// Watermark of a writer that has nothing open.
pub const NOTHING_OPEN: u64 = u64::MAX;

/// Positions that one writer of this process keeps others away from.
#[derive(Debug)]
pub struct WriterWatermark {
    /// Lower bound of its open reservations.
    pub(super) open: AtomicU64,
    /// While it commits: lower bound of what other writers commit behind it. A batch that is
    /// published before its predecessor is no longer open and not yet what any reader waits for.
    committing: AtomicU64,
}

impl Default for WriterWatermark {
    fn default() -> Self {
        Self {
            open: AtomicU64::new(NOTHING_OPEN),
            committing: AtomicU64::new(NOTHING_OPEN),
        }
    }
}

/// Counters that writers and readers share through the file.
#[derive(Debug)]
#[repr(C)]
pub struct Control {
    /// Next position to be reserved.
    pub(super) tail: CachePadded<AtomicU64>,
    /// Next place in the batch index.
    pub(super) index_tail: CachePadded<AtomicU64>,
    /// Batches below this are committed and visible.
    pub(super) frontier: CachePadded<AtomicU64>,
    /// No writer places payload at or beyond this position.
    pub(super) granted: CachePadded<AtomicU64>,
}

impl Default for Control {
    fn default() -> Self {
        let zero = || CachePadded::new(AtomicU64::new(0));
        Self {
            tail: zero(),
            index_tail: zero(),
            frontier: zero(),
            granted: zero(),
        }
    }
}

/// Positions of registered readers: the index of the oldest batch that each still needs, or [`FREE`].
///
/// Loads have no memory ordering: a caller that needs one adds a fence.
pub trait ReaderCursors: fmt::Debug {
    /// All of them, as of now.
    fn load(&self) -> [u64; MAX_READERS];
}

/// How far writers may go before they must look again at what others need.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Positions below this may be written.
    pub(super) position: u64,
    /// Batches may be received while the index is below this.
    pub(super) index: u64,
}

/// A borrowed view of everything that the algorithm touches.
#[derive(Debug, Clone, Copy)]
pub struct Ring<'a> {
    pub(super) geometry: Geometry,
    pub(super) control: &'a Control,
    pub(super) slots: &'a [Slot],
    /// Readers that writers wait for; `None` if the policy is to overwrite.
    pub(super) readers: Option<&'a dyn ReaderCursors>,
    /// One per writer of this process; empty in a reader.
    pub(super) watermarks: &'a [CachePadded<WriterWatermark>],
}

impl Ring<'_> {
    pub(super) fn slot(&self, index: u64) -> &Slot {
        &self.slots[(index & (self.geometry.index_slots() - 1)) as usize]
    }

    /// Takes room for `len` bytes. The writer's watermark must already be a lower bound of its open
    /// reservations, or is set here when it has none.
    pub(super) fn open(&self, watermark: &WriterWatermark, len: u32) -> u64 {
        let len = u64::from(len).next_multiple_of(ALIGNMENT);
        if watermark.open.load(Ordering::Relaxed) == NOTHING_OPEN {
            let tail = self.control.tail.load(Ordering::Relaxed);
            watermark.open.store(tail, Ordering::Relaxed);
        }
        let segment = self.geometry.segment_bytes();
        loop {
            // Release: a thread that sees this addition sees the watermark stored before it.
            let position = self.control.tail.fetch_add(len, Ordering::AcqRel);
            // A batch never straddles segments: the end of a segment that is too short is skipped.
            if position / segment == (position + len - 1) / segment {
                crash_point();
                // A thread that sees payload written from now on also sees the new tail.
                fence(Ordering::Release);
                return position;
            }
        }
    }

    /// How far writers may go. Kept by the caller until it has gone that far.
    pub(super) fn limits(&self) -> Limits {
        let taken = self.control.index_tail.load(Ordering::Acquire);
        // In this order: a batch goes from one bound to the next.
        let open = self.lowest_open();
        let committing = self.lowest_committing();
        let cursors = self.cursors();
        let oldest = registered(&cursors).fold(taken, u64::min);
        // Half of the index is kept for batches that are already being received, so that no commit
        // waits for a reader.
        let index = oldest + self.geometry.index_slots() / 2;

        let unread = open.min(committing).min(self.lowest_unread(&cursors));
        let position = unread + self.geometry.ring_bytes();
        self.control.granted.fetch_max(position, Ordering::AcqRel);
        if self.readers.is_none() {
            return Limits { position, index };
        }
        // A reader that registered meanwhile either sees the granted limit, or is seen here.
        fence(Ordering::SeqCst);
        let seen_now = self
            .lowest_unread(&self.cursors())
            .saturating_add(self.geometry.ring_bytes());
        Limits {
            position: position.min(seen_now),
            index,
        }
    }

    /// Whether a reservation that ends at `end` may be written.
    pub(super) fn grants(&self, limits: Limits, end: u64) -> bool {
        end <= limits.position && self.control.index_tail.load(Ordering::Relaxed) < limits.index
    }

    /// Lower bound of all open reservations and all later ones.
    fn lowest_open(&self) -> u64 {
        let tail = self.control.tail.load(Ordering::Acquire);
        self.watermarks
            .iter()
            .map(|watermark| watermark.open.load(Ordering::Acquire))
            .fold(tail, u64::min)
    }

    /// Lower bound of batches that are published above the frontier because a writer is between
    /// taking a place in the index and publishing it.
    fn lowest_committing(&self) -> u64 {
        self.watermarks
            .iter()
            .map(|watermark| watermark.committing.load(Ordering::Acquire))
            .fold(NOTHING_OPEN, u64::min)
    }

    /// Lower bound of what registered readers still need among committed batches. The others are
    /// covered by [`Self::lowest_open`] and [`Self::lowest_committing`], called before.
    fn lowest_unread(&self, cursors: &[u64; MAX_READERS]) -> u64 {
        let needed_by = |cursor| match self.slot(cursor).floor_of(cursor) {
            Some(floor) => floor,
            // Not yet committed: nothing is needed.
            None if cursor >= self.frontier() => NOTHING_OPEN,
            // The reader registered too late to be seen and its entry is gone from the index, but
            // it may still be looking at the payload: grant nothing until it has moved on.
            None => 0,
        };
        let needed = registered(cursors).map(needed_by);
        needed.min().unwrap_or(NOTHING_OPEN)
    }

    /// Whether registered readers still need bytes that the reserved room will overwrite. Then some of
    /// that room is not granted, whatever the writers do.
    pub(super) fn waits_for_readers(&self) -> bool {
        let cursors = self.cursors();
        let Some(oldest) = registered(&cursors).min() else {
            return false;
        };
        let unread = self.lowest_unread(&cursors);
        let tail = self.control.tail.load(Ordering::Acquire);
        let index_tail = self.control.index_tail.load(Ordering::Acquire);
        tail > unread.saturating_add(self.geometry.ring_bytes())
            || index_tail >= oldest + self.geometry.index_slots() / 2
    }

    /// What a registered reader at `cursor` has not read yet (batches and bytes), and whether that
    /// leaves writers less room than a batch may need.
    pub(super) fn lag_of(&self, cursor: u64) -> (u64, u64, bool) {
        let index_tail = self.control.index_tail.load(Ordering::Acquire);
        let batches = self.frontier().saturating_sub(cursor);
        if batches == 0 {
            return (0, 0, false);
        }
        let tail = self.control.tail.load(Ordering::Acquire);
        let needed = self.slot(cursor).floor_of(cursor).unwrap_or(0);
        let unread = tail.saturating_sub(needed);
        let ring = self.geometry.ring_bytes();
        let is_full = unread + self.geometry.segment_bytes() > ring
            || index_tail >= cursor + self.geometry.index_slots() / 2;
        (batches, unread.min(ring), is_full)
    }

    /// Registered readers, and the payload that the slowest of them has not read yet, bytes.
    pub(super) fn backlog(&self) -> (usize, u64) {
        let tail = self.control.tail.load(Ordering::Acquire);
        let cursors = self.cursors();
        let unread = tail.saturating_sub(self.lowest_unread(&cursors));
        // A reader that registered too late to be seen may seem to need all that there ever was.
        (
            registered(&cursors).count(),
            unread.min(self.geometry.ring_bytes()),
        )
    }

    fn cursors(&self) -> [u64; MAX_READERS] {
        self.readers
            .map_or([FREE; MAX_READERS], ReaderCursors::load)
    }

    /// Publishes a batch and returns its index. The writer's watermark must still cover it as open.
    pub(super) fn commit(&self, watermark: &WriterWatermark, mut descriptor: Descriptor) -> u64 {
        // Looked up before the index is taken: whatever is committed behind this batch is either
        // still open now, and so marked, or not yet reserved, and so beyond the tail.
        descriptor.floor = self.lowest_open();
        watermark
            .committing
            .store(descriptor.floor, Ordering::Relaxed);
        // A thread that takes a later slot, or learns that one was taken, sees the watermark.
        let index = self.control.index_tail.fetch_add(1, Ordering::AcqRel);
        crash_point();
        // One slot less than a round: the totals of the batch just below the frontier are the base
        // of those above it.
        while index + 1 >= self.frontier() + self.geometry.index_slots() {
            // Another writer is between taking a place one round ago and publishing it.
            self.advance();
            yield_now();
        }
        self.slot(index).publish(index, &descriptor);
        watermark.committing.store(NOTHING_OPEN, Ordering::Release);
        // Of two committers that publish side by side, at least one sees both slots.
        fence(Ordering::SeqCst);
        self.advance();
        index
    }

    /// Moves the frontier over every published batch that follows it, without a gap.
    pub(super) fn advance(&self) {
        loop {
            let frontier = self.control.frontier.load(Ordering::Acquire);
            let slot = self.slot(frontier);
            if !slot.holds(frontier) {
                return;
            }
            slot.complete(frontier, self.totals_below(frontier));
            // A failed exchange means that another thread has moved the frontier.
            let _ = self.control.frontier.compare_exchange(
                frontier,
                frontier + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            );
            crash_point();
        }
    }

    pub(super) fn frontier(&self) -> u64 {
        self.control.frontier.load(Ordering::Acquire)
    }

    /// Totals of all batches below `frontier`, which must have been the frontier at some time.
    pub(super) fn totals_below(&self, frontier: u64) -> Totals {
        match frontier.checked_sub(1) {
            Some(last) => self.slot(last).totals(),
            None => Totals::default(),
        }
    }

    /// Whether payload that was read from `position` was still whole when its last byte was read.
    pub(super) fn is_whole(&self, position: u64) -> bool {
        // Pairs with the fence in `open`: new bytes are seen only together with the new tail.
        fence(Ordering::Acquire);
        self.control.tail.load(Ordering::Relaxed) <= position + self.geometry.ring_bytes()
    }

    /// Whether a reader whose cursor is announced in its slot may read `position` in place for as
    /// long as the cursor stays: no writer has been granted what lies one ring above it.
    pub(super) fn can_borrow(&self, position: u64) -> bool {
        fence(Ordering::SeqCst);
        self.control.granted.load(Ordering::Acquire) <= position + self.geometry.ring_bytes()
    }

    /// Whether readers may not use payload in place.
    pub(super) fn lends_nothing(&self) -> bool {
        self.control.granted.load(Ordering::Acquire) == u64::MAX
    }
}

fn registered(cursors: &[u64; MAX_READERS]) -> impl Iterator<Item = u64> {
    cursors.iter().copied().filter(|cursor| *cursor != FREE)
}
