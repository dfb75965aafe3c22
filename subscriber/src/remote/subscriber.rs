//! The caller's side: takes the news of all brokers, merges them, and hands out one batch after the other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::thread;
use std::time::{Duration, Instant};

use penstock_wire::delivery::StartAt;

use super::broker_reader::{Attempts, BrokerReader, News, Stop};
use super::event::{Event, Pending};
use super::flow::{Finished, Flow};
use super::merge::{Merge, Merged, Place};
use super::outstanding::Outstanding;
use super::report::{BrokerReport, RemoteReport};
use super::{Error, Position, RemoteConfig, RemoteEvent, RemoteStart, StreamPosition};
use crate::Start;

/// Longest wait before [`RemoteEvent::Idle`].
const IDLE: Duration = Duration::from_millis(100);
/// How often gaps are looked at while batches wait for them.
const GAP_CHECK: Duration = Duration::from_millis(10);

/// Follows a topic on its brokers.
///
/// ```
/// use penstock_subscriber::{RemoteConfig, RemoteEvent, RemoteStart, RemoteSubscriber, Start};
/// # mod fake { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/support/fake_broker.rs")); }
/// # let fake = fake::FakeBroker::start();
/// # fake.publish(0, &[&b"one"[..]]);
/// # fake.publish(0, &[&b"two"[..]]);
/// # let broker = fake.address();
///
/// // One broker or more, such as 10.0.0.1:1214.
/// let config = RemoteConfig::new([&broker], "trades");
/// let mut subscriber = RemoteSubscriber::connect(config)?;
/// let mut results = Vec::new();
/// let stored = loop {
///     match subscriber.next()? {
///         RemoteEvent::Batch(batch) => {
///             for message in batch.messages() {
///                 results.push(message?.to_vec());
///             }
///             # if results.len() == 1 { break subscriber.position(); }
///         }
///         RemoteEvent::CaughtUp => break subscriber.position(),
///         RemoteEvent::Lost { messages, .. } => eprintln!("{messages} messages were overwritten"),
///         other => eprintln!("{other:?}"),
///     }
/// };
/// // A program that stores `results` and `stored` in one transaction gets each message exactly once, even if it
/// // is killed.
/// let mut config = RemoteConfig::new([&broker], "trades");
/// config.start = RemoteStart::Position { position: stored, otherwise: Start::Oldest };
/// let mut subscriber = RemoteSubscriber::connect(config)?;
/// # let mut ends = false;
/// # while !ends {
/// match subscriber.next()? {
///     RemoteEvent::Batch(batch) => results.push(batch.messages().next().unwrap()?.to_vec()),
///     # RemoteEvent::CaughtUp => ends = true,
///     _ => {}
/// }
/// # }
/// # assert_eq!(results, [b"one", b"two"]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct RemoteSubscriber {
    config: Arc<RemoteConfig>,
    sources: Vec<Source>,
    news: Receiver<(usize, News)>,
    stop: Arc<Stop>,
    merge: Merge<Pending>,
    current: Option<Pending>,
    /// Duplicates and gaps, and what the caller was told.
    report: RemoteReport,
    next_gap_check: Instant,
    told_end: bool,
    has_failed: bool,
}

/// What the caller's side keeps for each broker.
#[derive(Debug)]
struct Source {
    flow: Arc<Flow>,
    outstanding: Outstanding,
    finished: Finished,
}

impl RemoteSubscriber {
    /// Starts to read. Connects in the background: [`Self::next`] reports a broker that cannot be read.
    ///
    /// # Errors
    /// If a setting is invalid, or a thread cannot be started.
    pub fn connect(config: RemoteConfig) -> Result<Self, Error> {
        config.check()?;
        let config = Arc::new(config);
        let (sender, news) = channel();
        let stop = Arc::<Stop>::default();
        let now = Instant::now();
        let mut merge = Merge::new(
            config.brokers.len(),
            config.begins_in_the_middle(),
            config.gap_timeout,
            // Credit is raised by a quarter of the window at a time.
            config.window / 4 * 3,
            now,
        );
        let (position, start) = match &config.start {
            RemoteStart::Each(start) => (None, start),
            RemoteStart::Position {
                position,
                otherwise,
            } => (Some(position), otherwise),
        };
        for stream in position.iter().flat_map(|position| &position.streams) {
            merge.resume((stream.session, stream.stream), stream.next);
        }
        let mut sources = Vec::new();
        let mut report = RemoteReport::default();
        for (number, broker) in config.brokers.iter().enumerate() {
            let position = position.and_then(|position| position.brokers.get(broker).copied());
            let flow = Arc::new(Flow::new(config.window, config.register));
            sources.push(Source {
                flow: Arc::clone(&flow),
                outstanding: Outstanding::new(position),
                finished: Finished::default(),
            });
            report.brokers.push(BrokerReport {
                broker: broker.clone(),
                ..BrokerReport::default()
            });
            let reader = BrokerReader {
                number,
                broker: broker.clone(),
                config: Arc::clone(&config),
                flow,
                news: sender.clone(),
                stop: Arc::clone(&stop),
                start: start_at(*start),
                position,
                log: 0,
                progress: Attempts::default(),
            };
            let thread = thread::Builder::new().name(format!("broker-{number}"));
            let started = thread.spawn(move || reader.run());
            if let Err(error) = started {
                stop.set();
                return Err(Error::Thread(error.to_string()));
            }
        }
        Ok(Self {
            config,
            sources,
            news,
            stop,
            merge,
            current: None,
            report,
            next_gap_check: now,
            told_end: false,
            has_failed: false,
        })
    }

    /// The next event. Waits a moment for it, then returns [`RemoteEvent::Idle`]. The batch before it is finished:
    /// a broker need not keep it.
    ///
    /// # Errors
    /// If a broker cannot be read.
    // Named as what it does; an Iterator cannot lend from itself.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<RemoteEvent<'_>, Error> {
        self.finish_current();
        let event = self.find_event();
        let event = event.inspect_err(|_| self.has_failed = true)?;
        Ok(event.show(&self.config.brokers, &mut self.current))
    }

    /// Where the subscriber is: behind the batch, or the gap, that [`Self::next`] returned last. A subscriber that starts
    /// there delivers exactly what this one has not delivered.
    #[must_use]
    pub fn position(&mut self) -> Position {
        // The caller has let go of it.
        self.finish_current();
        // A broker that is not read this time may be read again later.
        let mut brokers = match &self.config.start {
            RemoteStart::Position { position, .. } => position.brokers.clone(),
            RemoteStart::Each(_) => BTreeMap::new(),
        };
        let read = self.config.brokers.iter().zip(&self.sources);
        brokers.extend(read.filter_map(|(broker, source)| {
            let position = source.outstanding.position()?;
            Some((broker.clone(), position))
        }));
        let waiting = self.merge.undelivered();
        let streams = self.merge.positions().map(|(key, next)| StreamPosition {
            session: key.0,
            stream: key.1,
            next: waiting.get(&key).copied().unwrap_or(next),
        });
        let mut streams: Vec<_> = streams.collect();
        streams.sort_by_key(|position| (position.session, position.stream));
        Position { brokers, streams }
    }

    /// Totals so far.
    #[must_use]
    pub fn report(&self) -> &RemoteReport {
        &self.report
    }

    fn find_event(&mut self) -> Result<Event, Error> {
        if self.has_failed {
            return Err(Error::Failed);
        }
        let deadline = Instant::now() + IDLE;
        loop {
            if let Some(event) = self.take_merged() {
                return Ok(event);
            }
            let news = match self.news.try_recv() {
                Ok(news) => news,
                Err(TryRecvError::Disconnected) => return Err(ended()),
                Err(TryRecvError::Empty) => match self.wait(deadline)? {
                    Waited::News(news) => *news,
                    Waited::Nothing => continue,
                    Waited::Event(event) => return Ok(event),
                },
            };
            if let Some(event) = self.take_news(news.0, news.1)? {
                return Ok(event);
            }
            if self.merge.is_waiting() {
                self.check_gaps(Instant::now());
            }
        }
    }

    /// Waits for news, after everything before them was handed out.
    fn wait(&mut self, deadline: Instant) -> Result<Waited, Error> {
        for source in &mut self.sources {
            source.tell(true);
        }
        let now = Instant::now();
        self.check_gaps(now);
        let is_at_end = self.merge.is_at_end();
        if is_at_end && !self.told_end {
            self.told_end = true;
            return Ok(Waited::Event(Event::CaughtUp));
        }
        if now >= deadline {
            return Ok(Waited::Event(Event::Idle));
        }
        let longest = match self.merge.is_waiting() {
            true => GAP_CHECK,
            false => IDLE,
        };
        match self.news.recv_timeout(longest.min(deadline - now)) {
            Ok(news) => Ok(Waited::News(Box::new(news))),
            Err(RecvTimeoutError::Timeout) => Ok(Waited::Nothing),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }

    fn check_gaps(&mut self, now: Instant) {
        if self.merge.is_waiting() && now >= self.next_gap_check {
            self.next_gap_check = now + GAP_CHECK;
            self.merge.decide(now);
        }
    }

    fn take_merged(&mut self) -> Option<Event> {
        while let Some(merged) = self.merge.next() {
            match merged {
                Merged::Batch(_, _, pending) => return Some(Event::Batch(pending)),
                Merged::Duplicate(pending) => {
                    self.report.duplicates += 1;
                    self.finish(pending);
                }
                Merged::Missing {
                    stream,
                    first,
                    batches,
                } => {
                    self.report.missing = self.report.missing.saturating_add(batches);
                    return Some(Event::Missing {
                        stream,
                        first,
                        batches,
                    });
                }
            }
        }
        None
    }

    fn take_news(&mut self, broker: usize, news: News) -> Result<Option<Event>, Error> {
        let source = &mut self.sources[broker];
        let report = &mut self.report.brokers[broker];
        let (event, next, bytes) = match news {
            News::Batch {
                info,
                payload,
                bytes,
            } => {
                report.batches += 1;
                let number = {
                    let next = info.index.saturating_add(1);
                    source.outstanding.push(info.index, next)
                };
                let place = Place {
                    broker,
                    stream: (info.session, info.stream),
                    batch_seq: info.batch_seq,
                    arrival_unix_ns: info.arrival_unix_ns,
                    bytes,
                };
                let pending = Pending {
                    broker,
                    number,
                    info,
                    payload,
                    bytes,
                };
                self.told_end = false;
                self.merge.on_batch(place, pending, Instant::now);
                return Ok(None);
            }
            News::Connected { log, is_new_log } => {
                report.reconnects += u64::from(report.was_connected);
                (report.is_connected, report.was_connected) = (true, true);
                source.outstanding.on_connected(log, is_new_log);
                source.tell(false);
                return Ok(is_new_log.then_some(Event::NewLog { broker }));
            }
            News::Disconnected(when) => {
                report.is_connected = false;
                self.merge.on_disconnected(broker, when);
                return Ok(None);
            }
            News::Failed(error) => return Err(error),
            News::CaughtUp { next, at, bytes } => {
                self.merge.on_caught_up(broker, at);
                (None, Some(next), bytes)
            }
            News::Lost {
                next,
                batches,
                messages,
                bytes,
            } => {
                report.lost_batches = report.lost_batches.saturating_add(batches);
                let event = Event::Lost {
                    broker,
                    batches,
                    messages,
                };
                (Some(event), Some(next), bytes)
            }
            News::Damaged { index, bytes } => {
                let event = Event::Damaged { broker, index };
                (Some(event), Some(index.saturating_add(1)), bytes)
            }
            News::Corrupt { mismatch, bytes } => {
                let event = Event::Corrupt { broker, mismatch };
                (Some(event), Some(mismatch.index.saturating_add(1)), bytes)
            }
            News::Evicted { bytes } => (Some(Event::Evicted { broker }), None, bytes),
        };
        self.merge.on_delivery(broker);
        if let Some(next) = next {
            let number = source.outstanding.push(next, next);
            source.outstanding.finish(number);
        }
        source.finished.bytes += bytes;
        Ok(event)
    }

    fn finish_current(&mut self) {
        if let Some(pending) = self.current.take() {
            self.finish(pending);
        }
    }

    fn finish(&mut self, pending: Pending) {
        let source = &mut self.sources[pending.broker];
        source.outstanding.finish(pending.number);
        source.finished.bytes += pending.bytes;
        source.finished.buffers.push(pending.payload.into_buffer());
        if source.finished.bytes >= self.config.window / 8 {
            source.tell(false);
        }
    }
}

impl Drop for RemoteSubscriber {
    fn drop(&mut self) {
        self.stop.set();
        self.sources.iter().for_each(|source| source.flow.close());
    }
}

enum Waited {
    News(Box<(usize, News)>),
    Event(Event),
    Nothing,
}

impl Source {
    /// Tells the flow what is finished.
    fn tell(&mut self, at_once: bool) {
        let (needed_from, generation) = self.outstanding.needed_from();
        self.finished.needed_from = needed_from;
        self.finished.generation = generation;
        self.flow.finish(&mut self.finished, at_once);
    }
}

fn start_at(start: Start) -> StartAt {
    match start {
        Start::Oldest => StartAt::Oldest,
        Start::End => StartAt::End,
        Start::Index(index) => StartAt::Index(index),
        Start::Time(time) => StartAt::Time(time),
    }
}

/// Every thread has ended, which each reports before.
fn ended() -> Error {
    Error::Thread("every thread has ended".to_owned())
}
