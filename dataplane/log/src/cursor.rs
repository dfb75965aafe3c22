//! A position in a log: where a reader starts, the batch that comes next, and what was lost before it.

use super::mapping::Mapping;
use super::slot::{Descriptor, Found, Totals};
use super::{OpenError, ReadError};

/// Where a reader starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest batch in the log.
    Oldest,
    /// Behind the newest batch.
    End,
    /// At the batch with this index, which a reader saw before. If the log no longer has it, the first read reports
    /// how many batches were lost. How many messages that were is a lower bound, since the log may no longer know.
    Index(u64),
    /// At the oldest batch in the log that arrived at this time or later, nanoseconds since the Unix epoch.
    Time(u64),
}

/// The batch that a reader reads next.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    /// Its index.
    pub(super) next: u64,
    /// Messages below it, to compute how many were lost when lapped.
    messages_below: u64,
}

/// The position of a batch whose bytes are not validated yet.
pub(super) enum Next {
    Here(Descriptor, Totals),
    NotYet,
    Overwritten,
    Damaged,
}

impl Cursor {
    pub(super) fn new(mapping: &Mapping, start: Start) -> Result<Self, OpenError> {
        let at = |next, messages_below| Self {
            next,
            messages_below,
        };
        let cursor = match start {
            Start::Oldest => {
                let (oldest, below) = oldest_from(mapping, 0);
                at(oldest, below.messages)
            }
            Start::End => {
                let info = mapping.info();
                at(info.batches, info.messages)
            }
            Start::Index(index) => {
                let batches = mapping.info().batches;
                if index > batches {
                    return Err(OpenError::Beyond {
                        path: mapping.path.clone(),
                        index,
                        batches,
                    });
                }
                at(index, messages_below(mapping, index))
            }
            Start::Time(time) => {
                let (oldest, _) = oldest_from(mapping, 0);
                let index = first_since(mapping, oldest, time);
                at(index, messages_below(mapping, index))
            }
        };
        Ok(cursor)
    }

    /// The oldest batch that a reader at this cursor can still get: what its slot in the registry says, because the
    /// broker cannot keep what is gone.
    pub(super) fn oldest_needed(&self, mapping: &Mapping) -> u64 {
        match self.find(mapping) {
            Next::Overwritten => oldest_from(mapping, self.next).0,
            Next::Here(..) | Next::NotYet | Next::Damaged => self.next,
        }
    }

    /// The batch at the cursor.
    pub(super) fn find(&self, mapping: &Mapping) -> Next {
        find(mapping, self.next)
    }

    /// Moves over the batch at the cursor.
    pub(super) fn advance(&mut self, totals: Totals) {
        self.next += 1;
        self.messages_below = totals.messages;
    }

    /// Moves over a damaged batch.
    pub(super) fn skip_damaged(&mut self) -> ReadError {
        let index = self.next;
        self.next += 1;
        ReadError::Damaged { index }
    }

    /// Moves to the oldest batch that is still whole, and returns what was skipped.
    pub(super) fn skip_lost(&mut self, mapping: &Mapping) -> ReadError {
        let (next, below) = oldest_from(mapping, self.next + 1);
        let lost = ReadError::Lapped {
            batches: next - self.next,
            messages: below.messages.saturating_sub(self.messages_below),
        };
        (self.next, self.messages_below) = (next, below.messages);
        lost
    }
}

fn find(mapping: &Mapping, index: u64) -> Next {
    let ring = mapping.ring();
    if index >= ring.frontier() {
        return Next::NotYet;
    }
    match ring.slot(index).read(index) {
        Found::Published(d, totals) if ring.geometry.may_hold(&d) => Next::Here(d, totals),
        Found::Published(..) | Found::Damaged => Next::Damaged,
        // It is below the frontier, so it was committed: a writer is overwriting it.
        Found::NotYet | Found::Overwritten => Next::Overwritten,
    }
}

/// The oldest whole batch from `index` on, and the totals below it.
///
/// Positions rise with the index, but for batches that were received at the same time. So a search by halves finds
/// about where the whole ones begin, however many there are.
pub(super) fn oldest_from(mapping: &Mapping, index: u64) -> (u64, Totals) {
    let ring = mapping.ring();
    let is_whole = |index| match find(mapping, index) {
        Next::Here(descriptor, _) => ring.is_whole(descriptor.position),
        // Damage can be anywhere, so it does not tell where to search.
        Next::NotYet | Next::Damaged => true,
        Next::Overwritten => false,
    };
    let mut index = index;
    loop {
        let frontier = ring.frontier();
        index = index.max(frontier.saturating_sub(ring.geometry.index_slots()));
        index = first_where(index, frontier, is_whole);
        if index >= frontier {
            let info = mapping.info();
            if info.batches <= index {
                let below = Totals {
                    messages: info.messages,
                    payload_bytes: info.payload_bytes,
                };
                return (info.batches, below);
            }
            continue;
        }
        if let Next::Here(descriptor, totals) = find(mapping, index)
            && ring.is_whole(descriptor.position)
        {
            return (index, without(totals, &descriptor));
        }
        // It was overwritten meanwhile.
        index += 1;
    }
}

/// The oldest batch from `oldest` on that arrived at `time` or later. Batches are committed in about the order of
/// their arrival.
fn first_since(mapping: &Mapping, oldest: u64, time: u64) -> u64 {
    first_where(oldest, mapping.ring().frontier(), |index| {
        let found = find(mapping, index);
        matches!(found, Next::Here(descriptor, _) if descriptor.arrival_unix_ns >= time)
    })
}

/// The first index from `low` to `high` for which `holds`, which is so for all behind it; `high` if there is none.
fn first_where(low: u64, high: u64, holds: impl Fn(u64) -> bool) -> u64 {
    let (mut low, mut high) = (low, high.max(low));
    while low < high {
        let middle = low + (high - low) / 2;
        match holds(middle) {
            true => high = middle,
            false => low = middle + 1,
        }
    }
    low
}

/// Messages below the batch with this index, or below a later one if the log no longer knows.
fn messages_below(mapping: &Mapping, index: u64) -> u64 {
    let ring = mapping.ring();
    let first = ring.frontier().saturating_sub(ring.geometry.index_slots());
    let known = (index.max(first)..).map_while(|index| match find(mapping, index) {
        Next::Here(descriptor, totals) => Some(Some(without(totals, &descriptor).messages)),
        Next::NotYet => None,
        Next::Overwritten | Next::Damaged => Some(None),
    });
    known
        .flatten()
        .next()
        .unwrap_or_else(|| mapping.info().messages)
}

/// Totals below a batch. They are not covered by the check word: a damaged file may have too small ones.
fn without(totals: Totals, descriptor: &Descriptor) -> Totals {
    Totals {
        messages: totals.messages.saturating_sub(descriptor.messages.into()),
        payload_bytes: totals
            .payload_bytes
            .saturating_sub(descriptor.message_bytes()),
    }
}
