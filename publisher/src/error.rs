//! Errors of a publisher: what failed, at which broker, and what to do about it.

use std::io;
use std::time::Duration;

use penstock_auth::AuthError;
use penstock_client::HandshakeError;
use penstock_transport::AckFault;
use penstock_wire::handshake::{BadTopic, Refusal, WelcomeError};
use penstock_wire::reply::InvalidReply;
use thiserror::Error;

use crate::net::af_xdp::TransmitError;

/// An ack that cannot be: it goes back, or beyond what was sent.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
#[error("acknowledges {committed} batches, but {acked} were acknowledged and {sent} sent")]
pub struct AckError {
    pub(crate) committed: u64,
    pub(crate) acked: u64,
    pub(crate) sent: u64,
}

/// An error of a publisher. Messages that were acknowledged before it are in the brokers' logs.
#[derive(Debug, Error)]
pub enum Error {
    /// A setting is invalid.
    #[error("{0}")]
    Config(String),
    /// The topic's name is not allowed.
    #[error(transparent)]
    Topic(#[from] BadTopic),
    /// The address is invalid or does not resolve.
    #[error("broker {broker}: {reason}")]
    Address {
        /// The broker.
        broker: String,
        /// Why.
        reason: String,
    },
    /// The connection failed.
    #[error(
        "broker {broker}: cannot connect: {source}; check that penstock-broker is running there, and the port"
    )]
    Connect {
        /// The broker.
        broker: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The broker refused the stream; the text says what to do.
    #[error("broker {broker} refused the stream: {text}")]
    Refused {
        /// The broker.
        broker: String,
        /// A [`penstock_wire::handshake::Refusal`] as a number.
        code: u16,
        /// The broker's text.
        text: String,
    },
    /// The peer did not prove that it holds the key.
    #[error("broker {broker} is not authenticated: {source}")]
    Unproven {
        /// The broker.
        broker: String,
        /// What failed.
        source: AuthError,
    },
    /// The stream was accepted without the key.
    #[error(
        "broker {broker} accepted the stream without proving its key, so another host may be answering for it; nothing was sent"
    )]
    Stripped {
        /// The broker.
        broker: String,
    },
    /// The publisher requires authenticated payload, but the broker sent no secret for it.
    #[error(
        "broker {broker} does not authenticate payload (--packet-auth); nothing was sent; use a publisher and a broker of the same release"
    )]
    NotAuthenticated {
        /// The broker.
        broker: String,
    },
    /// A reply has an invalid tag.
    #[error("broker {broker}: a reply has an invalid tag: it was changed on the path")]
    Forged {
        /// The broker.
        broker: String,
    },
    /// Datagrams do not reach the broker.
    #[error("broker {broker}: the xdp path fails: {reason}; --mode auto would fall back to tcp")]
    PathDead {
        /// The broker.
        broker: String,
        /// What was seen.
        reason: String,
    },
    /// AF_XDP transmit is not available.
    #[error("broker {broker}: cannot transmit with AF_XDP: {reason}")]
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
        /// The inconsistency.
        source: AckFault,
    },
    /// The peer is not a Penstock broker.
    #[error("broker {broker}: {source}")]
    NotABroker {
        /// The broker.
        broker: String,
        /// What it said.
        source: WelcomeError,
    },
    /// The broker's replies are invalid.
    #[error("broker {broker}: {source}; use a publisher and a broker of the same release")]
    BadReply {
        /// The broker.
        broker: String,
        /// The invalid reply.
        source: InvalidReply,
    },
    /// The broker acknowledged batches that were never sent.
    #[error("broker {broker}: {source}")]
    BadAck {
        /// The broker.
        broker: String,
        /// The inconsistency.
        source: AckError,
    },
    /// The broker claims batches that were never sent to any broker, or lacks ones that were acknowledged.
    #[error(
        "broker {broker} has {committed} batches of the stream, but {lowest} to {highest} are possible; it has another stream of the same session, or does not keep the protocol"
    )]
    BadResume {
        /// The broker.
        broker: String,
        /// What it claims.
        committed: u64,
        /// Batches that were acknowledged.
        lowest: u64,
        /// Batches that were sent.
        highest: u64,
    },
    /// The message does not fit into a batch that every broker accepts.
    #[error(
        "message of {len} bytes: a batch holds at most {max}; split the message, or raise the brokers' --segment-size"
    )]
    MessageTooLarge {
        /// Bytes of the message.
        len: usize,
        /// Bytes of the largest message that fits.
        max: usize,
    },
    /// The broker shows no sign of life.
    #[error(
        "broker {broker}: no sign of life for {timeout:.0?} with {unacked} messages unacknowledged; check that the broker is running, and the network"
    )]
    Silent {
        /// The broker.
        broker: String,
        /// How long the publisher waited.
        timeout: Duration,
        /// Messages of the stream that were sent and not acknowledged.
        unacked: u64,
    },
    /// The broker is alive, and waits for room in the topic's log.
    #[error(
        "broker {broker}: no progress for {timeout:.0?} with {unacked} messages unacknowledged: the broker waits for room, because a registered reader blocks the topic's log; the broker's log names the reader: resume or end it, or start the broker with --reader-timeout-action evict"
    )]
    Blocked {
        /// The broker.
        broker: String,
        /// Time without progress.
        timeout: Duration,
        /// Messages of the stream that were sent and not acknowledged.
        unacked: u64,
    },
    /// The broker answers, but neither accepts nor acknowledges anything.
    #[error(
        "broker {broker}: no progress for {timeout:.0?} with {unacked} messages unacknowledged: the broker answers, but accepts nothing; see the broker's log"
    )]
    NoProgress {
        /// The broker.
        broker: String,
        /// Time without progress.
        timeout: Duration,
        /// Messages of the stream that were sent and not acknowledged.
        unacked: u64,
    },
    /// The connection broke: of a stream without acks, or repeatedly without an ack in between.
    #[error(
        "broker {broker}: connection lost with {unacked} messages unacknowledged: {source}; they may or may not be in its log"
    )]
    Lost {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// The system's error.
        source: io::Error,
    },
    /// The connection broke, and no other connection could continue the stream in time.
    #[error(
        "broker {broker}: connection lost with {unacked} messages unacknowledged ({reason}), and the stream could not continue over another: {source}; they may or may not be in its log"
    )]
    NotResumed {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// How the connection ended.
        reason: String,
        /// Why no other connection could be used.
        source: Box<Error>,
    },
    /// The stream's broker was lost, and no other broker accepted the stream in time.
    #[error(
        "no broker accepts the stream, with {unacked} messages unacknowledged ({reason}): {failures}; they may or may not be in a log"
    )]
    NoBroker {
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// How the last connection ended.
        reason: String,
        /// What each broker answered.
        failures: String,
    },
    /// No broker could be reached, or none accepted the streams of one that could not.
    #[error("no broker can be reached that accepts the streams: {failures}")]
    NoneReachable {
        /// What happened with each broker.
        failures: String,
    },
    /// The broker was lost, and the settings say to fail then.
    #[error(
        "broker {broker} is lost with {unacked} messages unacknowledged: {reason}; they may or may not be in its log; to continue after a loss, use --on-broker-loss wait or reroute"
    )]
    BrokerLost {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// What happened.
        reason: String,
    },
    /// The broker ended the stream with an error.
    #[error("broker {broker} ended the stream with {unacked} messages unacknowledged: {text}")]
    Ended {
        /// The broker.
        broker: String,
        /// Messages of the stream that were sent and not acked.
        unacked: u64,
        /// The broker's text.
        text: String,
    },
    /// A thread could not be started, or panicked.
    #[error("cannot run a publisher thread: {0}")]
    Thread(String),
    /// The publisher failed earlier, and returned the error then.
    #[error("the publisher failed earlier")]
    Failed,
}

impl Error {
    /// The handshake with a broker failed.
    pub(crate) fn handshake(broker: &str, error: HandshakeError) -> Self {
        let broker = broker.to_owned();
        match error {
            HandshakeError::Topic(error) => Self::Topic(error),
            HandshakeError::Io(source) => Self::Connect { broker, source },
            HandshakeError::Refused { code, text } => Self::Refused { broker, code, text },
            HandshakeError::Unproven(source) => Self::Unproven { broker, source },
            HandshakeError::Stripped => Self::Stripped { broker },
            HandshakeError::NotAuthenticated => Self::NotAuthenticated { broker },
            HandshakeError::NotABroker(source) => Self::NotABroker { broker, source },
        }
    }

    /// The path does not work, or no longer.
    pub(crate) fn path_dead(broker: &str, reason: impl Into<String>) -> Self {
        Self::PathDead {
            broker: broker.to_owned(),
            reason: reason.into(),
        }
    }

    /// Whether the error may be that of a broker, or a host, which is just starting: nothing listens at
    /// the address yet, or it is unreachable.
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

    /// Whether the broker cannot be reached.
    pub(crate) fn is_unreachable(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::Address { .. })
    }

    /// Whether an earlier connection of the stream has not ended yet.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == Refusal::Busy as u16)
    }

    /// Whether the broker made no progress for the whole timeout.
    pub(crate) fn is_standstill(&self) -> bool {
        matches!(
            self,
            Self::Silent { .. } | Self::Blocked { .. } | Self::NoProgress { .. }
        )
    }

    /// Whether the broker has no room until other streams end.
    pub(crate) fn is_shortage(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if *code == Refusal::Resources as u16)
    }

    /// Whether the same attempt may succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Refused { code, .. } => *code == Refusal::Busy as u16 || self.is_shortage(),
            Self::Connect { .. } | Self::PathDead { .. } | Self::Lost { .. } => true,
            Self::Transmit { reason, .. } => reason.is_transient(),
            _ => false,
        }
    }
}
