//! The xdp path: datagrams that an XDP program steers to AF_XDP sockets, placed by workers at their
//! final offset in the log.
//!
//! A stream is opened over tcp like any other; its connection stays for control: the end of the
//! stream, and what goes wrong. Its payload arrives at the [`XskRxSocket`](penstock_xsk::XskRxSocket) of a
//! receive queue; a [`Worker`] drives such sockets and, for each stream, the receiving end of [`penstock_transport`].

mod ack_route;
mod close_reason;
mod control_connection;
mod key_hasher;
mod stats;
mod stream;
mod worker;

pub use stats::{WorkerSnapshot, XdpStats};
pub use worker::{Polling, Worker, WorkerConfig, WorkerHandle, bench_support};
