//! A stream over whichever path it takes, and the change from one connection to another.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use penstock_dataplane::wire::handshake::{Path, Refusal};
use tracing::warn;

use crate::account::{Account, Closed};
use crate::config::Mode;
use crate::connect::{self, Location};
use crate::datagram::{DatagramStream, Leftover, Outcome};
use crate::stream::{Job, Shared, Stream, Waker, owns_kept};
use crate::{Config, Error};

/// Pause between attempts to open a stream again.
const PAUSE: Duration = Duration::from_millis(50);
/// How long the first of these attempts waits for the broker; doubled by each that waits in vain. A
/// broker that dies with a connection in its queue resets it once (RFC 9293 3.10.4), and nobody
/// sends that reset again if it is lost: whoever waits as long as he may at once, waits for nothing.
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
    /// The same for all streams to the broker.
    pub(crate) location: Location,
}

/// What a stream needs from the publisher.
#[derive(Clone)]
pub(crate) struct Ends {
    pub(crate) jobs: Receiver<Job>,
    pub(crate) waker: Arc<Waker>,
    pub(crate) shared: Arc<Shared>,
}

impl Link {
    /// Opens a stream over the path that the settings ask for; returns its session's key and the
    /// largest batch that the broker takes as well.
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
                            // The stream exists by now: it goes on.
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
            // The connection before may not quite have ended.
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
            // The old connection is closed before another is asked for.
            let outcome = match link {
                Self::Tcp(mut stream) => stream.run()?,
                Self::Xdp(mut stream) => stream.run()?,
            };
            let leftover = match outcome {
                Outcome::Ended(account) => return Ok(account.close()),
                Outcome::Moves(leftover) => *leftover,
            };
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

    /// Opens another connection for a stream, and hands it what is not acked.
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
            "the stream goes on over another connection: {}",
            left.reason
        );
        left.account.summary.moves += 1;
        let (acked, mut broker_lost) = (left.first, left.broker_lost);
        let attempt = |wait| {
            // A path that died may come back, but not for this stream; a broker that went away may
            // be there again with its path.
            let paths: &[Path] = match (config.mode, broker_lost) {
                (Mode::Xdp, _) => &[Path::Xdp],
                (Mode::Auto, true) => &[Path::Xdp, Path::Tcp],
                (Mode::Auto, false) | (Mode::Tcp, _) => &[Path::Tcp],
            };
            let mut last = Error::Failed;
            for &path in paths {
                match Self::reopen(config, target, ends, acked, path, wait) {
                    // More than the path is gone.
                    Err(error @ Error::Connect { .. }) => {
                        broker_lost = true;
                        return Err(error);
                    }
                    // A broker that is busy, or only just starting, is asked for the path again.
                    // One that does not work is left, also while the attempt over it has not ended there.
                    Err(error) if is_about_the_path(&error) => {
                        broker_lost = false;
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

/// Whether the path does not work, while the broker may over the other one.
fn is_about_the_path(error: &Error) -> bool {
    match error {
        Error::PathDead { .. } => true,
        Error::Refused { code, .. } => *code == Refusal::Path as u16,
        _ => false,
    }
}

/// What follows on a lost connection.
enum Next {
    Link(Link),
    /// The publisher is cancelled: the figures of the stream, as far as it came.
    Cancelled(Box<Account>),
}

/// Since when a stream has had no luck with its connections. A broker that takes connections but
/// never anything over them is given up as one that takes none.
struct Luck {
    since: Instant,
    connected: Instant,
    acked: u64,
    /// The connection began with batches that wait for an ack.
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

    /// A connection ended when so many batches were acked. If it brought some, or lasted while there
    /// was nothing to bring, what was before it is forgotten.
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

/// Tries again what may succeed a little later, until it was to no avail for as long as the
/// settings say. Each attempt is told how long it may wait for the broker.
fn patiently<T>(
    config: &Config,
    since: Instant,
    shared: &Shared,
    mut attempt: impl FnMut(Duration) -> Result<T, Error>,
) -> Result<T, Error> {
    let mut wait = FIRST_WAIT;
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
                thread::sleep(PAUSE);
            }
            other => return other,
        }
    }
}
