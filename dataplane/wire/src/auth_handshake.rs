//! Opening a session with a key: what lies around the [`Hello`] and the Welcome, which travel sealed.
//! Layouts only; the crate penstock-auth fills and checks them.

use thiserror::Error;
use zerocopy::little_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::VERSION;
use super::handshake::{
    BadTopic, Hello, HelloError, MAX_TOPIC_LEN, Purpose, WELCOME_LEN, check_topic,
};

/// First four bytes of a [`AuthInit`], and of the [`AuthResponse`].
pub const AUTH_MAGIC: [u8; 4] = *b"PNSN";
/// Bytes of a [`AuthInit`].
pub const AUTH_INIT_LEN: usize = size_of::<AuthInit>();
/// Bytes of a [`AuthResponse`]: as many as those of a Welcome, so that either can be read.
pub const AUTH_RESPONSE_LEN: usize = size_of::<AuthResponse>();
/// Bytes of a key's number.
pub const KEY_ID_LEN: usize = 16;
/// Bytes that sealing adds: the tag of ChaCha20-Poly1305.
pub const SEAL_LEN: usize = 16;
/// Bytes of a handshake message of Noise NN: an X25519 key and a tag.
pub const NOISE_LEN: usize = 32 + SEAL_LEN;
/// Bytes of a sealed [`SealedHello`].
pub const SEALED_HELLO_LEN: usize = size_of::<SealedHello>() + SEAL_LEN;
/// Bytes of a sealed [`SealedWelcome`].
pub const SEALED_WELCOME_LEN: usize = size_of::<SealedWelcome>() + SEAL_LEN;

const _: () = assert!(AUTH_RESPONSE_LEN == WELCOME_LEN);

/// What comes before the Noise message; both ends take it into the handshake as its prologue, so
/// that a change on the path is detected.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Preamble {
    magic: [u8; 4],
    version: U16,
    reserved: [u8; 2],
    key: [u8; KEY_ID_LEN],
}

/// First bytes of a connection whose publisher has a key.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AuthInit {
    preamble: Preamble,
    noise: [u8; NOISE_LEN],
}

/// The broker's answer to a [`AuthInit`] with a key that it takes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AuthResponse {
    magic: [u8; 4],
    version: U16,
    reserved: [u8; 2],
    noise: [u8; NOISE_LEN],
}

/// The hello with its topic, in one length whatever the topic; sealed on the wire.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SealedHello {
    hello: Hello,
    packet_auth: u8,
    reserved: [u8; 7],
    topic: [u8; MAX_TOPIC_LEN],
}

/// The Welcome; sealed on the wire. The text of a refusal follows, sealed by itself.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SealedWelcome {
    /// A Welcome.
    pub welcome: [u8; WELCOME_LEN],
    /// Secret of the stream's packets; zeros if they are not authenticated.
    pub packets: [u8; 32],
}

/// What came is not as this version has it.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum AuthHandshakeError {
    /// The peer speaks another version.
    #[error(
        "protocol version {theirs}; this end speaks {VERSION}: use a publisher and a broker of the same release"
    )]
    Version {
        /// The peer's version.
        theirs: u16,
    },
    /// Bytes that have no meaning yet are in use.
    #[error("bytes that must be zero are not: use a publisher and a broker of the same release")]
    Reserved,
    /// The hello inside cannot be served.
    #[error(transparent)]
    Hello(#[from] HelloError),
    /// Nor can the topic.
    #[error(transparent)]
    Topic(#[from] BadTopic),
}

impl Preamble {
    /// The preamble of a publisher that holds the key of this number.
    #[must_use]
    pub fn new(key: [u8; KEY_ID_LEN]) -> Self {
        Self {
            magic: AUTH_MAGIC,
            version: VERSION.into(),
            reserved: [0; 2],
            key,
        }
    }
}

impl AuthInit {
    /// The first message of a connection, with that of the handshake.
    #[must_use]
    pub fn new(preamble: Preamble, noise: [u8; NOISE_LEN]) -> Self {
        Self { preamble, noise }
    }

    /// Whether these first bytes of a connection can still become one.
    #[must_use]
    pub fn may_start_with(bytes: &[u8]) -> bool {
        bytes.iter().zip(AUTH_MAGIC).all(|(a, b)| *a == b)
    }

    /// The preamble, the number of the key, and the message of the handshake.
    ///
    /// # Errors
    /// [`AuthHandshakeError`] when it is of another version.
    pub fn parse(
        &self,
    ) -> Result<(&Preamble, &[u8; KEY_ID_LEN], &[u8; NOISE_LEN]), AuthHandshakeError> {
        let preamble = &self.preamble;
        check(preamble.version, preamble.reserved)?;
        Ok((preamble, &preamble.key, &self.noise))
    }
}

impl AuthResponse {
    /// An answer with the second message of the handshake.
    #[must_use]
    pub fn new(noise: [u8; NOISE_LEN]) -> Self {
        Self {
            magic: AUTH_MAGIC,
            version: VERSION.into(),
            reserved: [0; 2],
            noise,
        }
    }

    /// The message of the handshake.
    ///
    /// # Errors
    /// [`AuthHandshakeError`] when it is of another version.
    pub fn parse(&self) -> Result<&[u8; NOISE_LEN], AuthHandshakeError> {
        check(self.version, self.reserved)?;
        Ok(&self.noise)
    }
}

fn check(version: U16, reserved: [u8; 2]) -> Result<(), AuthHandshakeError> {
    if version.get() != VERSION {
        return Err(AuthHandshakeError::Version {
            theirs: version.get(),
        });
    }
    if reserved != [0; 2] {
        return Err(AuthHandshakeError::Reserved);
    }
    Ok(())
}

impl SealedHello {
    /// Opens a connection for `purpose` on a topic whose name [`check_topic`] allows.
    ///
    /// # Errors
    /// [`BadTopic`] for another name.
    pub fn new(purpose: &Purpose, topic: &str, packet_auth: bool) -> Result<Self, BadTopic> {
        check_topic(topic.as_bytes())?;
        let mut name = [0; MAX_TOPIC_LEN];
        name[..topic.len()].copy_from_slice(topic.as_bytes());
        Ok(Self {
            hello: Hello::for_purpose(purpose, topic.len()),
            packet_auth: packet_auth.into(),
            reserved: [0; 7],
            topic: name,
        })
    }

    /// What the connection is for, on which topic, and whether packets and frames are to be authenticated.
    ///
    /// # Errors
    /// [`AuthHandshakeError`] says what cannot be served.
    pub fn parse(&self) -> Result<(Purpose, &str, bool), AuthHandshakeError> {
        let (topic_len, purpose) = self.hello.parse()?;
        let (topic, padding) = self.topic.split_at(topic_len);
        if self.packet_auth > 1 || self.reserved != [0; 7] || padding.iter().any(|byte| *byte != 0)
        {
            return Err(AuthHandshakeError::Reserved);
        }
        Ok((purpose, check_topic(topic)?, self.packet_auth == 1))
    }
}

impl SealedWelcome {
    /// Answers with a Welcome.
    #[must_use]
    pub fn new(welcome: [u8; WELCOME_LEN]) -> Self {
        Self {
            welcome,
            packets: [0; 32],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handshake::tests::request;
    use proptest::prelude::*;

    fn publish() -> Purpose {
        Purpose::Publish(request())
    }

    #[test]
    fn sealed_hellos_have_one_length_and_round_trip() {
        for topic in ["t", &"x".repeat(MAX_TOPIC_LEN)] {
            for purpose in [publish(), Purpose::Subscribe] {
                let question = SealedHello::new(&purpose, topic, true).unwrap();
                assert_eq!(question.as_bytes().len() + SEAL_LEN, SEALED_HELLO_LEN);
                assert_eq!(question.parse(), Ok((purpose, topic, true)));
            }
        }
        assert!(SealedHello::new(&publish(), "../etc", false).is_err());
        assert_eq!((SEALED_HELLO_LEN, SEALED_WELCOME_LEN), (200, 104));
        assert_eq!((AUTH_INIT_LEN, AUTH_RESPONSE_LEN), (72, 56));
    }

    #[test]
    fn other_versions_and_nonzero_reserved_bytes_are_refused() {
        let init = AuthInit::new(Preamble::new([1; KEY_ID_LEN]), [2; NOISE_LEN]);
        let (_, key, noise) = init.parse().unwrap();
        assert_eq!((key, noise), (&[1; KEY_ID_LEN], &[2; NOISE_LEN]));
        let with = |offset: usize| {
            let mut bytes: [u8; AUTH_INIT_LEN] = init.as_bytes().try_into().unwrap();
            bytes[offset] = 9;
            AuthInit::read_from_bytes(&bytes).unwrap()
        };
        let version = AuthHandshakeError::Version { theirs: 9 };
        assert_eq!(with(4).parse().unwrap_err(), version);
        assert_eq!(with(6).parse().unwrap_err(), AuthHandshakeError::Reserved);
        let question = SealedHello::new(&publish(), "ab", false).unwrap();
        for offset in [50, 58] {
            let mut bytes: [u8; 184] = question.as_bytes().try_into().unwrap();
            bytes[offset] ^= 1;
            let parsed = SealedHello::read_from_bytes(&bytes).unwrap();
            assert!(parsed.parse().is_err(), "byte {offset}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(init: [u8; AUTH_INIT_LEN], answer: [u8; AUTH_RESPONSE_LEN], question in prop::collection::vec(any::<u8>(), 184), good_hello: bool) {
            let _ = AuthInit::read_from_bytes(&init).unwrap().parse();
            let _ = AuthResponse::read_from_bytes(&answer).unwrap().parse();
            let mut question = question;
            if good_hello {
                question[..56].copy_from_slice(&SealedHello::new(&publish(), "t", false).unwrap().as_bytes()[..56]);
            }
            let _ = SealedHello::read_from_bytes(&question).unwrap().parse();
        }
    }
}
