//! Reads a topic from its brokers over the network: [`RemoteSubscriber`].
//!
//! A thread for each broker receives its log (`broker_reader`, with the bytes put together in `deliveries` and the
//! credit in `flow`), and the caller merges them (`merge`): each stream in its order, each batch once, also when a
//! stream moved to another broker.

mod broker_reader;
mod config;
mod deliveries;
mod error;
mod event;
mod flow;
mod merge;
mod outstanding;
mod position;
mod report;
mod subscriber;

pub use config::{RemoteConfig, RemoteStart};
pub use error::Error;
pub use event::{Delivered, RemoteEvent};
pub use position::{LogPosition, Position, StreamPosition};
pub use report::{BrokerReport, RemoteReport};
pub use subscriber::RemoteSubscriber;
