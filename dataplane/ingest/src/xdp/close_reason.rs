//! Why a stream over xdp ends.

use std::fmt;
use std::io;

use penstock_wire::reply::Fault;

/// Why a stream ends.
#[derive(Debug)]
pub(super) enum CloseReason {
    /// The whole stream is committed.
    Completed,
    /// The publisher closed the control connection before the end.
    Closed,
    /// The publisher continues over another connection.
    Superseded,
    /// The broker ended the stream.
    Fault(Fault, String),
    /// The control connection failed.
    Io(io::Error),
}

impl CloseReason {
    /// The control connection carried something other than a valid end.
    pub(super) fn not_the_end() -> Self {
        let text = "invalid frame on the control connection: only the end of the stream may follow"
            .to_owned();
        Self::Fault(Fault::Protocol, text)
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completed => f.write_str("completed"),
            Self::Closed => f.write_str("closed by the publisher without an end frame"),
            Self::Superseded => f.write_str("the publisher continues over another connection"),
            Self::Fault(_, text) => f.write_str(text),
            Self::Io(error) => error.fmt(f),
        }
    }
}
