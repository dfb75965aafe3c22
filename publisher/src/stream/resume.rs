//! Opens another connection for a stream that lost its own, in a thread of its own: names are looked up,
//! and brokers waited for, while the I/O thread goes on with its other streams.

use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, TryRecvError, bounded};
use penstock_wire::handshake::Path;
use tracing::warn;

use crate::config::{Mode, OnBrokerLoss};
use crate::shared::Shared;
use crate::stream::brokers::Brokers;
use crate::stream::connection::{ResumeState, StreamConnection, StreamId, is_about_the_path};
use crate::stream::metrics::StreamMetrics;
use crate::stream::waker::Waker;
use crate::{Config, Error};

/// Pause between attempts to reopen a stream.
pub(super) const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause, between attempts that a broker without room refuses.
pub(super) const MAX_RETRY_PAUSE: Duration = Duration::from_secs(1);
/// How long the first of these attempts waits for the broker; each attempt that times out doubles it. A
/// broker that dies with a connection in its queue resets it once (RFC 9293 section 3.10.4), and the
/// reset may be lost: an attempt that waited for the whole timeout would then wait for nothing.
pub(super) const FIRST_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) type Outcome = Result<(Next, ReconnectDeadline), Error>;

/// A stream that is to be continued.
pub(crate) struct Reconnect {
    pub(crate) config: Arc<Config>,
    /// The stream at its home.
    pub(crate) target: StreamId,
    pub(crate) home: usize,
    /// The broker that it used last.
    pub(crate) current: usize,
    pub(crate) brokers: Arc<Brokers>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) left: ResumeState,
    pub(crate) deadline: ReconnectDeadline,
}

/// An attempt that is under way.
pub(crate) struct Reconnecting(Receiver<Outcome>);

/// Wakes an I/O thread when it is dropped, also by a panic.
pub(crate) struct WakeOnDrop(pub(crate) Arc<Waker>);

impl Drop for WakeOnDrop {
    fn drop(&mut self) {
        // A thread that cannot be woken checks by itself a little later.
        let _ = self.0.wake();
    }
}

impl Reconnect {
    /// Starts a thread that wakes this I/O thread when it is done.
    pub(crate) fn start(self, waker: Arc<Waker>) -> Result<Reconnecting, Error> {
        let (sender, outcome) = bounded(1);
        let body = move || {
            let _wake = WakeOnDrop(waker);
            // Dropped before the I/O thread is woken.
            let sender = sender;
            // The I/O thread may have ended.
            let _ = sender.send(self.run());
        };
        thread::Builder::new()
            .name("reconnect".to_owned())
            .spawn(body)
            .map_err(|e| Error::Thread(e.to_string()))?;
        Ok(Reconnecting(outcome))
    }

    fn run(mut self) -> Outcome {
        self.deadline
            .lost_connection(self.current, self.left.first, self.config.timeout);
        match self.config.broker_loss() {
            OnBrokerLoss::Wait => {}
            OnBrokerLoss::Reroute => return self.search(),
            OnBrokerLoss::Fail => return self.once_more(),
        }
        if self.deadline.since.elapsed() > self.config.timeout {
            return Err(Error::Lost {
                broker: self.target.broker,
                unacked: self.left.unacked_messages(),
                source: io::Error::other(self.left.reason),
            });
        }
        self.again()
    }

    /// Asks the broker itself whether it is lost, unless it has ended the connection: then the publisher
    /// fails.
    fn once_more(self) -> Outcome {
        let lost = |unacked, reason| {
            Err(Error::BrokerLost {
                broker: self.target.broker.clone(),
                unacked,
                reason,
            })
        };
        // A broker that ends an idle stream is not lost.
        if self.left.connection_lost && !self.left.is_silent && !self.left.was_idle {
            return lost(self.left.unacked_messages(), self.left.reason);
        }
        let target = self.target.clone();
        match self.try_broker(self.home, FIRST_TIMEOUT) {
            Ok(found) => Ok(self.take_over(found)),
            Err(Error::Failed) => Ok(self.cancelled()),
            Err(error) => Err(Error::BrokerLost {
                broker: target.broker,
                unacked: self.left.unacked_messages(),
                reason: format!("{}; {error}", self.left.reason),
            }),
        }
    }

    /// Opens another connection for a stream, and hands over the unacknowledged batches.
    fn again(self) -> Result<(Next, ReconnectDeadline), Error> {
        let Self {
            config,
            target,
            shared,
            mut left,
            mut deadline,
            home,
            ..
        } = self;
        let (reason, unacked) = (left.reason.clone(), left.unacked_messages());
        warn!(
            broker = target.broker,
            stream = target.number,
            "the stream continues over another connection: {}",
            left.reason
        );
        left.account.summary.moves += 1;
        let (sent, mut tries_xdp) = (left.sent(), left.connection_lost);
        let attempt = |wait| {
            // If only the path failed, this stream stays on tcp. A broker that was lost may have
            // restarted with its xdp path.
            let paths: &[Path] = match (config.mode, tries_xdp) {
                (Mode::Xdp, _) => &[Path::Xdp],
                (Mode::Auto, true) => &[Path::Xdp, Path::Tcp],
                (Mode::Auto, false) | (Mode::Tcp, _) => &[Path::Tcp],
            };
            let mut last = Error::Failed;
            for &path in paths {
                match StreamConnection::reopen(&config, &target, &shared, sent, path, wait) {
                    // The broker itself is gone, so it may come back with its path.
                    Err(error @ Error::Connect { .. }) => {
                        tries_xdp = true;
                        return Err(error);
                    }
                    // Ask a broker that is busy or still starting for the path again. Leave a path that
                    // does not work, even if the broker has not yet noticed the end of the failed
                    // attempt.
                    Err(error) if is_about_the_path(&error) => {
                        tries_xdp = false;
                        last = error;
                    }
                    done => return done,
                }
            }
            Err(last)
        };
        let opened = retry_while_transient(&config, deadline.since, &shared, attempt);
        match opened {
            Ok((mut link, committed)) => {
                left.drop_committed(committed, &shared);
                deadline.connected(!left.unacked.is_empty());
                link.take_over(&mut left);
                Ok((Next::StreamConnection(link, home), deadline))
            }
            Err(Error::Failed) => Ok((Next::Cancelled(Box::new(left.account)), deadline)),
            Err(error) => Err(Error::NotResumed {
                broker: target.broker.clone(),
                unacked,
                reason,
                source: Box::new(error),
            }),
        }
    }
}

impl Reconnecting {
    pub(crate) fn is_over(&self) -> bool {
        !self.0.is_empty()
    }

    /// What came of it, once that is known.
    pub(crate) fn outcome(&self) -> Option<Outcome> {
        match self.0.try_recv() {
            Ok(outcome) => Some(outcome),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => Some(Err(Error::Thread(
                "it panicked while reconnecting".to_owned(),
            ))),
        }
    }
}

/// What follows a lost connection.
pub(crate) enum Next {
    /// A connection, and to which broker.
    StreamConnection(StreamConnection, usize),
    /// The publisher was cancelled: the stream's figures so far.
    Cancelled(Box<StreamMetrics>),
}

/// Since when a stream's connections have brought nothing. A broker that accepts connections but never
/// anything over them is given up like one that accepts none.
#[derive(Debug, Clone)]
pub(crate) struct ReconnectDeadline {
    pub(super) since: Instant,
    connected: Instant,
    acked: u64,
    /// Whether the connection began with unacknowledged batches.
    is_owed: bool,
    /// Brokers that took the stream since then, but acknowledged nothing.
    pub(super) unhelpful: BTreeSet<usize>,
}

impl ReconnectDeadline {
    pub(crate) fn new() -> Self {
        let now = Instant::now();
        Self {
            since: now,
            connected: now,
            acked: 0,
            is_owed: false,
            unhelpful: BTreeSet::new(),
        }
    }

    /// A connection was opened; whether it begins with unacknowledged batches.
    pub(super) fn connected(&mut self, is_owed: bool) {
        self.connected = Instant::now();
        self.is_owed = is_owed;
    }

    /// Records the end of a connection, and how many batches were acknowledged then. If the connection
    /// brought acks, or lasted while none were owed, earlier failures no longer count.
    fn lost_connection(&mut self, broker: usize, acked: u64, timeout: Duration) {
        let has_lasted = !self.is_owed && self.connected.elapsed() > timeout;
        if acked > self.acked || has_lasted {
            self.since = Instant::now();
            self.unhelpful.clear();
        } else {
            if self.is_owed {
                self.unhelpful.insert(broker);
            }
            thread::sleep(RETRY_PAUSE);
        }
        self.acked = acked;
    }
}

/// Retries an operation that may succeed later, until it has failed for the configured time. Each
/// attempt gets the time that it may wait for the broker.
pub(crate) fn retry_while_transient<T>(
    config: &Config,
    since: Instant,
    shared: &Shared,
    mut attempt: impl FnMut(Duration) -> Result<T, Error>,
) -> Result<T, Error> {
    let (mut wait, mut pause) = (FIRST_TIMEOUT, RETRY_PAUSE);
    loop {
        let left = config.timeout.saturating_sub(since.elapsed());
        let begun = Instant::now();
        match attempt(wait.min(left).max(RETRY_PAUSE)) {
            Err(error) if error.is_transient() && since.elapsed() < config.timeout => {
                if shared.is_abandoned() {
                    return Err(Error::Failed);
                }
                if begun.elapsed() >= wait {
                    wait *= 2;
                }
                thread::sleep(pause);
                pause = match error.is_shortage() {
                    true => (2 * pause).min(MAX_RETRY_PAUSE),
                    false => RETRY_PAUSE,
                };
            }
            other => return other,
        }
    }
}
