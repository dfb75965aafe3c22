//! The end of a connection: why it ends, what the peer learns, and what goes back to the broker.

use std::fmt;
use std::io::{self, Read};
use std::time::Duration;

use penstock_wire::handshake::Path;
use penstock_wire::reply::Fault;

use super::batch::State;
use super::{Connection, Context, Need};
use crate::session::stats::{ConnectionReport, Counters};

/// How long a peer that was told an error may take to read it before the socket goes.
const LINGER: Duration = Duration::from_secs(1);

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
    /// Gives back what the connection holds, tells the peer why, and waits a little for it to read.
    pub(super) fn fail(&mut self, cx: &mut Context<'_>, fault: Fault, text: String) {
        let counters = &cx.shared.counters;
        Counters::count(match fault {
            Fault::Protocol => &counters.protocol_errors,
            Fault::Checksum => &counters.checksum_errors,
            Fault::Stalled => &counters.stalled,
            Fault::Shutdown | Fault::LogLost => &counters.streams_cut,
            Fault::Authentication => &counters.forged,
        });
        self.release(cx);
        // A level 0 stream has no acks, but what it had committed stays committed.
        self.replies.error(fault, self.next_seq, &text);
        self.outbox_empty = false;
        self.failure = Some(text);
        self.state = State::Failed {
            until: cx.now + LINGER,
        };
    }

    /// Ends the stream because the broker ends.
    pub(in crate::tcp) fn shut_down(&mut self, cx: &mut Context<'_>) {
        if !matches!(self.state, State::Failed { .. } | State::Ended) {
            self.fail(
                cx,
                Fault::Shutdown,
                "the broker is shutting down".to_owned(),
            );
            // Best effort: the peer sees the connection close in any case.
            let _ = self.flush();
        }
    }

    pub(super) fn discard(&mut self) -> Result<Need, CloseReason> {
        let mut scratch = [0; 16 << 10];
        match (&self.socket).read(&mut scratch) {
            Ok(0) => Err(CloseReason::Closed),
            Ok(_) => Ok(Need::Turn),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Need::Readable),
            Err(error) => Err(CloseReason::Io(error)),
        }
    }

    pub(super) fn closed(&self) -> CloseReason {
        match &self.state {
            State::Payload { batch, .. } | State::Aside { batch } => CloseReason::CutInBatch {
                received: batch.received as usize,
                len: batch.batch.payload_len,
            },
            _ => CloseReason::Closed,
        }
    }

    pub(super) fn release(&mut self, cx: &mut Context<'_>) {
        // Memory is given back when it is dropped.
        if let State::Waiting {
            batch,
            reservation,
            claim,
            ..
        }
        | State::Payload {
            batch,
            reservation,
            claim,
        } = std::mem::replace(&mut self.state, State::Ended)
        {
            cx.writer.abort(reservation);
            if let Some(claim) = claim {
                claim.leave(batch.received.into());
            }
        }
    }

    /// Gives back what the connection holds, and sums it up.
    pub(in crate::tcp) fn finish(
        mut self,
        cx: &mut Context<'_>,
        ending: &CloseReason,
    ) -> ConnectionReport {
        self.release(cx);
        // The stream's next connection tells the publisher that these are committed, so they must be
        // visible, as for an ack.
        if let Some(index) = self.unseen {
            cx.writer.wait_until_visible(index);
        }
        let counters = &cx.shared.counters;
        if matches!(ending, CloseReason::Completed) {
            Counters::count(&counters.streams_completed);
        } else if self.failure.is_none() {
            Counters::count(&counters.streams_cut);
        }
        let ended = self.failure.take().unwrap_or_else(|| ending.to_string());
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
