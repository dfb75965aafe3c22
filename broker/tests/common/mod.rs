//! What tests of the program share.

use penstock_wire::handshake::{AckLevel, OrderLevel, Path, Request};

/// For the only stream of a new session, over tcp.
pub fn request() -> Request {
    Request {
        session: 0,
        stream: 0,
        streams: 1,
        ack: AckLevel::Committed,
        order: OrderLevel::PerStream,
        max_payload: 32 << 10,
        path: Path::Tcp,
        resume_from: None,
        max_datagram: 0,
    }
}
