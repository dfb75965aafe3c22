//! Who may publish: keys that both ends hold, and the handshake that proves it.
//!
//! The handshake is Noise NNpsk0 ([`SUITE`]): two messages, of which the first already proves that
//! the publisher holds the key, before the broker does anything that costs. What is asked for and
//! answered follows sealed, so no key of a session or of packets crosses the network in clear, and
//! a replayed message gains nothing: its sender cannot continue the handshake.
//! Nothing is negotiated, so nothing can be negotiated away: a publisher with a key takes no answer
//! without, and a broker with keys takes no publisher without.

mod channel;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod key;
mod keys;
mod packets;
mod pattern;

pub use channel::{Channel, Initiator, SUITE, Unproven, respond};
pub use key::{Key, KeyId, generate};
pub use keys::{Grant, Grants, KeyFileError, Keys, check_name, describe, read_key};
pub use packets::PacketKeys;
pub use pattern::TopicPattern;
