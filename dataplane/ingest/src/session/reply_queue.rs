//! Replies to one publisher. At most one frame is partly sent; the acks behind it become one, because acks are
//! cumulative.

use std::io::{self, Write};
use std::sync::Arc;

use penstock_auth::PacketKeys;
use penstock_wire::reply::{Fault, REPLY_LEN, Reply};
use zerocopy::IntoBytes;

/// Replies of one connection. Bounded: one partly sent frame, and one ack or error behind it.
#[derive(Debug, Default)]
pub(crate) struct ReplyQueue {
    /// The frame that is being sent, from `at` on.
    frame: Vec<u8>,
    at: usize,
    ack: Option<(u64, bool)>,
    error: Option<Vec<u8>>,
    /// Keys for the tags of replies, if there are any, and the number of replies so far.
    keys: Option<Arc<PacketKeys>>,
    sealed: u64,
}

impl ReplyQueue {
    /// Replies that carry tags if there are keys.
    pub(crate) fn new(keys: Option<Arc<PacketKeys>>) -> Self {
        Self {
            keys,
            ..Self::default()
        }
    }

    /// Queues an ack; it replaces a queued one.
    pub(crate) fn ack(&mut self, committed: u64, blocked: bool) {
        self.ack = Some((committed, blocked));
    }

    /// Queues the last frame; its number of committed batches replaces a queued ack.
    pub(crate) fn error(&mut self, fault: Fault, committed: u64, text: &str) {
        self.ack = None;
        self.error = Some(Reply::error(fault, committed, text));
    }

    /// Sends as much as possible without waiting; returns `true` when nothing is left.
    pub(crate) fn flush(&mut self, mut socket: impl Write) -> io::Result<bool> {
        loop {
            while self.at < self.frame.len() {
                match socket.write(&self.frame[self.at..]) {
                    Ok(sent) => self.at += sent,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            if !self.take_next() {
                return Ok(true);
            }
        }
    }

    fn take_next(&mut self) -> bool {
        self.frame.clear();
        self.at = 0;
        if let Some((committed, blocked)) = self.ack.take() {
            self.frame
                .extend_from_slice(Reply::ack(committed, blocked).as_bytes());
        } else if let Some(error) = self.error.take() {
            self.frame = error;
        }
        if self.frame.is_empty() {
            return false;
        }
        if let Some(keys) = &self.keys {
            // The tag goes between the reply and its text, as on packets.
            let tag = keys.seal_reply(self.sealed, &[&self.frame]);
            self.sealed += 1;
            self.frame.splice(REPLY_LEN..REPLY_LEN, tag);
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::packet::TAG_LEN;
    use penstock_wire::reply::Parsed;
    use zerocopy::FromBytes;

    /// A socket with room for `room` bytes.
    struct LimitedSocket {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for &mut LimitedSocket {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let sent = bytes.len().min(self.room);
            self.room -= sent;
            self.taken.extend_from_slice(&bytes[..sent]);
            if sent == 0 {
                Err(io::ErrorKind::WouldBlock.into())
            } else {
                Ok(sent)
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn replies_have_numbered_tags_if_there_are_keys() {
        let keys = Arc::new(PacketKeys::new(&[1; 32]));
        let mut replies = ReplyQueue::new(Some(Arc::clone(&keys)));
        let mut peer = LimitedSocket {
            taken: Vec::new(),
            room: 1000,
        };
        replies.ack(1, false);
        assert!(replies.flush(&mut peer).unwrap());
        replies.error(Fault::Shutdown, 3, "bye");
        assert!(replies.flush(&mut peer).unwrap());
        let (first, second) = peer.taken.split_at(REPLY_LEN + TAG_LEN);
        assert_eq!(second.len(), REPLY_LEN + TAG_LEN + 3);
        for (number, reply) in [(0, first), (1, second)] {
            let (head, rest) = reply.split_at(REPLY_LEN);
            let (tag, text) = rest.split_first_chunk::<TAG_LEN>().unwrap();
            assert!(keys.verify_reply(number, tag, &[head, text]), "{number}");
        }
    }

    #[test]
    fn acks_behind_a_partly_sent_one_become_one() {
        let mut replies = ReplyQueue::default();
        let mut peer = LimitedSocket {
            taken: Vec::new(),
            room: 5,
        };
        replies.ack(1, false);
        assert!(!replies.flush(&mut peer).unwrap());
        replies.ack(2, true);
        replies.ack(3, false);
        replies.error(Fault::Shutdown, 3, "bye");
        peer.room = 1000;
        assert!(replies.flush(&mut peer).unwrap());
        let (first, rest) = peer.taken.split_at(REPLY_LEN);
        let parse = |bytes: &[u8]| Reply::read_from_prefix(bytes).unwrap().0.parse().unwrap();
        assert_eq!(
            parse(first),
            Parsed::Ack {
                committed: 1,
                blocked: false
            }
        );
        assert_eq!(
            parse(rest),
            Parsed::Error {
                code: 4,
                committed: 3,
                text_len: 3
            }
        );
        assert_eq!(rest.len(), REPLY_LEN + 3);
    }
}
