//! A shared secret, and what is derived from it for one purpose each.

use std::fmt;

use blake2::Blake2sMac256;
use blake2::digest::{FixedOutput, KeyInit, Update};
use penstock_wire::auth_handshake::KEY_ID_LEN;
use zeroize::Zeroizing;

/// Bytes of a secret.
pub(super) const SECRET_LEN: usize = 32;

/// Names a key on the wire without telling anything of it.
pub type KeyId = [u8; KEY_ID_LEN];

/// What a shared secret is good for. The secret itself is not kept.
#[derive(Clone)]
pub struct Key {
    id: KeyId,
    handshake: Zeroizing<[u8; SECRET_LEN]>,
    sessions: Zeroizing<[u8; SECRET_LEN]>,
}

impl Key {
    /// Derives what is needed from a secret, which must be random.
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

    /// The key's number, by which the broker finds it.
    #[must_use]
    pub fn id(&self) -> &KeyId {
        &self.id
    }

    /// The pre-shared key of the handshake.
    pub(super) fn handshake(&self) -> &[u8; SECRET_LEN] {
        &self.handshake
    }

    /// The session of this key on a topic that a random number stands for.
    ///
    /// Half of a session's number is a keyed hash of the other half: a broker that was restarted
    /// sees whose session it was, so that no other key takes it up, without keeping any account.
    #[must_use]
    pub fn session(&self, random: u32, topic: &str) -> u64 {
        let hash = mac(&self.sessions, &[&random.to_le_bytes(), topic.as_bytes()]);
        let [a, b, c, d, ..] = hash;
        (u64::from(random) << 32) | u64::from(u32::from_le_bytes([a, b, c, d]))
    }

    /// Whether a session is one of this key on the topic.
    #[must_use]
    pub fn owns(&self, session: u64, topic: &str) -> bool {
        self.session((session >> 32) as u32, topic) == session
    }
}

/// A new random secret.
///
/// # Errors
/// If the system gives no random numbers.
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
    fn nothing_of_a_key_is_shown() {
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
