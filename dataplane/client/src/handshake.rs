//! The handshake over a new connection to open a stream: in plain text, or sealed if there is a key.

use std::io;
use std::net::TcpStream;
use std::time::Instant;

use penstock_auth::{AuthError, Channel, Initiator, Key, PacketKeys};
use penstock_process::text::foreign_bytes;
use penstock_runtime::deadline;
use penstock_wire::MAGIC;
use penstock_wire::auth_handshake::{
    AUTH_MAGIC, AuthResponse, SEAL_LEN, SEALED_WELCOME_LEN, SealedHello, SealedWelcome,
};
use penstock_wire::handshake::{
    Answer, BadTopic, Hello, Offer, Purpose, WELCOME_LEN, Welcome, WelcomeError, check_topic,
};
use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

/// A connection that is being opened for a topic.
#[derive(Debug)]
pub struct ClientHandshake<'a> {
    /// The connection.
    pub socket: &'a TcpStream,
    /// Deadline for the whole handshake, no matter how slowly the broker sends.
    pub deadline: Instant,
    /// Name of the topic.
    pub topic: &'a str,
    /// Both ends prove that they hold this key, if there is one.
    pub key: Option<&'a Key>,
    /// Whether packets and frames are to be authenticated; needs a key.
    pub packet_auth: bool,
}

/// Why a connection was not opened. Text from the broker is escaped.
#[derive(Debug, Error)]
pub enum HandshakeError {
    /// The topic's name is not allowed.
    #[error(transparent)]
    Topic(#[from] BadTopic),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The broker refused; the text says what to do.
    #[error("refused: {text}")]
    Refused {
        /// A [`penstock_wire::handshake::Refusal`] as a number.
        code: u16,
        /// The broker's text.
        text: String,
    },
    /// The broker did not prove that it holds the key.
    #[error("the broker is not authenticated: {0}")]
    Unproven(#[from] AuthError),
    /// The broker accepted without the key.
    #[error(
        "the broker accepted without proving its key, so another host may be answering for it; nothing was sent"
    )]
    Stripped,
    /// Authenticated payload is required, but the broker sent no secret for it.
    #[error(
        "the broker does not authenticate payload (--packet-auth); nothing was sent; use programs of the same release"
    )]
    NotAuthenticated,
    /// The peer is not a Penstock broker.
    #[error(transparent)]
    NotABroker(#[from] WelcomeError),
}

impl ClientHandshake<'_> {
    /// Sends the request; returns what the broker offers, and the keys of packets and frames if they are
    /// authenticated.
    ///
    /// # Errors
    /// [`HandshakeError`] says why the connection is not open.
    pub fn ask(&self, purpose: &Purpose) -> Result<(Offer, Option<PacketKeys>), HandshakeError> {
        check_topic(self.topic.as_bytes())?;
        match self.key {
            None => self.ask_openly(purpose).map(|offer| (offer, None)),
            Some(key) => self.ask_sealed(key, purpose),
        }
    }

    fn ask_openly(&self, purpose: &Purpose) -> Result<Offer, HandshakeError> {
        let topic = self.topic.as_bytes();
        let hello = Hello::for_purpose(purpose, topic.len());
        self.write(&[hello.as_bytes(), topic].concat())?;
        let welcome = self.read_answer()?;
        let welcome = Welcome::read_from_bytes(&welcome).expect("a welcome is plain bytes");
        match welcome.parse()? {
            Answer::Accepted(offer) => Ok(offer),
            Answer::Refused { code, text_len } => {
                let text = self.read(text_len)?;
                Err(refused(code, &text))
            }
        }
    }

    fn ask_sealed(
        &self,
        key: &Key,
        purpose: &Purpose,
    ) -> Result<(Offer, Option<PacketKeys>), HandshakeError> {
        let mut channel = self.authenticate(key)?;
        let request = SealedHello::new(purpose, self.topic, self.packet_auth)?;
        self.write(&channel.seal(request.as_bytes()))?;
        let reply = self.open(&mut channel, SEALED_WELCOME_LEN)?;
        let reply = SealedWelcome::read_from_bytes(&reply).expect("it has this length");
        let welcome = Welcome::read_from_bytes(&reply.welcome).expect("plain bytes");
        match welcome.parse()? {
            Answer::Accepted(offer) => {
                let keys = reply.packets != [0; 32];
                if self.packet_auth && !keys {
                    return Err(HandshakeError::NotAuthenticated);
                }
                Ok((offer, keys.then(|| PacketKeys::new(&reply.packets))))
            }
            Answer::Refused { code, text_len } => {
                let text = self.open(&mut channel, text_len + SEAL_LEN)?;
                Err(refused(code, &text))
            }
        }
    }

    /// Proves to the broker that this end holds the key, and verifies that the broker holds it too.
    fn authenticate(&self, key: &Key) -> Result<Channel, HandshakeError> {
        let (initiator, init) = Initiator::start(key)?;
        self.write(init.as_bytes())?;
        let answer = self.read_answer()?;
        if answer[..MAGIC.len()] == AUTH_MAGIC {
            let answer = AuthResponse::read_from_bytes(&answer).expect("they are as long");
            return Ok(initiator.finish(&answer)?);
        }
        let welcome = Welcome::read_from_bytes(&answer).expect("a welcome is plain bytes");
        match welcome.parse()? {
            // No matter who says so, the key is what counts.
            Answer::Accepted(_) => Err(HandshakeError::Stripped),
            Answer::Refused { code, text_len } => {
                let text = self.read(text_len)?;
                Err(refused(code, &text))
            }
        }
    }

    /// Reads an answer: a Welcome, or an [`AuthResponse`], which is as long. Its first bytes tell a
    /// stranger, who may not say as much as a broker does.
    fn read_answer(&self) -> Result<[u8; WELCOME_LEN], HandshakeError> {
        let mut bytes = [0; WELCOME_LEN];
        let (first, rest) = bytes.split_at_mut(MAGIC.len());
        let read = |part: &mut [u8]| {
            let read = deadline::read_exact(self.socket, part, self.deadline);
            read.map_err(explain_silence)
        };
        read(first)?;
        if *first != AUTH_MAGIC {
            Welcome::check_magic(first)?;
        }
        read(rest)?;
        Ok(bytes)
    }

    fn open(&self, channel: &mut Channel, len: usize) -> Result<Vec<u8>, HandshakeError> {
        let sealed = self.read(len)?;
        Ok(channel.open(&sealed)?)
    }

    fn read(&self, len: usize) -> Result<Vec<u8>, HandshakeError> {
        let mut bytes = vec![0; len];
        let read = deadline::read_exact(self.socket, &mut bytes, self.deadline);
        read.map_err(explain_silence)?;
        Ok(bytes)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), HandshakeError> {
        let written = deadline::write_all(self.socket, bytes, self.deadline);
        Ok(written.map_err(explain_silence)?)
    }
}

fn refused(code: u16, text: &[u8]) -> HandshakeError {
    HandshakeError::Refused {
        code,
        text: foreign_bytes(text),
    }
}

fn explain_silence(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::TimedOut => io::Error::new(
            io::ErrorKind::TimedOut,
            "the connection opened, but no whole answer to the handshake arrived in time",
        ),
        io::ErrorKind::UnexpectedEof => io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "the peer closed the connection without an answer; it may not be a Penstock broker",
        ),
        _ => error,
    }
}
