//! Leads a stream that continues at another broker back to its home: probes the home now and then, lets what is in
//! flight be acknowledged, and opens the stream there, while the connection that it has stays.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};
use penstock_wire::handshake::Path;
use tracing::warn;

use crate::Error;
use crate::config::Mode;
use crate::stream::brokers::Brokers;
use crate::stream::connect;
use crate::stream::connection::{Holdings, Sent, StreamContext};
use crate::stream::resume::WakeOnDrop;
use crate::stream::search::{Found, open_at};
use crate::stream::waker::Waker;

/// How long a broker may take to accept a connection of a probe, and to open a stream that returns.
const TIMEOUT: Duration = Duration::from_secs(1);

type Opened = Result<Found, Error>;

/// How far a stream is on its way home.
#[derive(Default)]
pub(crate) enum ReturnHome {
    /// It stays where it is.
    #[default]
    Away,
    /// Its home answers: it begins no batch until all are acknowledged.
    Draining,
    /// A thread opens it at its home.
    Opening(Receiver<Opened>),
}

impl ReturnHome {
    /// Whether the stream begins no new batches for now.
    pub(crate) fn holds_back(&self) -> bool {
        !matches!(self, Self::Away)
    }

    /// Whether a thread has finished.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, Self::Opening(opened) if !opened.is_empty())
    }

    /// Does what can be done now; returns the connection to the home once there is one.
    pub(crate) fn step(
        &mut self,
        now: Instant,
        context: &StreamContext,
        waker: &Arc<Waker>,
        holdings: Holdings,
    ) -> Result<Option<Found>, Error> {
        match self {
            // A stream that ends soon ends where it is.
            Self::Away | Self::Draining if context.shared.is_closed() => *self = Self::Away,
            Self::Away => {
                if is_home_back(now, context)? {
                    *self = Self::Draining;
                }
            }
            Self::Draining if holdings.held == 0 => {
                *self = Self::Opening(open(context, holdings.done, Arc::clone(waker))?);
            }
            Self::Draining => {}
            Self::Opening(opened) => match opened.try_recv() {
                Err(TryRecvError::Empty) => {}
                Ok(Ok(found)) => {
                    *self = Self::Away;
                    return Ok(Some(found));
                }
                outcome => {
                    *self = Self::Away;
                    let error = match outcome {
                        Ok(Err(error)) => error,
                        _ => Error::Thread("it panicked while returning home".to_owned()),
                    };
                    stay_away(now, context, &error);
                }
            },
        }
        Ok(None)
    }
}

/// The home answers, but does not take the stream.
fn stay_away(now: Instant, context: &StreamContext, error: &Error) {
    let brokers = &context.brokers;
    if brokers.health(context.home, |health| health.on_lost(now)) {
        let broker = brokers.address(context.home);
        warn!(broker, "the broker answers, but is not back: {error}");
    }
}

/// Whether a stream may return to its home; has a thread probe it when that is due.
pub(crate) fn is_home_back(now: Instant, context: &StreamContext) -> Result<bool, Error> {
    let (home, brokers) = (context.home, &context.brokers);
    let (does_answer, is_due) = brokers.health(home, |health| {
        (health.does_answer(), health.begin_probe(now))
    });
    if is_due {
        let probe = Probe {
            brokers: Arc::clone(brokers),
            home,
            does_answer: false,
        };
        let target = context.target.clone();
        spawn("probe", move || {
            let mut probe = probe;
            probe.does_answer = connect::does_answer(&target, TIMEOUT);
        })?;
    }
    Ok(does_answer)
}

/// Reports what a probe found when it is dropped, also by a panic.
struct Probe {
    brokers: Arc<Brokers>,
    home: usize,
    does_answer: bool,
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.brokers.health(self.home, |health| {
            health.on_probed(Instant::now(), self.does_answer);
        });
    }
}

fn open(context: &StreamContext, acked: u64, waker: Arc<Waker>) -> Result<Receiver<Opened>, Error> {
    let (sender, opened) = bounded(1);
    let config = Arc::clone(&context.config);
    let shared = Arc::clone(&context.shared);
    let (target, home) = (context.target.clone(), context.home);
    spawn("return", move || {
        let _wake = WakeOnDrop(waker);
        // Dropped before the I/O thread is woken.
        let sender = sender;
        let paths: &[Path] = match config.mode {
            Mode::Tcp => &[Path::Tcp],
            Mode::Xdp => &[Path::Xdp],
            Mode::Auto => &[Path::Xdp, Path::Tcp],
        };
        let sent = Sent { acked, unacked: 0 };
        let opened = open_at(&config, &shared, &target, home, sent, paths, TIMEOUT);
        // The stream may have lost its connection meanwhile.
        let _ = sender.send(opened);
    })?;
    Ok(opened)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = thread::Builder::new().name(name.to_owned());
    let spawned = thread.spawn(body);
    spawned
        .map(drop)
        .map_err(|error| Error::Thread(error.to_string()))
}
