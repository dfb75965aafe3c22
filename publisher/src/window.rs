//! The account of one stream: what was sent and is kept until it is acked. No socket, no clock.

use std::collections::VecDeque;
use std::collections::vec_deque::Drain;

use thiserror::Error;

use crate::stream::Filled;

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
    /// Unacked batches, oldest first; not kept when there is no limit.
    batches: VecDeque<Filled>,
}

/// What an ack covers for the first time.
#[derive(Debug)]
pub(crate) struct Acked<'a> {
    pub(crate) messages: u64,
    /// Batches that need not be kept any more.
    pub(crate) batches: Drain<'a, Filled>,
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

    /// Takes a batch that was sent; gives it back where it is not kept until it is acked.
    pub(crate) fn push(&mut self, batch: Filled) -> Option<Filled> {
        self.sent += 1;
        self.unacked_messages += u64::from(batch.messages);
        if self.limit == 0 {
            return Some(batch);
        }
        self.batches.push_back(batch);
        None
    }

    /// Takes a cumulative ack.
    pub(crate) fn ack(&mut self, committed: u64) -> Result<Acked<'_>, AckError> {
        if committed < self.acked || committed > self.sent {
            return Err(AckError {
                committed,
                acked: self.acked,
                sent: self.sent,
            });
        }
        let all = committed == self.sent;
        if self.limit == 0 && !all {
            return Ok(Acked {
                messages: 0,
                batches: self.batches.drain(..0),
            });
        }
        let count = (committed - self.acked) as usize;
        let count = count.min(self.batches.len());
        let messages = match all {
            true => self.unacked_messages,
            false => self
                .batches
                .range(..count)
                .map(|b| u64::from(b.messages))
                .sum(),
        };
        self.acked = committed;
        self.unacked_messages -= messages;
        Ok(Acked {
            messages,
            batches: self.batches.drain(..count),
        })
    }

    /// What is not acked, for another connection to send.
    pub(crate) fn take_unacked(&mut self) -> VecDeque<Filled> {
        std::mem::take(&mut self.batches)
    }
}

#[cfg(test)]
mod tests {
    use penstock_dataplane::profile::StageTimer;

    use penstock_dataplane::wire::message::OVERHEAD;

    use super::*;
    use crate::payload::Payload;
    use crate::summary::PublishStage;

    fn batch(messages: u32) -> Filled {
        let mut payload = Payload::default();
        payload.append(&[messages as u8], None);
        Filled {
            payload,
            messages,
            checksum: 0,
            sealed: StageTimer::<PublishStage>::default().now(),
        }
    }

    /// Messages and batches that an ack covers.
    fn ack(window: &mut Window, committed: u64) -> Result<(u64, usize), AckError> {
        let acked = window.ack(committed)?;
        Ok((acked.messages, acked.batches.count()))
    }

    #[test]
    fn acks_are_cumulative_and_checked() {
        let mut window = Window::new(Some(3), 0);
        for n in 0..3 {
            assert!(!window.is_full());
            assert_eq!(window.next_seq(), u64::from(n));
            assert!(window.push(batch(10 + n)).is_none());
        }
        assert!(window.is_full());
        assert_eq!(ack(&mut window, 0), Ok((0, 0)));
        assert_eq!(ack(&mut window, 2), Ok((21, 2)));
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
        assert_eq!(ack(&mut window, 3), Ok((12, 1)));
        assert!(!window.is_owed());
        window.push(batch(7));
        let kept = window.take_unacked();
        assert_eq!(kept[0].payload[OVERHEAD..], [7]);
    }

    #[test]
    fn without_acks_only_the_whole_counts() {
        let mut window = Window::new(None, 0);
        for _ in 0..3 {
            assert!(window.push(batch(10)).is_some());
            assert!(!window.is_full() && !window.is_owed());
        }
        assert_eq!(ack(&mut window, 2), Ok((0, 0)));
        assert_eq!(ack(&mut window, 3), Ok((30, 0)));
        assert!(window.ack(4).is_err());
    }
}
