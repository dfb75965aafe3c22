//! A reader's slot in the registry: what a broker with `--full block` waits for.

use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{Ordering, fence};

use super::OpenError;
use super::mapping::Mapping;
use super::registry::Registry;
use super::ring::FREE;

/// A registered reader. Dropping it frees the slot.
#[derive(Debug)]
pub(super) struct RegisteredReader {
    registry: Registry,
    slot: usize,
    /// The last value written to the slot; `None` if writing failed.
    announced: Option<u64>,
    /// What lies at this position or behind it is not overwritten before it is read: a writer that did not see the
    /// reader when it worked out how far it may go stays within a round of the tail of then.
    kept_from: u64,
    /// Epoch of the log's writer then. A later one may not know of the reader.
    epoch: u64,
}

impl RegisteredReader {
    /// Registers a reader that needs all batches from `cursor` on.
    pub(super) fn new(mapping: &Mapping, cursor: u64) -> Result<Self, OpenError> {
        let about = mapping.file.metadata();
        let about = about.map_err(OpenError::io("look at", &mapping.path))?;
        let registry = Registry::open(&mapping.path, about.uid())?;
        let epoch = current_epoch(mapping);
        let slot = registry.register(cursor, epoch)?;
        // Pairs with the fence in `Ring::limits`.
        fence(Ordering::SeqCst);
        let kept_from = mapping.control().tail.load(Ordering::Acquire);
        Ok(Self {
            kept_from,
            epoch,
            registry,
            slot,
            announced: Some(cursor),
        })
    }

    /// Announces that batches from `cursor` on are needed; returns whether that was written.
    pub(super) fn announce(&mut self, cursor: u64) -> bool {
        if self.announced != Some(cursor) {
            let written = self.registry.announce(self.slot, cursor);
            self.announced = written.is_ok().then_some(cursor);
        }
        self.announced.is_some()
    }

    /// Whether the payload at `position`, which the reader still needs according to its slot, has been kept for it
    /// until now, however far the writers have reserved.
    pub(super) fn has_kept(&self, mapping: &Mapping, position: u64) -> bool {
        let Some(cursor) = self.announced else {
            return false;
        };
        position >= self.kept_from
            && !self.is_evicted(mapping)
            && current_epoch(mapping) == self.epoch
            && self.registry.still_says(self.slot, cursor).unwrap_or(false)
    }

    /// What the slot says, or said before a write failed.
    pub(super) fn announced_cursor(&self) -> u64 {
        self.announced.unwrap_or(0)
    }

    /// Whether the broker has evicted the reader. Only a broker that lets no reader borrow payload evicts.
    pub(super) fn is_evicted(&self, mapping: &Mapping) -> bool {
        // If the notice cannot be read, the reader is lapped at worst.
        mapping.ring().lends_nothing()
            && self
                .registry
                .is_evicted(self.slot, current_epoch(mapping))
                .unwrap_or(false)
    }
}

impl Drop for RegisteredReader {
    fn drop(&mut self) {
        // Best effort: the broker frees the slots of dead readers.
        let _ = self.registry.announce(self.slot, FREE);
    }
}

fn current_epoch(mapping: &Mapping) -> u64 {
    mapping.epoch().load(Ordering::Acquire)
}
