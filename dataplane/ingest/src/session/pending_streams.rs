//! Streams that are open but have not sent a packet yet. The worker that receives the first packet claims the
//! stream: the interface chooses the receive queue, so no worker can be chosen beforehand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use penstock_auth::PacketKeys;
use penstock_runtime::poison::lock;
use penstock_wire::packet::StreamKey;

use super::accepted_stream::AcceptedStream;
use super::stream_filter::{FilterEntry, StreamFilter};

/// Time limit for a stream's first packet, which a publisher sends at once; beyond it the publisher has
/// fallen back to tcp.
const FIRST_PACKET_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of the check for timed-out streams, which one worker does for all, milliseconds.
const EXPIRY_INTERVAL_MS: u64 = 100;

/// A stream without a worker.
#[derive(Debug)]
struct PendingStream {
    accepted: AcceptedStream,
    filter_entry: FilterEntry,
    since: Instant,
}

/// Streams without a worker.
#[derive(Debug)]
pub struct PendingStreams {
    filter: Arc<dyn StreamFilter>,
    pending: Mutex<HashMap<StreamKey, PendingStream>>,
    count: AtomicUsize,
    /// Streams that workers serve.
    adopted: AtomicUsize,
    /// Whether the interface is gone, so that no more packets arrive.
    closed: AtomicBool,
    started: Instant,
    /// Time of the next check, milliseconds since `started`.
    next_expiry_ms: AtomicU64,
}

impl PendingStreams {
    /// Pending streams whose packets pass this filter.
    #[must_use]
    pub fn new(filter: Arc<dyn StreamFilter>) -> Self {
        Self {
            filter,
            pending: Mutex::default(),
            count: AtomicUsize::new(0),
            adopted: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            started: Instant::now(),
            next_expiry_ms: AtomicU64::new(0),
        }
    }

    /// Draws a key for a stream's packets, and makes the filter pass them.
    ///
    /// # Errors
    /// If the system gives no random numbers.
    pub(crate) fn allow(&self, stream: u16) -> Result<FilterEntry, getrandom::Error> {
        FilterEntry::draw(&self.filter, stream)
    }

    /// Adds a stream, for the worker that receives its first packet.
    pub(crate) fn insert(&self, filter_entry: FilterEntry, accepted: AcceptedStream) {
        let mut pending = lock(&self.pending);
        if self.is_closed() {
            // The publisher sees its connection close, and tries again.
            return;
        }
        let entry = PendingStream {
            accepted,
            filter_entry,
            since: Instant::now(),
        };
        pending.insert(entry.filter_entry.stream(), entry);
        self.count.store(pending.len(), Ordering::Release);
    }

    /// Packet keys of a pending stream, if its packets are authenticated; only an authentic packet may claim
    /// it.
    pub(crate) fn keys_of(&self, key: StreamKey) -> Option<Arc<PacketKeys>> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let pending = lock(&self.pending);
        pending.get(&key)?.accepted.keys.clone()
    }

    /// Takes a stream whose first packet arrived. One atomic load while no stream is pending, so packets of
    /// unknown streams are cheap.
    pub(crate) fn claim(&self, key: StreamKey) -> Option<(AcceptedStream, FilterEntry)> {
        if self.count.load(Ordering::Acquire) == 0 {
            return None;
        }
        let mut pending = lock(&self.pending);
        let PendingStream {
            accepted,
            filter_entry,
            ..
        } = pending.remove(&key)?;
        self.count.store(pending.len(), Ordering::Release);
        self.adopted.fetch_add(1, Ordering::Relaxed);
        Some((accepted, filter_entry))
    }

    /// Notes that a claimed stream has ended.
    pub(crate) fn ended(&self) {
        self.adopted.fetch_sub(1, Ordering::Relaxed);
    }

    /// Drops streams that never sent a packet. Each worker calls this every millisecond; most calls do
    /// nothing, because peers may open thousands of such streams.
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
            let mut pending = lock(&self.pending);
            pending.retain(|_, stream| {
                let lease = &stream.accepted.admission.lease;
                let waited = now.saturating_duration_since(stream.since);
                waited < FIRST_PACKET_TIMEOUT && !lease.is_superseded() && !lease.is_revoked()
            });
            self.count.store(pending.len(), Ordering::Release);
        }
    }

    /// Closes all pending streams, and refuses new ones from now on.
    pub fn close(&self) {
        let mut pending = lock(&self.pending);
        self.closed.store(true, Ordering::Release);
        pending.clear();
        self.count.store(0, Ordering::Release);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Number of streams, pending or served.
    #[must_use]
    pub fn load(&self) -> usize {
        self.count.load(Ordering::Relaxed) + self.adopted.load(Ordering::Relaxed)
    }
}
