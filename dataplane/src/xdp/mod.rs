//! The xdp path: datagrams that an XDP program steers to AF_XDP sockets, placed by workers at their
//! final offset in the log.
//!
//! A stream is opened over tcp like any other; its connection stays for control: the end of the
//! stream, and what goes wrong. Its payload comes to a [`Port`], one for each receive queue; a
//! [`Worker`] drives ports and, for each stream, the receiving end of [`penstock_transport`]. A
//! publisher that has a transmit queue to itself sends through a [`TxPort`].

mod error;
pub(crate) mod frame;
mod gate;
mod key_hasher;
mod pieces;
mod port;
mod prefetch;
mod registry;
mod socket;
mod stats;
mod stream;
mod tx_port;
mod worker;

pub use error::Error;
pub use frame::{Endpoint, Headers};
pub use gate::Gate;
pub use port::{
    ETHERNET, HEADROOM, LONGEST_PACKET, MAX_BUFFERS, Port, PortConfig, PortStats, fits, frame_size,
    packet_memory,
};
pub use registry::Registry;
pub use stats::{WorkerNow, XdpStats};
pub use tx_port::{TxPort, TxPortConfig, TxStats};
pub use worker::{Polling, Worker, WorkerConfig, WorkerHandle, bench_support};

/// Bytes of batches that a stream may send before the first ACK.
pub const FIRST_CREDIT: u64 = 64 << 10;
