//! ACK packets: which of the datagrams that arrive are the broker's, and news.

use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::packet::{Feedback, StreamKey};

/// Reads the ACKs of one stream.
pub(super) struct AckReader {
    key: StreamKey,
    /// If packets are authenticated; and the counter of the newest ACK.
    keys: Option<Arc<PacketKeys>>,
    newest: u64,
    feedback: Feedback,
}

impl AckReader {
    pub(super) fn new(key: StreamKey, keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            key,
            keys,
            newest: 0,
            feedback: Feedback::new(key),
        }
    }

    /// What a datagram says, if it is an ACK of this stream. Anyone can send datagrams to the socket's port.
    pub(super) fn read(&mut self, datagram: &[u8]) -> Option<&Feedback> {
        let ack = match &self.keys {
            None => datagram,
            Some(keys) => {
                let (counter, ack) = keys.open_ack(datagram)?;
                // ACKs are cumulative: an old one, perhaps a replay, has nothing new.
                if counter <= self.newest {
                    return None;
                }
                self.newest = counter;
                ack
            }
        };
        self.feedback.read(ack).ok()?;
        (self.feedback.stream == self.key).then_some(&self.feedback)
    }

    /// Largest packet number that the last ACK acknowledges.
    pub(super) fn largest(&self) -> Option<u64> {
        self.feedback.received.first().map(|&(_, largest)| largest)
    }
}
