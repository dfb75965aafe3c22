//! Finds a broker for a stream whose own is lost: its home if that answers after all, otherwise another one,
//! where the stream continues under the same session and number.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use penstock_wire::handshake::Path;
use tracing::warn;

use crate::config::{Mode, Transmit};
use crate::shared::Shared;
use crate::stream::connection::{
    ResumeState, Sent, StreamConnection, StreamContext, StreamId, is_about_the_path,
};
use crate::stream::resume::{
    FIRST_TIMEOUT, MAX_RETRY_PAUSE, Next, Outcome, RETRY_PAUSE, Reconnect, ReconnectDeadline,
};
use crate::{Config, Error};

/// How long the broker that a stream used is asked first, before others are.
const QUICK_TIMEOUT: Duration = Duration::from_millis(250);
/// How long a broker is asked again that has not yet noticed the end of the earlier connection.
const BUSY_TIMEOUT: Duration = Duration::from_millis(500);

/// A connection to a broker, which has this number of the stream's batches.
pub(crate) struct Found {
    link: StreamConnection,
    broker: usize,
    committed: u64,
}

/// The settings of a stream at a broker that is not its home: an interface may have no transmit queue to spare.
pub(crate) fn config_away(config: &Arc<Config>) -> Arc<Config> {
    match config.transmit {
        Transmit::Udp => Arc::clone(config),
        Transmit::AfXdp { .. } => Arc::new(Config {
            transmit: Transmit::Udp,
            ..Config::clone(config)
        }),
    }
}

impl Found {
    /// Goes on with a stream whose earlier connection was left; returns the connection.
    pub(super) fn take_over(self, context: &StreamContext, left: ResumeState) -> StreamConnection {
        let Self {
            mut link,
            broker,
            committed,
        } = self;
        let (shared, mut left) = (&context.shared, left);
        let brokers = &context.brokers;
        brokers.health(broker, |health| health.on_accepted(Instant::now()));
        warn!(
            broker = brokers.address(broker),
            stream = context.target.number,
            "the stream returns: {}",
            left.reason
        );
        left.account.summary.moves += 1;
        left.drop_committed(committed, shared);
        link.take_over(&mut left);
        link
    }
}

impl Reconnect {
    /// Asks one broker after the other until one takes the stream, or the time is over.
    pub(super) fn search(mut self) -> Outcome {
        // A stream that is owed nothing is not late.
        if self.left.unacked.is_empty() {
            self.deadline.since = Instant::now();
        }
        // Brokers that accept the stream again and again, but acknowledge nothing, are of no use in the end.
        let is_late = self.deadline.since.elapsed() > self.config.timeout;
        if self.deadline.unhelpful.contains(&self.current) || self.left.is_stuck {
            // It answers, but does not help: others are asked first.
            let now = Instant::now();
            let brokers = &self.brokers;
            brokers.health(self.current, |health| health.on_lost(now));
        }
        let mut pause = RETRY_PAUSE;
        let mut wait = QUICK_TIMEOUT;
        loop {
            let brokers = &self.brokers;
            let now = Instant::now();
            let mut candidates = brokers.candidates(&self.target, self.home, self.current, now);
            let mut failures = vec![String::new(); brokers.len()];
            let unhelpful = &self.deadline.unhelpful;
            for broker in unhelpful {
                "it accepts the stream, but acknowledges nothing"
                    .clone_into(&mut failures[*broker]);
            }
            match is_late {
                true => candidates.retain(|broker| !unhelpful.contains(broker)),
                // Stable: the order stays among those that may help, and among those that did not.
                false => candidates.sort_by_key(|broker| unhelpful.contains(broker)),
            }
            for broker in candidates {
                if self.shared.is_abandoned() {
                    return Ok(self.cancelled());
                }
                match self.try_broker(broker, wait) {
                    Ok(found) => return Ok(self.take_over(found)),
                    Err(error) => {
                        self.note_failure(broker, &error);
                        failures[broker] = error.to_string();
                    }
                }
                wait = FIRST_TIMEOUT;
            }
            if self.deadline.since.elapsed() >= self.config.timeout {
                return Err(self.no_broker(&failures.join("; ")));
            }
            thread::sleep(pause);
            pause = (2 * pause).min(MAX_RETRY_PAUSE);
        }
    }

    /// Opens the stream at a broker, over the first path in the settings that works.
    pub(super) fn try_broker(&self, broker: usize, wait: Duration) -> Result<Found, Error> {
        let Self {
            config,
            target,
            shared,
            left,
            ..
        } = self;
        let is_home = broker == self.home;
        let config = match is_home {
            true => Arc::clone(config),
            false => config_away(config),
        };
        // If only the path failed, the stream stays on tcp there.
        let is_path_in_doubt = broker == self.current && !left.connection_lost && !left.is_silent;
        let paths: &[Path] = match (config.mode, is_path_in_doubt) {
            (Mode::Xdp, _) => &[Path::Xdp],
            (Mode::Auto, false) => &[Path::Xdp, Path::Tcp],
            (Mode::Auto, true) | (Mode::Tcp, _) => &[Path::Tcp],
        };
        let target = self
            .brokers
            .stream_at(broker, target.session, target.number);
        open_at(&config, shared, &target, broker, left.sent(), paths, wait)
    }

    fn no_broker(self, failures: &str) -> Error {
        Error::NoBroker {
            unacked: self.left.unacked_messages(),
            reason: self.left.reason,
            failures: failures.to_owned(),
        }
    }

    fn note_failure(&self, broker: usize, error: &Error) {
        // A broker that answers may refuse only this stream.
        if broker != self.home && !error.is_unreachable() {
            return;
        }
        let now = Instant::now();
        let brokers = &self.brokers;
        if brokers.health(broker, |health| health.on_lost(now)) {
            let address = brokers.address(broker);
            warn!(broker = address, "the broker is lost: {error}");
        }
    }

    /// Hands the unacknowledged batches over.
    pub(super) fn take_over(self, found: Found) -> (Next, ReconnectDeadline) {
        let Self {
            target,
            shared,
            brokers,
            mut left,
            mut deadline,
            current,
            ..
        } = self;
        let Found {
            mut link,
            broker,
            committed,
        } = found;
        let address = brokers.address(broker);
        let stream = target.number;
        let reason = &left.reason;
        match broker == current {
            true => warn!(
                broker = address,
                stream, "the stream continues over another connection: {reason}"
            ),
            false => warn!(
                broker = address,
                session = format!("{:016x}", target.session),
                stream,
                home = target.broker,
                "the stream continues at another broker: {reason}"
            ),
        }
        brokers.health(broker, |health| health.on_accepted(Instant::now()));
        left.account.summary.moves += 1;
        left.drop_committed(committed, &shared);
        deadline.connected(!left.unacked.is_empty());
        link.take_over(&mut left);
        (Next::StreamConnection(link, broker), deadline)
    }

    pub(super) fn cancelled(self) -> (Next, ReconnectDeadline) {
        (Next::Cancelled(Box::new(self.left.account)), self.deadline)
    }
}

/// Opens a stream, of which these batches were sent, at the broker of this number, over the first of the paths that
/// works.
pub(super) fn open_at(
    config: &Config,
    shared: &Arc<Shared>,
    target: &StreamId,
    broker: usize,
    sent: Sent,
    paths: &[Path],
    wait: Duration,
) -> Result<Found, Error> {
    let mut last = Error::Failed;
    for &path in paths {
        let begun = Instant::now();
        loop {
            match StreamConnection::reopen(config, target, shared, sent, path, wait) {
                Ok((link, committed)) => {
                    return Ok(Found {
                        link,
                        broker,
                        committed,
                    });
                }
                // The broker has not yet noticed the end of the earlier connection, or attempt.
                Err(error) if error.is_busy() && begun.elapsed() < BUSY_TIMEOUT => {
                    if shared.is_abandoned() {
                        return Err(Error::Failed);
                    }
                    thread::sleep(RETRY_PAUSE);
                }
                Err(error) if is_about_the_path(&error) => {
                    last = error;
                    break;
                }
                Err(error) => return Err(error),
            }
        }
    }
    Err(last)
}
