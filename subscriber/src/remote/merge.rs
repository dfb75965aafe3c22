//! Merges the logs of several brokers: each stream in its order, each batch once; no I/O and no clock.
//!
//! A stream whose broker was lost continues on another one with its next numbers, and may repeat some. So a
//! number that comes too early is held until the lower ones come from another broker, or until none has them.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// Session and number of a stream.
pub(super) type StreamKey = (u64, u32);

/// How long after a gap was seen a broker must catch up to prove that it has none of the missing batches: what
/// it sent before may still be under way.
const GRACE: Duration = Duration::from_millis(200);
/// Streams that are remembered. Beyond this number, the half that has been idle longest is forgotten.
const MAX_STREAMS: usize = 1 << 17;

/// Where a batch comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub(super) broker: usize,
    pub(super) stream: StreamKey,
    pub(super) batch_seq: u64,
    pub(super) arrival_unix_ns: u64,
    /// Bytes of the broker's credit that it uses.
    pub(super) bytes: u64,
}

/// What comes next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Merged<B> {
    /// The next batch of its stream.
    Batch(StreamKey, u64, B),
    /// A batch that was delivered before.
    Duplicate(B),
    /// No broker has these batches.
    Missing {
        stream: StreamKey,
        first: u64,
        batches: u64,
    },
}

/// What is known of a broker.
#[derive(Debug)]
struct Broker {
    /// When it last had nothing more.
    caught_up: Option<Instant>,
    /// Nothing came after that.
    is_at_end: bool,
    unreachable_since: Option<Instant>,
    latest_arrival: u64,
    held_bytes: u64,
    /// Since when all its credit is used by batches that are held.
    stalled_since: Option<Instant>,
}

#[derive(Debug)]
struct Stream<B> {
    /// Number of the next batch, once the stream's start is known.
    next: Option<u64>,
    held: BTreeMap<u64, Held<B>>,
    last_used: u64,
}

#[derive(Debug)]
struct Held<B> {
    batch: B,
    seen: Instant,
    arrival_unix_ns: u64,
    broker: usize,
    bytes: u64,
    /// Other brokers that have shown it too.
    doubles: Vec<usize>,
}

/// The merge of several brokers' logs.
#[derive(Debug)]
pub(super) struct Merge<B> {
    gap_timeout: Duration,
    /// Credit of each broker.
    window: u64,
    /// The first batch of a stream sets its start, because every broker may begin in the middle.
    begins_in_the_middle: bool,
    brokers: Vec<Broker>,
    streams: HashMap<StreamKey, Stream<B>>,
    /// Streams with held batches.
    waiting: BTreeSet<StreamKey>,
    ready: VecDeque<Merged<B>>,
    batches: u64,
}

impl<B> Merge<B> {
    pub(super) fn new(
        brokers: usize,
        begins_in_the_middle: bool,
        gap_timeout: Duration,
        window: u64,
        now: Instant,
    ) -> Self {
        let broker = || Broker {
            caught_up: None,
            is_at_end: false,
            unreachable_since: Some(now),
            latest_arrival: 0,
            held_bytes: 0,
            stalled_since: None,
        };
        Self {
            gap_timeout,
            window,
            begins_in_the_middle,
            brokers: (0..brokers).map(|_| broker()).collect(),
            streams: HashMap::new(),
            waiting: BTreeSet::new(),
            ready: VecDeque::new(),
            batches: 0,
        }
    }

    /// Continues a stream that was read before.
    pub(super) fn resume(&mut self, stream: StreamKey, next: u64) {
        let stream = self.stream(stream);
        stream.next = Some(next);
    }

    /// Every stream whose start is known, with the number of its next batch.
    pub(super) fn positions(&self) -> impl Iterator<Item = (StreamKey, u64)> {
        let streams = self.streams.iter();
        streams.filter_map(|(key, stream)| Some((*key, stream.next?)))
    }

    /// The lowest number of each stream among the results that [`Self::next`] has not returned.
    pub(super) fn undelivered(&self) -> HashMap<StreamKey, u64> {
        let mut lowest = HashMap::new();
        for merged in &self.ready {
            match merged {
                Merged::Batch(stream, number, _) => {
                    lowest.entry(*stream).or_insert(*number);
                }
                Merged::Missing { stream, first, .. } => {
                    lowest.entry(*stream).or_insert(*first);
                }
                Merged::Duplicate(_) => {}
            }
        }
        lowest
    }

    /// Takes a batch of a broker. `now` is called only if the batch must be held.
    pub(super) fn on_batch(&mut self, place: Place, batch: B, now: impl FnOnce() -> Instant) {
        self.on_delivery(place.broker);
        let broker = &mut self.brokers[place.broker];
        broker.is_at_end = false;
        broker.latest_arrival = broker.latest_arrival.max(place.arrival_unix_ns);
        let starts = self.begins_in_the_middle || place.batch_seq == 0;
        let stream = self.stream(place.stream);
        if stream.next.is_none() && starts {
            stream.next = Some(place.batch_seq);
        }
        match stream.next {
            Some(next) if place.batch_seq < next => self.ready.push_back(Merged::Duplicate(batch)),
            Some(next) if place.batch_seq == next => {
                stream.next = Some(next.saturating_add(1));
                let was_waiting = !stream.held.is_empty();
                let batch = Merged::Batch(place.stream, next, batch);
                self.ready.push_back(batch);
                if was_waiting {
                    self.release(place.stream);
                }
            }
            _ => self.hold(place, batch, now()),
        }
    }

    /// A broker had nothing more at `when`.
    pub(super) fn on_caught_up(&mut self, broker: usize, when: Instant) {
        self.on_delivery(broker);
        let broker = &mut self.brokers[broker];
        broker.caught_up = Some(when);
        broker.is_at_end = true;
    }

    /// A broker delivers. One that accepts connections and then delivers nothing counts as unreachable.
    pub(super) fn on_delivery(&mut self, broker: usize) {
        self.brokers[broker].unreachable_since = None;
    }

    pub(super) fn on_disconnected(&mut self, broker: usize, when: Instant) {
        let broker = &mut self.brokers[broker];
        broker.unreachable_since.get_or_insert(when);
        broker.is_at_end = false;
    }

    /// The next result.
    pub(super) fn next(&mut self) -> Option<Merged<B>> {
        self.ready.pop_front()
    }

    /// Whether batches are held.
    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether every broker has nothing more, and nothing is held.
    pub(super) fn is_at_end(&self) -> bool {
        let at_end = |broker: &Broker| broker.is_at_end;
        self.ready.is_empty() && !self.is_waiting() && self.brokers.iter().all(at_end)
    }

    /// Goes on behind each gap whose batches no broker has.
    pub(super) fn decide(&mut self, now: Instant) {
        let certain: Vec<StreamKey> = self.waiting.iter().copied().collect();
        for key in certain {
            while self.is_certain(key, now) {
                self.skip_gap(key);
            }
        }
    }

    fn stream(&mut self, key: StreamKey) -> &mut Stream<B> {
        if self.streams.len() >= MAX_STREAMS && !self.streams.contains_key(&key) {
            self.forget_idle();
        }
        self.batches += 1;
        let stream = self.streams.entry(key).or_insert_with(|| Stream {
            next: None,
            held: BTreeMap::new(),
            last_used: 0,
        });
        stream.last_used = self.batches;
        stream
    }

    fn forget_idle(&mut self) {
        let mut used: Vec<u64> = self.streams.values().map(|s| s.last_used).collect();
        let half = used.len() / 2;
        let (_, median, _) = used.select_nth_unstable(half);
        let median = *median;
        let is_kept = |stream: &Stream<B>| stream.last_used > median || !stream.held.is_empty();
        self.streams.retain(|_, stream| is_kept(stream));
    }

    fn hold(&mut self, place: Place, batch: B, now: Instant) {
        let stream = self.streams.get_mut(&place.stream).expect("it was found");
        if let Some(held) = stream.held.get_mut(&place.batch_seq) {
            held.doubles.push(place.broker);
            self.ready.push_back(Merged::Duplicate(batch));
            return;
        }
        let held = Held {
            batch,
            seen: now,
            arrival_unix_ns: place.arrival_unix_ns,
            broker: place.broker,
            bytes: place.bytes,
            doubles: Vec::new(),
        };
        stream.held.insert(place.batch_seq, held);
        self.waiting.insert(place.stream);
        let broker = &mut self.brokers[place.broker];
        broker.held_bytes += place.bytes;
        if broker.held_bytes >= self.window {
            broker.stalled_since.get_or_insert(now);
        }
    }

    /// Delivers the held batches that are next.
    fn release(&mut self, key: StreamKey) {
        let stream = self.streams.get_mut(&key).expect("it was found");
        while let Some(entry) = stream.held.first_entry() {
            let (number, next) = (*entry.key(), stream.next.unwrap_or(0));
            if number > next {
                return;
            }
            let held = entry.remove();
            let broker = &mut self.brokers[held.broker];
            broker.held_bytes -= held.bytes;
            if broker.held_bytes < self.window {
                broker.stalled_since = None;
            }
            let merged = match number == next {
                true => Merged::Batch(key, number, held.batch),
                false => Merged::Duplicate(held.batch),
            };
            self.ready.push_back(merged);
            stream.next = Some(next.max(number.saturating_add(1)));
        }
        self.waiting.remove(&key);
    }

    /// Whether no broker can have the batches before the lowest one that is held.
    fn is_certain(&self, key: StreamKey, now: Instant) -> bool {
        let Some(stream) = self.streams.get(&key) else {
            return false;
        };
        let Some(lowest) = stream.held.values().next() else {
            return false;
        };
        let passed = |since: Instant| now.saturating_duration_since(since) >= self.gap_timeout;
        let latest = self.gap_timeout.as_nanos() as u64;
        let latest = lowest.arrival_unix_ns.saturating_add(latest);
        let mut others = self.brokers.iter().enumerate();
        others.all(|(number, broker)| {
            // A log has each stream in its order.
            let shows = |held: &Held<B>| held.broker == number || held.doubles.contains(&number);
            broker.caught_up.is_some_and(|at| at >= lowest.seen + GRACE)
                || broker.unreachable_since.is_some_and(passed)
                || broker.latest_arrival >= latest
                || (broker.stalled_since.is_some_and(passed) && passed(lowest.seen))
                || stream.held.values().any(shows)
        })
    }

    fn skip_gap(&mut self, key: StreamKey) {
        let stream = self.streams.get_mut(&key).expect("it waits");
        let lowest = stream.held.keys().next().copied();
        let lowest = lowest.expect("a batch is held");
        if let Some(first) = stream.next {
            self.ready.push_back(Merged::Missing {
                stream: key,
                first,
                batches: lowest - first,
            });
        }
        stream.next = Some(lowest);
        self.release(key);
    }
}

#[cfg(test)]
mod tests;
