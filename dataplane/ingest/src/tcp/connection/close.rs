//! The end of a connection: why it ends, what the peer learns, and what goes back to the broker.

use std::fmt;
use std::io::{self, Read};
use std::time::Duration;

use penstock_wire::handshake::Path;
use penstock_wire::reply::Fault;

use super::state::State;
use super::{Connection, Context, Need};
use crate::session::stats::{ConnectionReport, Counters};

/// Time that a peer has to read an error before the socket closes.
const ERROR_READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a connection ends.
#[derive(Debug)]
pub(in crate::tcp) enum CloseReason {
    Completed,
    Closed,
    /// The publisher opened another connection for the stream.
    Superseded,
    CutInBatch {
        received: usize,
        len: u32,
    },
    Fault(Fault, String),
    Io(io::Error),
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Closed => f.write_str("closed by the publisher without an end frame"),
            Self::Superseded => f.write_str("the publisher continues over another connection"),
            Self::CutInBatch { received, len } => {
                write!(
                    f,
                    "closed by the publisher inside a batch, after {received} of {len} bytes"
                )
            }
            Self::Fault(_, text) => f.write_str(text),
            Self::Io(error) => error.fmt(f),
        }
    }
}

impl Connection {
    /// Ends the stream with an error: releases what the connection holds, and gives the peer some time to
    /// read the error.
    pub(super) fn fail(&mut self, cx: &mut Context<'_>, fault: Fault, text: String) {
        let counters = &cx.shared.counters;
        Counters::count(match fault {
            Fault::Protocol | Fault::Permission => &counters.protocol_errors,
            Fault::Checksum => &counters.checksum_errors,
            Fault::Stalled => &counters.stalled,
            Fault::Shutdown | Fault::LogLost => &counters.streams_cut,
            Fault::Authentication => &counters.forged,
        });
        self.release(cx);
        // A stream with ack level 0 gets no acks, but its committed batches stay committed.
        self.replies.error(fault, self.next_seq, &text);
        self.failure = Some(text);
        self.state = State::Failed {
            close_at: cx.now + ERROR_READ_TIMEOUT,
        };
    }

    /// Ends the stream because the broker ends.
    pub(in crate::tcp) fn shut_down(&mut self, cx: &mut Context<'_>) {
        if !self.state.is_over() {
            self.fail(
                cx,
                Fault::Shutdown,
                "the broker is shutting down".to_owned(),
            );
            // Best effort: the peer sees the connection close in any case.
            let _ = self.flush();
        }
    }

    /// Discards what a peer sends after its stream has failed.
    pub(super) fn discard_input(&mut self) -> Result<Need, CloseReason> {
        let mut scratch = [0; 16 << 10];
        match (&self.socket).read(&mut scratch) {
            Ok(0) => Err(CloseReason::Closed),
            Ok(_) => Ok(Need::Yield),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Need::Readable),
            Err(error) => Err(CloseReason::Io(error)),
        }
    }

    /// Why the connection ends if the peer has closed it now.
    pub(super) fn end_of_input(&self) -> CloseReason {
        match &self.state {
            State::InRing { batch, .. } | State::Spilled { batch } => CloseReason::CutInBatch {
                received: batch.received as usize,
                len: batch.header.payload_len,
            },
            _ => CloseReason::Closed,
        }
    }

    /// Releases the batch that is being received.
    fn release(&mut self, cx: &mut Context<'_>) {
        // A spill releases its memory when it is dropped.
        if let State::AwaitingGrant {
            batch,
            reservation,
            claim,
            ..
        }
        | State::InRing {
            batch,
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Ended)
        {
            cx.writer.abort(reservation);
            if let Some(claim) = claim {
                claim.release(batch.received.into());
            }
        }
    }

    /// Releases what the connection holds, and summarises it.
    pub(in crate::tcp) fn finish(
        mut self,
        cx: &mut Context<'_>,
        reason: &CloseReason,
    ) -> ConnectionReport {
        self.release(cx);
        // The stream's next connection reports these batches as committed, so readers must see them, as for
        // an ack.
        if let Some(index) = self.invisible {
            cx.writer.wait_until_visible(index);
        }
        let counters = &cx.shared.counters;
        if matches!(reason, CloseReason::Completed) {
            Counters::count(&counters.streams_completed);
        } else if self.failure.is_none() {
            Counters::count(&counters.streams_cut);
        }
        let ended = self.failure.take().unwrap_or_else(|| reason.to_string());
        let (admission, buffers) = (&self.admission, self.buffers);
        ConnectionReport::new(
            self.peer,
            Path::Tcp,
            admission,
            buffers,
            &self.committed,
            ended,
        )
    }
}
