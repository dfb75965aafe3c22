//! The handshake over a new connection to open a stream: in plain text, or sealed if there is a key.

use std::io;
use std::net::TcpStream;
use std::time::Instant;

use penstock_auth::{Channel, Initiator, Key, PacketKeys};
use penstock_process::text::foreign_bytes;
use penstock_runtime::deadline;
use penstock_wire::MAGIC;
use penstock_wire::auth_handshake::{
    AUTH_MAGIC, AuthResponse, SEAL_LEN, SEALED_WELCOME_LEN, SealedHello, SealedWelcome,
};
use penstock_wire::handshake::{Answer, Hello, Offer, Purpose, Request, WELCOME_LEN, Welcome};
use zerocopy::{FromBytes, IntoBytes};

use crate::{Config, Error};

/// A connection over which a stream is being opened.
pub(crate) struct ClientHandshake<'a> {
    pub(crate) broker: &'a str,
    pub(crate) socket: &'a TcpStream,
    /// Deadline for the whole handshake, no matter how slowly the broker sends.
    pub(crate) deadline: Instant,
}

impl ClientHandshake<'_> {
    /// Requests a stream; returns what the broker offers, and the keys of its packets if they are
    /// authenticated.
    pub(crate) fn ask(
        &self,
        config: &Config,
        request: &Request,
    ) -> Result<(Offer, Option<PacketKeys>), Error> {
        match &config.key {
            None => self.ask_openly(config, request).map(|offer| (offer, None)),
            Some(key) => self.ask_sealed(key, config, request),
        }
    }

    fn ask_openly(&self, config: &Config, request: &Request) -> Result<Offer, Error> {
        let topic = config.topic.as_bytes();
        let hello = Hello::new(request, topic.len());
        self.write(&[hello.as_bytes(), topic].concat())?;
        let welcome = self.read_answer()?;
        let welcome = Welcome::read_from_bytes(&welcome).expect("a welcome is plain bytes");
        match welcome.parse().map_err(|e| self.stranger(e))? {
            Answer::Accepted(offer) => Ok(offer),
            Answer::Refused { code, text_len } => {
                let text = self.read(text_len)?;
                Err(self.refused(code, &text))
            }
        }
    }

    fn ask_sealed(
        &self,
        key: &Key,
        config: &Config,
        request: &Request,
    ) -> Result<(Offer, Option<PacketKeys>), Error> {
        let mut channel = self.authenticate(key)?;
        let question = SealedHello::new(
            &Purpose::Publish(request.clone()),
            &config.topic,
            config.packet_auth,
        )?;
        self.write(&channel.seal(question.as_bytes()))?;
        let reply = self.open(&mut channel, SEALED_WELCOME_LEN)?;
        let reply = SealedWelcome::read_from_bytes(&reply).expect("it has this length");
        let welcome = Welcome::read_from_bytes(&reply.welcome).expect("plain bytes");
        match welcome.parse().map_err(|e| self.stranger(e))? {
            Answer::Accepted(offer) => {
                let keys = reply.packets != [0; 32];
                if config.packet_auth && !keys {
                    return Err(Error::NotAuthenticated {
                        broker: self.broker.to_owned(),
                    });
                }
                Ok((offer, keys.then(|| PacketKeys::new(&reply.packets))))
            }
            Answer::Refused { code, text_len } => {
                let text = self.open(&mut channel, text_len + SEAL_LEN)?;
                Err(self.refused(code, &text))
            }
        }
    }

    /// Proves to the broker that this end holds the key, and verifies that the broker holds it too.
    fn authenticate(&self, key: &Key) -> Result<Channel, Error> {
        let unproven = |source| Error::Unproven {
            broker: self.broker.to_owned(),
            source,
        };
        let (publisher, init) = Initiator::start(key).map_err(unproven)?;
        self.write(init.as_bytes())?;
        let answer = self.read_answer()?;
        if answer[..MAGIC.len()] == AUTH_MAGIC {
            let answer = AuthResponse::read_from_bytes(&answer).expect("they are as long");
            return publisher.finish(&answer).map_err(unproven);
        }
        let welcome = Welcome::read_from_bytes(&answer).expect("a welcome is plain bytes");
        match welcome.parse().map_err(|e| self.stranger(e))? {
            // Whoever says so, the key is what counts.
            Answer::Accepted(_) => Err(Error::Stripped {
                broker: self.broker.to_owned(),
            }),
            Answer::Refused { code, text_len } => {
                let text = self.read(text_len)?;
                Err(self.refused(code, &text))
            }
        }
    }

    /// Reads an answer: a Welcome, or an [`AuthResponse`], which is as long. Its first bytes tell a
    /// stranger, who may not say as much as a broker does.
    fn read_answer(&self) -> Result<[u8; WELCOME_LEN], Error> {
        let mut bytes = [0; WELCOME_LEN];
        let (first, rest) = bytes.split_at_mut(MAGIC.len());
        let read = |part: &mut [u8]| {
            let read = deadline::read_exact(self.socket, part, self.deadline);
            read.map_err(|e| self.failed(explain_silence(e)))
        };
        read(first)?;
        if *first != AUTH_MAGIC {
            Welcome::check_magic(first).map_err(|e| self.stranger(e))?;
        }
        read(rest)?;
        Ok(bytes)
    }

    fn open(&self, channel: &mut Channel, len: usize) -> Result<Vec<u8>, Error> {
        let sealed = self.read(len)?;
        channel.open(&sealed).map_err(|source| Error::Unproven {
            broker: self.broker.to_owned(),
            source,
        })
    }

    fn read(&self, len: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        let read = deadline::read_exact(self.socket, &mut bytes, self.deadline);
        read.map_err(|e| self.failed(explain_silence(e)))?;
        Ok(bytes)
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Error> {
        let written = deadline::write_all(self.socket, bytes, self.deadline);
        written.map_err(|e| self.failed(explain_silence(e)))
    }

    fn failed(&self, source: io::Error) -> Error {
        Error::Connect {
            broker: self.broker.to_owned(),
            source,
        }
    }

    fn stranger(&self, source: penstock_wire::handshake::WelcomeError) -> Error {
        Error::NotABroker {
            broker: self.broker.to_owned(),
            source,
        }
    }

    fn refused(&self, code: u16, text: &[u8]) -> Error {
        Error::Refused {
            broker: self.broker.to_owned(),
            code,
            text: foreign_bytes(text),
        }
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
