//! The shared buffer: one memory-mapped file per topic that a broker fills and others read.
//!
//! The steps of a payload byte: [`Writer::reserve`] reserves room with one atomic add, the path (tcp, xdp)
//! places bytes there in any order, [`Writer::commit`] publishes a descriptor in the batch index,
//! and the **frontier** moves over it. A [`Reader`] in any process follows the frontier.
//!
//! - [`layout`] alone knows offsets in the file;
//! - [`ring`] is the algorithm, free of files, so that a model checker can run it;
//! - [`slot`] is one entry of the batch index;
//! - `file` creates, maps and recovers a log; `writer_lock` ensures that only one broker writes it;
//! - `registry` lists readers that a broker waits for; `access` defines which users may register and read;
//! - `sigbus` reports logs that are shortened while they are mapped.
//!
//! ```
//! use std::sync::Arc;
//! use penstock_log::{Access, Commit, Geometry, Log, LogOptions, Reader, RingFullPolicy, Start};
//! use penstock_wire::batch;
//!
//! # let dir = tempfile::tempdir()?;
//! # let path = dir.path().join("trades.log");
//! let options = LogOptions {
//!     geometry: Geometry::new(1 << 20, 1 << 17, 1 << 10)?,
//!     full: RingFullPolicy::Block,
//!     access: Access::default(),
//!     writers: 1,
//! };
//! let log = Arc::new(Log::open(&path, &options)?);
//! let mut writer = log.writer();
//!
//! // Reserve, place, commit.
//! let payload = b"\x05\0\0\0hello";
//! let reservation = writer.reserve(payload.len() as u32);
//! assert!(writer.is_granted(&reservation), "no reader needs these bytes");
//! writer.place(&reservation, 0, payload);
//! let index = writer.commit(reservation, &Commit {
//!     session: 1,
//!     stream: 0,
//!     batch_seq: 0,
//!     messages: 1,
//!     checksum: batch::checksum(0, 1, payload),
//!     arrival_unix_ns: 0,
//! });
//! assert!(writer.frontier() > index, "visible to readers");
//!
//! // Another process would do the same.
//! let mut reader = Reader::open(&path, Start::Oldest)?;
//! reader.register()?;
//! let batch = reader.next()?.expect("one batch is committed");
//! batch.verify()?;
//! assert_eq!(batch.payload, payload);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod layout;
pub mod ring;
pub mod slot;
mod sync;

pub use layout::Geometry;

#[cfg(all(test, loom))]
mod loom_models;

// Under loom only the algorithm is built: its atomics cannot lie in a mapped file.
#[cfg(not(loom))]
mod access;
#[cfg(not(loom))]
mod allocation;
#[cfg(all(test, not(loom)))]
mod crash_tests;
#[cfg(not(loom))]
mod cursor;
#[cfg(not(loom))]
mod error;
#[cfg(not(loom))]
mod file;
#[cfg(all(any(test, fuzzing), not(loom)))]
pub mod fuzzing;
#[cfg(all(any(test, fuzzing), not(loom)))]
mod harness;
#[cfg(not(loom))]
mod lock;
#[cfg(not(loom))]
mod mapping;
#[cfg(not(loom))]
mod reader;
#[cfg(not(loom))]
mod recovery;
#[cfg(not(loom))]
mod registered_reader;
#[cfg(not(loom))]
mod registry;
#[cfg(not(loom))]
mod sigbus;
#[cfg(not(loom))]
mod span_reader;
#[cfg(all(test, not(loom)))]
mod tests;
#[cfg(not(loom))]
mod watch;
#[cfg(not(loom))]
mod writer;
#[cfg(not(loom))]
mod writer_lock;
#[cfg(not(loom))]
mod writers;

#[cfg(not(loom))]
pub use writers::Writers;
#[cfg(not(loom))]
pub use {
    access::Access,
    cursor::Start,
    error::{OpenError, ReadError},
    file::{FileState, Log, LogOptions, Lost, ReaderInfo, RingFullPolicy},
    mapping::LogInfo,
    reader::{Batch, ChecksumMismatch, Overwritten, Reader},
    sigbus::{notify_shortened_logs, report_shortened_logs},
    span_reader::{Span, SpanReader},
    writer::{Commit, Region, Reservation, Writer},
};
