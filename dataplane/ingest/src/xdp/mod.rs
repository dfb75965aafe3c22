//! The xdp path: datagrams that an XDP program steers to AF_XDP sockets, placed by workers at their
//! final offset in the log.
//!
//! A stream is opened over tcp like any other; its connection stays for control: the end of the
//! stream, and what goes wrong. Its payload comes to a [`Port`](penstock_xsk::Port), one for each receive
//! queue; a [`Worker`] drives ports and, for each stream, the receiving end of [`penstock_transport`].

mod gate;
mod key_hasher;
mod registry;
mod stats;
mod stream;
mod worker;

pub use gate::Gate;
pub use registry::Registry;
pub use stats::{WorkerSnapshot, XdpStats};
pub use worker::{Polling, Worker, WorkerConfig, WorkerHandle, bench_support};

/// Bytes of batches that a stream may send before the first ACK.
pub const FIRST_CREDIT: u64 = 64 << 10;
