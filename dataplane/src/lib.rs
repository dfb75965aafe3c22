//! Everything that a payload byte passes through, from the wire to the reader.
//!
//! Data flows one way: [`tcp`] receives what [`wire`] describes straight into the shared buffer of
//! [`log`]. `wire` and the protocol logic touch no socket,
//! no clock and no randomness.

#[cfg(not(loom))]
pub mod admission;
#[cfg(not(loom))]
pub mod claims;
#[cfg(all(any(test, fuzzing), not(loom)))]
pub mod fuzzing;
pub mod log;
#[cfg(not(loom))]
mod log_quota;
#[cfg(not(loom))]
pub mod peer;
#[cfg(not(loom))]
pub mod permits;
#[cfg(not(loom))]
pub mod shares;
#[cfg(not(loom))]
pub mod tcp;
#[cfg(not(loom))]
pub mod transport;
#[cfg(not(loom))]
pub mod xdp;
