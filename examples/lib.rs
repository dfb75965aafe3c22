//! Programs to copy from. Each runs with `cargo run -p penstock-examples --example NAME`:
//!
//! - `embed`: a broker of your own around the ingest path;
//! - `publish`: sends messages and waits until all of them are committed;
//! - `read_in_place`: reads them from the shared buffer without a copy;
//! - `read_remote`: reads them from the topic's brokers over the network.
//!
//! `tests/run.rs` runs them.
