//! The broker's side of both paths: what publishers may take, and workers that place their payload in the log.
//!
//! Data flows one way: [`tcp`] and [`xdp`] receive what [`penstock_wire`] describes straight into the
//! shared buffer of [`penstock_log`].

pub mod admission;
pub mod claims;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod log_quota;
pub mod peer;
pub mod permits;
pub mod shares;
pub mod tcp;
pub mod xdp;
