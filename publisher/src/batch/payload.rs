//! The payload of a batch, summed while it is filled: each byte is read for its checksums once, while
//! the first-level cache still holds it.

use std::ops::{Deref, Range};
use std::slice;

use penstock_wire::crc32c::{self, Joiner};
use penstock_wire::message;

/// Bytes that are summed at a time where no packets are to be made of them.
const STEP: usize = 4 << 10;
/// Fewer bytes than any path's packets carry.
const MIN_PART: usize = 1000;

/// Messages of a batch, with the checksum of all, and of each part that fills one packet.
#[derive(Debug, Default)]
pub(crate) struct Payload {
    bytes: Vec<u8>,
    /// The number of bytes that are summed, and their CRC32C.
    summed: usize,
    checksum: u32,
    /// CRC32C of each part of `part_len` bytes from the start; none if that is 0.
    parts: Vec<u32>,
    part_len: usize,
}

impl Payload {
    pub(crate) fn with_capacity(bytes: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(bytes),
            ..Self::default()
        }
    }

    /// Appends a message.
    pub(crate) fn append(&mut self, message: &[u8]) {
        message::append(&mut self.bytes, message);
    }

    /// Appends what is a number of messages already.
    pub(crate) fn append_encoded(&mut self, messages: &[u8]) {
        self.bytes.extend_from_slice(messages);
    }

    /// Sums what is complete; says whether something was. `packets` is for parts as long as a packet
    /// carries; the same for all messages of a batch.
    pub(crate) fn sum_complete(&mut self, packets: Option<&Joiner>) -> bool {
        let summed = self.summed;
        match packets {
            Some(packets) => self.sum_parts(packets),
            None if self.bytes.len() - self.summed >= STEP => self.sum_rest(),
            None => {}
        }
        self.summed > summed
    }

    /// Length at which there is something to sum.
    pub(crate) fn next_sum(&self, packets: Option<&Joiner>) -> usize {
        self.summed + packets.map_or(STEP, Joiner::len)
    }

    /// The memory, with room for `len` bytes: what follows those that there are may be written until
    /// this is used again, other than by [`Self::filled`].
    pub(crate) fn room_for(&mut self, len: usize) -> *mut u8 {
        self.bytes.reserve(len.saturating_sub(self.bytes.len()));
        self.bytes.as_mut_ptr()
    }

    /// Counts what was written to [`Self::room_for`].
    ///
    /// # Safety
    /// There is room for `len` bytes, and they are initialised.
    pub(crate) unsafe fn set_len(&mut self, len: usize) {
        debug_assert!(len >= self.bytes.len() && len <= self.bytes.capacity());
        // SAFETY: as the caller says.
        unsafe { self.bytes.set_len(len) };
    }

    /// Bytes that were written to [`Self::room_for`], some perhaps not counted yet.
    ///
    /// # Safety
    /// There is room for `range.end` bytes; those in `range` are initialised and stay as they are.
    pub(crate) unsafe fn filled(&self, range: Range<usize>) -> &[u8] {
        debug_assert!(range.start <= range.end && range.end <= self.bytes.capacity());
        // SAFETY: as the caller says; the vector's pointer is valid for its capacity.
        unsafe { slice::from_raw_parts(self.bytes.as_ptr().add(range.start), range.len()) }
    }

    /// Removes the first `len` bytes.
    pub(crate) fn remove_first(&mut self, len: usize) {
        self.bytes.drain(..len);
        self.parts.clear();
        (self.summed, self.checksum, self.part_len) = (0, 0, 0);
    }

    fn sum_parts(&mut self, packets: &Joiner) {
        // A batch that was sealed goes on only if its publisher failed: then its parts are of no use.
        if self.summed != self.parts.len() * packets.len() {
            return self.sum_rest();
        }
        self.part_len = packets.len();
        while let Some(part) = self.bytes[self.summed..].get(..packets.len()) {
            let sum = crc32c::checksum(part);
            self.parts.push(sum);
            self.checksum = packets.join(self.checksum, sum);
            self.summed += packets.len();
        }
    }

    fn sum_rest(&mut self) {
        self.checksum = crc32c::append(self.checksum, &self.bytes[self.summed..]);
        self.summed = self.bytes.len();
    }

    /// CRC32C of all of it.
    pub(crate) fn seal(&mut self) -> u32 {
        self.sum_rest();
        self.checksum
    }

    /// CRC32C of the `len` bytes at `offset`, if that is known.
    pub(crate) fn part_checksum(&self, offset: usize, len: usize) -> Option<u32> {
        if len != self.part_len || !offset.is_multiple_of(len) {
            return None;
        }
        self.parts.get(offset / len).copied()
    }

    /// Empties it, and gives back what memory it has beyond that of batches of `batch_size` bytes.
    pub(crate) fn reset(&mut self, batch_size: usize) {
        self.bytes.clear();
        self.bytes.shrink_to(batch_size);
        self.parts.clear();
        self.parts.shrink_to(batch_size / MIN_PART);
        (self.summed, self.checksum, self.part_len) = (0, 0, 0);
    }

    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }
}

impl Deref for Payload {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn sums_are_those_of_the_bytes(
            messages in vec(vec(any::<u8>(), 0..3000), 1..20),
            len in 1..2000usize,
            has_packets: bool,
        ) {
            let joiner = has_packets.then(|| Joiner::new(len));
            let mut payload = Payload::with_capacity(1000);
            for _ in 0..2 {
                for message in &messages {
                    payload.append(message);
                    let due = payload.next_sum(joiner.as_ref()) <= payload.len();
                    prop_assert_eq!(payload.sum_complete(joiner.as_ref()), due);
                    prop_assert!(payload.next_sum(joiner.as_ref()) > payload.len());
                }
                let sum = payload.seal();
                prop_assert_eq!(sum, crc32c::checksum(&payload));
                for (number, part) in payload.chunks_exact(len).enumerate() {
                    let known = payload.part_checksum(number * len, len);
                    prop_assert_eq!(known, has_packets.then(|| crc32c::checksum(part)));
                }
                prop_assert_eq!(payload.part_checksum(1, len).filter(|_| len > 1), None);
                prop_assert_eq!(payload.part_checksum(0, len + 1), None);
                let end = payload.len() / len * len;
                prop_assert_eq!(payload.part_checksum(end, len), None);
                payload.append(&messages[0]);
                payload.sum_complete(joiner.as_ref());
                prop_assert_eq!(payload.seal(), crc32c::checksum(&payload));
                if let Some(part) = payload.get(end..end + len)
                    && let Some(known) = payload.part_checksum(end, len)
                {
                    prop_assert_eq!(known, crc32c::checksum(part));
                }
                payload.remove_first(payload.len() / 2);
                payload.sum_complete(joiner.as_ref());
                prop_assert_eq!(payload.seal(), crc32c::checksum(&payload));
                if has_packets && let Some(part) = payload.get(..len) {
                    prop_assert_eq!(payload.part_checksum(0, len), Some(crc32c::checksum(part)));
                }
                payload.reset(1000);
            }
        }
    }
}
