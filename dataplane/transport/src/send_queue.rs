//! Batches that are not committed, and which of their bytes to send next.

use std::collections::VecDeque;

use penstock_wire::packet::{BatchInfo, Pause};

use super::MAX_OPEN_BATCHES;

/// A part of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) seq: u64,
    pub(super) offset: u32,
    pub(super) len: u32,
}

/// A batch that is not committed.
#[derive(Debug, Clone, Copy)]
struct Pending {
    info: BatchInfo,
    /// Position in the stream where it starts.
    position: u64,
}

/// The batches of one stream, within the broker's credit.
#[derive(Debug)]
pub(super) struct SendQueue {
    pending: VecDeque<Pending>,
    committed: u64,
    /// What has never been sent: batch, and offset in it.
    pub(super) next: (u64, u32),
    /// Position in the stream behind the last batch.
    end: u64,
    credit: u64,
    lost: VecDeque<Span>,
    /// Only the credit holds the stream back.
    is_stalled: bool,
    credit_stalls: u64,
}

impl SendQueue {
    /// An empty queue; batches before `first_batch` are committed.
    pub(super) fn new(first_batch: u64, credit: u64) -> Self {
        Self {
            pending: VecDeque::with_capacity(64),
            committed: first_batch,
            next: (first_batch, 0),
            end: 0,
            credit,
            lost: VecDeque::with_capacity(64),
            is_stalled: false,
            credit_stalls: 0,
        }
    }

    /// Whether one more batch may be pushed.
    pub(super) fn has_room(&self) -> bool {
        self.pending.len() < MAX_OPEN_BATCHES
    }

    /// Adds a batch and returns its number.
    pub(super) fn push(&mut self, len: u32, messages: u32, checksum: u32) -> u64 {
        assert!(self.has_room() && len > 0);
        let seq = self.committed + self.pending.len() as u64;
        let info = BatchInfo {
            seq,
            len,
            messages,
            checksum,
        };
        self.pending.push_back(Pending {
            info,
            position: self.end,
        });
        self.end += u64::from(len);
        seq
    }

    /// Batches committed.
    pub(super) fn committed(&self) -> u64 {
        self.committed
    }

    /// Batches that were sent, at least in part.
    pub(super) fn sent_batches(&self) -> u64 {
        self.next.0 + u64::from(self.next.1 > 0)
    }

    /// Takes the broker's progress and credit. Returns whether either is news.
    pub(super) fn on_feedback(&mut self, committed: u64, credit: u64) -> bool {
        let has_changed = credit > self.credit || committed > self.committed;
        self.credit = self.credit.max(credit);
        while self.committed < committed {
            self.pending.pop_front();
            self.committed += 1;
        }
        has_changed
    }

    /// Batches that are pushed and not committed.
    pub(super) fn uncommitted(&self) -> usize {
        self.pending.len()
    }

    /// Bytes of batches that are pushed and not committed.
    pub(super) fn uncommitted_bytes(&self) -> u64 {
        let first = self.pending.front();
        first.map_or(0, |first| self.end - first.position)
    }

    /// Times that the broker's credit was all that held the stream back.
    pub(super) fn credit_stalls(&self) -> u64 {
        self.credit_stalls
    }

    /// What is known of an uncommitted batch.
    pub(super) fn batch(&self, seq: u64) -> Option<&BatchInfo> {
        self.pending(seq).map(|pending| &pending.info)
    }

    fn pending(&self, seq: u64) -> Option<&Pending> {
        let index = seq.checked_sub(self.committed)?;
        self.pending.get(usize::try_from(index).ok()?)
    }

    /// Whether there are bytes that were never sent.
    pub(super) fn has_unsent(&self) -> bool {
        self.pending(self.next.0).is_some()
    }

    /// Whether there are lost bytes to send again.
    pub(super) fn has_lost(&self) -> bool {
        !self.lost.is_empty()
    }

    /// Whether there is anything to send, even beyond the credit.
    pub(super) fn wants_to_send(&self) -> bool {
        self.has_lost() || self.has_unsent()
    }

    /// Whether there is anything to send within the credit, as far as is known.
    pub(super) fn can_send(&self) -> bool {
        self.has_lost() || (self.has_unsent() && !self.is_stalled)
    }

    /// Queues the bytes of a lost packet, unless they are committed.
    pub(super) fn requeue(&mut self, span: Span) {
        if span.seq >= self.committed {
            self.lost.push_back(span);
        }
    }

    /// The next lost bytes that are not committed, at most `segment` of them: packets may have become
    /// smaller since.
    pub(super) fn next_lost(&mut self, segment: u32) -> Option<Span> {
        loop {
            let span = self.lost.front_mut()?;
            if span.seq < self.committed {
                self.lost.pop_front();
                continue;
            }
            let first = Span {
                len: span.len.min(segment),
                ..*span
            };
            span.offset += first.len;
            span.len -= first.len;
            if span.len == 0 {
                self.lost.pop_front();
            }
            return Some(first);
        }
    }

    /// The next bytes that were never sent, at most `segment` of them, or why there are none.
    pub(super) fn next_unsent(&mut self, segment: u32) -> Result<Span, Pause> {
        let (seq, offset) = self.next;
        let Some(&Pending { info, position }) = self.pending(seq) else {
            self.is_stalled = false;
            return Err(Pause::Idle);
        };
        let len = (info.len - offset).min(segment);
        if position + u64::from(offset + len) > self.credit {
            self.credit_stalls += u64::from(!self.is_stalled);
            self.is_stalled = true;
            return Err(Pause::Credit);
        }
        self.is_stalled = false;
        self.next = if offset + len == info.len {
            (seq + 1, 0)
        } else {
            (seq, offset + len)
        };
        Ok(Span { seq, offset, len })
    }

    /// Entries of all kinds.
    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.lost.len() + self.pending.len()
    }
}
