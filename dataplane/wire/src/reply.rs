//! Replies of a broker on an open stream: cumulative acks, and the reason if it ends the stream.

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::text::{MAX_TEXT_LEN, clip};

/// Bytes of a [`Reply`], before the text of an error.
pub const REPLY_LEN: usize = size_of::<Reply>();

const KIND_ACK: u8 = 3;
const KIND_ERROR: u8 = 4;
const FLAG_BLOCKED: u8 = 1;

/// A frame from broker to publisher, as it lies on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Reply {
    kind: u8,
    flags: u8,
    code: U16,
    text_len: U32,
    committed: U64,
}

/// Why a broker ends a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Fault {
    /// The publisher broke the protocol.
    Protocol = 1,
    /// A batch's checksum does not match its bytes.
    Checksum = 2,
    /// The publisher stalled inside a batch for too long.
    Stalled = 3,
    /// The broker is shutting down.
    Shutdown = 4,
    /// A frame or reply has an invalid tag.
    Authentication = 5,
    /// The topic's log was deleted, replaced or truncated under the broker.
    LogLost = 6,
    /// A subscriber may not register.
    Permission = 7,
}

/// A frame from broker to publisher, once parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parsed {
    /// Every batch of the stream below `committed` is committed.
    Ack {
        /// Batches committed, which is also the next sequence number expected.
        committed: u64,
        /// The broker waits for space in the shared buffer; it is alive.
        blocked: bool,
    },
    /// The broker closes the stream; batches below `committed` are committed, others are not.
    Error {
        /// A [`Fault`] as a number.
        code: u16,
        /// Batches committed.
        committed: u64,
        /// Bytes of text that follow.
        text_len: usize,
    },
}

/// The bytes are no reply of this protocol.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
#[error("not a reply of this protocol (first byte {kind:#04x})")]
pub struct InvalidReply {
    kind: u8,
}

impl Reply {
    /// Acknowledges every batch below `committed`.
    #[must_use]
    pub fn ack(committed: u64, blocked: bool) -> Self {
        Self {
            kind: KIND_ACK,
            flags: if blocked { FLAG_BLOCKED } else { 0 },
            code: U16::ZERO,
            text_len: U32::ZERO,
            committed: committed.into(),
        }
    }

    /// A reply that ends a stream, as bytes: the frame and its text, which begins at [`REPLY_LEN`].
    #[must_use]
    pub fn error(fault: Fault, committed: u64, text: &str) -> Vec<u8> {
        let text = clip(text, MAX_TEXT_LEN);
        let reply = Self {
            kind: KIND_ERROR,
            flags: 0,
            code: (fault as u16).into(),
            text_len: (text.len() as u32).into(),
            committed: committed.into(),
        };
        [reply.as_bytes(), text.as_bytes()].concat()
    }

    /// What the broker says.
    ///
    /// # Errors
    /// [`InvalidReply`] when it is nothing that this version knows.
    pub fn parse(&self) -> Result<Parsed, InvalidReply> {
        let committed = self.committed.get();
        let text_len = self.text_len.get() as usize;
        match (self.kind, text_len) {
            (KIND_ACK, 0) => Ok(Parsed::Ack {
                committed,
                blocked: self.flags & FLAG_BLOCKED != 0,
            }),
            (KIND_ERROR, 0..=MAX_TEXT_LEN) => Ok(Parsed::Error {
                code: self.code.get(),
                committed,
                text_len,
            }),
            (kind, _) => Err(InvalidReply { kind }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn replies_round_trip() {
        assert_eq!(REPLY_LEN, 16);
        for blocked in [false, true] {
            let ack = Reply::ack(u64::MAX, blocked);
            assert_eq!(
                ack.parse(),
                Ok(Parsed::Ack {
                    committed: u64::MAX,
                    blocked
                })
            );
        }
        let bytes = Reply::error(Fault::Checksum, 5, "bad");
        let (reply, text) = Reply::read_from_prefix(&bytes).unwrap();
        assert_eq!(
            reply.parse(),
            Ok(Parsed::Error {
                code: 2,
                committed: 5,
                text_len: 3
            })
        );
        assert_eq!(text, b"bad");
    }

    #[test]
    fn long_texts_are_clipped_between_characters() {
        let text = "é".repeat(MAX_TEXT_LEN);
        let bytes = Reply::error(Fault::Protocol, 0, &text);
        let clipped = std::str::from_utf8(&bytes[REPLY_LEN..]).unwrap();
        assert_eq!(clipped.len(), MAX_TEXT_LEN);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes: [u8; REPLY_LEN]) {
            let _ = Reply::read_from_bytes(&bytes).unwrap().parse();
        }
    }
}
