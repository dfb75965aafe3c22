//! The broker's side of both paths: what publishers may take, and workers that place their payload in the log.
//!
//! Data flows one way: [`session`] admits a stream, and [`tcp`] or [`xdp`] receives what [`penstock_wire`]
//! describes straight into the shared buffer of [`penstock_log`]. The two paths know nothing of each other.
//!
//! A broker of your own needs an [`Admit`](session::admission::Admit), an [`Acceptor`](session::Acceptor) and workers.
//! This is all of `examples/embed.rs`:
//!
#![doc = concat!("```no_run\n", include_str!("../../../examples/embed.rs"), "```")]

#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod session;
pub mod tcp;
pub mod xdp;
