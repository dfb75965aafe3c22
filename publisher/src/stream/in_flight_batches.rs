//! The account of one stream: what was sent and is kept until it is acked. No socket, no clock.

use std::collections::VecDeque;
use std::collections::vec_deque::Drain;

use penstock_transport::{InFlightLimit, Nanos, Timestamp};

use crate::batch::sealed_batch::SealedBatch;
use crate::error::AckError;

/// Batches for which there is room at first: many streams keep one at a time.
const FIRST_ROOM: usize = 4;

/// Batches on their way. All streams of a publisher count time from the same moment.
#[derive(Debug)]
pub(crate) struct InFlightBatches {
    /// Batches that may be kept; 0 where none is.
    limit: usize,
    /// What the path needs of that.
    path: InFlightLimit,
    /// Bytes of a full batch.
    batch_size: u64,
    sent: u64,
    acked: u64,
    unacked_messages: u64,
    /// Bytes of unacked batches, and of those that were acked.
    unacked_bytes: u64,
    acked_bytes: u64,
    /// Unacked batches, oldest first, with the time at which each was written; not kept when there is no
    /// limit.
    batches: VecDeque<(Timestamp, SealedBatch)>,
}

/// What an ack covers for the first time.
#[derive(Debug)]
pub(crate) struct Acked<'a> {
    pub(crate) messages: u64,
    /// Batches that need not be kept any more.
    pub(crate) batches: Drain<'a, (Timestamp, SealedBatch)>,
}

impl InFlightBatches {
    /// At most `limit` batches on their way; `None` where nothing but the end is acked, and then
    /// only an ack of everything counts. The path gets `floor` batches of `batch_size` bytes, and more if
    /// it needs more. Batches before `first` are acked already.
    pub(crate) fn new(
        limit: Option<usize>,
        floor: usize,
        batch_size: usize,
        first: u64,
        now: Timestamp,
    ) -> Self {
        let limit = limit.unwrap_or(0);
        Self {
            limit,
            path: InFlightLimit::new((floor * batch_size) as u64, Nanos::ZERO, now),
            batch_size: batch_size as u64,
            sent: first,
            acked: first,
            unacked_messages: 0,
            unacked_bytes: 0,
            acked_bytes: 0,
            batches: VecDeque::with_capacity(limit.min(FIRST_ROOM)),
        }
    }

    /// Sequence number of the next batch: the number of batches sent.
    pub(crate) fn next_seq(&self) -> u64 {
        self.sent
    }

    pub(crate) fn acked(&self) -> u64 {
        self.acked
    }

    pub(crate) fn unacked_messages(&self) -> u64 {
        self.unacked_messages
    }

    /// Batches that are kept.
    pub(crate) fn len(&self) -> usize {
        self.batches.len()
    }

    /// Whether one more batch may be begun behind `begun` others of `bytes` that are not sent yet.
    pub(crate) fn has_room(&self, now: Timestamp, begun: usize, bytes: u64) -> bool {
        if self.limit == 0 {
            return true;
        }
        let unacked = self.unacked_bytes + bytes;
        match self.batches.len() + begun {
            0 => true,
            count => count < self.limit && unacked + self.batch_size <= self.path.bytes(now),
        }
    }

    /// A batch waits until [`Self::has_room`].
    pub(crate) fn on_limited(&mut self, now: Timestamp) {
        self.path.on_limited(now, self.acked_bytes);
    }

    /// When there may be room whatever is acked until then.
    pub(crate) fn probe_end(&self, now: Timestamp) -> Option<Timestamp> {
        self.path.probe_end(now)
    }

    /// Whether an ack is due.
    pub(crate) fn is_owed(&self) -> bool {
        !self.batches.is_empty()
    }

    /// Takes a batch that was sent; gives it back where it is not kept until it is acked.
    pub(crate) fn push(&mut self, now: Timestamp, batch: SealedBatch) -> Option<SealedBatch> {
        self.sent += 1;
        self.unacked_messages += u64::from(batch.messages);
        if self.limit == 0 {
            return Some(batch);
        }
        self.unacked_bytes += batch.payload.len() as u64;
        self.batches.push_back((now, batch));
        None
    }

    /// Takes a cumulative ack.
    pub(crate) fn ack(&mut self, now: Timestamp, committed: u64) -> Result<Acked<'_>, AckError> {
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
        let acked = self.batches.range(..count);
        let messages = match all {
            true => self.unacked_messages,
            false => acked.clone().map(|(_, b)| u64::from(b.messages)).sum(),
        };
        let bytes: u64 = acked.map(|(_, b)| b.payload.len() as u64).sum();
        self.acked = committed;
        self.unacked_messages -= messages;
        self.unacked_bytes -= bytes;
        self.acked_bytes += bytes;
        if let Some(&(sent, _)) = count.checked_sub(1).and_then(|last| self.batches.get(last)) {
            self.path.on_round_trip(now, now - sent);
            self.path.on_delivered(now, self.acked_bytes);
        }
        Ok(Acked {
            messages,
            batches: self.batches.drain(..count),
        })
    }

    /// What is not acked, for another connection to send.
    pub(crate) fn take_unacked(&mut self) -> VecDeque<SealedBatch> {
        self.unacked_bytes = 0;
        let unacked = std::mem::take(&mut self.batches);
        unacked.into_iter().map(|(_, batch)| batch).collect()
    }
}

#[cfg(test)]
mod tests {
    use penstock_runtime::profile::StageTimer;

    use penstock_wire::message::OVERHEAD;

    use super::*;
    use crate::batch::payload::Payload;
    use crate::summary::PublishStage;

    const START: Timestamp = Timestamp::ZERO;

    fn batch(messages: u32) -> SealedBatch {
        let mut payload = Payload::default();
        payload.append(&[messages as u8]);
        SealedBatch {
            payload,
            messages,
            checksum: 0,
            sealed: StageTimer::<PublishStage>::default().now(),
        }
    }

    /// Messages and batches that an ack covers.
    fn ack(window: &mut InFlightBatches, committed: u64) -> Result<(u64, usize), AckError> {
        let acked = window.ack(START, committed)?;
        Ok((acked.messages, acked.batches.count()))
    }

    #[test]
    fn acks_are_cumulative_and_checked() {
        let mut window = InFlightBatches::new(Some(3), 3, 100, 0, START);
        for n in 0..3 {
            assert!(window.has_room(START, 2 - n as usize, 0));
            assert_eq!(window.next_seq(), u64::from(n));
            assert!(window.push(START, batch(10 + n)).is_none());
        }
        assert!(!window.has_room(START, 0, 0));
        assert_eq!(ack(&mut window, 0), Ok((0, 0)));
        assert_eq!(ack(&mut window, 2), Ok((21, 2)));
        assert_eq!((window.acked(), window.unacked_messages()), (2, 12));
        for lie in [1, 4, u64::MAX] {
            let error = window.ack(START, lie).unwrap_err();
            assert_eq!(
                error,
                AckError {
                    committed: lie,
                    acked: 2,
                    sent: 3
                }
            );
        }
        assert!(window.is_owed() && window.len() == 1);
        assert!(window.has_room(START, 1, 0) && !window.has_room(START, 2, 0));
        assert_eq!(ack(&mut window, 3), Ok((12, 1)));
        assert!(!window.is_owed());
        window.push(START, batch(7));
        let kept = window.take_unacked();
        assert_eq!(kept[0].payload[OVERHEAD..], [7]);
    }

    #[test]
    fn without_acks_only_the_whole_counts() {
        let mut window = InFlightBatches::new(None, 3, 100, 0, START);
        for _ in 0..3 {
            assert!(window.push(START, batch(10)).is_some());
            assert!(window.has_room(START, 100, u64::MAX) && !window.is_owed());
        }
        assert_eq!(ack(&mut window, 2), Ok((0, 0)));
        assert_eq!(ack(&mut window, 3), Ok((30, 0)));
        assert!(window.ack(START, 4).is_err());
    }

    #[test]
    fn a_long_path_gets_more_than_the_floor_and_a_short_one_does_not() {
        const MS: Nanos = Nanos::from_millis(1);
        let len = batch(1).payload.len();
        let kept = |round_trip: Nanos| {
            let mut window = InFlightBatches::new(Some(100), 2, len, 0, START);
            // The broker takes a batch each millisecond; acks come a round trip later.
            for ms in 1..5000 {
                let now = START + ms * MS;
                while window.has_room(now, 0, 0) {
                    window.push(now, batch(1));
                }
                window.on_limited(now);
                let due = |(sent, _): &(Timestamp, SealedBatch)| *sent + round_trip <= now;
                if window.batches.front().is_some_and(due) {
                    window.ack(now, window.acked() + 1).unwrap();
                }
            }
            window.len()
        };
        assert!(kept(20 * MS) >= 20, "{}", kept(20 * MS));
        assert!(kept(MS / 10) <= 4, "{}", kept(MS / 10));
    }
}
