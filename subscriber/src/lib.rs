//! Reads a topic's shared buffer from another process: batches in the order of their commit,
//! checked on request, with an account per stream.
//!
//! ```no_run
//! use std::path::Path;
//! use penstock_subscriber::{Event, Start, Subscriber};
//!
//! # fn main() -> Result<(), penstock_subscriber::OpenError> {
//! let log = Path::new("/dev/shm/penstock/trades.log");
//! let mut subscriber = Subscriber::open(log, Start::Oldest)?;
//! loop {
//!     match subscriber.next() {
//!         Event::Batch(batch) => {
//!             for message in batch.messages().flatten() {
//!                 println!("{} bytes from stream {}", message.len(), batch.stream);
//!             }
//!         }
//!         Event::Lost { messages, .. } => eprintln!("{messages} messages were overwritten"),
//!         Event::Damaged { index } => eprintln!("batch {index} is damaged"),
//!         Event::Evicted => eprintln!("evicted for reading too slowly; reading on unregistered"),
//!         Event::Idle => subscriber.rest(),
//!     }
//! }
//! # }
//! ```

mod account;
#[doc(hidden)]
pub mod program;
mod subscriber;

pub use account::{Account, StreamAccount, Trouble};
pub use penstock_log::{Batch, OpenError, Start};
pub use subscriber::{Event, Received, Subscriber};
