//! AF_XDP sockets: their packet memory, their rings, and the headers of the frames in them.
//!
//! A broker receives from a [`Port`], one for each receive queue; a publisher that has a transmit queue
//! to itself sends through a [`TxPort`]. This is the only crate that uses xsk-rs, and with it libbpf.

mod error;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod pieces;
mod port;
pub mod prefetch;
mod socket;
mod tx_port;

pub use error::Error;
pub use frame::{Endpoint, Headers};
pub use pieces::{Parts, Pieces};
pub use port::{
    BURST, ETHERNET, HEADROOM, LONGEST_PACKET, MAX_BUFFERS, Port, PortConfig, PortStats, fits,
    frame_size, packet_memory,
};
pub use tx_port::{TxPort, TxPortConfig, TxStats};
