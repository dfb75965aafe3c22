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

/// Batches on their way.
#[derive(Debug)]
pub(crate) struct Window {
    limit: usize,
    sent: u64,
    acked: u64,
    unacked_messages: u64,
    /// Messages of each unacked batch, oldest first; not kept when there is no limit.
    batches: VecDeque<u32>,
}

impl Window {
    /// At most `limit` batches on their way; `None` where nothing but the end is acked, and then
    /// only an ack of everything counts.
    /// Batches before `first` are acked already.
    pub(crate) fn new(limit: Option<usize>, first: u64) -> Self {
        let limit = limit.unwrap_or(0);
        let batches = VecDeque::with_capacity(limit);
        Self {
            limit,
            sent: first,
            acked: first,
            unacked_messages: 0,
            batches,
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
        self.limit > 0 && self.batches.len() >= self.limit
    }

    /// Whether an ack is due.
    pub(crate) fn is_owed(&self) -> bool {
        !self.batches.is_empty()
    }

    /// Takes note of a batch that is being sent.
    pub(crate) fn push(&mut self, messages: u32) {
        self.sent += 1;
        self.unacked_messages += u64::from(messages);
        if self.limit > 0 {
            self.batches.push_back(messages);
        }
    }

    /// Takes a cumulative ack; returns the messages that it covers for the first time.
    pub(crate) fn ack(&mut self, committed: u64) -> Result<u64, AckError> {
        if committed < self.acked || committed > self.sent {
            return Err(AckError {
                committed,
                acked: self.acked,
                sent: self.sent,
            });
        }
        let messages = if committed == self.sent {
            self.batches.clear();
            self.unacked_messages
        } else if self.limit > 0 {
            let count = (committed - self.acked) as usize;
            self.batches.drain(..count).map(u64::from).sum()
        } else {
            return Ok(0);
        };
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
        let mut window = Window::new(Some(3), 0);
        for n in 0..3 {
            assert!(!window.is_full());
            assert_eq!(window.next_seq(), u64::from(n));
            window.push(10 + n);
        }
        assert!(window.is_full());
        assert_eq!(window.ack(0), Ok(0));
        assert_eq!(window.ack(2), Ok(21));
        assert_eq!((window.acked(), window.unacked_messages()), (2, 12));
        for lie in [1, 4, u64::MAX] {
            let error = window.ack(lie).unwrap_err();
            assert_eq!(
                error,
                AckError {
                    committed: lie,
                    acked: 2,
                    sent: 3
                }
            );
        }
        assert!(window.is_owed());
        assert_eq!(window.ack(3), Ok(12));
        assert!(!window.is_owed());
    }

    #[test]
    fn without_acks_only_the_whole_counts() {
        let mut window = Window::new(None, 0);
        for _ in 0..3 {
            window.push(10);
            assert!(!window.is_full() && !window.is_owed());
        }
        assert_eq!(window.ack(2), Ok(0));
        assert_eq!(window.ack(3), Ok(30));
        assert!(window.ack(4).is_err());
    }
}
