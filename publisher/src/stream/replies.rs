//! Replies of a broker as they arrive over a connection, with their tags if they carry any.

use std::io::{self, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_wire::packet::TAG_LEN;
use penstock_wire::reply::{Parsed, REPLY_LEN, Reply};
use zerocopy::FromBytes;

use crate::Error;

/// How long the text of an error is waited for after the error.
const TEXT_WAIT: Duration = Duration::from_secs(1);

/// What a broker says over a connection.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum FromBroker {
    Ack {
        committed: u64,
        blocked: bool,
    },
    /// The end of the stream, and why. The text may be cut off.
    Error {
        committed: u64,
        code: u16,
        text: Vec<u8>,
        is_whole: bool,
    },
    /// The connection is closed.
    Closed,
}

/// The text of an error, as far as it has arrived.
struct ErrorText {
    committed: u64,
    code: u16,
    bytes: Vec<u8>,
    filled: usize,
    deadline: Instant,
}

/// The reply that is being received.
pub(crate) struct Replies {
    broker: String,
    bytes: [u8; REPLY_LEN + TAG_LEN],
    filled: usize,
    /// The reply is an error.
    error: Option<ErrorText>,
    /// Keys for the tags of replies, if there are any, and the number of replies so far.
    keys: Option<Arc<PacketKeys>>,
    verified: u64,
}

impl Replies {
    pub(crate) fn new(broker: &str, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            broker: broker.to_owned(),
            bytes: [0; REPLY_LEN + TAG_LEN],
            filled: 0,
            error: None,
            keys,
            verified: 0,
        }
    }

    /// Takes what has arrived over the connection, without waiting: the next reply, if it is complete.
    pub(crate) fn next(&mut self, socket: &TcpStream) -> Result<Option<FromBroker>, NoReply> {
        let mut socket = socket;
        loop {
            let got = match socket.read(self.room()) {
                Ok(0) => return Ok(Some(self.take_error().unwrap_or(FromBroker::Closed))),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return match self.take_error() {
                        Some(told) => Ok(Some(told)),
                        None => Err(NoReply::Io(error)),
                    };
                }
            };
            if let Some(reply) = self.on_bytes(got).map_err(NoReply::Invalid)? {
                return Ok(Some(reply));
            }
        }
    }

    /// The error of which a part has arrived, if its text is due.
    pub(crate) fn overdue(&mut self, now: Instant) -> Option<FromBroker> {
        let is_due = self
            .error
            .as_ref()
            .is_some_and(|error| error.deadline <= now);
        is_due.then(|| self.take_error()).flatten()
    }

    /// Until when the text of an error is waited for.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.error.as_ref().map(|error| error.deadline)
    }

    /// The error of which a part has arrived.
    pub(crate) fn take_error(&mut self) -> Option<FromBroker> {
        let mut error = self.error.take()?;
        let is_whole = error.filled == error.bytes.len();
        error.bytes.truncate(error.filled);
        Some(FromBroker::Error {
            committed: error.committed,
            code: error.code,
            text: error.bytes,
            is_whole,
        })
    }

    fn len(&self) -> usize {
        match self.keys {
            Some(_) => REPLY_LEN + TAG_LEN,
            None => REPLY_LEN,
        }
    }

    /// The buffer for the next bytes.
    fn room(&mut self) -> &mut [u8] {
        let len = self.len();
        match &mut self.error {
            Some(error) => &mut error.bytes[error.filled..],
            None => &mut self.bytes[self.filled..len],
        }
    }

    /// Processes bytes that were written there; returns the reply once it is complete. The tag of an
    /// ack is verified here; that of an error with [`Self::verify`].
    fn on_bytes(&mut self, got: usize) -> Result<Option<FromBroker>, Error> {
        if let Some(error) = &mut self.error {
            error.filled += got;
            return Ok(match error.filled == error.bytes.len() {
                true => self.take_error(),
                false => None,
            });
        }
        self.filled += got;
        if self.filled < self.len() {
            return Ok(None);
        }
        self.filled = 0;
        let reply = Reply::read_from_prefix(&self.bytes)
            .expect("the length matches")
            .0;
        let parsed = reply.parse().map_err(|source| Error::BadReply {
            broker: self.broker.clone(),
            source,
        })?;
        match parsed {
            Parsed::Ack { committed, blocked } => {
                self.verify(&[])?;
                Ok(Some(FromBroker::Ack { committed, blocked }))
            }
            Parsed::Error {
                committed,
                text_len,
                code,
            } => {
                self.error = Some(ErrorText {
                    committed,
                    code,
                    bytes: vec![0; text_len],
                    filled: 0,
                    deadline: Instant::now() + TEXT_WAIT,
                });
                Ok((text_len == 0).then(|| self.take_error()).flatten())
            }
        }
    }

    /// Verifies the tag of the last reply and the text after it.
    pub(crate) fn verify(&mut self, text: &[u8]) -> Result<(), Error> {
        let Some(keys) = &self.keys else {
            return Ok(());
        };
        let (reply, tag) = self.bytes.split_at(REPLY_LEN);
        let tag = tag.try_into().expect("the length matches");
        if !keys.verify_reply(self.verified, tag, &[reply, text]) {
            return Err(Error::Forged {
                broker: self.broker.clone(),
            });
        }
        self.verified += 1;
        Ok(())
    }
}

/// Why there is no reply.
#[derive(Debug)]
pub(crate) enum NoReply {
    /// The connection broke.
    Io(io::Error),
    /// What arrived is no reply of this stream's broker.
    Invalid(Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::reply::Fault;
    use zerocopy::IntoBytes;

    fn sealed(keys: &PacketKeys, number: u64, reply: &[u8]) -> Vec<u8> {
        let (head, text) = reply.split_at(REPLY_LEN);
        let tag = keys.seal_reply(number, &[head, text]);
        [head, &tag, text].concat()
    }

    /// Feeds bytes one by one; returns the reply that the last one completes.
    fn feed(replies: &mut Replies, bytes: &[u8]) -> Result<FromBroker, Error> {
        for (at, byte) in bytes.iter().enumerate() {
            replies.room()[0] = *byte;
            if let Some(reply) = replies.on_bytes(1)? {
                assert_eq!(at + 1, bytes.len());
                return Ok(reply);
            }
        }
        panic!("no whole reply")
    }

    #[test]
    fn replies_that_do_not_carry_their_tag_are_noticed() {
        let keys = Arc::new(PacketKeys::new(&[1; 32]));
        let mut replies = Replies::new("b", Some(Arc::clone(&keys)));
        let ack = Reply::ack(1, false);
        let first = sealed(&keys, 0, ack.as_bytes());
        assert!(feed(&mut replies, &first).is_ok());
        let repeated = feed(&mut replies, &first);
        assert!(matches!(repeated, Err(Error::Forged { .. })));
        let error = sealed(&keys, 1, &Reply::error(Fault::Shutdown, 1, "the end"));
        let FromBroker::Error { text, is_whole, .. } = feed(&mut replies, &error).unwrap() else {
            panic!("an error");
        };
        assert!(is_whole && replies.verify(b"the END").is_err());
        replies.verify(&text).unwrap();
        let mut plain = Replies::new("b", None);
        assert!(feed(&mut plain, ack.as_bytes()).is_ok());
    }

    #[test]
    fn the_text_of_an_error_is_waited_for_but_not_forever() {
        let error = Reply::error(Fault::Checksum, 3, "bits have flipped");
        let mut replies = Replies::new("b", None);
        let part = &error[..REPLY_LEN + 4];
        for byte in part {
            replies.room()[0] = *byte;
            assert!(replies.on_bytes(1).unwrap().is_none());
        }
        let deadline = replies.deadline().unwrap();
        let early = deadline - Duration::from_millis(1);
        assert_eq!(replies.overdue(early), None);
        let told = FromBroker::Error {
            committed: 3,
            code: Fault::Checksum as u16,
            text: b"bits".to_vec(),
            is_whole: false,
        };
        assert_eq!(replies.overdue(deadline), Some(told));
        assert_eq!(replies.deadline(), None);
    }
}
