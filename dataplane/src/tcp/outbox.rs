//! Replies on their way to one publisher: at most one frame is half sent, and acks that pile up
//! behind it become one, because they are cumulative.

use std::io::{self, Write};

use zerocopy::IntoBytes;

use crate::wire::reply::{Fault, Reply};

/// Replies of one connection. Bounded: one frame in flight, one ack or error behind it.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// The frame that is being sent, from `at` on.
    frame: Vec<u8>,
    at: usize,
    ack: Option<(u64, bool)>,
    error: Option<Vec<u8>>,
}

impl Outbox {
    /// Queues an ack, in place of one that waits.
    pub(crate) fn ack(&mut self, committed: u64, blocked: bool) {
        self.ack = Some((committed, blocked));
    }

    /// Queues the last frame; acks before it are implied by its own figure.
    pub(crate) fn error(&mut self, fault: Fault, committed: u64, text: &str) {
        self.ack = None;
        self.error = Some(Reply::error(fault, committed, text));
    }

    /// Sends what can be sent without waiting; `true` when nothing is left.
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
        !self.frame.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::reply::{Parsed, REPLY_LEN};
    use zerocopy::FromBytes;

    /// Takes at most `room` bytes, then would block.
    struct Narrow {
        taken: Vec<u8>,
        room: usize,
    }

    impl Write for &mut Narrow {
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
    fn acks_behind_a_half_sent_one_become_one() {
        let mut outbox = Outbox::default();
        let mut peer = Narrow {
            taken: Vec::new(),
            room: 5,
        };
        outbox.ack(1, false);
        assert!(!outbox.flush(&mut peer).unwrap());
        outbox.ack(2, true);
        outbox.ack(3, false);
        outbox.error(Fault::Shutdown, 3, "bye");
        peer.room = 1000;
        assert!(outbox.flush(&mut peer).unwrap());
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
