//! A reader inside the broker that names batches by their place in the file, so that the kernel can send them from
//! there, and that releases them when the remote subscriber has them.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cursor::{Cursor, Next, Start};
use super::registered_reader::RegisteredReader;
use super::slot::Descriptor;
use super::{Log, OpenError, ReadError};

/// A committed batch where it lies in the log's file.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Position in the log, rising by one.
    pub index: u64,
    /// What the log keeps about the batch.
    pub descriptor: Descriptor,
    /// Offset of the payload in the file, bytes.
    pub file_offset: u64,
}

/// Reads the batches of an open log, in the order of their commit, without touching their payload.
#[derive(Debug)]
pub struct SpanReader {
    log: Arc<Log>,
    registration: Option<RegisteredReader>,
    cursor: Cursor,
}

impl SpanReader {
    /// A reader of `log`; a registered one makes the log wait for [`Self::release`].
    ///
    /// # Errors
    /// [`OpenError`] if the log has no such batch, or the reader cannot be registered.
    pub fn new(log: Arc<Log>, start: Start, is_registered: bool) -> Result<Self, OpenError> {
        let cursor = Cursor::new(log.mapping(), start)?;
        // A registry may be there that an earlier broker made.
        if is_registered && !log.waits_for_readers() {
            return Err(OpenError::NoRegistry(log.path().with_extension("readers")));
        }
        let register = || RegisteredReader::new(log.mapping(), cursor.oldest_needed(log.mapping()));
        let registration = is_registered.then(register).transpose()?;
        Ok(Self {
            log,
            registration,
            cursor,
        })
    }

    /// Index of the batch that [`Self::next`] returns, or skips.
    #[must_use]
    pub fn next_index(&self) -> u64 {
        self.cursor.next
    }

    /// Whether there is no batch to read yet.
    #[must_use]
    pub fn is_caught_up(&self) -> bool {
        matches!(self.cursor.find(self.log.mapping()), Next::NotYet)
    }

    /// Payload bytes of the next batch, if there is one.
    #[must_use]
    pub fn next_len(&self) -> Option<u32> {
        match self.cursor.find(self.log.mapping()) {
            Next::Here(descriptor, _) => Some(descriptor.payload_len),
            Next::NotYet | Next::Overwritten | Next::Damaged => None,
        }
    }

    /// The next batch, or `None` if there is none yet. Never blocks. Its bytes may be overwritten at any time, unless
    /// the reader is registered and the batch not released: [`Self::is_whole`] tells afterwards.
    ///
    /// # Errors
    /// [`ReadError`] says what was skipped; the next call continues after it.
    // Named as the reader's; an iterator would end where this waits.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Span>, ReadError> {
        let mapping = self.log.mapping();
        let is_evicted = |registration: &RegisteredReader| registration.is_evicted(mapping);
        let found = self.cursor.find(mapping);
        if !matches!(found, Next::NotYet) && self.registration.as_ref().is_some_and(is_evicted) {
            self.registration = None;
            return Err(ReadError::Evicted);
        }
        match found {
            Next::NotYet => Ok(None),
            Next::Overwritten => Err(self.skip_lost()),
            Next::Damaged => Err(self.cursor.skip_damaged()),
            Next::Here(descriptor, _) if !self.is_intact(descriptor.position) => {
                Err(self.skip_lost())
            }
            Next::Here(descriptor, totals) => {
                let span = Span {
                    index: self.cursor.next,
                    descriptor,
                    file_offset: mapping.geometry.offset_of(descriptor.position) as u64,
                };
                self.cursor.advance(totals);
                Ok(Some(span))
            }
        }
    }

    /// The payload of a span, to be copied. A writer may be overwriting it: check [`Self::is_whole`] afterwards.
    #[must_use]
    pub fn copy_payload(&self, span: &Span, into: &mut Vec<u8>) -> bool {
        let is_whole = self.log.mapping().copy_payload(&span.descriptor, into);
        is_whole || self.is_intact(span.descriptor.position)
    }

    /// Whether the payload of a span has not been overwritten until now.
    #[must_use]
    pub fn is_whole(&self, span: &Span) -> bool {
        self.is_intact(span.descriptor.position)
    }

    /// Whether writers may soon overwrite the payload of a span: it lies in the last quarter of the ring before them,
    /// and the log does not wait for this reader.
    #[must_use]
    pub fn is_endangered(&self, span: &Span) -> bool {
        let ring = self.log.mapping().ring();
        let tail = ring.control.tail.load(Ordering::Relaxed);
        let size = ring.geometry.ring_bytes();
        self.registration.is_none() && tail + size / 4 > span.descriptor.position + size
    }

    /// Whether this reader is registered and leaves writers no room.
    #[must_use]
    pub fn holds_up(&self) -> bool {
        self.registration.as_ref().is_some_and(|reader| {
            let (_, _, holds_up) = self.log.mapping().ring().lag_of(reader.announced_cursor());
            holds_up
        })
    }

    /// Nobody needs what is lost, so the log does not wait for it.
    fn skip_lost(&mut self) -> ReadError {
        let lost = self.cursor.skip_lost(self.log.mapping());
        self.release(self.cursor.next);
        lost
    }

    fn is_intact(&self, position: u64) -> bool {
        let mapping = self.log.mapping();
        let ring = mapping.ring();
        let registered = self.registration.as_ref();
        ring.is_whole(position)
            || registered.is_some_and(|reader| {
                ring.can_borrow(position) || reader.has_kept(mapping, position)
            })
    }

    /// Lets the log overwrite all batches below `needed_from`; a no-op if the reader is not registered.
    pub fn release(&mut self, needed_from: u64) {
        if let Some(registration) = &mut self.registration
            && needed_from > registration.announced_cursor()
        {
            registration.announce(needed_from);
        }
    }
}
