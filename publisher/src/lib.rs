//! Publishes messages to brokers: batches them, spreads batches over brokers and streams, and
//! counts a message as delivered only when its acknowledgement came.
//!
//! ```
//! use penstock_publisher::{Config, Publisher};
//! # mod embed { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/embed.rs")); }
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let dir = tempfile::tempdir()?;
//! # let log = dir.path().join("trades.log");
//! # let listener = penstock_ingest::session::listen("127.0.0.1:0".parse()?, &embed::BUFFERS)?;
//! # let broker = listener.local_addr()?.to_string();
//! # std::thread::spawn(move || embed::serve(listener, &log));
//!
//! // One broker or more, such as 10.0.0.1:1214.
//! let config = Config::new([broker], "trades");
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

pub use config::{Config, Mode, OnBrokerLoss, Transmit};
pub use error::Error;
pub use latency::AckLatency;
pub use net::af_xdp::TransmitError;
pub use publisher::{Canceller, Progress, Publisher};
pub use summary::{BrokerSummary, StreamSummary, Summary, TransportSummary};
