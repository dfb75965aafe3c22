//! A shared secret, and the values derived from it, one for each purpose.

use std::fmt;

use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, KeyInit, Update};
use penstock_wire::auth_handshake::KEY_ID_LEN;
use zeroize::Zeroizing;

/// Bytes of a secret.
pub(super) const SECRET_LEN: usize = 32;

/// Names a key on the wire without revealing anything about it.
pub type KeyId = [u8; KEY_ID_LEN];

/// Values derived from a shared secret. The secret itself is not kept.
#[derive(Clone)]
pub struct Key {
    id: KeyId,
    handshake: Zeroizing<[u8; SECRET_LEN]>,
    sessions: Zeroizing<[u8; SECRET_LEN]>,
}

impl Key {
    /// Derives the values from a secret, which must be random.
    #[must_use]
    pub fn new(secret: &[u8; SECRET_LEN]) -> Self {
        let derived = |purpose: &str| Zeroizing::new(mac(secret, &[purpose.as_bytes()]));
        let mut id = KeyId::default();
        id.copy_from_slice(&derived("penstock key id")[..KEY_ID_LEN]);
        Self {
            id,
            handshake: derived("penstock handshake"),
            sessions: derived("penstock sessions"),
        }
    }

    /// The key's id, by which the broker finds it.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// The pre-shared key of the handshake.
    pub(super) fn handshake(&self) -> &[u8; SECRET_LEN] {
        &self.handshake
    }

    /// A session number of this key on a topic, derived from a random number.
    ///
    /// Half of a session's number is a keyed hash of the other half. So a restarted broker recognises the owner
    /// of a session without any stored state, and refuses other keys.
    #[must_use]
    pub fn session(&self, random: u32, topic: &str) -> u64 {
        let hash = mac(&self.sessions, &[&random.to_le_bytes(), topic.as_bytes()]);
        let [a, b, c, d, ..] = hash;
        (u64::from(random) << 32) | u64::from(u32::from_le_bytes([a, b, c, d]))
    }

    /// Whether a session on the topic belongs to this key.
    #[must_use]
    pub fn owns(&self, session: u64, topic: &str) -> bool {
        self.session((session >> 32) as u32, topic) == session
    }
}

/// A new random secret.
///
/// # Errors
/// If the system provides no random numbers.
pub fn generate() -> Result<Zeroizing<[u8; SECRET_LEN]>, getrandom::Error> {
    let mut secret = Zeroizing::new([0; SECRET_LEN]);
    getrandom::fill(secret.as_mut())?;
    Ok(secret)
}

pub(super) fn mac(key: &[u8; SECRET_LEN], parts: &[&[u8]]) -> [u8; SECRET_LEN] {
    let mut mac = Blake2sMac256::new(key.into());
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize_fixed().into()
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn debug_output_reveals_nothing_of_a_key() {
        let key = Key::new(&[0xab; SECRET_LEN]);
        assert_eq!(format!("{key:?}"), "Key { .. }");
        let ids = [1, 2].map(|byte| *Key::new(&[byte; SECRET_LEN]).id());
        assert_ne!(ids[0], ids[1]);
        assert_ne!(generate().unwrap(), generate().unwrap());
    }

    proptest! {
        #[test]
        fn a_session_belongs_to_one_key_and_one_topic(random: u32, other in 1u64..) {
            let [mine, yours] = [1, 2].map(|byte| Key::new(&[byte; SECRET_LEN]));
            let session = mine.session(random, "trades");
            prop_assert!(mine.owns(session, "trades"));
            prop_assert!(!mine.owns(session, "audit"));
            prop_assert!(!yours.owns(session, "trades"));
            prop_assert!(!mine.owns(session ^ other, "trades"));
        }
    }
}
