//! Batch buffers that are used again and again, the most recently used first: it is the one that
//! the CPU's cache still holds.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::Config;
use crate::batch::payload::Payload;
use crate::config::Mode;

/// Batches that wait in front of all streams together.
const QUEUE: usize = 8;
/// Batches that all streams over xdp together may have in flight, however little their paths need; at
/// least one for each.
const MIN_IN_FLIGHT: usize = 8;

/// How many buffers there are, and who may have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BufferPlan {
    /// All, most of which are only in use while streams stall.
    pub(crate) total: usize,
    /// In use at least, while no stream stalls.
    pub(crate) least: usize,
    /// That are free when a publisher that waits for one is woken: one wake-up for several batches.
    pub(crate) wake_at: usize,
    /// Batches that one stream after the other gets in a row, while all take their turn.
    pub(crate) in_a_row: usize,
    /// Batches that may wait in front of a stream. While none stalls, the pool has fewer than would fill all
    /// queues: a publisher waits in one place only.
    pub(crate) most_queued: usize,
    /// Batches that each stream may have in flight, however little its path needs.
    pub(crate) min_in_flight: usize,
}

impl BufferPlan {
    pub(crate) fn new(config: &Config) -> Self {
        let streams = config.brokers.len() * config.threads_per_broker as usize;
        let share = |of: usize, users: usize| (of / users).max(1);
        let (in_flight, min_in_flight) = match config.mode {
            // Streams say what they keep. A broker acknowledges after several batches.
            Mode::Tcp => (
                1,
                share(config.in_flight, config.threads_per_broker as usize),
            ),
            Mode::Xdp | Mode::Auto => (MIN_IN_FLIGHT, share(MIN_IN_FLIGHT, streams)),
        };
        let least = QUEUE + in_flight;
        let most_queued = match streams {
            1 => config.in_flight + least,
            _ => share(2 * QUEUE, streams),
        };
        Self {
            total: streams * (config.in_flight + most_queued) + least,
            least,
            wake_at: QUEUE / 2,
            in_a_row: share(QUEUE, streams),
            most_queued,
            min_in_flight: min_in_flight.min(config.in_flight),
        }
    }
}

/// What a stream asks of the pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Share {
    /// Bytes of batches that its path needs.
    pub(crate) needed: usize,
    /// Batches that it holds, or may come to hold, and that do not come back soon: others go on without.
    pub(crate) stalled: usize,
}

/// A fixed number of buffers, taken by the publisher and given back by streams. As many are in use as the
/// paths of all streams together need: more would only wait in queues.
#[derive(Debug)]
pub(crate) struct Pool {
    free: Mutex<Vec<Payload>>,
    given_back: Condvar,
    /// Sums over all streams.
    needed: AtomicUsize,
    stalled: AtomicUsize,
    /// A thread waits: a notification costs a system call even if no thread does.
    wanted: AtomicBool,
    plan: BufferPlan,
    batch_size: usize,
}

impl Pool {
    /// Buffers for batches of `batch_size` bytes.
    pub(crate) fn new(plan: BufferPlan, batch_size: usize) -> Self {
        let free = std::iter::repeat_with(|| Payload::with_capacity(batch_size))
            .take(plan.total)
            .collect();
        Self {
            free: Mutex::new(free),
            needed: AtomicUsize::new(0),
            stalled: AtomicUsize::new(0),
            wanted: AtomicBool::new(false),
            given_back: Condvar::new(),
            plan,
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
            // A stream may have changed its share between the two.
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

    /// Buffers that may be in use.
    pub(crate) fn in_use(&self) -> usize {
        let needed = self.needed.load(Ordering::SeqCst).div_ceil(self.batch_size);
        (QUEUE + needed).max(self.plan.least) + self.stalled.load(Ordering::SeqCst)
    }

    /// Buffers that may be handed out.
    fn available(&self, free: &[Payload]) -> usize {
        free.len()
            .saturating_sub(self.plan.total.saturating_sub(self.in_use()))
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

    /// A stream asks for something else than before.
    pub(crate) fn share(&self, before: Share, after: Share) {
        if before == after {
            return;
        }
        // Two's complement: a smaller number is added as well.
        let change = |sum: &AtomicUsize, before: usize, after: usize| {
            sum.fetch_add(after.wrapping_sub(before), Ordering::SeqCst);
        };
        change(&self.needed, before.needed, after.needed);
        change(&self.stalled, before.stalled, after.stalled);
        // Either this sees the waiting thread, or that thread sees the new sums.
        if self.wanted.load(Ordering::SeqCst) {
            self.wake(self.lock());
        }
    }

    fn wake(&self, free: MutexGuard<'_, Vec<Payload>>) {
        if self.wanted.load(Ordering::SeqCst) && self.available(&free) >= self.plan.wake_at {
            self.wanted.store(false, Ordering::SeqCst);
            drop(free);
            self.given_back.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(mode: Mode, brokers: usize, threads: u32, in_flight: usize) -> BufferPlan {
        let names = (0..brokers).map(|number| format!("b{number}:1214"));
        let mut config = Config::new(names, "t");
        (config.mode, config.in_flight) = (mode, in_flight);
        config.threads_per_broker = threads;
        BufferPlan::new(&config)
    }

    fn take_all(pool: &Pool) -> Vec<Payload> {
        let mut taken = Vec::new();
        loop {
            let before = taken.len();
            pool.take(&mut taken, Duration::ZERO);
            if taken.len() == before {
                return taken;
            }
        }
    }

    #[test]
    fn one_live_stream_among_stalled_ones_keeps_a_publisher_going() {
        for mode in [Mode::Tcp, Mode::Xdp, Mode::Auto] {
            for (brokers, threads, in_flight) in [1, 2, 5, 9, 64]
                .into_iter()
                .flat_map(|brokers| [(1, 1), (1, 32), (7, 8)].map(|(t, f)| (brokers, t, f)))
            {
                let plan = plan(mode, brokers, threads, in_flight);
                let pool = Pool::new(plan, 100);
                // All but one hold all that they can, and the pool knows.
                let stalled = (brokers * threads as usize - 1) * (in_flight + plan.most_queued);
                let none = Share::default();
                pool.share(none, Share { needed: 0, stalled });
                let taken = take_all(&pool).len();
                assert_eq!(taken, plan.least + stalled, "{mode:?} {plan:?}");
                assert!(taken - stalled >= plan.wake_at && plan.most_queued >= 1);
                assert!(plan.min_in_flight >= 1 && plan.min_in_flight <= in_flight);
            }
        }
    }

    #[test]
    fn as_many_are_in_use_as_the_paths_need() {
        let plan = plan(Mode::Xdp, 1, 64, 32);
        let pool = Pool::new(plan, 100);
        let share = |needed| Share { needed, stalled: 0 };
        let first = take_all(&pool);
        assert_eq!(first.len(), QUEUE + MIN_IN_FLIGHT);
        // Two streams that need less than the least together, then more.
        pool.share(share(0), share(150));
        pool.share(share(0), share(450));
        assert!(take_all(&pool).is_empty());
        pool.share(share(150), share(850));
        assert_eq!(take_all(&pool).len(), QUEUE + 13 - first.len());
        pool.share(share(850), share(0));
        pool.share(share(450), share(0));
        pool.give_back_all(first.into_iter().take(4));
        assert!(take_all(&pool).is_empty(), "more than the least are in use");
    }

    #[test]
    fn queues_are_not_full_while_no_stream_stalls() {
        for mode in [Mode::Tcp, Mode::Xdp] {
            for threads in [1, 2, 4, 16, 64] {
                let plan = plan(mode, 1, threads, 32);
                assert!(plan.most_queued * threads as usize >= plan.least - 1);
            }
        }
    }

    #[test]
    fn the_last_one_back_is_the_first_one_out() {
        let mut plan = plan(Mode::Tcp, 1, 1, 1);
        (plan.total, plan.wake_at) = (2, 1);
        let pool = Pool::new(plan, 100);
        let take = || {
            let mut stash = Vec::new();
            pool.take(&mut stash, Duration::ZERO);
            stash.pop()
        };
        let (mut first, second) = (take().unwrap(), take().unwrap());
        assert!(take().is_none());
        first.append(&[1; 5000]);
        let hot = second.as_ptr();
        pool.give_back_all([first, second].into_iter());
        let newest = take().unwrap();
        assert_eq!(newest.as_ptr(), hot);
        let shrunk = take().unwrap();
        assert!(shrunk.is_empty() && shrunk.capacity() < 5000);
    }
}
