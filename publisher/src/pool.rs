//! Batch buffers that are used again and again, the most recently used first: it is the one that
//! the CPU's cache still holds.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A fixed number of buffers, taken by the publisher and given back by streams.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Vec<u8>>>,
    given_back: Condvar,
    /// So many must be free before a waiting publisher is woken: one wake-up, several batches.
    wake_at: usize,
    batch_size: usize,
}

impl Pool {
    /// `count` buffers for batches of `batch_size` bytes; `wake_at` must not exceed what a single
    /// stream may hold, so that one live stream is enough to go on.
    pub(crate) fn new(count: usize, batch_size: usize, wake_at: usize) -> Self {
        let free = std::iter::repeat_with(|| Vec::with_capacity(batch_size))
            .take(count)
            .collect();
        Self {
            free: Mutex::new(free),
            given_back: Condvar::new(),
            wake_at,
            batch_size,
        }
    }

    /// An empty buffer; none if none came back in time.
    pub(crate) fn take(&self, patience: Duration) -> Option<Vec<u8>> {
        // A list of buffers is whole at every moment, so a panic elsewhere does not spoil it.
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self
            .given_back
            .wait_timeout_while(free, patience, |free| free.is_empty());
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        free.pop()
    }

    /// Takes a buffer back. One that carried an oversized message gives its memory back.
    pub(crate) fn give_back(&self, mut buffer: Vec<u8>) {
        buffer.clear();
        buffer.shrink_to(self.batch_size);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(buffer);
        let enough = free.len() >= self.wake_at;
        drop(free);
        if enough {
            self.given_back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_one_back_is_the_first_one_out() {
        let pool = Pool::new(2, 100, 1);
        let mut first = pool.take(Duration::ZERO).unwrap();
        let second = pool.take(Duration::ZERO).unwrap();
        assert!(pool.take(Duration::ZERO).is_none());
        first.resize(5000, 1);
        let hot = second.as_ptr();
        pool.give_back(first);
        pool.give_back(second);
        let newest = pool.take(Duration::ZERO).unwrap();
        assert_eq!(newest.as_ptr(), hot);
        let shrunk = pool.take(Duration::ZERO).unwrap();
        assert!(shrunk.is_empty() && shrunk.capacity() < 5000);
    }
}
