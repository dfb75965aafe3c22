//! Streams that are open and have not sent a packet: whichever worker gets the first one takes them.
//!
//! Which queue a stream's packets come in on is for the interface to decide, so no worker can be
//! chosen beforehand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::auth::PacketKeys;
use crate::tcp::Opened;
use crate::wire::packet::StreamKey;

/// A publisher sends its first packet at once; one that has not by then has gone over to tcp.
const PATIENCE: Duration = Duration::from_secs(10);

/// Streams without a worker.
#[derive(Debug, Default)]
pub struct Registry {
    waiting: Mutex<HashMap<StreamKey, (Opened, Instant)>>,
    count: AtomicUsize,
    /// Streams that workers have.
    adopted: AtomicUsize,
    /// The interface is gone: no packet will come any more.
    closed: AtomicBool,
}

impl Registry {
    /// Leaves a stream to whoever gets its first packet.
    pub(crate) fn leave(&self, key: StreamKey, opened: Opened) {
        let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
        if self.is_closed() {
            // The publisher sees its connection close, and asks again.
            return;
        }
        waiting.retain(|_, (_, since)| since.elapsed() < PATIENCE);
        waiting.insert(key, (opened, Instant::now()));
        self.count.store(waiting.len(), Ordering::Release);
    }

    /// Keys of a stream that waits, if its packets are authenticated: it is taken by no other packet.
    pub(super) fn keys_of(&self, key: StreamKey) -> Option<Arc<PacketKeys>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let waiting = self.waiting.lock().expect("no holder of this lock panics");
        waiting.get(&key)?.0.keys.clone()
    }

    /// Takes a stream whose first packet came. Costs next to nothing while none waits, so that
    /// packets of unknown streams are no burden.
    pub(super) fn take(&self, key: StreamKey) -> Option<Opened> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
        let (opened, _) = waiting.remove(&key)?;
        self.count.store(waiting.len(), Ordering::Release);
        self.adopted.fetch_add(1, Ordering::Relaxed);
        Some(opened)
    }

    pub(super) fn ended(&self) {
        self.adopted.fetch_sub(1, Ordering::Relaxed);
    }

    /// Drops streams that never sent a packet; called now and then.
    pub(super) fn expire(&self) {
        if self.count.load(Ordering::Relaxed) > 0 {
            let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
            waiting.retain(|_, (opened, since)| {
                since.elapsed() < PATIENCE && !opened.admission.lease.is_wanted()
            });
            self.count.store(waiting.len(), Ordering::Release);
        }
    }

    /// Ends the path for good: streams that wait are closed, and there will be no others.
    ///
    /// # Panics
    /// Never: no holder of the lock does.
    pub fn close(&self) {
        let mut waiting = self.waiting.lock().expect("no holder of this lock panics");
        self.closed.store(true, Ordering::Release);
        waiting.clear();
        self.count.store(0, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Streams that wait or are served.
    #[must_use]
    pub fn load(&self) -> usize {
        self.count.load(Ordering::Relaxed) + self.adopted.load(Ordering::Relaxed)
    }
}
