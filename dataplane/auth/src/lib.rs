//! Authentication: keys that both ends hold, the handshake that proves it, and tags of packets and frames.
//!
//! The handshake is Noise NNpsk0 ([`SUITE`]): two messages, of which the first already proves that the
//! publisher holds the key, before the broker does anything expensive. Request and answer follow sealed, so no
//! session key or packet key crosses the network in clear text, and a replayed message gains nothing, because
//! its sender cannot continue the handshake.
//! Nothing is negotiated, so nothing can be downgraded: a publisher with a key accepts no unauthenticated
//! answer, and a broker with keys accepts no publisher without one.

mod channel;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod key;
mod keys;
mod packets;
mod pattern;

pub use channel::{AuthError, Channel, Initiator, SUITE, respond};
pub use key::{Key, KeyId, generate};
pub use keys::{Grant, Grants, KeyFileError, Keys, check_name, describe, read_key};
pub use packets::PacketKeys;
pub use pattern::TopicPattern;
