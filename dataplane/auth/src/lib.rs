//! Authentication: keys that both ends hold, the handshake that proves it, and tags of packets and frames.
//!
//! The handshake is Noise NNpsk0 ([`SUITE`]): two messages, of which the first already proves that the
//! publisher holds the key, before the broker does anything expensive. Request and answer follow sealed, so no
//! session key or packet key crosses the network in clear text, and a replayed message gains nothing, because
//! its sender cannot continue the handshake.
//! Nothing is negotiated, so nothing can be downgraded: a publisher with a key accepts no unauthenticated
//! answer, and a broker with keys accepts no publisher without one.
//!
//! ```
//! use std::path::Path;
//! use penstock_auth::{Grants, Initiator, Key, respond};
//!
//! // A broker's key file has one line for each publisher: name, secret, topics.
//! let secret = "4f".repeat(32);
//! let file = format!("collector {secret} trades.*\n");
//! let grants = Grants::parse(Path::new("keys"), &file)?;
//!
//! // The publisher holds the same secret. It starts, the broker answers.
//! let key = Key::new(&[0x4f; 32]);
//! let (publisher, first) = Initiator::start(&key)?;
//! let (grant, expected) = grants.find(key.id());
//! assert!(grant.is_some_and(|grant| grant.permits("trades.eu")));
//! let (mut broker, answer) = respond(expected, &first)?;
//! let mut publisher = publisher.finish(&answer)?;
//!
//! // From now on, either end can open only what the other one sealed.
//! let sealed = publisher.seal(b"a request");
//! assert_eq!(broker.open(&sealed)?, b"a request");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
