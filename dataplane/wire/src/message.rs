//! How messages lie inside a batch: each is a 4-byte length, then its bytes, with no padding.

use thiserror::Error;

/// Bytes that framing adds to each message.
pub const OVERHEAD: usize = size_of::<u32>();

/// The payload of a batch does not hold the messages that its header claims.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum Malformed {
    /// Fewer than four bytes remain where a length is expected.
    #[error("{remaining} bytes remain at offset {offset}, too few for a message length")]
    Length {
        /// Offset in the payload, bytes.
        offset: usize,
        /// Bytes from there to the end of the payload.
        remaining: usize,
    },
    /// The length points past the end of the payload.
    #[error("message of {length} bytes at offset {offset} reaches past the end of its batch")]
    Body {
        /// Offset of the message's length field, bytes.
        offset: usize,
        /// Claimed length, bytes.
        length: usize,
    },
}

/// Bytes that a message of `len` bytes occupies in a batch.
#[inline]
#[must_use]
pub const fn encoded_len(len: usize) -> usize {
    OVERHEAD + len
}

/// Appends one message to a batch payload.
///
/// # Panics
/// If the message is 4 GiB or longer; a batch is far smaller, so callers have checked before.
#[inline]
pub fn append(payload: &mut Vec<u8>, message: &[u8]) {
    let len = u32::try_from(message.len()).expect("a message is smaller than a batch");
    payload.extend_from_slice(&len.to_le_bytes());
    payload.extend_from_slice(message);
}

/// Iterates over the messages of a batch payload, in place.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    payload: &'a [u8],
    offset: usize,
}

impl<'a> Messages<'a> {
    /// Starts at the beginning of `payload`.
    #[must_use]
    pub fn new(payload: &'a [u8]) -> Self {
        Self { payload, offset: 0 }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = Result<&'a [u8], Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        let offset = self.offset;
        let rest = &self.payload[offset..];
        if rest.is_empty() {
            return None;
        }
        // After an error there is no way to find the next message: end the iteration.
        self.offset = self.payload.len();
        let Some((length, body)) = rest.split_first_chunk::<OVERHEAD>() else {
            return Some(Err(Malformed::Length {
                offset,
                remaining: rest.len(),
            }));
        };
        let length = u32::from_le_bytes(*length) as usize;
        let Some(message) = body.get(..length) else {
            return Some(Err(Malformed::Body { offset, length }));
        };
        self.offset = offset + encoded_len(length);
        Some(Ok(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_truncation_of_a_payload_is_an_error_or_a_prefix() {
        let mut payload = Vec::new();
        for message in [&b"one"[..], b"", b"three!"] {
            append(&mut payload, message);
        }
        let whole: Vec<_> = Messages::new(&payload).map(Result::unwrap).collect();
        assert_eq!(whole, [&b"one"[..], b"", b"three!"]);
        let boundaries = [0, 7, 11, 21];
        for cut in 0..payload.len() {
            let failed = Messages::new(&payload[..cut]).any(|m| m.is_err());
            assert_eq!(failed, !boundaries.contains(&cut), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn messages_round_trip(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..50)) {
            let mut payload = Vec::new();
            messages.iter().for_each(|m| append(&mut payload, m));
            let read: Vec<_> = Messages::new(&payload).map(|m| m.unwrap().to_vec()).collect();
            prop_assert_eq!(read, messages);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let total: usize = Messages::new(&bytes).map_while(Result::ok).map(|m| encoded_len(m.len())).sum();
            prop_assert!(total <= bytes.len());
        }
    }
}
