//! Reads a topic's shared buffer from another process: batches in the order of their commit,
//! checked on request, with totals per stream.
//!
//! ```
//! use penstock_subscriber::{Event, Start, Subscriber};
//! # use std::sync::Arc;
//! # use penstock_log::{Access, Commit, Geometry, Log, LogOptions, RingFullPolicy};
//! # let dir = tempfile::tempdir()?;
//! # let log = dir.path().join("trades.log");
//! # let options = LogOptions {
//! #     geometry: Geometry::new(1 << 20, 1 << 17, 1 << 10)?,
//! #     full: RingFullPolicy::Block,
//! #     access: Access::default(),
//! #     writers: 1,
//! # };
//! # let broker = Arc::new(Log::open(&log, &options)?);
//! # let mut writer = broker.writer();
//! # let payload = b"\x05\0\0\0hello";
//! # let reservation = writer.reserve(9);
//! # assert!(writer.is_granted(&reservation));
//! # writer.place(&reservation, 0, payload);
//! # let checksum = penstock_wire::batch::checksum(0, 1, payload);
//! # let (session, stream, batch_seq, messages, arrival_unix_ns) = (1, 0, 0, 1, 0);
//! # writer.commit(reservation, &Commit { session, stream, batch_seq, messages, checksum, arrival_unix_ns });
//!
//! // Such as /dev/shm/penstock/trades.log
//! let mut subscriber = Subscriber::open(&log, Start::Oldest)?;
//! // The broker waits for this subscriber, which therefore reads without a copy.
//! subscriber.register()?;
//! let mut bytes = 0;
//! while bytes == 0 {
//!     match subscriber.next() {
//!         Event::Batch(batch) => {
//!             batch.verify()?;
//!             for message in batch.messages() {
//!                 bytes += message?.len();
//!             }
//!         }
//!         Event::Lost { messages, .. } => panic!("{messages} messages were overwritten"),
//!         Event::Damaged { index } => panic!("batch {index} is damaged"),
//!         Event::Evicted => panic!("evicted for reading too slowly"),
//!         Event::Idle => subscriber.rest(),
//!     }
//! }
//! assert_eq!(bytes, 5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

#[doc(hidden)]
pub mod program;
mod remote;
mod subscriber;
mod tally;

pub use penstock_log::{Batch, OpenError, Start};
pub use remote::{
    BrokerReport, Delivered, Error, LogPosition, Position, RemoteConfig, RemoteEvent, RemoteReport,
    RemoteStart, RemoteSubscriber, StreamPosition,
};
pub use subscriber::{Event, Received, Subscriber};
pub use tally::{StreamTotals, Tally, Trouble};
