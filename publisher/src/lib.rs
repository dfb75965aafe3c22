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
//! The caller's thread fills batches ([`Publisher::publish`], `open_batch`); an I/O thread (`io_thread`), or a few of them,
//! drive all streams, each with a connection of its own (`stream`, `datagram`), and `window` keeps account
//! of what is acked.

mod account;
mod af_xdp;
mod config;
mod connect;
mod datagram;
mod driver;
mod error;
mod failure;
mod frame_writer;
mod happy_eyeballs;
mod io_thread;
mod latency;
mod link;
mod open_batch;
mod opening;
mod payload;
mod pool;
mod progress;
mod publisher;
mod reconnect;
mod replies;
mod route;
mod sending;
mod stream;
mod summary;
mod tx_queues;
mod udp;
mod waker;
mod window;

pub use af_xdp::TransmitError;
pub use config::{Config, Mode, Transmit};
pub use error::Error;
pub use latency::AckLatency;
pub use publisher::{Canceller, Progress, Publisher};
pub use summary::{BrokerSummary, StreamSummary, Summary, TransportSummary};
