//! Opens every stream of a publisher, broker by broker; those of a broker that cannot be reached at others.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use penstock_runtime::address::check_broker;
use tracing::warn;

use crate::batch_builder::StreamQueue;
use crate::shared::Shared;
use crate::stream::brokers::Brokers;
use crate::stream::connection::{StreamConnection, StreamContext, StreamId};
use crate::stream::io_thread::{IoThread, StreamResult};
use crate::stream::search::config_away;
use crate::{Config, Error};

/// Pause between attempts to reach a broker that is not running yet.
const RETRY: Duration = Duration::from_millis(50);

/// As many I/O threads as the settings ask for. The kernel's work on a packet that is sent is most of a
/// thread's time, and brokers have different links: a thread for each, as long as there are cores.
pub(crate) fn io_thread_count(config: &Config, streams: usize) -> usize {
    let count = match config.io_threads {
        Some(count) => count as usize,
        None => {
            let cores = thread::available_parallelism().map_or(1, NonZero::get);
            config
                .brokers
                .len()
                .min(cores)
                .min(Config::MAX_IO_THREADS as usize)
        }
    };
    count.min(streams)
}

/// Opens every stream.
pub(crate) struct SessionOpener<'a> {
    config: &'a Arc<Config>,
    shared: &'a Arc<Shared>,
    brokers: Arc<Brokers>,
    first: FirstAttempts,
    most_queued: usize,
    /// Bytes of the largest batch that every broker accepts.
    max_payload: u32,
    sessions: Vec<Session>,
}

/// The streams that belong to one broker, and have been opened.
#[derive(Default)]
struct Session {
    /// 0 until the first stream is open.
    key: u64,
    /// Each with the number of the broker that it is connected to.
    streams: Vec<(StreamConnection, usize)>,
}

/// What was opened.
pub(crate) struct OpenedSessions {
    /// The key of each broker's session.
    pub(crate) keys: Vec<u64>,
    /// Bytes of the largest batch that every broker accepts.
    pub(crate) max_payload: u32,
    pub(crate) streams: Vec<StreamQueue>,
    pub(crate) results: Vec<Receiver<StreamResult>>,
}

impl<'a> SessionOpener<'a> {
    pub(crate) fn new(
        config: &'a Arc<Config>,
        shared: &'a Arc<Shared>,
        most_queued: usize,
    ) -> Self {
        let sessions = config.brokers.iter().map(|_| Session::default());
        Self {
            config,
            shared,
            brokers: Arc::new(Brokers::new(config)),
            first: FirstAttempts::new(config.connect_timeout.min(config.timeout)),
            most_queued,
            max_payload: u32::MAX,
            sessions: sessions.collect(),
        }
    }

    /// Opens the streams to all brokers. If one cannot be reached, its streams are opened at others.
    pub(crate) fn open_all(mut self, threads: &mut [IoThread]) -> Result<OpenedSessions, Error> {
        let mut unreachable = Vec::new();
        for home in 0..self.sessions.len() {
            match self.open_session(home) {
                Ok(()) => {}
                // An address that cannot be one is a mistake; a name that is not known may belong to a broker
                // that is down.
                Err(error)
                    if self.config.reroutes()
                        && error.is_unreachable()
                        && check_broker(self.brokers.address(home)).is_ok() =>
                {
                    unreachable.push((home, error));
                }
                Err(error) => return Err(error),
            }
        }
        if unreachable.len() == self.sessions.len() {
            let failures = unreachable.iter().map(|(_, error)| error.to_string());
            return Err(Error::NoneReachable {
                failures: failures.collect::<Vec<_>>().join("; "),
            });
        }
        for (home, error) in &unreachable {
            let brokers = &self.brokers;
            brokers.health(*home, |health| health.on_lost(Instant::now()));
            let broker = brokers.address(*home);
            warn!(broker, "its streams begin at other brokers: {error}");
        }
        for (home, _) in unreachable {
            self.open_elsewhere(home)?;
        }
        self.hand_to(threads)
    }

    /// Opens the streams that belong to a broker there.
    fn open_session(&mut self, home: usize) -> Result<(), Error> {
        for number in 0..self.config.threads_per_broker {
            let key = self.sessions[home].key;
            let target = self.brokers.stream_at(home, key, number);
            let opened = self.first.open(self.config, &target, self.shared)?;
            self.add(home, home, opened);
        }
        Ok(())
    }

    /// Opens the streams that belong to a broker, or the rest of them, at other brokers. The first of them
    /// that is opened anywhere gets the session's key.
    fn open_elsewhere(&mut self, home: usize) -> Result<(), Error> {
        let config = config_away(self.config);
        let brokers = Arc::clone(&self.brokers);
        for number in self.sessions[home].streams.len() as u32..config.threads_per_broker {
            let key = self.sessions[home].key;
            let mut failures = Vec::new();
            let own = brokers.stream_at(home, key, number);
            let candidates = brokers.candidates(&own, home, home, Instant::now());
            for broker in candidates.into_iter().filter(|broker| *broker != home) {
                let target = brokers.stream_at(broker, key, number);
                match StreamConnection::open(&config, &target, self.shared, key != 0) {
                    Ok(opened) => {
                        self.add(home, broker, opened);
                        break;
                    }
                    Err(error) => failures.push(error.to_string()),
                }
            }
            if self.sessions[home].streams.len() as u32 == number {
                return Err(Error::NoneReachable {
                    failures: failures.join("; "),
                });
            }
        }
        Ok(())
    }

    fn add(
        &mut self,
        home: usize,
        broker: usize,
        (link, key, max_payload): (StreamConnection, u64, u32),
    ) {
        self.max_payload = self.max_payload.min(max_payload);
        let session = &mut self.sessions[home];
        session.key = key;
        session.streams.push((link, broker));
    }

    fn hand_to(self, threads: &mut [IoThread]) -> Result<OpenedSessions, Error> {
        let mut opened = OpenedSessions {
            keys: self.sessions.iter().map(|session| session.key).collect(),
            max_payload: self.max_payload,
            streams: Vec::new(),
            results: Vec::new(),
        };
        let max_payload = &self.shared.max_payload;
        max_payload.store(self.max_payload, Ordering::Relaxed);
        for (home, session) in self.sessions.into_iter().enumerate() {
            for (number, (link, broker)) in (0..).zip(session.streams) {
                let (sender, jobs) = crossbeam_channel::bounded(self.most_queued);
                let is_away = Arc::new(AtomicBool::new(false));
                let context = StreamContext {
                    config: Arc::clone(self.config),
                    target: self.brokers.stream_at(home, session.key, number),
                    home,
                    brokers: Arc::clone(&self.brokers),
                    jobs,
                    is_away: Arc::clone(&is_away),
                    shared: Arc::clone(self.shared),
                };
                // In turn, so that each thread has about as many streams to each broker.
                let thread = opened.streams.len() % threads.len();
                let thread = &mut threads[thread];
                opened.streams.push(StreamQueue {
                    jobs: sender,
                    waker: Arc::clone(thread.waker()),
                    is_away,
                });
                opened.results.push(thread.add(context, link, broker)?);
            }
        }
        Ok(opened)
    }
}

/// Opens the first connections. Retries while nothing listens, because the broker may have been started
/// at the same moment.
struct FirstAttempts {
    deadline: Instant,
    warned: bool,
}

impl FirstAttempts {
    fn new(retry_for: Duration) -> Self {
        Self {
            deadline: Instant::now() + retry_for,
            warned: false,
        }
    }

    fn open(
        &mut self,
        config: &Config,
        target: &StreamId,
        shared: &Arc<Shared>,
    ) -> Result<(StreamConnection, u64, u32), Error> {
        loop {
            let error = match StreamConnection::open(config, target, shared, false) {
                Err(error) if error.nobody_listens() => error,
                done => return done,
            };
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(error);
            }
            if !self.warned {
                warn!("{error}; trying again for {:.1} s", left.as_secs_f64());
                self.warned = true;
            }
            thread::sleep(RETRY.min(left));
        }
    }
}
