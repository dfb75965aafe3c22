//! AF_XDP sockets: their packet memory, their rings, and the headers of the frames in them.
//!
//! A broker receives from a [`XskRxSocket`] of each receive queue; a publisher that has a transmit queue
//! to itself sends through a [`XskTxSocket`]. This is the only crate that uses xsk-rs, and with it libbpf.

mod error;
mod fragments;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod prefetch;
mod rings;
mod rx_socket;
mod tx_socket;

pub use error::Error;
pub use fragments::{FragmentReader, Fragments};
pub use frame::{Endpoint, FrameTemplate};
pub use rx_socket::{
    BURST, ETHERNET, HEADROOM, LONGEST_PACKET, MAX_BUFFERS, XskRxConfig, XskRxSocket, XskRxStats,
    fits, frame_size, packet_memory,
};
pub use tx_socket::{XskTxConfig, XskTxSocket, XskTxStats};
