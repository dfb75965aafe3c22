//! Observes a running TCP server for some seconds and says what limits it, with the evidence.
//!
//! [`observe()`] samples sockets, threads, system calls, interfaces and the figures of a Penstock broker; the result is a [`sample::Sample`]. `facts` condenses it to a few numbers, and the table in
//! `rules` turns these into verdicts ([`verdict`]).

pub mod broker_stats;
mod clue;
pub mod cpu;
mod facts;
pub mod interfaces;
pub mod namespaces;
mod observe;
pub mod other_processes;
mod processes;
mod routes;
mod rules;
pub mod sample;
pub mod settings;
pub mod sockets;
mod syscalls;
mod target;
pub mod tcp_info;
pub mod verdict;

pub use observe::observe;
pub use target::Target;
pub use verdict::Diagnosis;

/// Every cause that a verdict can name, by its identifier, with its title.
pub fn causes() -> impl Iterator<Item = (&'static str, &'static str)> {
    rules::CAUSES.iter().map(|cause| (cause.id, cause.title))
}
