//! The broker's side of both paths: what publishers may take, and workers that place their payload in the log.
//!
//! Data flows one way: [`session`] admits a stream, and [`tcp`] or [`xdp`] receives what [`penstock_wire`]
//! describes straight into the shared buffer of [`penstock_log`]. The two paths know nothing of each other.

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod session;
pub mod tcp;
pub mod xdp;
