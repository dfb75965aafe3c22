//! The XDP program's list of streams: packets of others do not get as far as a worker.

use std::fmt::Debug;
use std::sync::Arc;

use penstock_wire::packet::StreamKey;

/// Which packets the program lets through, by the key that they carry; implemented by the broker.
pub trait StreamFilter: Debug + Send + Sync {
    /// Lets packets with this key through. Returns false if it cannot with this one: at most every
    /// other time.
    fn insert(&self, key: u64) -> bool;

    /// Lets no packet with this key through any more.
    fn remove(&self, key: u64);
}

/// Lets a stream's packets through until it is dropped.
#[derive(Debug)]
pub(crate) struct FilterEntry {
    stream: StreamKey,
    filter: Arc<dyn StreamFilter>,
}

impl FilterEntry {
    /// For a stream of this number, with a key that nobody can guess.
    pub(crate) fn draw(
        filter: &Arc<dyn StreamFilter>,
        stream: u16,
    ) -> Result<Self, getrandom::Error> {
        loop {
            let key = getrandom::u64()?;
            if let Some(filter_entry) = Self::of(filter, StreamKey { key, stream }) {
                return Ok(filter_entry);
            }
        }
    }

    /// For the stream with this key, if the filter can tell it from others.
    pub(crate) fn of(filter: &Arc<dyn StreamFilter>, stream: StreamKey) -> Option<Self> {
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

    /// A filter that takes every other key.
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
    fn a_pass_has_a_key_that_the_gate_takes_and_gives_it_back() {
        let odd = Arc::new(OddKeys::default());
        let filter: Arc<dyn StreamFilter> = Arc::clone(&odd) as _;
        let passes: Vec<_> = (0..100)
            .map(|n| FilterEntry::draw(&filter, n).unwrap())
            .collect();
        for (number, filter_entry) in (0..).zip(&passes) {
            assert_eq!(filter_entry.stream().stream, number);
            assert!(odd.0.lock().unwrap().contains(&filter_entry.stream().key));
        }
        assert!(
            FilterEntry::of(&filter, passes[0].stream()).is_none(),
            "taken"
        );
        drop(passes);
        assert!(odd.0.lock().unwrap().is_empty());
    }
}
