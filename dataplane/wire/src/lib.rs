//! Message and frame layouts as bytes on the wire and in the log; no I/O, no allocation on views.
//!
//! All integers are little-endian. [`batch`] is the unit of transfer, [`message`] is how messages
//! lie inside a batch, [`handshake`] opens a session, [`auth_handshake`] does so with a key, [`reply`] is what a broker sends back.
//! `docs/protocol.md` states the same tables for implementers in other languages.

pub mod auth_handshake;
pub mod batch;
pub mod crc32c;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod handshake;
pub mod message;
pub mod packet;
pub mod reply;
pub mod text;

/// First four bytes of a [`handshake::Hello`] and a [`handshake::Welcome`]: "PNSK".
pub const MAGIC: [u8; 4] = *b"PNSK";

/// Version of the wire protocol; both ends must speak the same one.
pub const VERSION: u16 = 1;
