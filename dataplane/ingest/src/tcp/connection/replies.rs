//! Acks: when one is due, and what waits for room in the socket.

use std::net::Shutdown;

use penstock_wire::handshake::AckLevel;

use super::batch::State;
use super::close::CloseReason;
use super::{Connection, Context, Need};
use crate::session::stats::PathStage;

/// Bytes after which an ack is sent even though more is coming in. An ack costs a packet's way
/// through both stacks, as much as receiving some 50 kB.
const ACK_EVERY: u64 = 512 << 10;

impl Connection {
    /// Whether an ack is owed, and little enough, with nothing else to send.
    pub(super) fn may_ack_later(&self) -> bool {
        self.acked < self.next_seq
            && self.admission.ack == AckLevel::Committed
            && self.unacked_bytes < ACK_EVERY
            && self.outbox_empty
            && !matches!(self.state, State::Failed { .. })
    }

    /// Acks what has become visible; says what is needed besides more bytes.
    pub(in crate::tcp) fn acknowledge(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Result<Need, CloseReason> {
        self.reply(cx)?;
        match self.state {
            State::Ended if self.outbox_empty && self.acked == self.next_seq => {
                Err(CloseReason::Completed)
            }
            State::Ended if self.unseen.is_none() => Ok(Need::Nothing),
            State::Waiting { .. } | State::Starved { .. } => Ok(Need::Space),
            _ if self.unseen.is_some() => Ok(Need::Space),
            _ => Ok(Need::Readable),
        }
    }

    /// Acks what has become visible, and sends what waits.
    pub(super) fn reply(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if self
            .unseen
            .is_some_and(|index| cx.writer.frontier() > index)
        {
            self.unseen = None;
        }
        let wanted =
            self.admission.ack == AckLevel::Committed || matches!(self.state, State::Ended);
        // The end of a stream is confirmed even if the stream was empty.
        let news = self.acked < self.next_seq || matches!(self.state, State::Ended);
        if wanted && news && self.unseen.is_none() && !matches!(self.state, State::Failed { .. }) {
            let start = cx.stats.stages.now();
            self.acked = self.next_seq;
            self.unacked_bytes = 0;
            self.replies.ack(self.acked, false);
            self.flush()?;
            cx.stats.stages.lap(PathStage::SendAck, start);
            return Ok(());
        }
        if self.outbox_empty {
            Ok(())
        } else {
            self.flush()
        }
    }

    pub(super) fn flush(&mut self) -> Result<(), CloseReason> {
        self.outbox_empty = self.replies.flush(&self.socket).map_err(CloseReason::Io)?;
        if self.outbox_empty && matches!(self.state, State::Failed { .. }) {
            self.socket
                .shutdown(Shutdown::Write)
                .map_err(CloseReason::Io)?;
        }
        Ok(())
    }

    /// Whether the socket should be watched for room to send.
    pub(in crate::tcp) fn wants_to_write(&self) -> bool {
        !self.outbox_empty
    }
}
