//! The account of one stream: what was sent, what is acked. No socket, no clock.

use std::collections::VecDeque;

use thiserror::Error;

/// An ack that cannot be: it goes back, or beyond what was sent.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
#[error("acknowledges {committed} batches, but {acked} were acknowledged and {sent} sent")]
pub struct AckError {
    committed: u64,
    acked: u64,
    sent: u64,
}

/// Batches on their way, each with what its sender wants back (`T`, its buffer).
#[derive(Debug)]
pub(crate) struct Window<T> {
    limit: usize,
    sent: u64,
    acked: u64,
    unacked_messages: u64,
    batches: VecDeque<(u32, T)>,
    /// Batches are not kept until their ack.
    forgotten: bool,
}

impl<T> Window<T> {
    /// At most `limit` batches on their way.
    pub(crate) fn new(limit: usize) -> Self {
        let batches = VecDeque::with_capacity(limit);
        Self {
            limit,
            sent: 0,
            acked: 0,
            unacked_messages: 0,
            batches,
            forgotten: false,
        }
    }

    /// Sequence number of the next batch; so many have been sent.
    pub(crate) fn next_seq(&self) -> u64 {
        self.sent
    }

    pub(crate) fn acked(&self) -> u64 {
        self.acked
    }

    pub(crate) fn unacked_messages(&self) -> u64 {
        self.unacked_messages
    }

    pub(crate) fn is_full(&self) -> bool {
        self.batches.len() >= self.limit
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.batches.is_empty()
    }

    /// Takes note of a batch that is about to be sent.
    pub(crate) fn push(&mut self, messages: u32, held: T) {
        self.sent += 1;
        self.unacked_messages += u64::from(messages);
        self.batches.push_back((messages, held));
    }

    /// What the newest batch holds.
    pub(crate) fn newest(&self) -> Option<&T> {
        self.batches.back().map(|(_, held)| held)
    }

    /// Gives back what all batches hold; from now on only an ack of everything counts.
    pub(crate) fn forget(&mut self, mut release: impl FnMut(T)) {
        self.forgotten = true;
        self.batches.drain(..).for_each(|(_, held)| release(held));
    }

    /// Takes a cumulative ack; gives back what the acked batches held, and returns their messages.
    pub(crate) fn ack(
        &mut self,
        committed: u64,
        mut release: impl FnMut(T),
    ) -> Result<u64, AckError> {
        if committed < self.acked || committed > self.sent {
            return Err(AckError {
                committed,
                acked: self.acked,
                sent: self.sent,
            });
        }
        if self.forgotten {
            // Which batch held how many messages is not known any more, only their sum.
            if committed < self.sent {
                return Ok(0);
            }
            self.acked = committed;
            return Ok(std::mem::take(&mut self.unacked_messages));
        }
        let mut messages = 0;
        for _ in self.acked..committed {
            let (count, held) = self
                .batches
                .pop_front()
                .expect("one entry per unacked batch");
            messages += u64::from(count);
            release(held);
        }
        self.acked = committed;
        self.unacked_messages -= messages;
        Ok(messages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acks_are_cumulative_and_checked() {
        let mut window = Window::new(3);
        for n in 0..3 {
            assert!(!window.is_full());
            assert_eq!(window.next_seq(), u64::from(n));
            window.push(10 + n, n);
        }
        assert!(window.is_full());
        assert_eq!(window.newest(), Some(&2));
        let mut released = Vec::new();
        assert_eq!(window.ack(0, |held| released.push(held)), Ok(0));
        assert_eq!(window.ack(2, |held| released.push(held)), Ok(21));
        assert_eq!(released, [0, 1]);
        assert_eq!((window.acked(), window.unacked_messages()), (2, 12));
        for lie in [1, 4, u64::MAX] {
            let error = window
                .ack(lie, |_| panic!("nothing is released"))
                .unwrap_err();
            assert_eq!(
                error,
                AckError {
                    committed: lie,
                    acked: 2,
                    sent: 3
                }
            );
        }
        assert_eq!(window.ack(3, drop), Ok(12));
        assert!(window.is_empty());
    }

    #[test]
    fn forgotten_batches_count_once_all_are_acked() {
        let mut window = Window::new(1);
        for n in 0..3 {
            window.push(10, n);
            window.forget(drop);
            assert!(!window.is_full());
        }
        assert_eq!(window.ack(2, |_| panic!("nothing is held")), Ok(0));
        assert_eq!(window.ack(3, |_| panic!("nothing is held")), Ok(30));
        assert!(window.ack(4, drop).is_err());
    }
}
