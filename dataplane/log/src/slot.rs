//! One entry of the batch index: a descriptor under a sequence lock.
//!
//! Word 0 is the **stamp**: `index + 1` once the descriptor of batch `index` is published, `BUSY`
//! while a writer replaces it. All words are atomics, so a concurrent read in another process is a
//! wrong value at worst, which the stamp or the check word tells; it is never undefined.

use penstock_wire::crc32c;

use super::sync::{AtomicU64, Ordering, crash_point, fence};

/// Bytes of a slot in the file: two cache lines.
pub const SLOT_BYTES: usize = 128;

/// Stamp of a slot that is being written.
const BUSY: u64 = u64::MAX;
/// Marks running totals that are not filled in yet; the low bits name the batch.
const UNSET: u64 = 1 << 63;
/// Words of a descriptor, all covered by the check word.
const CHECKED: usize = 7;
/// Word that holds payload length and message count.
const LEN_AND_COUNT: usize = 1;
/// Word that holds the floor.
const FLOOR: usize = 6;

/// What the log keeps about a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Descriptor {
    /// Position of the payload in the endless sequence of payload bytes.
    pub position: u64,
    /// Payload bytes.
    pub payload_len: u32,
    /// Messages in the payload.
    pub messages: u32,
    /// Session that the batch came from.
    pub session: u64,
    /// Position of the batch in its stream.
    pub batch_seq: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// CRC32C of the batch, as the publisher computed it.
    pub checksum: u32,
    /// When the broker had the whole batch, nanoseconds since the Unix epoch.
    pub arrival_unix_ns: u64,
    /// No batch at or behind this one in the index lies below this position.
    pub floor: u64,
}

#[cfg(not(loom))]
impl Descriptor {
    /// Message bytes of the batch, without framing.
    pub(super) fn message_bytes(&self) -> u64 {
        let framing = u64::from(self.messages) * penstock_wire::message::OVERHEAD as u64;
        u64::from(self.payload_len).saturating_sub(framing)
    }
}

/// Totals up to and including a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Messages committed.
    pub messages: u64,
    /// Message bytes committed, without framing.
    pub payload_bytes: u64,
}

/// What a reader found in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// The batch asked for, and the totals up to it, which count once the frontier has passed it.
    Published(Descriptor, Totals),
    /// The batch is not there yet.
    NotYet,
    /// The slot has been taken over by a later batch.
    Overwritten,
    /// The slot claims to hold the batch, but its check word disagrees.
    Damaged,
}

/// A slot as it lies in the file.
#[derive(Debug)]
#[repr(C, align(128))]
pub struct Slot {
    stamp: AtomicU64,
    words: [AtomicU64; CHECKED],
    check: AtomicU64,
    total_messages: AtomicU64,
    total_bytes: AtomicU64,
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            stamp: AtomicU64::new(0),
            words: std::array::from_fn(|_| AtomicU64::new(0)),
            check: AtomicU64::new(0),
            total_messages: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
        }
    }
}

impl Slot {
    /// Whether batch `index` is published here.
    pub(super) fn holds(&self, index: u64) -> bool {
        self.stamp.load(Ordering::Acquire) == index + 1
    }

    /// Publishes batch `index`. Only the writer that took `index` may call this, and only once the
    /// frontier has passed the slot's previous batch.
    pub(super) fn publish(&self, index: u64, descriptor: &Descriptor) {
        self.stamp.store(BUSY, Ordering::Relaxed);
        crash_point();
        // A reader that sees one of the words below also sees BUSY, or what came after it.
        fence(Ordering::Release);
        let words = descriptor.to_words();
        for (word, value) in self.words.iter().zip(words) {
            word.store(value, Ordering::Relaxed);
            crash_point();
        }
        self.check
            .store(check_word(index, &words), Ordering::Relaxed);
        crash_point();
        self.total_messages.store(UNSET | index, Ordering::Relaxed);
        crash_point();
        self.total_bytes.store(UNSET | index, Ordering::Relaxed);
        crash_point();
        self.stamp.store(index + 1, Ordering::Release);
        crash_point();
    }

    /// Reads the descriptor of batch `index`, whole or not at all.
    #[must_use]
    pub fn read(&self, index: u64) -> Found {
        match self.stamp.load(Ordering::Acquire) {
            BUSY => {}
            stamp if stamp == index + 1 => {}
            stamp if stamp > index => return Found::Overwritten,
            _ => return Found::NotYet,
        }
        let words = std::array::from_fn(|n| self.words[n].load(Ordering::Relaxed));
        let check = self.check.load(Ordering::Relaxed);
        let totals = self.totals();
        fence(Ordering::Acquire);
        match self.stamp.load(Ordering::Relaxed) {
            stamp if stamp == index + 1 && check == check_word(index, &words) => {
                Found::Published(Descriptor::from_words(&words), totals)
            }
            stamp if stamp == index + 1 => Found::Damaged,
            // A slot is only rewritten once its batch is below the frontier, so for a batch that
            // some reader knows to be published BUSY means that it is being overwritten.
            BUSY => Found::NotYet,
            stamp if stamp > index => Found::Overwritten,
            _ => Found::NotYet,
        }
    }

    /// Lower bound of positions at and behind batch `index`, if that batch is still here.
    pub(super) fn floor_of(&self, index: u64) -> Option<u64> {
        if !self.holds(index) {
            return None;
        }
        let floor = self.words[FLOOR].load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        (self.stamp.load(Ordering::Relaxed) == index + 1).then_some(floor)
    }

    /// Totals up to and including batch `index`, once the frontier has passed it.
    #[must_use]
    pub fn totals(&self) -> Totals {
        Totals {
            messages: self.total_messages.load(Ordering::Acquire),
            payload_bytes: self.total_bytes.load(Ordering::Acquire),
        }
    }

    /// Fills in the totals of batch `index` from those of its predecessor. Any number of threads
    /// may do so: they compute the same, the first one wins, and one that was held up until the
    /// slot was taken over finds another mark and changes nothing.
    pub(super) fn complete(&self, index: u64, before: Totals) {
        let len_and_count = self.words[LEN_AND_COUNT].load(Ordering::Relaxed);
        let (len, messages) = (len_and_count >> 32, len_and_count & u64::from(u32::MAX));
        let framing = messages * penstock_wire::message::OVERHEAD as u64;
        let bytes = len.saturating_sub(framing);
        let set = |word: &AtomicU64, value: u64| {
            let _ =
                word.compare_exchange(UNSET | index, value, Ordering::AcqRel, Ordering::Acquire);
            crash_point();
        };
        set(
            &self.total_messages,
            before.messages.wrapping_add(messages) & !UNSET,
        );
        set(
            &self.total_bytes,
            before.payload_bytes.wrapping_add(bytes) & !UNSET,
        );
    }

    /// The batch that is published here, by its own account.
    #[cfg(not(loom))]
    pub(super) fn held(&self) -> Option<u64> {
        let index = match self.stamp.load(Ordering::Relaxed) {
            BUSY => None,
            stamp => stamp.checked_sub(1),
        }?;
        matches!(self.read(index), Found::Published(..)).then_some(index)
    }

    /// Forgets a batch that a dead writer left at or beyond the frontier.
    #[cfg(not(loom))]
    pub(super) fn discard_from(&self, frontier: u64) {
        if self.stamp.load(Ordering::Relaxed) > frontier {
            self.stamp.store(0, Ordering::Release);
        }
    }
}

impl Descriptor {
    fn to_words(self) -> [u64; CHECKED] {
        let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        [
            self.position,
            pair(self.payload_len, self.messages),
            self.session,
            self.batch_seq,
            pair(self.stream, self.checksum),
            self.arrival_unix_ns,
            self.floor,
        ]
    }

    fn from_words(words: &[u64; CHECKED]) -> Self {
        let high = |word: u64| (word >> 32) as u32;
        Self {
            position: words[0],
            payload_len: high(words[1]),
            messages: words[1] as u32,
            session: words[2],
            batch_seq: words[3],
            stream: high(words[4]),
            checksum: words[4] as u32,
            arrival_unix_ns: words[5],
            floor: words[FLOOR],
        }
    }
}

/// CRC32C over the batch's index and descriptor: a slot never passes for another batch's.
fn check_word(index: u64, words: &[u64; CHECKED]) -> u64 {
    let first = crc32c::checksum(&index.to_le_bytes());
    let words = words.iter().map(|word| word.to_le_bytes());
    words
        .fold(first, |crc, word| crc32c::append(crc, &word))
        .into()
}
