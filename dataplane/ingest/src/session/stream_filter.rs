//! The XDP program's list of streams; it drops packets of unknown streams.

use std::fmt::Debug;
use std::sync::Arc;

use penstock_wire::packet::StreamKey;

/// Decides which packets the program entries to workers, by their stream key; implemented by the broker.
pub trait StreamFilter: Debug + Send + Sync {
    /// Passes packets with this key from now on. Returns false if the filter cannot accept the key, which
    /// holds for at most half of all keys.
    fn insert(&self, key: u64) -> bool;

    /// Drops packets with this key from now on.
    fn remove(&self, key: u64);
}

/// Makes the filter pass a stream's packets until it is dropped.
#[derive(Debug)]
pub(crate) struct FilterEntry {
    stream: StreamKey,
    filter: Arc<dyn StreamFilter>,
}

impl FilterEntry {
    /// An entry for the stream with this number, with an unpredictable key.
    pub(crate) fn draw(
        filter: &Arc<dyn StreamFilter>,
        stream: u16,
    ) -> Result<Self, getrandom::Error> {
        loop {
            let key = getrandom::u64()?;
            if let Some(filter_entry) = Self::new(filter, StreamKey { key, stream }) {
                return Ok(filter_entry);
            }
        }
    }

    /// An entry for the stream with this key, if the filter accepts the key.
    pub(crate) fn new(filter: &Arc<dyn StreamFilter>, stream: StreamKey) -> Option<Self> {
        filter.insert(stream.key).then(|| Self {
            stream,
            filter: Arc::clone(filter),
        })
    }

    pub(crate) fn stream(&self) -> StreamKey {
        self.stream
    }
}

impl Drop for FilterEntry {
    fn drop(&mut self) {
        self.filter.remove(self.stream.key);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashSet;
    use std::sync::Mutex;

    use super::*;

    /// A filter that accepts every other key.
    #[derive(Debug, Default)]
    pub(crate) struct OddKeys(pub(crate) Mutex<HashSet<u64>>);

    impl StreamFilter for OddKeys {
        fn insert(&self, key: u64) -> bool {
            key % 2 == 1 && self.0.lock().unwrap().insert(key)
        }

        fn remove(&self, key: u64) {
            assert!(self.0.lock().unwrap().remove(&key), "it was admitted");
        }
    }

    #[test]
    fn an_entry_has_a_key_that_the_filter_accepts_until_it_is_dropped() {
        let odd = Arc::new(OddKeys::default());
        let filter: Arc<dyn StreamFilter> = Arc::clone(&odd) as _;
        let entries: Vec<_> = (0..100)
            .map(|n| FilterEntry::draw(&filter, n).unwrap())
            .collect();
        for (number, entry) in (0..).zip(&entries) {
            assert_eq!(entry.stream().stream, number);
            assert!(odd.0.lock().unwrap().contains(&entry.stream().key));
        }
        assert!(
            FilterEntry::new(&filter, entries[0].stream()).is_none(),
            "taken"
        );
        drop(entries);
        assert!(odd.0.lock().unwrap().is_empty());
    }
}
