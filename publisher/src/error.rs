//! What can go wrong, at which broker, and what to do about it.

use std::io;
use std::time::Duration;

use penstock_dataplane::auth::Unproven;
use penstock_dataplane::transport::AckFault;
use penstock_dataplane::wire::handshake::{BadTopic, Refusal, WelcomeError};
use penstock_dataplane::wire::reply::InvalidReply;
use thiserror::Error;

use crate::af_xdp::TransmitError;
use crate::window::AckError;

/// A failure of a publisher. Messages that were acked before it are in the brokers' logs.
#[derive(Debug, Error)]
pub enum Error {
    /// A setting is impossible.
    #[error("{0}")]
    Config(String),
    /// The topic's name is not allowed.
    #[error(transparent)]
    Topic(#[from] BadTopic),
    /// The address is none, or does not resolve.
    #[error("broker {broker}: {reason}")]
    Address {
        /// The broker.
        broker: String,
        /// What is wrong.
        reason: String,
    },
    /// No connection came about.
    #[error(
        "broker {broker}: cannot connect: {source}; is penstock-broker running there, and the port right?"
    )]
    Connect {
        /// The broker.
        broker: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The broker said no; the text says what to do.
    #[error("broker {broker} refuses the stream: {text}")]
    Refused {
        /// The broker.
        broker: String,
        /// A [`penstock_dataplane::wire::handshake::Refusal`] as a number.
        code: u16,
        /// The broker's words.
        text: String,
    },
    /// The broker, or whoever answers for it, does not prove that it holds the key.
    #[error("broker {broker} does not prove itself: {source}")]
    Unproven {
        /// The broker.
        broker: String,
        /// What failed.
        source: Unproven,
    },
    /// The stream was accepted, but not with the key.
    #[error(
        "broker {broker} accepts the stream without the key: somebody in between answers for it; nothing was sent"
    )]
    Stripped {
        /// The broker.
        broker: String,
    },
    /// Payload was to be authenticated, and the broker gave no secret for it.
    #[error(
        "broker {broker} does not authenticate payload (--packet-auth); nothing was sent; use a publisher and a broker of the same release"
    )]
    NotAuthenticated {
        /// The broker.
        broker: String,
    },
    /// A reply does not carry its tag.
    #[error("broker {broker}: a reply does not carry the broker's tag: it was changed on the way")]
    Forged {
        /// The broker.
        broker: String,
    },
    /// The broker is not to be reached with datagrams.
    #[error("broker {broker}: the xdp path fails: {reason}; --mode auto goes over tcp then")]
    PathDead {
        /// The broker.
        broker: String,
        /// What was seen.
        reason: String,
    },
    /// Packets cannot be sent with AF_XDP.
    #[error("broker {broker}: no AF_XDP transmit: {reason}")]
    Transmit {
        /// The broker.
        broker: String,
        /// Why.
        reason: TransmitError,
    },
    /// The broker acknowledged packets that were never sent.
    #[error("broker {broker}: {source}")]
    BadFeedback {
        /// The broker.
        broker: String,
        /// What it said.
        source: AckFault,
    },
    /// Something else listens there.
    #[error("broker {broker}: {source}")]
    NotABroker {
        /// The broker.
        broker: String,
        /// What it said.
        source: WelcomeError,
    },
    /// The broker's replies make no sense.
    #[error("broker {broker}: {source}; use a publisher and a broker of the same release")]
    BadReply {
        /// The broker.
        broker: String,
        /// What it said.
        source: InvalidReply,
    },
    /// The broker acknowledged what was never sent.
    #[error("broker {broker}: {source}")]
    BadAck {
        /// The broker.
        broker: String,
        /// What it said.
        source: AckError,
    },
    /// The message fits in no batch that every broker accepts.
    #[error(
        "message of {len} bytes: a batch holds at most {max}; split the message, or raise --segment-size of the brokers"
    )]
    MessageTooLarge {
        /// Bytes of the message.
        len: usize,
        /// Bytes of the largest message that fits.
        max: usize,
    },
    /// The broker shows no sign of life.
    #[error(
        "broker {broker}: no sign of life for {timeout:.0?} with {unacked} messages unacknowledged; is it stopped, or the network down?"
    )]
    Silent {
        /// The broker.
        broker: String,
        /// How long it was waited for.
        timeout: Duration,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
    },
    /// The broker lives, and waits for room in the topic's log.
    #[error(
        "broker {broker}: no progress for {timeout:.0?} with {unacked} messages unacknowledged: the broker waits for room, because a registered reader holds up the topic's log; the broker's log names the reader: resume or end it, or start the broker with --reader-timeout-action evict"
    )]
    Blocked {
        /// The broker.
        broker: String,
        /// How long nothing went on.
        timeout: Duration,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
    },
    /// The broker answers, and neither takes nor acks anything.
    #[error(
        "broker {broker}: no progress for {timeout:.0?} with {unacked} messages unacknowledged: the broker answers, but takes nothing; its log may say why"
    )]
    NoProgress {
        /// The broker.
        broker: String,
        /// How long nothing went on.
        timeout: Duration,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
    },
    /// The connection broke, of a stream without acks or again and again without an ack between.
    #[error(
        "broker {broker}: connection lost with {unacked} messages unacknowledged: {source}; they may or may not be in its log"
    )]
    Lost {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The connection broke, and no other could take the stream up in time.
    #[error(
        "broker {broker}: connection lost with {unacked} messages unacknowledged ({reason}), and the stream could not go on over another: {source}; they may or may not be in its log"
    )]
    NotResumed {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// How the connection ended.
        reason: String,
        /// Why there is no other.
        source: Box<Error>,
    },
    /// The broker gave up on the stream.
    #[error("broker {broker} ended the stream with {unacked} messages unacknowledged: {text}")]
    Ended {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// The broker's words.
        text: String,
    },
    /// A thread could not be started or did not end well.
    #[error("cannot run a publisher thread: {0}")]
    Thread(String),
    /// The publisher failed before; the error was returned then.
    #[error("the publisher has failed before")]
    Failed,
}

impl Error {
    /// Whether the address answered that nobody listens there, or cannot be reached yet: what a
    /// broker, or a host, says that is just starting.
    pub(crate) fn nobody_listens(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkDown, NetworkUnreachable};
        let Self::Connect { source, .. } = self else {
            return false;
        };
        matches!(
            source.kind(),
            ConnectionRefused | HostUnreachable | NetworkDown | NetworkUnreachable
        )
    }

    /// Whether the same attempt may succeed a little later.
    pub(crate) fn may_pass(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == Refusal::Busy as u16,
            Self::Connect { .. } | Self::PathDead { .. } | Self::Lost { .. } => true,
            Self::Transmit { reason, .. } => reason.may_pass(),
            _ => false,
        }
    }
}
