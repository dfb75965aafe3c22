//! Streams: an I/O thread drives many of them, each over a connection of its own that is replaced when it is
//! lost.
//!
//! [`connect`] opens a connection, [`tcp`] or [`datagram`] carries batches over it, [`silence`] detects that nobody
//! answers, [`resume`] opens the next one, [`search`] finds another broker for the stream and [`return_home`] leads
//! it back; [`driver`] is the state machine of one stream.

pub(crate) mod brokers;
pub(crate) mod connect;
pub(crate) mod connection;
mod datagram;
mod datagram_tx;
mod driver;
mod frame_writer;
mod in_flight_batches;
pub(crate) mod io_thread;
pub(crate) mod metrics;
mod progress;
mod replies;
mod resume;
mod return_home;
pub(crate) mod search;
mod silence;
mod tcp;
pub(crate) mod waker;
