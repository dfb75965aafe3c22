//! Batch buffers that are used again and again, the most recently used first: it is the one that
//! the CPU's cache still holds.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Config;
use crate::config::Mode;
use crate::payload::Payload;

/// Batches that wait in front of each stream over tcp, or of all together over xdp; at least one for each.
const QUEUE: usize = 8;
/// Batches that all streams over xdp together may have in flight, however little their paths need; at
/// least one for each.
const MIN_IN_FLIGHT: usize = 8;

/// How many buffers there are, and who may have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BufferPlan {
    /// All.
    pub(crate) total: usize,
    /// That are free when a publisher that waits for one is woken: one wake-up for several batches, but
    /// no more than what a single stream has, so that one live stream is enough to go on.
    pub(crate) wake_at: usize,
    /// Batches that wait in front of each stream while all take their turn.
    pub(crate) queue: usize,
    /// Batches that may wait in front of a stream.
    pub(crate) most_queued: usize,
    /// Batches that each stream over xdp may have in flight, however little its path needs.
    pub(crate) min_in_flight: usize,
}

impl BufferPlan {
    pub(crate) fn new(config: &Config) -> Self {
        let streams = config.brokers.len() * config.threads_per_broker as usize;
        let share = |of: usize| (of / streams).max(1);
        let min_in_flight = share(MIN_IN_FLIGHT).min(config.in_flight);
        // And the next to be filled.
        let total = |of_each: usize| streams * of_each + 1;
        match config.mode {
            // What a stream holds until it is written; the kernel's socket buffers hold more than the
            // queue. That is never full while there is a buffer: a publisher waits in one place only.
            Mode::Tcp => Self {
                total: total(1 + QUEUE),
                wake_at: QUEUE,
                queue: QUEUE,
                most_queued: 1 + QUEUE,
                min_in_flight,
            },
            // What a stream holds until it is acknowledged. One that stalls queues no more than its share
            // of the buffers that the pool hands out.
            Mode::Xdp | Mode::Auto => {
                let queue = share(QUEUE);
                Self {
                    total: total(config.in_flight + queue),
                    wake_at: QUEUE.min(queue + min_in_flight),
                    queue,
                    most_queued: queue,
                    min_in_flight,
                }
            }
        }
    }
}

/// A fixed number of buffers, taken by the publisher and given back by streams.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Payload>>,
    given_back: Condvar,
    /// So many of the free buffers stay here: streams want less on its way than they might have.
    withheld: AtomicUsize,
    /// Somebody waits: telling costs a system call, also when nobody listens.
    wanted: AtomicBool,
    /// So many must be free before a waiting publisher is woken: one wake-up, several batches.
    wake_at: usize,
    batch_size: usize,
}

impl Pool {
    /// `count` buffers for batches of `batch_size` bytes.
    pub(crate) fn new(count: usize, batch_size: usize, wake_at: usize) -> Self {
        let free = std::iter::repeat_with(|| Payload::with_capacity(batch_size))
            .take(count)
            .collect();
        Self {
            free: Mutex::new(free),
            withheld: AtomicUsize::new(0),
            wanted: AtomicBool::new(false),
            given_back: Condvar::new(),
            wake_at,
            batch_size,
        }
    }

    /// Adds empty buffers to `stash`, half of those that there are, so that both sides seldom meet
    /// here; none if none came back in time.
    pub(crate) fn take(&self, stash: &mut Vec<Payload>, patience: Duration) {
        let mut free = self.lock();
        if self.available(&free) == 0 {
            self.wanted.store(true, Ordering::SeqCst);
            let is_wanted = |_: &mut Vec<Payload>| self.wanted.load(Ordering::SeqCst);
            // A stream may have given up its claim between the two.
            if self.available(&free) == 0 {
                let waited = self
                    .given_back
                    .wait_timeout_while(free, patience, is_wanted);
                (free, _) = waited.unwrap_or_else(PoisonError::into_inner);
            }
            self.wanted.store(false, Ordering::SeqCst);
        }
        let rest = free.len() - self.available(&free).div_ceil(2);
        stash.extend(free.drain(rest..));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Payload>> {
        // A list of buffers is whole at every moment, so a panic elsewhere does not spoil it.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn available(&self, free: &[Payload]) -> usize {
        free.len()
            .saturating_sub(self.withheld.load(Ordering::SeqCst))
    }

    /// Takes a buffer back.
    pub(crate) fn give_back(&self, buffer: Payload) {
        self.give_back_all(std::iter::once(buffer));
    }

    /// Takes buffers back. One that carried an oversized message gives its memory back.
    pub(crate) fn give_back_all(&self, mut buffers: impl Iterator<Item = Payload>) {
        let Some(first) = buffers.next() else { return };
        let mut free = self.lock();
        for mut buffer in std::iter::once(first).chain(buffers) {
            buffer.reset(self.batch_size);
            free.push(buffer);
        }
        self.wake(free);
    }

    /// A stream that asked for `before` buffers to be withheld asks for `after`.
    pub(crate) fn withhold(&self, before: usize, after: usize) {
        // Two's complement: a smaller number is added as well.
        self.withheld
            .fetch_add(after.wrapping_sub(before), Ordering::SeqCst);
        // Either this sees that somebody waits, or they see the new number.
        if after < before && self.wanted.load(Ordering::SeqCst) {
            self.wake(self.lock());
        }
    }

    fn wake(&self, free: MutexGuard<'_, Vec<Payload>>) {
        if self.wanted.load(Ordering::SeqCst) && self.available(&free) >= self.wake_at {
            self.wanted.store(false, Ordering::SeqCst);
            drop(free);
            self.given_back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_live_stream_among_stalled_ones_keeps_a_publisher_going() {
        for mode in [Mode::Tcp, Mode::Xdp, Mode::Auto] {
            for (brokers, in_flight) in [1, 2, 3, 5, 8, 9, 64]
                .into_iter()
                .flat_map(|brokers| [1, 2, 8, 32].map(|in_flight| (brokers, in_flight)))
            {
                let names = (0..brokers).map(|number| format!("b{number}:1214"));
                let mut config = Config::new(names, "t");
                (config.mode, config.in_flight) = (mode, in_flight);
                let plan = BufferPlan::new(&config);
                // Over xdp, the pool withholds what the path of a stream does not need.
                let held = match mode {
                    Mode::Tcp => 1,
                    Mode::Xdp | Mode::Auto => plan.min_in_flight,
                };
                let withheld = match mode {
                    Mode::Tcp => 0,
                    Mode::Xdp | Mode::Auto => brokers * (in_flight - plan.min_in_flight),
                };
                let stalled = (brokers - 1) * (held + plan.most_queued.min(plan.queue));
                let left = plan.total - withheld - 1 - stalled;
                assert!(
                    left >= plan.wake_at,
                    "{brokers} brokers, {in_flight}, {plan:?}"
                );
                assert!(plan.most_queued >= plan.queue && plan.wake_at >= 1);
            }
        }
    }

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
