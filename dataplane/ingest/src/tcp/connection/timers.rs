//! Time-based work of a connection: heartbeats, stalls, and conditions that end the stream.

use std::time::Instant;

use penstock_wire::reply::Fault;

use super::close::CloseReason;
use super::state::State;
use super::{Connection, Context};
use crate::session::admission::REVOKED;
use crate::session::claims;

impl Connection {
    /// Checks timeouts and whether the stream may go on. Called a few times per second.
    pub(in crate::tcp) fn tick(&mut self, cx: &mut Context<'_>) -> Result<(), CloseReason> {
        if self.admission.lease.is_superseded() {
            return Err(CloseReason::Superseded);
        }
        if let Some((fault, text)) = self.revocation(cx) {
            self.fail(cx, fault, text);
            return self.send_replies(cx);
        }
        if cx.writer.waits_for_readers(cx.round) {
            self.exclude_wait_for_readers(cx.now);
        }
        if let Some(text) = self.stall(cx) {
            self.fail(cx, Fault::Stalled, text);
            return self.send_replies(cx);
        }
        match &self.state {
            State::AwaitingGrant { .. } | State::AwaitingShare { .. }
                if self.replies.heartbeat(cx.now, cx.config.heartbeat) =>
            {
                self.flush()
            }
            State::Failed { close_at } if cx.now >= *close_at => Err(CloseReason::Closed),
            _ => Ok(()),
        }
    }

    /// Why the broker has to end the stream, although the publisher did nothing wrong.
    fn revocation(&mut self, cx: &Context<'_>) -> Option<(Fault, String)> {
        if self.state.is_over() {
            return None;
        }
        if self.admission.lease.is_revoked() {
            return Some((Fault::Stalled, REVOKED.to_owned()));
        }
        let lost = cx.writer.log().lost()?;
        let cause = (lost.fault(), lost.reason.clone());
        // A committed batch that was not acknowledged counts as never received.
        self.next_seq = self.replies.acked();
        self.admission.lease.set_committed(self.next_seq);
        Some(cause)
    }

    /// How its batch exceeds a time limit, if it does.
    fn stall(&self, cx: &Context<'_>) -> Option<String> {
        let seq = self.next_seq;
        let stall_timeout = cx.config.stall_timeout;
        match &self.state {
            State::AwaitingShare { paused_at, .. } if cx.now - *paused_at > stall_timeout => {
                Some(format!(
                    "no room for batch {seq} for {stall_timeout:.0?}: too many batches of this host, or of all publishers, are incomplete; send smaller batches (--batch-size) or fewer at a time (--in-flight)"
                ))
            }
            State::InRing { batch, .. } | State::Spilled { batch } => {
                let silent_for = cx.now - self.last_progress;
                if silent_for > stall_timeout {
                    return Some(format!("no byte of batch {seq} for {silent_for:.0?}"));
                }
                let (elapsed, received) = (batch.elapsed(cx.now), batch.received.into());
                let len = batch.header.payload_len;
                claims::is_overdue(elapsed, received, stall_timeout)
                    .then(|| claims::overdue_text(seq, received, len, elapsed))
            }
            _ => None,
        }
    }

    /// Excludes the time since the last check from the time of a waiting batch: registered readers block
    /// the ring, not its publisher.
    fn exclude_wait_for_readers(&mut self, now: Instant) {
        self.spill_denied_since = None;
        if let State::AwaitingShare {
            batch, paused_at, ..
        } = &mut self.state
        {
            batch.exclude_wait(now - *paused_at);
            *paused_at = now;
        }
    }
}
