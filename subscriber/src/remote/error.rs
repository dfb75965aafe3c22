//! Errors of a remote subscriber: what failed, at which broker, and what to do about it.

use std::time::Duration;

use penstock_client::HandshakeError;
use penstock_wire::handshake::{BadTopic, Refusal};
use thiserror::Error;

/// An error that ends a remote subscriber. Control characters in brokers' texts are escaped.
#[derive(Debug, Error)]
pub enum Error {
    /// A setting is invalid.
    #[error("{0}")]
    Config(String),
    /// The topic's name is not allowed.
    #[error(transparent)]
    Topic(#[from] BadTopic),
    /// The broker's release serves publishers only.
    #[error(
        "the broker at {broker} is an older release that serves no remote subscribers ({text}): upgrade it, or read its log on its host with --path"
    )]
    OlderRelease {
        /// The broker.
        broker: String,
        /// The broker's text.
        text: String,
    },
    /// The broker refused, and will refuse again; the text says what to do.
    #[error("broker {broker} refused the subscriber: {text}")]
    Refused {
        /// The broker.
        broker: String,
        /// A [`penstock_wire::handshake::Refusal`] as a number.
        code: u16,
        /// The broker's text.
        text: String,
    },
    /// The broker ended the connection, and will end the next one; the text says what to do.
    #[error("broker {broker} ended the connection: {text}")]
    Rejected {
        /// The broker.
        broker: String,
        /// The broker's text.
        text: String,
    },
    /// The peer is not a Penstock broker, or did not prove that it holds the key.
    #[error("broker {broker}: {source}")]
    Handshake {
        /// The broker.
        broker: String,
        /// What failed.
        source: HandshakeError,
    },
    /// The broker could not be read in time.
    #[error("broker {broker}: {reason}{}", tried(*waited))]
    Unreachable {
        /// The broker.
        broker: String,
        /// Why the last attempt failed.
        reason: String,
        /// How long it was tried.
        waited: Duration,
    },
    /// The log has fewer batches than the index to start at.
    #[error(
        "broker {broker}: its log has {batches} batches, so none with index {index}; use --from oldest or end"
    )]
    Beyond {
        /// The broker.
        broker: String,
        /// Where to start.
        index: u64,
        /// Batches that were ever in the log.
        batches: u64,
    },
    /// The broker repeatedly sends invalid deliveries.
    #[error("broker {broker}: {reason}; use a broker and a subscriber of the same release")]
    BadDelivery {
        /// The broker.
        broker: String,
        /// What is wrong.
        reason: String,
    },
    /// Deliveries were changed on the path.
    #[error("broker {broker}: a delivery has an invalid tag: it was changed on the path")]
    Forged {
        /// The broker.
        broker: String,
    },
    /// A thread could not be started, or panicked.
    #[error("cannot run a subscriber thread: {0}")]
    Thread(String),
    /// The subscriber failed earlier, and returned the error then.
    #[error("the subscriber failed earlier")]
    Failed,
}

impl Error {
    /// The error of a handshake, or its text if another attempt may succeed.
    pub(super) fn from_handshake(broker: &str, source: HandshakeError) -> Result<Self, String> {
        let broker = broker.to_owned();
        match source {
            HandshakeError::Io(error) => Err(error.to_string()),
            HandshakeError::Refused { code, text } if is_transient(code) => Err(text),
            HandshakeError::Refused { code, text } if is_older_release(code, &text) => {
                Ok(Self::OlderRelease { broker, text })
            }
            HandshakeError::Refused { code, text } => Ok(Self::Refused { broker, code, text }),
            HandshakeError::Topic(error) => Ok(Self::Topic(error)),
            source => Ok(Self::Handshake { broker, source }),
        }
    }
}

fn tried(waited: Duration) -> String {
    match waited.as_millis() {
        0 => String::new(),
        _ => format!("; tried for {:.1} s", waited.as_secs_f64()),
    }
}

/// Whether a broker that refuses for this reason may accept later. It may not have the topic yet.
fn is_transient(code: u16) -> bool {
    [Refusal::Topic, Refusal::Resources, Refusal::Busy]
        .iter()
        .any(|refusal| *refusal as u16 == code)
}

/// Whether the broker does not know the path of a subscriber's hello.
fn is_older_release(code: u16, text: &str) -> bool {
    code == Refusal::Unsupported as u16 && text.starts_with("path 2")
}
