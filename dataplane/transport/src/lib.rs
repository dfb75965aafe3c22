//! Reliable delivery of batches over datagrams: the state machines of both ends, without I/O.
//!
//! Neither end touches a socket, a clock or a source of randomness: packets and times ([`Timestamp`])
//! are arguments, so a simulation can drive hours of a lossy network in a second. [`Sender`] runs in the publisher, [`Receiver`] in the broker's worker; `docs/protocol.md`
//! has the packets and the timers. Loss detection follows RFC 9002: a packet number is used once,
//! a retransmission has a new one.

mod congestion;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod in_flight;
mod loss;
mod mtu;
mod pacer;
mod probe_timer;
mod ranges;
mod receiver;
mod rtt;
mod send_queue;
mod sender;
mod sent_packets;
#[cfg(test)]
mod simulation;
mod time;

pub use in_flight::InFlightLimit;
pub use receiver::{
    ArrivalOrder, DropReason, FREE_MEMORY, Limits, NewBatch, NextPacket, Offer, OfferedPacket,
    OpenBatch, Receiver,
};
pub use sender::{AckFault, Outgoing, Sender, SenderConfig, SenderStats, Transmit};
pub use time::{Nanos, Timestamp};

/// Maximum number of uncommitted batches of a stream, for both ends.
pub const MAX_OPEN_BATCHES: usize = 1024;
