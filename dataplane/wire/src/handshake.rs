//! Opening a session: the publisher's [`Hello`] and the broker's [`Welcome`].
//!
//! ```
//! use penstock_wire::handshake::{AckLevel, Answer, Hello, Offer, OrderLevel, Path, Purpose, Request, Welcome};
//!
//! let request = Request {
//!     session: 0,
//!     stream: 0,
//!     streams: 1,
//!     ack: AckLevel::Committed,
//!     order: OrderLevel::PerStream,
//!     max_payload: 60 << 10,
//!     path: Path::Tcp,
//!     resume_from: None,
//!     max_datagram: 0,
//! };
//! let hello = Hello::new(&request, "trades".len());
//! assert_eq!(hello.parse()?, (6, Purpose::Publish(request)));
//!
//! let offer = Offer { session: 0xc0ffee, max_payload: 1 << 20, committed: 0, datagrams: None };
//! assert_eq!(Welcome::accept(offer).parse().unwrap(), Answer::Accepted(offer));
//! # Ok::<(), penstock_wire::handshake::HelloError>(())
//! ```

use thiserror::Error;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

pub use super::levels::{AckLevel, OrderLevel, UnsupportedLevel};
use super::text::{MAX_TEXT_LEN, clip};
use super::{MAGIC, VERSION};

/// Bytes of a [`Hello`], before the topic's name.
pub const HELLO_LEN: usize = size_of::<Hello>();
/// Bytes of a [`Welcome`], before the text of a refusal.
pub const WELCOME_LEN: usize = size_of::<Welcome>();
/// Longest topic name, bytes.
pub const MAX_TOPIC_LEN: usize = 128;
/// Most streams that a session may have.
pub const MAX_STREAMS: u32 = 1024;
/// Limit of the number of batches in a stream, which no stream can reach in practice.
const MAX_BATCHES: u64 = 1 << 62;

/// The path field of a subscriber's hello.
const SUBSCRIBE: u8 = 2;

/// First bytes of a connection, from publisher or subscriber to broker; the topic's name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Hello {
    magic: [u8; 4],
    version: U16,
    topic_len: U16,
    session: U64,
    stream: U32,
    streams: U32,
    ack_level: u8,
    order_level: u8,
    path: u8,
    reserved: u8,
    max_payload: U32,
    resume_from: U64,
    max_datagram: U32,
    reserved_too: [u8; 4],
}

/// What a connection is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// To open a stream.
    Publish(Request),
    /// To read the topic; see [`crate::delivery`].
    Subscribe,
}

impl Purpose {
    /// The stream that is requested, if any.
    #[must_use]
    pub fn into_request(self) -> Option<Request> {
        match self {
            Self::Publish(request) => Some(request),
            Self::Subscribe => None,
        }
    }
}

/// What a publisher asks for when it opens a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The session that this stream belongs to; 0 opens a new one.
    pub session: u64,
    /// Number of this stream in its session, from 0.
    pub stream: u32,
    /// Streams that the session will have, 1 to [`MAX_STREAMS`].
    pub streams: u32,
    /// When the broker acknowledges.
    pub ack: AckLevel,
    /// What order is kept.
    pub order: OrderLevel,
    /// Largest batch payload that the publisher means to send, bytes.
    pub max_payload: u32,
    /// Path that payload is to take.
    pub path: Path,
    /// The stream continues after an earlier connection, over which this many batches were
    /// acknowledged; none begins it.
    pub resume_from: Option<u64>,
    /// Largest UDP payload that the publisher's interface takes, bytes; 0 over tcp.
    pub max_datagram: u32,
}

/// Path that payload takes from publisher to broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// 0: over the connection itself.
    Tcp,
    /// 1: as datagrams to the same port, which the broker receives with AF_XDP sockets.
    Xdp,
}

impl Path {
    /// The name on command lines and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
        }
    }
}

impl TryFrom<u8> for Path {
    type Error = UnsupportedLevel;

    fn try_from(path: u8) -> Result<Self, UnsupportedLevel> {
        match path {
            0 => Ok(Self::Tcp),
            1 => Ok(Self::Xdp),
            _ => Err(UnsupportedLevel::new(
                "path",
                path,
                "0 (tcp), 1 (xdp), 2 (subscribe)",
            )),
        }
    }
}

/// Why a broker did not open the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Refusal {
    /// The broker speaks another version of the protocol.
    Version = 1,
    /// The ack or order level, or the stream count, is not served.
    Unsupported = 2,
    /// The topic's name is not allowed, or the broker serves no more topics.
    Topic = 3,
    /// No such session, or its stream is already connected.
    Session = 4,
    /// The broker is at its limit of connections, or cannot make the buffer.
    Resources = 5,
    /// A batch as large as asked for does not fit.
    BatchSize = 6,
    /// The path is not offered.
    Path = 7,
    /// The stream's earlier connection has not ended yet; ask again soon.
    Busy = 8,
    /// The broker takes publishers with a key only, or not with this one, or it has no keys.
    Authentication = 9,
    /// The key may not publish to the topic.
    Permission = 10,
}

/// A hello that cannot be served; the text is for the publisher's user.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum HelloError {
    /// The peer does not speak this protocol at all.
    #[error("not a Penstock publisher (first bytes {0:02x?})")]
    Magic([u8; 4]),
    /// The peer speaks another version.
    #[error(
        "protocol version {theirs}; this broker speaks {VERSION}: use a publisher of the same release"
    )]
    Version {
        /// The publisher's version.
        theirs: u16,
    },
    /// The topic's name has a forbidden length.
    #[error("topic name of {0} bytes; allowed are 1 to {MAX_TOPIC_LEN}")]
    TopicLen(usize),
    /// The stream number and count do not fit together.
    #[error(
        "stream {stream} of {streams}; a session has 1 to {MAX_STREAMS} streams, numbered from 0"
    )]
    Streams {
        /// Asked stream.
        stream: u32,
        /// Asked count.
        streams: u32,
    },
    /// More batches acked than any stream has.
    #[error("invalid field: the stream has {0} batches already, more than possible; connect anew")]
    Resume(u64),
    /// An ack or order level that this build does not have.
    #[error(transparent)]
    Level(#[from] UnsupportedLevel),
}

impl HelloError {
    /// The code that tells the publisher; none for a peer that would not understand it.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Magic(_) => None,
            Self::Version { .. } => Some(Refusal::Version),
            Self::TopicLen(_) => Some(Refusal::Topic),
            Self::Resume(_) => Some(Refusal::Session),
            Self::Streams { .. } | Self::Level(_) => Some(Refusal::Unsupported),
        }
    }
}

impl Hello {
    /// The hello for `request` on a topic whose name has `topic_len` bytes.
    ///
    /// # Panics
    /// If `topic_len` exceeds [`MAX_TOPIC_LEN`]; [`check_topic`] tells beforehand.
    #[must_use]
    pub fn new(request: &Request, topic_len: usize) -> Self {
        assert!(
            topic_len <= MAX_TOPIC_LEN,
            "topic names are checked before a hello is made"
        );
        Self {
            magic: MAGIC,
            version: VERSION.into(),
            topic_len: (topic_len as u16).into(),
            session: request.session.into(),
            stream: request.stream.into(),
            streams: request.streams.into(),
            ack_level: request.ack.number(),
            order_level: request.order.number(),
            path: request.path as u8,
            reserved: 0,
            max_payload: request.max_payload.into(),
            resume_from: request.resume_from.map_or(0, |acked| acked + 1).into(),
            max_datagram: request.max_datagram.into(),
            reserved_too: [0; 4],
        }
    }

    /// The hello of a subscriber to a topic whose name has `topic_len` bytes.
    ///
    /// Brokers that serve publishers only refuse it with [`Refusal::Unsupported`].
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn for_subscriber(topic_len: usize) -> Self {
        let request = Request {
            session: 0,
            stream: 0,
            streams: 1,
            ack: AckLevel::None,
            order: OrderLevel::PerStream,
            max_payload: 0,
            path: Path::Tcp,
            resume_from: None,
            max_datagram: 0,
        };
        Self {
            path: SUBSCRIBE,
            ..Self::new(&request, topic_len)
        }
    }

    /// The hello of a connection for `purpose`.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn for_purpose(purpose: &Purpose, topic_len: usize) -> Self {
        match purpose {
            Purpose::Publish(request) => Self::new(request, topic_len),
            Purpose::Subscribe => Self::for_subscriber(topic_len),
        }
    }

    /// Whether these first bytes of a connection can still become a hello.
    #[must_use]
    pub fn may_start_with(bytes: &[u8]) -> bool {
        bytes.iter().zip(MAGIC).all(|(byte, magic)| *byte == magic)
    }

    /// Length of the topic's name, and what the connection is for.
    ///
    /// # Errors
    /// [`HelloError`] says what cannot be served.
    pub fn parse(&self) -> Result<(usize, Purpose), HelloError> {
        if self.magic != MAGIC {
            return Err(HelloError::Magic(self.magic));
        }
        if self.version.get() != VERSION {
            return Err(HelloError::Version {
                theirs: self.version.get(),
            });
        }
        let topic_len = usize::from(self.topic_len.get());
        if topic_len == 0 || topic_len > MAX_TOPIC_LEN {
            return Err(HelloError::TopicLen(topic_len));
        }
        let purpose = match self.path {
            SUBSCRIBE => Purpose::Subscribe,
            _ => Purpose::Publish(self.parse_request()?),
        };
        Ok((topic_len, purpose))
    }

    fn parse_request(&self) -> Result<Request, HelloError> {
        let (stream, streams) = (self.stream.get(), self.streams.get());
        if streams == 0 || streams > MAX_STREAMS || stream >= streams {
            return Err(HelloError::Streams { stream, streams });
        }
        let resume_from = self.resume_from.get().checked_sub(1);
        if let Some(acked) = resume_from.filter(|acked| *acked >= MAX_BATCHES) {
            return Err(HelloError::Resume(acked));
        }
        Ok(Request {
            session: self.session.get(),
            stream,
            streams,
            ack: self.ack_level.try_into()?,
            order: self.order_level.try_into()?,
            max_payload: self.max_payload.get(),
            path: self.path.try_into()?,
            resume_from,
            max_datagram: self.max_datagram.get(),
        })
    }
}

/// Why a topic's name is refused.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
#[error(
    "topic name {0:?} is not allowed: use 1 to {MAX_TOPIC_LEN} of A-Z a-z 0-9 . _ - and do not start with a dot"
)]
pub struct BadTopic(String);

/// Checks a topic's name; it becomes a file name, so only plain characters are allowed.
///
/// # Errors
/// [`BadTopic`] names the rule.
pub fn check_topic(name: &[u8]) -> Result<&str, BadTopic> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"._-".contains(byte);
    let allowed = !name.is_empty()
        && name.len() <= MAX_TOPIC_LEN
        && name[0] != b'.'
        && name.iter().all(plain);
    std::str::from_utf8(name)
        .ok()
        .filter(|_| allowed)
        .ok_or_else(|| BadTopic(String::from_utf8_lossy(name).into_owned()))
}

/// The broker's answer to a [`Hello`]; the text of a refusal follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Welcome {
    magic: [u8; 4],
    version: U16,
    refusal: U16,
    session: U64,
    max_payload: U32,
    text_len: U32,
    committed: U64,
    key: U64,
    credit: U64,
    max_datagram: U32,
    reserved: [u8; 4],
}

/// What a broker offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offer {
    /// Key of the session: later streams of it name this.
    pub session: u64,
    /// Largest batch payload that the broker accepts, bytes.
    pub max_payload: u32,
    /// Batches of the stream that are committed: the next to be sent.
    pub committed: u64,
    /// What datagrams are to carry, over xdp.
    pub datagrams: Option<DatagramOffer>,
}

/// What a stream over xdp needs to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatagramOffer {
    /// Names the stream in its packets; never 0.
    pub key: u64,
    /// Bytes of batches that may be sent before the first ACK packet.
    pub credit: u64,
    /// Largest UDP payload that both interfaces take, bytes.
    pub max_datagram: u32,
}

/// A broker's answer, once parsed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The stream is open.
    Accepted(Offer),
    /// The stream is not open; `text_len` bytes that say why follow.
    Refused {
        /// A [`Refusal`] as a number: a newer broker may know more of them.
        code: u16,
        /// Bytes of text that follow.
        text_len: usize,
    },
}

/// The peer's answer is not one of this protocol.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum WelcomeError {
    /// Other first bytes than [`MAGIC`].
    #[error("the peer is not a Penstock broker (first bytes {0:02x?}): check the address and port")]
    Magic([u8; 4]),
    /// A text longer than [`MAX_TEXT_LEN`].
    #[error("the broker's answer claims a text of {0} bytes")]
    TextLen(u32),
}

impl Welcome {
    /// Accepts a stream.
    #[must_use]
    pub fn accept(offer: Offer) -> Self {
        Self {
            magic: MAGIC,
            version: VERSION.into(),
            refusal: U16::ZERO,
            session: offer.session.into(),
            max_payload: offer.max_payload.into(),
            text_len: U32::ZERO,
            committed: offer.committed.into(),
            key: offer.datagrams.map_or(0, |d| d.key).into(),
            credit: offer.datagrams.map_or(0, |d| d.credit).into(),
            max_datagram: offer.datagrams.map_or(0, |d| d.max_datagram).into(),
            reserved: [0; 4],
        }
    }

    /// Refuses a stream; `text` says what to do. Returns all bytes of the answer.
    #[must_use]
    pub fn refuse(refusal: Refusal, text: &str) -> Vec<u8> {
        let text = clip(text, MAX_TEXT_LEN);
        let welcome = Self {
            magic: MAGIC,
            version: VERSION.into(),
            refusal: (refusal as u16).into(),
            session: U64::ZERO,
            max_payload: U32::ZERO,
            text_len: (text.len() as u32).into(),
            committed: U64::ZERO,
            key: U64::ZERO,
            credit: U64::ZERO,
            max_datagram: U32::ZERO,
            reserved: [0; 4],
        };
        [welcome.as_bytes(), text.as_bytes()].concat()
    }

    /// Whether an answer that begins with these four bytes may be a broker's.
    ///
    /// # Errors
    /// [`WelcomeError::Magic`] when it is not.
    pub fn check_magic(first: &[u8]) -> Result<(), WelcomeError> {
        match <[u8; 4]>::try_from(first) {
            Ok(MAGIC) => Ok(()),
            other => Err(WelcomeError::Magic(other.unwrap_or_default())),
        }
    }

    /// What the broker answered.
    ///
    /// # Errors
    /// [`WelcomeError`] when the peer is no broker.
    pub fn parse(&self) -> Result<Answer, WelcomeError> {
        Self::check_magic(&self.magic)?;
        let text_len = self.text_len.get();
        if text_len as usize > MAX_TEXT_LEN {
            return Err(WelcomeError::TextLen(text_len));
        }
        Ok(match self.refusal.get() {
            0 => Answer::Accepted(Offer {
                session: self.session.get(),
                max_payload: self.max_payload.get(),
                committed: self.committed.get(),
                datagrams: (self.key.get() != 0).then(|| DatagramOffer {
                    key: self.key.get(),
                    credit: self.credit.get(),
                    max_datagram: self.max_datagram.get(),
                }),
            }),
            code => Answer::Refused {
                code,
                text_len: text_len as usize,
            },
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// For the only stream of a new session, over tcp.
    pub(crate) fn request() -> Request {
        Request {
            session: 0,
            stream: 0,
            streams: 1,
            ack: AckLevel::Committed,
            order: OrderLevel::PerStream,
            max_payload: 4096,
            path: Path::Tcp,
            resume_from: None,
            max_datagram: 0,
        }
    }

    /// One that differs from it wherever it can.
    fn resumed() -> Request {
        Request {
            session: 9,
            stream: 1,
            streams: 2,
            max_payload: 1 << 20,
            path: Path::Xdp,
            resume_from: Some(0),
            max_datagram: 8972,
            ..request()
        }
    }

    #[test]
    fn hello_round_trips() {
        let hello = Hello::new(&resumed(), 5);
        assert_eq!((HELLO_LEN, WELCOME_LEN), (48, 56));
        assert!(Hello::may_start_with(&hello.as_bytes()[..3]));
        assert_eq!(hello.parse(), Ok((5, Purpose::Publish(resumed()))));
        let hello = Hello::for_subscriber(7);
        assert_eq!(hello.parse(), Ok((7, Purpose::Subscribe)));
    }

    #[test]
    fn each_wrong_field_is_named() {
        let with = |offset: usize, byte: u8| {
            let mut bytes: [u8; HELLO_LEN] =
                Hello::new(&resumed(), 5).as_bytes().try_into().unwrap();
            bytes[offset] = byte;
            Hello::read_from_bytes(&bytes).unwrap().parse().unwrap_err()
        };
        assert!(matches!(with(0, b'G'), HelloError::Magic(_)));
        assert_eq!(with(4, 9), HelloError::Version { theirs: 9 });
        assert_eq!(with(6, 0), HelloError::TopicLen(0));
        assert_eq!(
            with(16, 2),
            HelloError::Streams {
                stream: 2,
                streams: 2
            }
        );
        assert_eq!(with(24, 2).refusal(), Some(Refusal::Unsupported));
        assert!(
            with(24, 2).to_string().contains("supported: 0 (none), 1"),
            "{}",
            with(24, 2)
        );
        assert!(
            with(25, 1)
                .to_string()
                .contains("supported: 0 (per stream)")
        );
        assert!(with(26, 3).to_string().contains("supported: 0 (tcp), 1"));
        assert_eq!(with(39, 0x40), HelloError::Resume(1 << 62));
    }

    #[test]
    fn welcome_round_trips() {
        let offer = Offer {
            session: 77,
            max_payload: 4096,
            committed: 3,
            datagrams: None,
        };
        assert_eq!(Welcome::accept(offer).parse(), Ok(Answer::Accepted(offer)));
        let offer = Offer {
            datagrams: Some(DatagramOffer {
                key: 5,
                credit: 1 << 33,
                max_datagram: 1472,
            }),
            ..offer
        };
        assert_eq!(Welcome::accept(offer).parse(), Ok(Answer::Accepted(offer)));
        let bytes = Welcome::refuse(Refusal::Topic, "no more topics");
        let (welcome, text) = Welcome::read_from_prefix(&bytes).unwrap();
        assert_eq!(
            welcome.parse(),
            Ok(Answer::Refused {
                code: 3,
                text_len: 14
            })
        );
        assert_eq!(text, b"no more topics");
    }

    #[test]
    fn topics_cannot_leave_their_directory() {
        for bad in [
            &b""[..],
            b".",
            b"..",
            b"a/b",
            b".hidden",
            b"a\0",
            b"\xff",
            &[b'a'; 129],
        ] {
            assert!(check_topic(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_topic(b"trades-2.eu_1"), Ok("trades-2.eu_1"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(hello: [u8; HELLO_LEN], welcome: [u8; WELCOME_LEN]) {
            let _ = Hello::read_from_bytes(&hello).unwrap().parse();
            let _ = Welcome::read_from_bytes(&welcome).unwrap().parse();
        }
    }
}
