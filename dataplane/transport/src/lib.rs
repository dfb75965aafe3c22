//! Reliable delivery of batches over datagrams: the state machines of both ends, without I/O.
//!
//! Neither end touches a socket, a clock or a source of randomness: packets and times ([`Timestamp`])
//! are arguments, so a simulation can drive hours of a lossy network in a second. [`Sender`] runs in
//! the publisher, [`Receiver`] in the broker's worker; `docs/protocol.md` has the packets and the timers. Loss detection follows RFC 9002: a packet number is used once,
//! a retransmission has a new one.
//!
//! ```
//! use penstock_transport::{Limits, Nanos, Outgoing, Receiver, Sender, SenderConfig, Timestamp};
//! use penstock_wire::packet::{Feedback, StreamKey};
//!
//! let config = SenderConfig {
//!     first_batch: 0,
//!     credit: 64 << 10,
//!     max_datagram: 1472,
//!     min_in_flight: 64 << 10,
//!     phase: Nanos::ZERO,
//! };
//! let stream = StreamKey { key: 0x5ec2, stream: 0 };
//! let limits = Limits { max_payload: 1 << 20, window: 1 << 20 };
//! let mut now = Timestamp::ZERO;
//! let mut sender = Sender::new(&config, now);
//! let mut receiver: Receiver<Vec<u8>> = Receiver::new(stream, 0, limits, now);
//! let mut feedback = Feedback::new(stream);
//!
//! // One batch of 3,000 bytes takes three packets; the second gets lost.
//! sender.push(3000, 1, 0);
//! let mut sent = 0;
//! while sender.committed() == 0 {
//!     while let Some(packet) = sender.poll_transmit(now) {
//!         sent += 1;
//!         if sent == 2 {
//!             continue;
//!         }
//!         let Outgoing::Payload { chunk, len } = packet.what else {
//!             continue;
//!         };
//!         if let Ok(offer) = receiver.offer(packet.packet, &chunk, len) {
//!             let room = || vec![0; chunk.batch.len as usize];
//!             // Here the caller would copy the payload into the room.
//!             offer.or_open(room).placed(now);
//!         }
//!         while let Some((batch, room)) = receiver.next_complete() {
//!             assert_eq!((batch.seq, room.len()), (0, 3000));
//!         }
//!     }
//!     now += Nanos::from_millis(1);
//!     receiver.feedback(now, false, &mut feedback);
//!     sender.on_feedback(now, &feedback)?;
//!     if sender.next_timeout() <= now {
//!         sender.on_timeout(now);
//!     }
//! }
//! assert!(sent > 3, "what was lost went out again, as a packet of its own");
//! # Ok::<(), penstock_transport::AckFault>(())
//! ```

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
