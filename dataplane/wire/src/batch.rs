//! The batch frame: a fixed header, then the payload; also the end-of-stream frame.

use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{crc32c, message};

/// Bytes of a [`Header`].
pub const HEADER_LEN: usize = size_of::<Header>();

/// Largest batch payload that the format allows, bytes; a broker may offer less.
pub const MAX_PAYLOAD: u32 = 1 << 30;

/// The header of a batch.
const KIND_BATCH: u8 = 1;
/// The end of the stream; the broker answers with a last ack and closes.
const KIND_END: u8 = 2;

/// Header of a frame from publisher to broker, as it lies on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    kind: u8,
    reserved: [u8; 3],
    payload_len: U32,
    batch_seq: U64,
    messages: U32,
    checksum: U32,
}

/// The description of a batch: the part of the header that the log keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// Payload bytes that follow the header.
    pub payload_len: u32,
    /// Position of this batch in its stream; rises by one.
    pub batch_seq: u64,
    /// Messages in the payload.
    pub messages: u32,
    /// CRC32C of the header before this field and of the payload's CRC32C; see [`checksum`].
    pub checksum: u32,
}

/// A frame from publisher to broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// A batch, whose payload follows.
    Batch(Batch),
    /// The publisher has sent all its batches: `batch_seq` of them.
    End {
        /// Batches that the stream held.
        batches: u64,
    },
}

/// A frame header that cannot be served.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum Invalid {
    /// The first byte names no known frame, or reserved bytes are not zero.
    #[error("not a frame of this protocol (first byte {kind:#04x}): the peer lost its place")]
    Kind {
        /// First byte of the header.
        kind: u8,
    },
    /// The claimed payload is empty or larger than the broker accepts.
    #[error("batch of {len} bytes; this broker accepts 4 to {max} bytes")]
    PayloadLen {
        /// Claimed payload length, bytes.
        len: u32,
        /// Largest accepted, bytes.
        max: u32,
    },
    /// More messages than the payload could hold, or none.
    #[error("batch of {len} bytes claims {messages} messages")]
    Messages {
        /// Claimed payload length, bytes.
        len: u32,
        /// Claimed message count.
        messages: u32,
    },
}

impl Header {
    /// Header of a batch whose payload has `payload_len` bytes and the checksum
    /// [`payload_checksum`], which does not depend on the batch's place in a stream.
    #[must_use]
    pub fn for_batch(batch_seq: u64, messages: u32, payload_len: u32, payload_sum: u32) -> Self {
        let mut header = Self::without_checksum(KIND_BATCH, payload_len, batch_seq, messages);
        header.checksum = header.checksum_with(payload_sum).into();
        header
    }

    /// The checksum that the header carries.
    #[must_use]
    pub fn checksum(&self) -> u32 {
        self.checksum.get()
    }

    /// Header that ends a stream of `batches` batches.
    #[must_use]
    pub fn for_end(batches: u64) -> Self {
        let mut header = Self::without_checksum(KIND_END, 0, batches, 0);
        header.checksum = header.checksum_with(payload_checksum(&[])).into();
        header
    }

    /// Checks everything that the header alone allows to check.
    ///
    /// # Errors
    /// [`Invalid`] if the kind is unknown or a claim is invalid.
    pub fn parse(&self, max_payload: u32) -> Result<Frame, Invalid> {
        if self.reserved != [0; 3] {
            return Err(Invalid::Kind { kind: self.kind });
        }
        match self.kind {
            KIND_BATCH => self.parse_batch(max_payload).map(Frame::Batch),
            KIND_END if self.checksum() == self.checksum_with(payload_checksum(&[])) => {
                Ok(Frame::End {
                    batches: self.batch_seq.get(),
                })
            }
            kind => Err(Invalid::Kind { kind }),
        }
    }

    fn parse_batch(&self, max: u32) -> Result<Batch, Invalid> {
        let (len, messages) = (self.payload_len.get(), self.messages.get());
        if (len as usize) < message::OVERHEAD || len > max {
            return Err(Invalid::PayloadLen { len, max });
        }
        if messages == 0 || messages as usize > len as usize / message::OVERHEAD {
            return Err(Invalid::Messages { len, messages });
        }
        Ok(Batch {
            payload_len: len,
            batch_seq: self.batch_seq.get(),
            messages,
            checksum: self.checksum.get(),
        })
    }

    fn without_checksum(kind: u8, payload_len: u32, batch_seq: u64, messages: u32) -> Self {
        Self {
            kind,
            reserved: [0; 3],
            payload_len: payload_len.into(),
            batch_seq: batch_seq.into(),
            messages: messages.into(),
            checksum: U32::ZERO,
        }
    }

    fn checksum_with(&self, payload_sum: u32) -> u32 {
        let mut covered = [0; HEADER_LEN];
        covered.copy_from_slice(self.as_bytes());
        covered[HEADER_LEN - size_of::<U32>()..].copy_from_slice(&payload_sum.to_le_bytes());
        crc32c::checksum(&covered)
    }
}

/// CRC32C (RFC 3720 appendix B.4) of a batch: of its header up to the checksum, followed by the
/// CRC32C of its payload, so a batch can be filled before its place in a stream is known.
///
/// Publishers send it, the log keeps it, and a reader that verifies computes it again: the same
/// figure guards the payload and what is said about it from end to end.
///
/// # Panics
/// If the payload has 4 GiB or more, which no batch has.
#[must_use]
pub fn checksum(batch_seq: u64, messages: u32, payload: &[u8]) -> u32 {
    let len = u32::try_from(payload.len()).expect("a batch fits in MAX_PAYLOAD");
    Header::for_batch(batch_seq, messages, len, payload_checksum(payload)).checksum()
}

/// CRC32C of a payload.
#[must_use]
pub fn payload_checksum(payload: &[u8]) -> u32 {
    crc32c::checksum(payload)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn header_layout_is_the_documented_one() {
        let payload = [1, 0, 0, 0, 0x78];
        let header = Header::for_batch(0x0102_0304_0506_0708, 1, 5, payload_checksum(&payload));
        let bytes = header.as_bytes();
        assert_eq!(HEADER_LEN, 24);
        assert_eq!(bytes[..4], [1, 0, 0, 0]);
        assert_eq!(bytes[4..8], [5, 0, 0, 0]);
        assert_eq!(bytes[8..16], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [1, 0, 0, 0]);
        let mut covered = bytes[..20].to_vec();
        covered.extend(crc32c::bitwise(&payload).to_le_bytes());
        assert_eq!(bytes[20..], crc32c::bitwise(&covered).to_le_bytes());
    }

    #[test]
    fn invalid_claims_are_refused() {
        let max = 4096;
        let parse = |len, messages| {
            Header::without_checksum(KIND_BATCH, len, 0, messages)
                .parse(max)
                .unwrap_err()
        };
        assert_eq!(parse(0, 1), Invalid::PayloadLen { len: 0, max });
        assert_eq!(parse(4097, 1), Invalid::PayloadLen { len: 4097, max });
        assert_eq!(
            parse(8, 0),
            Invalid::Messages {
                len: 8,
                messages: 0
            }
        );
        assert_eq!(
            parse(8, 3),
            Invalid::Messages {
                len: 8,
                messages: 3
            }
        );
    }

    #[test]
    fn end_of_stream_round_trips_and_is_checked() {
        let end = Header::for_end(7);
        assert_eq!(end.parse(0), Ok(Frame::End { batches: 7 }));
        let mut bytes: [u8; HEADER_LEN] = end.as_bytes().try_into().unwrap();
        bytes[9] ^= 1;
        let damaged = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(damaged.parse(0), Err(Invalid::Kind { kind: KIND_END }));
    }

    proptest! {
        #[test]
        fn any_flipped_bit_is_seen(payload in prop::collection::vec(any::<u8>(), 4..300),
                                   seq: u64, messages in 1u32..50, bit: prop::sample::Index) {
            let len = payload.len() as u32;
            let header = Header::for_batch(seq, messages, len, payload_checksum(&payload));
            let mut bytes = [header.as_bytes(), &payload].concat();
            let bit = bit.index(bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (damaged, payload) = Header::read_from_prefix(&bytes).unwrap();
            let computed = damaged.checksum_with(payload_checksum(payload));
            prop_assert_ne!(computed, damaged.checksum());
        }

        #[test]
        fn arbitrary_headers_never_panic(bytes: [u8; HEADER_LEN], max: u32) {
            let _ = Header::read_from_bytes(&bytes).unwrap().parse(max);
        }
    }
}
