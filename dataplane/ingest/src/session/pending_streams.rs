//! Streams that are open and have not sent a packet: whichever worker gets the first one takes them.
//!
//! Which queue a stream's packets come in on is for the interface to decide, so no worker can be
//! chosen beforehand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_runtime::poison::lock;
use penstock_wire::packet::StreamKey;

use super::accepted_stream::AcceptedStream;
use super::stream_filter::{FilterEntry, StreamFilter};

/// A publisher sends its first packet at once; one that has not by then has fallen back to tcp.
const PATIENCE: Duration = Duration::from_secs(10);
/// Interval of the check for them, which one worker does for all.
const EXPIRY_INTERVAL_MS: u64 = 100;

/// A stream without a worker.
#[derive(Debug)]
struct Waiting {
    opened: AcceptedStream,
    filter_entry: FilterEntry,
    since: Instant,
}

/// Streams without a worker.
#[derive(Debug)]
pub struct PendingStreams {
    filter: Arc<dyn StreamFilter>,
    waiting: Mutex<HashMap<StreamKey, Waiting>>,
    count: AtomicUsize,
    /// Streams that workers have.
    adopted: AtomicUsize,
    /// The interface is gone: no packet will come any more.
    closed: AtomicBool,
    started: Instant,
    /// Time of the next check, milliseconds since `started`.
    next_expiry_ms: AtomicU64,
}

impl PendingStreams {
    /// For streams whose packets come through this filter.
    #[must_use]
    pub fn new(filter: Arc<dyn StreamFilter>) -> Self {
        Self {
            filter,
            waiting: Mutex::default(),
            count: AtomicUsize::new(0),
            adopted: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            started: Instant::now(),
            next_expiry_ms: AtomicU64::new(0),
        }
    }

    /// Makes a key for a stream's packets, and lets them through.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub(crate) fn allow(&self, stream: u16) -> Result<FilterEntry, getrandom::Error> {
        FilterEntry::draw(&self.filter, stream)
    }

    /// Leaves a stream to whoever gets its first packet.
    pub(crate) fn insert(&self, filter_entry: FilterEntry, opened: AcceptedStream) {
        let mut waiting = lock(&self.waiting);
        if self.is_closed() {
            // The publisher sees its connection close, and asks again.
            return;
        }
        let entry = Waiting {
            opened,
            filter_entry,
            since: Instant::now(),
        };
        waiting.insert(entry.filter_entry.stream(), entry);
        self.count.store(waiting.len(), Ordering::Release);
    }

    /// Keys of a stream that waits, if its packets are authenticated: it is taken by no other packet.
    pub(crate) fn keys_of(&self, key: StreamKey) -> Option<Arc<PacketKeys>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let waiting = lock(&self.waiting);
        waiting.get(&key)?.opened.keys.clone()
    }

    /// Takes a stream whose first packet came. Costs next to nothing while none waits, so that
    /// packets of unknown streams are no burden.
    pub(crate) fn claim(&self, key: StreamKey) -> Option<(AcceptedStream, FilterEntry)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut waiting = lock(&self.waiting);
        let Waiting {
            opened,
            filter_entry,
            ..
        } = waiting.remove(&key)?;
        self.count.store(waiting.len(), Ordering::Release);
        self.adopted.fetch_add(1, Ordering::Relaxed);
        Some((opened, filter_entry))
    }

    pub(crate) fn ended(&self) {
        self.adopted.fetch_sub(1, Ordering::Relaxed);
    }

    /// Drops streams that never sent a packet. Each worker calls this every millisecond and most calls
    /// do nothing, because peers may let thousands of streams wait.
    pub(crate) fn expire(&self) {
        if self.count.load(Ordering::Relaxed) == 0 {
            return;
        }
        let now = Instant::now();
        let now_ms = now.saturating_duration_since(self.started).as_millis() as u64;
        let next = self.next_expiry_ms.load(Ordering::Relaxed);
        let is_due = now_ms >= next
            && self
                .next_expiry_ms
                .compare_exchange(
                    next,
                    now_ms + EXPIRY_INTERVAL_MS,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok();
        if is_due {
            let mut waiting = lock(&self.waiting);
            waiting.retain(|_, waiting| {
                let lease = &waiting.opened.admission.lease;
                let waited = now.saturating_duration_since(waiting.since);
                waited < PATIENCE && !lease.is_wanted() && !lease.is_revoked()
            });
            self.count.store(waiting.len(), Ordering::Release);
        }
    }

    /// Ends the path for good: streams that wait are closed, and there will be no others.
    pub fn close(&self) {
        let mut waiting = lock(&self.waiting);
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
