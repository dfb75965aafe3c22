//! Finds the stream of a packet by its key.

use std::collections::HashMap;

use penstock_wire::packet::StreamKey;

use crate::xdp::key_hasher::KeyHash;

/// Positions of streams in the worker's table.
#[derive(Debug, Default)]
pub(super) struct StreamIndex {
    by_key: HashMap<StreamKey, usize, KeyHash>,
    /// The stream of the last packet.
    latest: Option<(StreamKey, usize)>,
}

impl StreamIndex {
    pub(super) fn find(&mut self, key: StreamKey) -> Option<usize> {
        // Most packets belong to the same stream as the packet before.
        if let Some((latest, number)) = self.latest
            && latest == key
        {
            return Some(number);
        }
        let number = *self.by_key.get(&key)?;
        self.latest = Some((key, number));
        Some(number)
    }

    pub(super) fn insert(&mut self, key: StreamKey, number: usize) {
        self.by_key.insert(key, number);
    }

    pub(super) fn remove(&mut self, key: StreamKey) {
        self.by_key.remove(&key);
        self.latest = None;
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }
}
