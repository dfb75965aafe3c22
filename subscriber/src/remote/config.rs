//! Settings of a remote subscriber.

use std::time::Duration;

use penstock_auth::Key;
use penstock_runtime::address::check_broker;
use penstock_wire::handshake::check_topic;

use super::{Error, Position};
use crate::Start;

/// Where a remote subscriber starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RemoteStart {
    /// At the same place in each broker's log.
    Each(Start),
    /// Where an earlier subscriber stopped; at `otherwise` in the logs that it did not read.
    Position {
        /// What [`RemoteSubscriber::position`](super::RemoteSubscriber::position) returned.
        position: Position,
        /// The start in other brokers' logs.
        otherwise: Start,
    },
}

/// Settings of a [`RemoteSubscriber`](super::RemoteSubscriber).
#[derive(Debug)]
#[non_exhaustive]
pub struct RemoteConfig {
    /// Brokers, each as `host:port`.
    pub brokers: Vec<String>,
    /// Name of the topic.
    pub topic: String,
    /// Where to start.
    pub start: RemoteStart,
    /// A broker whose log blocks when it is full waits for this subscriber.
    pub register: bool,
    /// Key that both ends hold, if the brokers require one.
    pub key: Option<Key>,
    /// Require that deliveries are authenticated; needs a key.
    pub packet_auth: bool,
    /// Bytes that each broker may be ahead of the caller. Memory for one more batch may be needed.
    pub window: u64,
    /// Time for a connection, and for the whole handshake over it.
    pub connect_timeout: Duration,
    /// How long to try until a broker serves the topic for the first time.
    pub wait: Duration,
    /// How long to try to reconnect to a broker.
    pub reconnect_for: Duration,
    /// Time without any sign of life after which a connection is given up.
    pub keepalive: Duration,
    /// How long batches that are missing in a stream are waited for if a broker that may have them is not reachable.
    pub gap_timeout: Duration,
}

impl RemoteConfig {
    /// Smallest [`Self::window`], bytes.
    pub const MIN_WINDOW: u64 = 4 << 10;
    /// Largest [`Self::window`], bytes.
    pub const MAX_WINDOW: u64 = 4 << 30;
    /// Most brokers.
    pub const MAX_BROKERS: usize = 256;

    /// Default settings, from the oldest batch in each log.
    pub fn new(
        brokers: impl IntoIterator<Item = impl Into<String>>,
        topic: impl Into<String>,
    ) -> Self {
        Self {
            brokers: brokers.into_iter().map(Into::into).collect(),
            topic: topic.into(),
            start: RemoteStart::Each(Start::Oldest),
            register: false,
            key: None,
            packet_auth: false,
            window: 4 << 20,
            connect_timeout: Duration::from_secs(10),
            wait: Duration::from_secs(10),
            reconnect_for: Duration::MAX,
            keepalive: Duration::from_secs(5),
            gap_timeout: Duration::from_secs(10),
        }
    }

    /// Checks the settings.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Topic`] for the first that is wrong.
    pub fn check(&self) -> Result<(), Error> {
        check_topic(self.topic.as_bytes())?;
        let wrong = |text: String| Err(Error::Config(text));
        if self.brokers.is_empty() || self.brokers.len() > Self::MAX_BROKERS {
            let most = Self::MAX_BROKERS;
            return wrong(format!(
                "{} brokers; 1 to {most} are possible",
                self.brokers.len()
            ));
        }
        for (number, broker) in self.brokers.iter().enumerate() {
            if let Err(error) = check_broker(broker) {
                return wrong(format!("broker {error}"));
            }
            if self.brokers[..number].contains(broker) {
                return wrong(format!("broker {broker} is named twice"));
            }
        }
        if !(Self::MIN_WINDOW..=Self::MAX_WINDOW).contains(&self.window) {
            let (least, most) = (Self::MIN_WINDOW, Self::MAX_WINDOW);
            return wrong(format!(
                "window of {} bytes; {least} to {most} are possible",
                self.window
            ));
        }
        if self.packet_auth && self.key.is_none() {
            return wrong("packet_auth (--packet-auth) needs a key (--auth-key)".to_owned());
        }
        match self.start {
            RemoteStart::Each(Start::Index(index)) if self.brokers.len() > 1 => wrong(format!(
                "index {index} names another batch in each broker's log: start at a saved position (--from @FILE), or read one broker"
            )),
            _ => Ok(()),
        }
    }

    /// Whether the first batch of a stream that is seen sets its start.
    pub(super) fn begins_in_the_middle(&self) -> bool {
        !matches!(
            self.start,
            RemoteStart::Each(Start::Oldest) | RemoteStart::Position { .. }
        )
    }
}
