//! A stream over either path, and its moves from one connection to another.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select};
use penstock_dataplane::wire::handshake::{Path, Refusal};
use tracing::warn;

use crate::account::{Account, Closed};
use crate::config::Mode;
use crate::connect::{self, Location};
use crate::datagram::{DatagramStream, Leftover, Outcome};
use crate::stream::{Job, Shared, Stream, Waker, owns_kept};
use crate::{Config, Error};

/// Pause between attempts to reopen a stream.
const PAUSE: Duration = Duration::from_millis(50);
/// Longest pause, between attempts that a broker without room refuses.
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Interval in which a stream that waits for work checks whether the publisher was dropped.
const ABANDONED_CHECK: Duration = Duration::from_millis(200);
/// How long the first of these attempts waits for the broker; each attempt that times out doubles it. A
/// broker that dies with a connection in its queue resets it once (RFC 9293 section 3.10.4), and the
/// reset may be lost: an attempt that waited for the whole timeout would then wait for nothing.
const FIRST_WAIT: Duration = Duration::from_secs(1);

/// A stream, over tcp or xdp.
pub(crate) enum Link {
    Tcp(Box<Stream>),
    Xdp(Box<DatagramStream>),
}

/// Which stream of which broker.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) broker: String,
    /// 0 opens a session.
    pub(crate) session: u64,
    pub(crate) number: u32,
    /// The address that the broker was last reached at, shared by all streams to it.
    pub(crate) location: Location,
}

/// What a stream needs from the publisher.
#[derive(Clone)]
pub(crate) struct Ends {
    pub(crate) jobs: Receiver<Job>,
    pub(crate) waker: Arc<Waker>,
    pub(crate) shared: Arc<Shared>,
}

impl Ends {
    /// Waits until there is a job, or the publisher is closed or dropped.
    fn wait_for_work(&self) {
        let mut select = Select::new();
        select.recv(&self.jobs);
        while select.ready_timeout(ABANDONED_CHECK).is_err() {
            if self.shared.abandoned.load(Ordering::Relaxed) {
                return;
            }
        }
    }
}

impl Link {
    /// Opens a stream over the path in the settings; returns its session's key and the largest batch
    /// that the broker accepts as well.
    pub(crate) fn open(
        config: &Config,
        target: &Target,
        ends: &Ends,
    ) -> Result<(Self, u64, u32), Error> {
        let queues = &ends.shared.tx_queues;
        let mut target = target.clone();
        let mut acked = None;
        if config.mode != Mode::Tcp {
            let wait = config.timeout;
            let opened = connect::open_stream(config, &target, queues, None, Path::Xdp, wait);
            let reason = match opened {
                Ok(opened) => {
                    let (session, max) = (opened.offer.session, opened.offer.max_payload);
                    match DatagramStream::open(config, &target, opened, ends) {
                        Ok(stream) => return Ok((Self::Xdp(Box::new(stream)), session, max)),
                        Err(error) => {
                            // The stream exists by now, so this connection continues it.
                            (target.session, acked) = (session, Some(0));
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            if config.mode == Mode::Xdp || !is_about_the_path(&reason) {
                return Err(reason);
            }
            warn!(
                broker = target.broker,
                stream = target.number,
                "payload goes over tcp: {reason}"
            );
        }
        let open = |wait| connect::open_stream(config, &target, queues, acked, Path::Tcp, wait);
        let opened = match acked {
            None => open(config.timeout)?,
            // The previous connection may not have ended yet.
            Some(_) => patiently(config, Instant::now(), &ends.shared, open)?,
        };
        let (session, max) = (opened.offer.session, opened.offer.max_payload);
        let stream = Stream::new(config, &target, opened, ends)?;
        Ok((Self::Tcp(Box::new(stream)), session, max))
    }

    /// Sends until the publisher closes; returns what was done.
    pub(crate) fn run(
        self,
        config: &Config,
        target: &Target,
        ends: &Ends,
    ) -> Result<Closed, Error> {
        let mut link = self;
        let mut luck = Luck::new();
        loop {
            // The old connection is closed before a new one is opened.
            let outcome = match link {
                Self::Tcp(mut stream) => stream.run()?,
                Self::Xdp(mut stream) => stream.run()?,
            };
            let leftover = match outcome {
                Outcome::Ended(account) => return Ok(account.close()),
                Outcome::Moves(leftover) => *leftover,
            };
            // The broker ended an idle stream because another needs its place. A stream that reconnects
            // without work would only make the broker end the next idle one.
            if leftover.was_idle && leftover.unacked.is_empty() {
                ends.wait_for_work();
                luck = Luck::new();
            }
            luck.lost_connection(leftover.first, config.timeout);
            if luck.since.elapsed() > config.timeout {
                return Err(Error::Lost {
                    broker: target.broker.clone(),
                    unacked: leftover.unacked_messages(),
                    source: io::Error::other(leftover.reason),
                });
            }
            link = match Self::again(config, target, ends, leftover, &mut luck)? {
                Next::Link(link) => link,
                Next::Cancelled(account) => return Ok(account.close()),
            };
        }
    }

    /// Opens another connection for a stream, and hands over the unacknowledged batches.
    fn again(
        config: &Config,
        target: &Target,
        ends: &Ends,
        mut left: Leftover,
        luck: &mut Luck,
    ) -> Result<Next, Error> {
        let (reason, unacked) = (left.reason.clone(), left.unacked_messages());
        warn!(
            broker = target.broker,
            stream = target.number,
            "the stream continues over another connection: {}",
            left.reason
        );
        left.account.summary.moves += 1;
        let (acked, mut tries_xdp) = (left.first, left.connection_lost);
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
                match Self::reopen(config, target, ends, acked, path, wait) {
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
        let opened = patiently(config, luck.since, &ends.shared, attempt);
        luck.connected = Instant::now();
        match opened {
            Ok((mut link, committed)) => {
                left.drop_committed(committed, &ends.shared, !owns_kept(config));
                luck.is_owed = !left.unacked.is_empty();
                match &mut link {
                    Self::Tcp(stream) => stream.take_over(&mut left),
                    Self::Xdp(stream) => stream.take_over(&mut left),
                }
                Ok(Next::Link(link))
            }
            Err(Error::Failed) => Ok(Next::Cancelled(Box::new(left.account))),
            Err(error) => Err(Error::NotResumed {
                broker: target.broker.clone(),
                unacked,
                reason,
                source: Box::new(error),
            }),
        }
    }

    /// Opens a stream again over one path; returns how many of its batches are committed as well.
    fn reopen(
        config: &Config,
        target: &Target,
        ends: &Ends,
        acked: u64,
        path: Path,
        wait: Duration,
    ) -> Result<(Self, u64), Error> {
        let queues = &ends.shared.tx_queues;
        let opened = connect::open_stream(config, target, queues, Some(acked), path, wait)?;
        let committed = opened.offer.committed;
        let link = match path {
            Path::Tcp => Self::Tcp(Box::new(Stream::new(config, target, opened, ends)?)),
            Path::Xdp => Self::Xdp(Box::new(DatagramStream::open(
                config, target, opened, ends,
            )?)),
        };
        Ok((link, committed))
    }
}

/// Whether the error concerns only the path, so that the broker may be reachable over the other one.
fn is_about_the_path(error: &Error) -> bool {
    match error {
        Error::PathDead { .. } => true,
        Error::Refused { code, .. } => *code == Refusal::Path as u16,
        _ => false,
    }
}

/// What follows a lost connection.
enum Next {
    Link(Link),
    /// The publisher was cancelled: the stream's figures so far.
    Cancelled(Box<Account>),
}

/// Since when a stream's connections have brought nothing. A broker that accepts connections but never
/// anything over them is given up like one that accepts none.
struct Luck {
    since: Instant,
    connected: Instant,
    acked: u64,
    /// Whether the connection began with unacknowledged batches.
    is_owed: bool,
}

impl Luck {
    fn new() -> Self {
        let now = Instant::now();
        Self {
            since: now,
            connected: now,
            acked: 0,
            is_owed: false,
        }
    }

    /// Records the end of a connection, and how many batches were acknowledged then. If the connection
    /// brought acks, or lasted while none were owed, earlier failures no longer count.
    fn lost_connection(&mut self, acked: u64, timeout: Duration) {
        let has_lasted = !self.is_owed && self.connected.elapsed() > timeout;
        if acked > self.acked || has_lasted {
            self.since = Instant::now();
        } else {
            thread::sleep(PAUSE);
        }
        self.acked = acked;
    }
}

/// Retries an operation that may succeed later, until it has failed for the configured time. Each
/// attempt gets the time that it may wait for the broker.
fn patiently<T>(
    config: &Config,
    since: Instant,
    shared: &Shared,
    mut attempt: impl FnMut(Duration) -> Result<T, Error>,
) -> Result<T, Error> {
    let (mut wait, mut pause) = (FIRST_WAIT, PAUSE);
    loop {
        let left = config.timeout.saturating_sub(since.elapsed());
        let begun = Instant::now();
        match attempt(wait.min(left).max(PAUSE)) {
            Err(error) if error.may_pass() && since.elapsed() < config.timeout => {
                if shared.abandoned.load(Ordering::Relaxed) {
                    return Err(Error::Failed);
                }
                if begun.elapsed() >= wait {
                    wait *= 2;
                }
                thread::sleep(pause);
                pause = match error.is_shortage() {
                    true => (2 * pause).min(MAX_PAUSE),
                    false => PAUSE,
                };
            }
            other => return other,
        }
    }
}
