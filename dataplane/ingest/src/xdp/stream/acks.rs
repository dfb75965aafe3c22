//! When an ACK is due, and its packet.

use penstock_transport::{ArrivalOrder, Nanos, Timestamp};
use penstock_wire::packet::{Feedback, MAX_ACK_LEN};

use super::Stream;

/// Number of packets after which an ACK is due at once.
const ACK_EVERY_PACKETS: u32 = 32;
/// Maximum delay of an ACK.
const MAX_ACK_DELAY: Nanos = Nanos::from_micros(100);

/// The schedule of a stream's ACKs.
#[derive(Debug)]
pub(super) struct AckSchedule {
    /// When an ACK is due at the latest.
    due: Option<Timestamp>,
    /// Packets placed since the last ACK.
    unacked: u32,
    /// Number of sealed ACKs so far.
    sealed: u64,
    /// Number of committed batches in the last ACK.
    reported: u64,
}

impl AckSchedule {
    pub(super) fn new(first_batch: u64) -> Self {
        Self {
            due: None,
            unacked: 0,
            sealed: 0,
            reported: first_batch,
        }
    }

    pub(super) fn at_once(&mut self, now: Timestamp) {
        self.due = Some(now);
    }

    /// Makes an ACK due within the maximum delay. So repeated packets cause a limited number of ACKs.
    pub(super) fn delayed(&mut self, now: Timestamp) {
        self.due.get_or_insert(now + MAX_ACK_DELAY);
    }

    pub(super) fn note_placed(&mut self, order: ArrivalOrder, now: Timestamp) {
        self.unacked += 1;
        if order != ArrivalOrder::InOrder || self.unacked >= ACK_EVERY_PACKETS {
            self.at_once(now);
        } else {
            self.delayed(now);
        }
    }

    /// Number of committed batches in the last ACK.
    pub(super) fn reported(&self) -> u64 {
        self.reported
    }
}

impl Stream {
    /// Writes an ACK packet with all headers to `frame`, if one is due; returns its length.
    pub(in crate::xdp) fn write_ack(
        &mut self,
        now: Timestamp,
        feedback: &mut Feedback,
        frame: &mut [u8],
    ) -> Option<usize> {
        if self.acks.due.is_none_or(|due| due > now) {
            return None;
        }
        self.acks.due = None;
        self.acks.unacked = 0;
        let template = self.route.template()?;
        self.receiver.feedback(now, self.is_blocked(), feedback);
        feedback.committed = self.commits.visible();
        self.acks.reported = feedback.committed;
        let headers = template.len();
        let (head, rest) = frame.split_at_mut(headers);
        let mut len = feedback.write(&mut rest[..MAX_ACK_LEN]);
        if let Some(keys) = &self.keys {
            self.acks.sealed += 1;
            len = keys.seal_ack(self.acks.sealed, rest, len);
        }
        template.write(head, &[&rest[..len]]);
        Some(headers + len)
    }

    /// When an ACK is due, if any.
    pub(in crate::xdp) fn ack_due(&self) -> Option<Timestamp> {
        self.acks.due
    }
}
