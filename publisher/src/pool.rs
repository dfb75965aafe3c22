//! Batch buffers that are used again and again, the most recently used first: it is the one that
//! the CPU's cache still holds.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::payload::Payload;

/// A fixed number of buffers, taken by the publisher and given back by streams.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Mutex<State>,
    given_back: Condvar,
    /// So many must be free before a waiting publisher is woken: one wake-up, several batches.
    wake_at: usize,
    batch_size: usize,
}

#[derive(Debug)]
struct State {
    free: Vec<Payload>,
    /// So many of these stay here: streams want less on its way than they might have.
    withheld: usize,
    /// Somebody waits: telling costs a system call, also when nobody listens.
    wanted: bool,
}

impl State {
    fn available(&self) -> usize {
        self.free.len().saturating_sub(self.withheld)
    }
}

impl Pool {
    /// `count` buffers for batches of `batch_size` bytes; `wake_at` must not exceed what a single
    /// stream may hold, so that one live stream is enough to go on.
    pub(crate) fn new(count: usize, batch_size: usize, wake_at: usize) -> Self {
        let free = std::iter::repeat_with(|| Payload::with_capacity(batch_size))
            .take(count)
            .collect();
        let wanted = false;
        Self {
            state: Mutex::new(State {
                free,
                withheld: 0,
                wanted,
            }),
            given_back: Condvar::new(),
            wake_at,
            batch_size,
        }
    }

    /// Adds empty buffers to `stash`, half of those that there are, so that both sides seldom meet
    /// here; none if none came back in time.
    pub(crate) fn take(&self, stash: &mut Vec<Payload>, patience: Duration) {
        // A list of buffers is whole at every moment, so a panic elsewhere does not spoil it.
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.available() == 0 {
            state.wanted = true;
            let waited = self
                .given_back
                .wait_timeout_while(state, patience, |state| state.wanted);
            (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            state.wanted = false;
        }
        let rest = state.free.len() - state.available().div_ceil(2);
        stash.extend(state.free.drain(rest..));
    }

    /// Takes a buffer back.
    pub(crate) fn give_back(&self, buffer: Payload) {
        self.give_back_all(std::iter::once(buffer));
    }

    /// Takes buffers back. One that carried an oversized message gives its memory back.
    pub(crate) fn give_back_all(&self, mut buffers: impl Iterator<Item = Payload>) {
        let Some(first) = buffers.next() else { return };
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for mut buffer in std::iter::once(first).chain(buffers) {
            buffer.reset(self.batch_size);
            state.free.push(buffer);
        }
        self.wake(state);
    }

    /// A stream that asked for `before` buffers to be withheld asks for `after`.
    pub(crate) fn withhold(&self, before: usize, after: usize) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.withheld = state.withheld - before + after;
        self.wake(state);
    }

    fn wake(&self, mut state: MutexGuard<'_, State>) {
        if state.wanted && state.available() >= self.wake_at {
            state.wanted = false;
            drop(state);
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
        let take = || {
            let mut stash = Vec::new();
            pool.take(&mut stash, Duration::ZERO);
            stash.pop()
        };
        let (mut first, second) = (take().unwrap(), take().unwrap());
        assert!(take().is_none());
        first.append(&[1; 5000], None);
        let hot = second.as_ptr();
        pool.give_back_all([first, second].into_iter());
        let newest = take().unwrap();
        assert_eq!(newest.as_ptr(), hot);
        let shrunk = take().unwrap();
        assert!(shrunk.is_empty() && shrunk.capacity() < 5000);
    }
}
