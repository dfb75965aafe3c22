//! The reader: follows the frontier from any process, and never returns a torn batch.

use std::path::Path;

use penstock_wire::batch;
use thiserror::Error;

use super::cursor::{Cursor, Next, Start, oldest_from};
use super::mapping::{LogInfo, Mapping};
use super::registered_reader::RegisteredReader;
use super::slot::Descriptor;
use super::{OpenError, ReadError};

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
    registration: Option<RegisteredReader>,
    cursor: Cursor,
    overwritten: Overwritten,
    copy: Vec<u8>,
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

impl Reader {
    /// Maps the log at `path`, read-only.
    ///
    /// # Errors
    /// [`OpenError`] when there is no such file, it is no log of this version, or it has no such batch.
    pub fn open(path: &Path, start: Start) -> Result<Self, OpenError> {
        let mapping = Mapping::open_read_only(path)?;
        let cursor = Cursor::new(&mapping, start)?;
        let (oldest, below) = oldest_from(&mapping, 0);
        Ok(Self {
            mapping,
            registration: None,
            cursor,
            overwritten: Overwritten {
                batches: oldest,
                messages: below.messages,
                payload_bytes: below.payload_bytes,
            },
            copy: Vec::new(),
        })
    }

    /// Makes a broker with `--full block` wait for this reader. Needs write permission for the
    /// `.readers` file beside the log. Batches that are overwritten before the broker sees the
    /// registration are reported as [`ReadError::Lapped`].
    ///
    /// # Errors
    /// [`OpenError`] when there is no registry, or it cannot be written or is full.
    pub fn register(&mut self) -> Result<(), OpenError> {
        if self.registration.is_none() {
            self.registration = Some(RegisteredReader::new(
                &self.mapping,
                self.cursor.oldest_needed(&self.mapping),
            )?);
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
        let index = self.cursor.next;
        let is_waited_for = self
            .registration
            .as_mut()
            .is_some_and(|registration| registration.announce(index));
        let found = self.cursor.find(&self.mapping);
        if is_waited_for && !matches!(found, Next::NotYet) && self.is_evicted() {
            self.registration = None;
            return Err(ReadError::Evicted);
        }
        let (descriptor, totals) = match found {
            Next::Here(descriptor, totals) => (descriptor, totals),
            Next::NotYet => return Ok(None),
            Next::Overwritten => return Err(self.cursor.skip_lost(&self.mapping)),
            Next::Damaged => return Err(self.cursor.skip_damaged()),
        };
        let lent = is_waited_for && self.mapping.ring().can_borrow(descriptor.position);
        let is_intact = lent
            || self.mapping.copy_payload(&descriptor, &mut self.copy)
            || self.is_kept(descriptor.position);
        if !is_intact {
            return Err(self.cursor.skip_lost(&self.mapping));
        }
        self.cursor.advance(totals);
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

    fn is_kept(&self, position: u64) -> bool {
        let reader = self.registration.as_ref();
        reader.is_some_and(|reader| reader.has_kept(&self.mapping, position))
    }

    fn is_evicted(&self) -> bool {
        let registration = self.registration.as_ref();
        registration.is_some_and(|registration| registration.is_evicted(&self.mapping))
    }

    fn batch(&self, index: u64, d: &Descriptor, lent: bool) -> Batch<'_> {
        let payload = match lent {
            // SAFETY: the batch lies inside one segment of the mapping, which lives as long as
            // self. `can_borrow` said that no writer has been granted this memory, and none will be
            // before the cursor moves, which takes `&mut self` and so ends this borrow.
            true => unsafe {
                std::slice::from_raw_parts(
                    self.mapping.payload_at(d.position),
                    d.payload_len as usize,
                )
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
}
