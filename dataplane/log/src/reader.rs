//! The reader: follows the frontier from any process, and never returns a torn batch.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::Ordering;

use penstock_wire::batch;
use thiserror::Error;

use super::mapping::{LogInfo, Mapping};
use super::registry::Registry;
use super::ring::FREE;
use super::slot::{Descriptor, Found, Totals};
use super::{OpenError, ReadError};

/// Where a reader starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// At the oldest batch in the log.
    Oldest,
    /// Behind the newest batch.
    End,
}

/// A committed batch, as a reader sees it.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    /// Position in the log, rising by one.
    pub index: u64,
    /// Session that sent it.
    pub session: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// Position in the stream.
    pub batch_seq: u64,
    /// Number of messages, according to the publisher.
    pub messages: u32,
    /// CRC32C that the publisher computed.
    pub checksum: u32,
    /// When the broker had received the whole batch, nanoseconds since the Unix epoch.
    pub arrival_unix_ns: u64,
    /// The messages; see [`penstock_wire::message::Messages`].
    pub payload: &'a [u8],
}

/// The bytes of a batch differ from those that its publisher sent.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
#[error(
    "batch {index} (stream {stream}, sequence {batch_seq}): CRC32C is {computed:#010x}, its publisher sent {sent:#010x}"
)]
pub struct ChecksumMismatch {
    /// Position in the log.
    pub index: u64,
    /// Stream inside the session.
    pub stream: u32,
    /// Position in the stream.
    pub batch_seq: u64,
    /// Checksum of the bytes in the log.
    pub computed: u32,
    /// Checksum that the publisher sent.
    pub sent: u32,
}

impl Batch<'_> {
    /// Compares the batch with its checksum.
    ///
    /// # Errors
    /// [`ChecksumMismatch`] names the batch.
    pub fn verify(&self) -> Result<(), ChecksumMismatch> {
        let computed = batch::checksum(self.batch_seq, self.messages, self.payload);
        if computed == self.checksum {
            return Ok(());
        }
        let Self {
            index,
            stream,
            batch_seq,
            checksum: sent,
            ..
        } = *self;
        Err(ChecksumMismatch {
            index,
            stream,
            batch_seq,
            computed,
            sent,
        })
    }
}

/// Reads the batches of a log, in the order of their commit.
#[derive(Debug)]
pub struct Reader {
    mapping: Mapping,
    registered: Option<Registered>,
    /// Index of the next batch.
    next: u64,
    /// Messages below `next`, to compute how many were lost when lapped.
    messages_below: u64,
    overwritten: Overwritten,
    copy: Vec<u8>,
}

/// A reader's slot in the registry.
#[derive(Debug)]
struct Registered {
    registry: Registry,
    slot: usize,
    /// The last value written to the slot; `None` if writing failed.
    announced: Option<u64>,
}

impl Registered {
    /// Announces that batches from `cursor` on are needed; returns whether that was written.
    fn announce(&mut self, cursor: u64) -> bool {
        if self.announced != Some(cursor) {
            let written = self.registry.announce(self.slot, cursor);
            self.announced = written.is_ok().then_some(cursor);
        }
        self.announced.is_some()
    }
}

/// Totals of a log that have been overwritten.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Overwritten {
    /// Batches.
    pub batches: u64,
    /// Messages.
    pub messages: u64,
    /// Message bytes, without framing.
    pub payload_bytes: u64,
}

/// The position of a batch whose bytes are not validated yet.
enum Next {
    Here(Descriptor, Totals),
    NotYet,
    Overwritten,
    Damaged,
}

impl Reader {
    /// Maps the log at `path`, read-only.
    ///
    /// # Errors
    /// [`OpenError`] when there is no such file or it is no log of this version.
    pub fn open(path: &Path, start: Start) -> Result<Self, OpenError> {
        let mapping = Mapping::open_read_only(path)?;
        let mut reader = Self {
            mapping,
            registered: None,
            next: 0,
            messages_below: 0,
            overwritten: Overwritten::default(),
            copy: Vec::new(),
        };
        let (oldest, below) = reader.oldest_from(0);
        reader.overwritten = Overwritten {
            batches: oldest,
            messages: below.messages,
            payload_bytes: below.payload_bytes,
        };
        match start {
            Start::Oldest => {
                (reader.next, reader.messages_below) = (oldest, below.messages);
            }
            Start::End => {
                let info = reader.mapping.info();
                (reader.next, reader.messages_below) = (info.batches, info.messages);
            }
        }
        Ok(reader)
    }

    /// Makes a broker with `--full block` wait for this reader. Needs write permission for the
    /// `.readers` file beside the log. Batches that are overwritten before the broker sees the
    /// registration are reported as [`ReadError::Lapped`].
    ///
    /// # Errors
    /// [`OpenError`] when there is no registry, or it cannot be written or is full.
    pub fn register(&mut self) -> Result<(), OpenError> {
        if self.registered.is_none() {
            let about = self.mapping.file.metadata();
            let about = about.map_err(OpenError::io("look at", &self.mapping.path))?;
            let registry = Registry::open(&self.mapping.path, about.uid())?;
            let slot = registry.register(self.next, self.epoch())?;
            self.registered = Some(Registered {
                registry,
                slot,
                announced: Some(self.next),
            });
        }
        Ok(())
    }

    /// The next batch, or `None` if there is none yet. Never blocks, and never returns bytes that
    /// a writer has touched since they were committed: a registered reader of a log with
    /// `--full block` sees them in place, others get a copy that was validated afterwards.
    ///
    /// # Errors
    /// [`ReadError`] says what was skipped; the next call continues after it.
    // Named as what it does; an Iterator cannot lend from itself.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Batch<'_>>, ReadError> {
        let index = self.next;
        let is_waited_for = self
            .registered
            .as_mut()
            .is_some_and(|registered| registered.announce(index));
        let found = self.find(index);
        if is_waited_for && !matches!(found, Next::NotYet) && self.is_evicted() {
            self.registered = None;
            return Err(ReadError::Evicted);
        }
        let (descriptor, totals) = match found {
            Next::Here(descriptor, totals) => (descriptor, totals),
            Next::NotYet => return Ok(None),
            Next::Overwritten => return Err(self.skip_lost()),
            Next::Damaged => {
                self.next += 1;
                return Err(ReadError::Damaged { index });
            }
        };
        let lent = is_waited_for && self.mapping.ring().can_borrow(descriptor.position);
        if !lent && !self.copy_payload(&descriptor) {
            return Err(self.skip_lost());
        }
        self.next += 1;
        self.messages_below = totals.messages;
        Ok(Some(self.batch(index, &descriptor, lent)))
    }

    /// Whether a broker has the log open for writing.
    #[must_use]
    pub fn writer_is_alive(&self) -> bool {
        // If the file cannot be queried, assume that a writer exists.
        self.mapping.is_written().unwrap_or(true)
    }

    /// The current figures of the log.
    #[must_use]
    pub fn info(&self) -> LogInfo {
        self.mapping.info()
    }

    /// What the log no longer held when this reader opened it, regardless of where it started.
    #[must_use]
    pub fn overwritten(&self) -> Overwritten {
        self.overwritten
    }

    fn epoch(&self) -> u64 {
        self.mapping.epoch().load(Ordering::Acquire)
    }

    /// Whether the broker has evicted this reader. Only a broker that lets no reader borrow payload
    /// evicts.
    fn is_evicted(&self) -> bool {
        let evicted = |registered: &Registered| {
            let asked = registered
                .registry
                .is_evicted(registered.slot, self.epoch());
            // If the notice cannot be read, the reader is lapped at worst.
            asked.unwrap_or(false)
        };
        self.mapping.ring().lends_nothing() && self.registered.as_ref().is_some_and(evicted)
    }

    fn find(&self, index: u64) -> Next {
        let ring = self.mapping.ring();
        if index >= ring.frontier() {
            return Next::NotYet;
        }
        match ring.slot(index).read(index) {
            Found::Published(d, totals) if ring.geometry.may_hold(&d) => Next::Here(d, totals),
            Found::Published(..) | Found::Damaged => Next::Damaged,
            // It is below the frontier, so it was committed: a writer is overwriting it.
            Found::NotYet | Found::Overwritten => Next::Overwritten,
        }
    }

    fn copy_payload(&mut self, d: &Descriptor) -> bool {
        let len = d.payload_len as usize;
        self.copy.clear();
        self.copy.reserve(len);
        // SAFETY: `find` ensures that the batch lies inside one segment of the mapping, and `copy` has room for
        // it. A writer may be overwriting the bytes: then the copy is garbage, which `is_whole` detects, and
        // it is not returned. Any bytes are valid `u8`s.
        unsafe {
            self.copy
                .as_mut_ptr()
                .copy_from_nonoverlapping(self.payload_at(d.position), len);
            self.copy.set_len(len);
        }
        self.mapping.ring().is_whole(d.position)
    }

    fn payload_at(&self, position: u64) -> *const u8 {
        // SAFETY: `offset_of` lies inside the mapping for every position.
        unsafe {
            self.mapping
                .base()
                .add(self.mapping.geometry.offset_of(position))
        }
    }

    fn batch(&self, index: u64, d: &Descriptor, lent: bool) -> Batch<'_> {
        let payload = match lent {
            // SAFETY: the batch lies inside one segment of the mapping, which lives as long as
            // self. `can_borrow` said that no writer has been granted this memory, and none will be
            // before the cursor moves, which takes `&mut self` and so ends this borrow.
            true => unsafe {
                std::slice::from_raw_parts(self.payload_at(d.position), d.payload_len as usize)
            },
            false => &self.copy[..],
        };
        Batch {
            index,
            session: d.session,
            stream: d.stream,
            batch_seq: d.batch_seq,
            messages: d.messages,
            checksum: d.checksum,
            arrival_unix_ns: d.arrival_unix_ns,
            payload,
        }
    }

    /// Moves to the oldest batch that is still whole, and returns what was skipped.
    fn skip_lost(&mut self) -> ReadError {
        let (next, below) = self.oldest_from(self.next + 1);
        let lost = ReadError::Lapped {
            batches: next - self.next,
            messages: below.messages.saturating_sub(self.messages_below),
        };
        (self.next, self.messages_below) = (next, below.messages);
        lost
    }

    /// The oldest whole batch from `index` on, and the totals below it.
    fn oldest_from(&self, index: u64) -> (u64, Totals) {
        let ring = self.mapping.ring();
        let mut index = index;
        loop {
            let frontier = ring.frontier();
            index = index.max(frontier.saturating_sub(ring.geometry.index_slots()));
            if index >= frontier {
                let info = self.mapping.info();
                if info.batches <= index {
                    let below = Totals {
                        messages: info.messages,
                        payload_bytes: info.payload_bytes,
                    };
                    return (info.batches, below);
                }
                continue;
            }
            if let Next::Here(descriptor, totals) = self.find(index)
                && ring.is_whole(descriptor.position)
            {
                // Totals are not covered by the check word: a damaged file may have too small ones.
                let below = Totals {
                    messages: totals.messages.saturating_sub(descriptor.messages.into()),
                    payload_bytes: totals
                        .payload_bytes
                        .saturating_sub(descriptor.message_bytes()),
                };
                return (index, below);
            }
            index += 1;
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        if let Some(Registered { registry, slot, .. }) = &self.registered {
            // Best effort: the broker frees the slots of dead readers.
            let _ = registry.announce(*slot, FREE);
        }
    }
}
