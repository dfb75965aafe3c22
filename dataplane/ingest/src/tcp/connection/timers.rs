//! Time-based work of a connection: heartbeats, stalls, and conditions that end the stream.

use std::time::Instant;

use penstock_wire::reply::Fault;

use super::batch::State;
use super::close::CloseReason;
use super::{Connection, Context};
use crate::session::admission::REVOKED;
use crate::session::claims;

impl Connection {
    /// Handles time: heartbeats, stalls, pressure on the ring. Called a few times a second.
    pub(in crate::tcp) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if self.admission.lease.is_wanted() {
            return Err(CloseReason::Superseded);
        }
        let is_over = matches!(self.state, State::Failed { .. } | State::Ended);
        if self.admission.lease.is_revoked() && !is_over {
            self.fail(cx, Fault::Stalled, REVOKED.to_owned());
            return self.reply(cx);
        }
        if let Some(lost) = cx.writer.log().lost()
            && !is_over
        {
            let (fault, text) = (lost.fault(), lost.reason.clone());
            // A committed batch that was not acknowledged counts as never received.
            self.next_seq = self.acked;
            self.admission.lease.set_committed(self.acked);
            self.fail(cx, fault, text);
            return self.reply(cx);
        }
        if cx.writer.waits_for_readers(cx.round) {
            self.excuse(cx.now);
        }
        let silent_for = cx.now - self.last_progress;
        let may_stall = cx.config.stall_timeout;
        match &self.state {
            State::Starved { paused, .. } if cx.now - *paused > may_stall => {
                let text = format!(
                    "no room for batch {} for {may_stall:.0?}: too many batches of this host, or of all publishers, are incomplete; send smaller batches (--batch-size) or fewer at a time (--in-flight)",
                    self.next_seq
                );
                self.fail(cx, Fault::Stalled, text);
                return self.reply(cx);
            }
            State::Waiting { .. } | State::Starved { .. }
                if self
                    .last_heartbeat
                    .is_none_or(|at| cx.now - at >= cx.config.heartbeat) =>
            {
                self.last_heartbeat = Some(cx.now);
                self.replies.ack(self.acked, true);
                return self.flush();
            }
            State::Payload { .. } | State::Aside { .. } if silent_for > may_stall => {
                let text = format!("no byte of batch {} for {silent_for:.0?}", self.next_seq);
                self.fail(cx, Fault::Stalled, text);
                return self.reply(cx);
            }
            State::Payload { batch, .. } | State::Aside { batch } => {
                let (elapsed, received) = (cx.now - batch.since, batch.received.into());
                if claims::is_overdue(elapsed, received, may_stall) {
                    let len = batch.batch.payload_len;
                    let text = claims::overdue_text(self.next_seq, received, len, elapsed);
                    self.fail(cx, Fault::Stalled, text);
                    return self.reply(cx);
                }
            }
            State::Failed { until } if cx.now >= *until => return Err(CloseReason::Closed),
            _ => {}
        }
        Ok(())
    }

    /// Registered readers hold up the ring: the time that its batch waits does not count against its
    /// publisher.
    fn excuse(&mut self, now: Instant) {
        self.evicted = None;
        if let State::Starved { batch, paused, .. } = &mut self.state {
            batch.since += now - *paused;
            *paused = now;
        }
    }
}
