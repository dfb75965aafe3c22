//! Publishes messages to brokers: batches them, spreads batches over brokers and streams, and
//! counts a message as delivered only when its acknowledgement came.
//!
//! ```no_run
//! use penstock_publisher::{Config, Publisher};
//!
//! # fn main() -> Result<(), penstock_publisher::Error> {
//! let config = Config::new(["10.0.0.1:1214".to_owned(), "10.0.0.2:1214".to_owned()], "trades");
//! let mut publisher = Publisher::connect(config)?;
//! publisher.publish(b"a message")?;
//! let summary = publisher.close()?;
//! assert_eq!(summary.messages_acked, 1);
//! # Ok(())
//! # }
//! ```
//!
//! The caller's thread fills batches ([`Publisher::publish`], `batch`); an I/O thread, or a few of them, drive all
//! streams, each with a connection of its own (`stream`), over the sockets of `net`.

mod batch;
mod batch_builder;
mod config;
mod error;
mod failure;
mod latency;
mod linger;
mod net;
#[doc(hidden)]
pub mod program;
mod publisher;
mod session_opener;
mod shared;
mod stream;
mod summary;

pub use config::{Config, Mode, Transmit};
pub use error::Error;
pub use latency::AckLatency;
pub use net::af_xdp::TransmitError;
pub use publisher::{Canceller, Progress, Publisher};
pub use summary::{BrokerSummary, StreamSummary, Summary, TransportSummary};
