//! The thread that serves all remote subscribers, with a poller of its own; commits wake it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Waker;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use penstock_ingest::session::{self, AcceptedSubscriber, Shared, SubscriberQueue};
use penstock_runtime::poller::{Events, Interest, Poller};
use penstock_runtime::profile::{Rounds, SNAPSHOT_INTERVAL, SnapshotCell};
use penstock_wire::reply::Fault;
use slab::Slab;
use tracing::{info, warn};

use super::stats::ServeStats;
use super::subscription::{CloseReason, Need, Resources, Subscription};

/// Interval of time-based checks of the subscribers.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Settings.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Time limit for a subscriber's first request.
    pub start_timeout: Duration,
    /// Time limit for a registered subscriber that holds up publishers and makes no progress.
    pub reader_timeout: Duration,
}

/// Access to the running worker.
pub type WorkerHandle = session::WorkerHandle<ServeStats>;

/// A worker that does not run yet.
#[derive(Debug)]
pub struct Worker {
    config: Config,
    shared: Arc<Shared>,
    stop: Arc<AtomicBool>,
    inbox: Receiver<AcceptedSubscriber>,
    queue: SubscriberQueue,
    poller: Arc<Poller>,
    subscriptions: Slab<Entry>,
    resources: Resources,
    snapshot: Arc<SnapshotCell<ServeStats>>,
    rounds: Rounds,
}

#[derive(Debug)]
struct Entry {
    subscription: Subscription,
    need: Need,
    watched: Interest,
}

impl Worker {
    /// A worker that runs until `stop` is set.
    ///
    /// # Errors
    /// If the kernel cannot create an epoll instance.
    pub fn new(
        config: Config,
        shared: Arc<Shared>,
        stop: Arc<AtomicBool>,
    ) -> io::Result<(Self, WorkerHandle)> {
        let poller = Arc::new(Poller::new()?);
        let (queue, inbox) = SubscriberQueue::new(Arc::clone(&poller));
        let handle = WorkerHandle::new(&poller);
        let worker = Self {
            config,
            shared,
            stop,
            inbox,
            queue,
            poller,
            subscriptions: Slab::new(),
            resources: Resources::default(),
            snapshot: handle.snapshot(),
            rounds: handle.rounds(),
        };
        Ok((worker, handle))
    }

    /// The queue of admitted subscribers.
    #[must_use]
    pub fn queue(&self) -> SubscriberQueue {
        self.queue.clone()
    }

    /// Serves subscribers until the stop flag is set; returns its counters.
    ///
    /// # Errors
    /// If the poller fails, which no peer can cause.
    pub fn run(mut self) -> io::Result<ServeStats> {
        let mut events = Events::default();
        let mut next_check = Instant::now() + CHECK_INTERVAL;
        while !self.stop.load(Ordering::Relaxed) {
            self.poller
                .wait(&mut events, self.poll_timeout(next_check))?;
            self.rounds.count();
            let now = Instant::now();
            while let Ok(accepted) = self.inbox.try_recv() {
                self.add(accepted, now);
            }
            for event in events.iter() {
                self.drive(event.key, now);
            }
            self.drive_ready(now);
            if now >= next_check {
                next_check = now + CHECK_INTERVAL;
                self.check(now);
            }
            self.snapshot.publish(self.stats_now());
        }
        self.shut_down();
        Ok(self.stats_now())
    }

    fn stats_now(&self) -> ServeStats {
        ServeStats {
            connected: self.subscriptions.len() as u64,
            ..self.resources.stats
        }
    }

    /// Asks every log that a subscriber waits for to wake this thread; returns how long to sleep.
    fn poll_timeout(&self, next_check: Instant) -> Duration {
        let mut is_ready = false;
        for (_, entry) in &self.subscriptions {
            match entry.need {
                Need::Yield => is_ready = true,
                Need::Batches => {
                    entry.subscription.log().wake_on_commit();
                    // A batch may have been committed just before.
                    is_ready |= entry.subscription.has_batches();
                }
                Need::Request | Need::Writable | Need::Memory => {}
            }
        }
        if is_ready {
            return Duration::ZERO;
        }
        let check = next_check.saturating_duration_since(Instant::now());
        check.min(SNAPSHOT_INTERVAL)
    }

    fn add(&mut self, accepted: AcceptedSubscriber, now: Instant) {
        accepted
            .log
            .set_waker(Waker::from(Arc::clone(&self.poller)));
        let peer = accepted.peer;
        let opened = Subscription::new(accepted, now + self.config.start_timeout);
        let vacant = self.subscriptions.vacant_entry();
        let watched = Interest::READABLE;
        let added = opened.and_then(|subscription| {
            // `remove` deletes the socket from the poller before its key is reused.
            self.poller
                .add(&subscription.socket, vacant.key(), watched)?;
            Ok(subscription)
        });
        match added {
            Ok(subscription) => {
                vacant.insert(Entry {
                    subscription,
                    need: Need::Request,
                    watched,
                });
            }
            Err(error) => {
                warn!(%peer, %error, "cannot serve a subscriber; it is dropped");
                self.queue.ended();
            }
        }
    }

    /// Drives the subscriptions that yielded, and those whose logs have new batches.
    fn drive_ready(&mut self, now: Instant) {
        for key in 0..self.subscriptions.capacity() {
            let is_ready = self
                .subscriptions
                .get(key)
                .is_some_and(|entry| match entry.need {
                    Need::Yield => true,
                    Need::Batches => entry.subscription.has_batches(),
                    Need::Request | Need::Writable | Need::Memory => false,
                });
            if is_ready {
                self.drive(key, now);
            }
        }
    }

    fn drive(&mut self, key: usize, now: Instant) {
        let Some(entry) = self.subscriptions.get_mut(key) else {
            return;
        };
        let driven = entry.subscription.drive(now, &mut self.resources);
        let need = match driven {
            Ok(need) => need,
            Err(reason) => return self.remove(key, &reason),
        };
        entry.need = need;
        let interest = match need {
            Need::Writable => Interest::READABLE.and(Interest::WRITABLE),
            Need::Request | Need::Batches | Need::Yield | Need::Memory => Interest::READABLE,
        };
        if entry.watched != interest {
            entry.watched = interest;
            let watched = self
                .poller
                .modify(&entry.subscription.socket, key, interest);
            if let Err(error) = watched {
                self.remove(key, &error.into());
            }
        }
    }

    fn check(&mut self, now: Instant) {
        for key in 0..self.subscriptions.capacity() {
            let checked = self.subscriptions.get_mut(key);
            match checked.map(|entry| entry.subscription.tick(now, self.config.reader_timeout)) {
                // It may have a heartbeat to send.
                Some(Ok(())) => self.drive(key, now),
                Some(Err(reason)) => self.remove(key, &reason),
                None => {}
            }
        }
    }

    fn remove(&mut self, key: usize, reason: &CloseReason) {
        let Entry { subscription, .. } = self.subscriptions.remove(key);
        // Best effort: the descriptor may not be watched any more.
        let _ = self.poller.delete(&subscription.socket);
        if self.shared.allows_line() {
            info!(peer = %subscription.peer, topic = subscription.topic, "subscriber ended: {reason}");
        }
        subscription.close(reason, &mut self.resources);
        self.queue.ended();
    }

    fn shut_down(&mut self) {
        let reason = CloseReason::Fault {
            fault: Fault::Shutdown,
            text: "the broker is shutting down".to_owned(),
        };
        for key in 0..self.subscriptions.capacity() {
            if self.subscriptions.contains(key) {
                self.remove(key, &reason);
            }
        }
    }
}
