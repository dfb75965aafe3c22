//! Opens every stream of a publisher, broker by broker.

use std::num::NonZero;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use tracing::warn;

use crate::batch::sealed_batch::Job;
use crate::shared::Shared;
use crate::stream::connect::Location;
use crate::stream::connection::{StreamConnection, StreamContext, StreamId};
use crate::stream::io_thread::{IoThread, StreamResult};
use crate::stream::waker::Waker;
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
    first: FirstAttempts,
    most_queued: usize,
    /// Bytes of the largest batch that every broker accepts.
    pub(crate) max_payload: u32,
    pub(crate) streams: Vec<(Sender<Job>, Arc<Waker>)>,
    pub(crate) results: Vec<Receiver<StreamResult>>,
}

impl<'a> SessionOpener<'a> {
    pub(crate) fn new(
        config: &'a Arc<Config>,
        shared: &'a Arc<Shared>,
        most_queued: usize,
    ) -> Self {
        Self {
            config,
            shared,
            first: FirstAttempts::new(config.connect_timeout.min(config.timeout)),
            most_queued,
            max_payload: u32::MAX,
            streams: Vec::new(),
            results: Vec::new(),
        }
    }

    /// Opens the streams to a broker; returns the key of their session.
    pub(crate) fn open_session(
        &mut self,
        broker: &str,
        threads: &mut [IoThread],
    ) -> Result<u64, Error> {
        let mut target = StreamId {
            broker: broker.to_owned(),
            session: 0,
            number: 0,
            location: Location::default(),
        };
        for number in 0..self.config.threads_per_broker {
            target.number = number;
            let (link, session, max) = self.first.open(self.config, &target, self.shared)?;
            target.session = session;
            self.max_payload = self.max_payload.min(max);
            let (sender, jobs) = crossbeam_channel::bounded(self.most_queued);
            let context = StreamContext {
                config: Arc::clone(self.config),
                target: target.clone(),
                jobs,
                shared: Arc::clone(self.shared),
            };
            // In turn, so that each thread has about as many streams to each broker.
            let thread = self.streams.len() % threads.len();
            let thread = &mut threads[thread];
            self.streams.push((sender, Arc::clone(thread.waker())));
            self.results.push(thread.add(context, link)?);
        }
        Ok(target.session)
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
            let error = match StreamConnection::open(config, target, shared) {
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
