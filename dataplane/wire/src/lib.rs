//! Message and frame layouts as bytes on the wire and in the log; no I/O, no allocation on views.
//!
//! All integers are little-endian. [`batch`] is the unit of transfer, [`message`] is how messages
//! lie inside a batch, [`handshake`] opens a session, [`auth_handshake`] does so with a key, [`reply`] is what a broker sends back,
//! [`delivery`] is how a subscriber reads.
//! `docs/protocol.md` states the same tables for implementers in other languages.
//!
//! A batch of two messages, as a publisher frames it and as a broker reads it:
//!
//! ```
//! use penstock_wire::batch::{self, Frame, Header};
//! use penstock_wire::message::{self, Messages};
//! use zerocopy::{FromBytes, IntoBytes};
//!
//! let mut payload = Vec::new();
//! message::append(&mut payload, b"one");
//! message::append(&mut payload, b"two");
//! let sum = batch::payload_checksum(&payload);
//! let header = Header::for_batch(0, 2, payload.len() as u32, sum);
//! let frame = [header.as_bytes(), &payload].concat();
//!
//! let (header, rest) = Header::ref_from_prefix(&frame).expect("a whole header");
//! let Frame::Batch(batch) = header.parse(batch::MAX_PAYLOAD)? else {
//!     panic!("not a batch");
//! };
//! assert_eq!((batch.batch_seq, batch.messages), (0, 2));
//! let messages: Vec<&[u8]> = Messages::new(rest).flatten().collect();
//! assert_eq!(messages, [b"one", b"two"]);
//! # Ok::<(), batch::Invalid>(())
//! ```

pub mod auth_handshake;
pub mod batch;
pub mod crc32c;
pub mod delivery;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handshake;
mod levels;
pub mod message;
pub mod packet;
pub mod reply;
pub mod text;

/// First four bytes of a [`handshake::Hello`] and a [`handshake::Welcome`]: "PNSK".
pub const MAGIC: [u8; 4] = *b"PNSK";

/// Version of the wire protocol; both ends must speak the same one.
pub const VERSION: u16 = 1;
