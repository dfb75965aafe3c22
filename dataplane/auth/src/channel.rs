//! The handshake, and the channel that results from it. No I/O; randomness comes from the system.

use penstock_wire::auth_handshake::{
    AuthHandshakeError, AuthInit, AuthResponse, NOISE_LEN, Preamble, SEAL_LEN,
};
use snow::{Builder, HandshakeState, TransportState};
use thiserror::Error;
use zerocopy::IntoBytes;

use super::key::Key;

/// The Noise protocol: pattern NN with the pre-shared key mixed in before anything else.
pub const SUITE: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";

/// A failed handshake or an invalid message.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum AuthError {
    /// The other end does not hold the key, or a message was changed.
    #[error("the other end does not hold this key, or what it said was changed on the way")]
    Wrong,
    /// The message is invalid, for example of another version.
    #[error(transparent)]
    Other(#[from] AuthHandshakeError),
    /// The host provides no random numbers.
    #[error("this host gives no random numbers")]
    Random,
}

impl From<snow::Error> for AuthError {
    fn from(error: snow::Error) -> Self {
        match error {
            snow::Error::Rng => Self::Random,
            _ => Self::Wrong,
        }
    }
}

/// A publisher that has started the handshake.
#[derive(Debug)]
pub struct Initiator(HandshakeState);

impl Initiator {
    /// Starts a handshake with a key; returns its first message.
    ///
    /// # Errors
    /// If the host provides no random numbers.
    pub fn start(key: &Key) -> Result<(Self, AuthInit), AuthError> {
        let preamble = Preamble::new(*key.id());
        let mut noise = builder(key, &preamble).build_initiator()?;
        let mut message = [0; NOISE_LEN];
        noise.write_message(&[], &mut message)?;
        Ok((Self(noise), AuthInit::new(preamble, message)))
    }

    /// Completes the handshake with the broker's answer.
    ///
    /// # Errors
    /// [`AuthError`] when the answer does not come from a holder of the key.
    pub fn finish(mut self, answer: &AuthResponse) -> Result<Channel, AuthError> {
        self.0.read_message(answer.parse()?, &mut [])?;
        Ok(Channel(self.0.into_transport_mode()?))
    }
}

/// The broker's side: one message in, one out. Costs only a few hashes if the other end does not hold the key.
///
/// An answer does not prove that the other end is a live holder of the key: a recorded [`AuthInit`] gets one as
/// well. A message that the [`Channel`] opens does prove it.
///
/// # Errors
/// [`AuthError`] when it does not come from a holder of the key.
pub fn respond(key: &Key, init: &AuthInit) -> Result<(Channel, AuthResponse), AuthError> {
    let (preamble, _, message) = init.parse()?;
    let mut noise = builder(key, preamble).build_responder()?;
    noise.read_message(message, &mut [])?;
    let mut answer = [0; NOISE_LEN];
    noise.write_message(&[], &mut answer)?;
    Ok((
        Channel(noise.into_transport_mode()?),
        AuthResponse::new(answer),
    ))
}

fn builder<'a>(key: &'a Key, preamble: &'a Preamble) -> Builder<'a> {
    Builder::new(SUITE.parse().expect("the suite is one that is built in"))
        .psk(0, key.handshake())
        .and_then(|builder| builder.prologue(preamble.as_bytes()))
        .expect("each is set once")
}

/// Seals and opens messages between both ends, with a separate key for each direction. Messages must be
/// opened in the order in which they were sealed.
#[derive(Debug)]
pub struct Channel(TransportState);

impl Channel {
    /// Seals a message of at most 64 KiB, [`SEAL_LEN`] included.
    ///
    /// # Panics
    /// If it is longer.
    #[must_use]
    pub fn seal(&mut self, message: &[u8]) -> Vec<u8> {
        let mut sealed = vec![0; message.len() + SEAL_LEN];
        let len = self.0.write_message(message, &mut sealed);
        assert_eq!(len.ok(), Some(sealed.len()), "messages are short and few");
        sealed
    }

    /// Opens a message of the other end.
    ///
    /// # Errors
    /// [`AuthError`] when it is not the next that the other end sealed.
    pub fn open(&mut self, sealed: &[u8]) -> Result<Vec<u8>, AuthError> {
        let len = sealed.len().checked_sub(SEAL_LEN).ok_or(AuthError::Wrong)?;
        let mut message = vec![0; len];
        self.0.read_message(sealed, &mut message)?;
        Ok(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use zerocopy::FromBytes;

    fn key(byte: u8) -> Key {
        Key::new(&[byte; 32])
    }

    fn pair() -> (Channel, Channel) {
        let (publisher, init) = Initiator::start(&key(1)).unwrap();
        let (broker, answer) = respond(&key(1), &init).unwrap();
        (publisher.finish(&answer).unwrap(), broker)
    }

    #[test]
    fn only_both_ends_of_a_handshake_open_its_messages() {
        let (mut publisher, mut broker) = pair();
        let sealed = publisher.seal(b"hello");
        assert_eq!(broker.open(&sealed).unwrap(), b"hello");
        let sealed = broker.seal(b"welcome");
        assert_eq!(publisher.open(&sealed).unwrap(), b"welcome");
        let (_, mut another) = pair();
        assert_eq!(another.open(&sealed), Err(AuthError::Wrong));
    }

    #[test]
    fn a_wrong_key_is_detected_by_either_end() {
        let (_, init) = Initiator::start(&key(2)).unwrap();
        assert_eq!(respond(&key(1), &init).unwrap_err(), AuthError::Wrong);
        // A broker that accepts any key cannot answer for it either.
        let (publisher, _) = Initiator::start(&key(2)).unwrap();
        let (_, init) = Initiator::start(&key(1)).unwrap();
        let (_, answer) = respond(&key(1), &init).unwrap();
        assert_eq!(publisher.finish(&answer).unwrap_err(), AuthError::Wrong);
    }

    #[test]
    fn a_recorded_publisher_gets_no_further_than_the_first_answer() {
        let (publisher, init) = Initiator::start(&key(1)).unwrap();
        let (mut broker, answer) = respond(&key(1), &init).unwrap();
        let question = publisher.finish(&answer).unwrap().seal(b"question");
        let (mut again, _) = respond(&key(1), &init).unwrap();
        assert_eq!(again.open(&question), Err(AuthError::Wrong));
        assert_eq!(broker.open(&question).unwrap(), b"question");
        assert_eq!(broker.open(&question), Err(AuthError::Wrong), "twice");
    }

    #[test]
    fn a_recorded_answer_completes_no_other_handshake() {
        let (first, init) = Initiator::start(&key(1)).unwrap();
        let (_, answer) = respond(&key(1), &init).unwrap();
        first.finish(&answer).unwrap();
        let (second, _) = Initiator::start(&key(1)).unwrap();
        assert_eq!(second.finish(&answer).unwrap_err(), AuthError::Wrong);
    }

    #[test]
    fn every_flipped_bit_is_detected() {
        let (_, init) = Initiator::start(&key(1)).unwrap();
        // The magic is checked earlier.
        for bit in 32..init.as_bytes().len() * 8 {
            let mut bytes = init.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let flipped = AuthInit::read_from_bytes(&bytes).unwrap();
            assert!(
                respond(&key(1), &flipped).is_err(),
                "bit {bit} of the init message"
            );
        }
        for bit in 32..size_of::<AuthResponse>() * 8 {
            let (publisher, init) = Initiator::start(&key(1)).unwrap();
            let (_, answer) = respond(&key(1), &init).unwrap();
            let mut bytes = answer.as_bytes().to_vec();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let flipped = AuthResponse::read_from_bytes(&bytes).unwrap();
            assert!(
                publisher.finish(&flipped).is_err(),
                "bit {bit} of the answer"
            );
        }
    }

    proptest! {
        #[test]
        fn sealed_messages_open_once_and_in_order(messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 1..8), bit: usize) {
            let (mut publisher, mut broker) = pair();
            let sealed: Vec<_> = messages.iter().map(|message| publisher.seal(message)).collect();
            if let Some(second) = sealed.get(1) {
                prop_assert_eq!(broker.open(second), Err(AuthError::Wrong));
            }
            for (sealed, message) in sealed.iter().zip(&messages) {
                let mut flipped = sealed.clone();
                let bit = bit % (flipped.len() * 8);
                flipped[bit / 8] ^= 1 << (bit % 8);
                prop_assert_eq!(broker.open(&flipped), Err(AuthError::Wrong));
                prop_assert_eq!(broker.open(&sealed[..sealed.len() - 1]), Err(AuthError::Wrong));
                prop_assert_eq!(&broker.open(sealed).unwrap(), message);
            }
        }

        #[test]
        fn arbitrary_bytes_authenticate_nothing(init: [u8; size_of::<AuthInit>()], sealed in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(respond(&key(1), &AuthInit::read_from_bytes(&init).unwrap()).is_err());
            prop_assert_eq!(pair().1.open(&sealed), Err(AuthError::Wrong));
        }
    }
}
