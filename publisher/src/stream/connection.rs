//! One connection of a stream, over either path.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use nix::poll::PollFd;
use penstock_wire::handshake::{Path, Refusal};
use tracing::warn;

use crate::batch::sealed_batch::{Job, SealedBatch};
use crate::config::Mode;
use crate::shared::Shared;
use crate::stream::brokers::Brokers;
use crate::stream::connect::{self, Location};
use crate::stream::datagram::DatagramStream;
use crate::stream::metrics::StreamMetrics;
use crate::stream::resume::retry_while_transient;
use crate::stream::tcp::Stream;
use crate::{Config, Error};

/// A stream's connection, over tcp or xdp.
pub(crate) enum StreamConnection {
    Tcp(Box<Stream>),
    Xdp(Box<DatagramStream>),
}

/// Which stream of which broker.
#[derive(Debug, Clone)]
pub(crate) struct StreamId {
    pub(crate) broker: String,
    /// 0 opens a session.
    pub(crate) session: u64,
    pub(crate) number: u32,
    /// The address that the broker was last reached at, shared by all streams to it.
    pub(crate) location: Location,
}

/// What a stream has of the publisher, whichever connection it uses.
pub(crate) struct StreamContext {
    pub(crate) config: Arc<Config>,
    /// The stream at its home.
    pub(crate) target: StreamId,
    /// Its home: the broker that it belongs to, by its number.
    pub(crate) home: usize,
    pub(crate) brokers: Arc<Brokers>,
    pub(crate) jobs: Receiver<Job>,
    /// Tells the publisher that the stream is not at its home: others get the next batches.
    pub(crate) is_away: Arc<AtomicBool>,
    pub(crate) shared: Arc<Shared>,
}

/// What the sockets of a connection have.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Ready {
    /// The connection has something to read.
    pub(crate) is_readable: bool,
    /// The connection has room to write.
    pub(crate) is_writable: bool,
    /// Datagrams have come, or there is room for more.
    pub(crate) has_datagrams: bool,
}

impl Ready {
    /// Whether the sockets have anything.
    pub(crate) fn any(self) -> bool {
        self.is_readable || self.is_writable || self.has_datagrams
    }
}

/// The part of the publisher's buffers that a connection has to do with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Holdings {
    /// Batches that it holds, acknowledged or not begun.
    pub(crate) held: usize,
    /// Batches that are done: acknowledged, or written where none is.
    pub(crate) done: u64,
    /// Bytes of batches that its path needs.
    pub(crate) needed: usize,
}

/// What a step of a connection came to.
pub(crate) enum Step {
    /// It goes on at this time, or earlier if a socket has something or a job comes.
    Wait(Instant),
    /// Everything is acknowledged, or the publisher was cancelled.
    Ended(Box<StreamMetrics>),
    /// The path is dead or the broker is gone: the stream continues over another connection.
    Reconnects(Box<ResumeState>),
}

/// What another connection needs to continue.
pub(crate) struct ResumeState {
    pub(crate) reason: String,
    /// The control connection ended as well, so the broker may have been restarted.
    pub(crate) connection_lost: bool,
    /// The broker ended the stream because it was idle.
    pub(crate) was_idle: bool,
    /// Nobody ended the connection: the broker fell silent, and may be asked again.
    pub(crate) is_silent: bool,
    /// The broker answers, but made no progress for the whole timeout.
    pub(crate) is_stuck: bool,
    /// Time since the broker's last sign of life, if answers were due.
    pub(crate) quiet: Option<Duration>,
    pub(crate) account: StreamMetrics,
    /// Unacknowledged batches, oldest first; the first has the number `first`.
    pub(crate) unacked: VecDeque<SealedBatch>,
    pub(crate) first: u64,
}

impl ResumeState {
    pub(crate) fn unacked_messages(&self) -> u64 {
        let messages = self.unacked.iter().map(|batch| u64::from(batch.messages));
        messages.sum()
    }

    pub(crate) fn sent(&self) -> Sent {
        Sent {
            acked: self.first,
            unacked: self.unacked.len() as u64,
        }
    }

    /// Batches that turned out to be committed are done.
    pub(crate) fn drop_committed(&mut self, committed: u64, shared: &Shared) {
        while self.first < committed {
            let Some(batch) = self.unacked.pop_front() else {
                return;
            };
            self.first += 1;
            self.account.acked(1, batch.messages.into(), shared);
            shared.pool.give_back(batch.payload);
        }
    }
}

/// The batches of a stream that were sent to some broker.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sent {
    pub(crate) acked: u64,
    /// Those behind them.
    pub(crate) unacked: u64,
}

impl Sent {
    const NOTHING: Self = Self {
        acked: 0,
        unacked: 0,
    };

    /// Checks what a broker claims to have of the stream. Otherwise batches would count as acknowledged that no
    /// log has, or their numbers would be used again.
    fn check(self, target: &StreamId, committed: u64) -> Result<(), Error> {
        let highest = self.acked + self.unacked;
        match (self.acked..=highest).contains(&committed) {
            true => Ok(()),
            false => Err(Error::BadResume {
                broker: target.broker.clone(),
                committed,
                lowest: self.acked,
                highest,
            }),
        }
    }
}

impl StreamConnection {
    /// Opens a stream over the path in the settings; returns its session's key and the largest batch
    /// that the broker accepts as well. A stream of a session that another broker chose is resumed.
    pub(crate) fn open(
        config: &Config,
        target: &StreamId,
        shared: &Arc<Shared>,
        resumes: bool,
    ) -> Result<(Self, u64, u32), Error> {
        let queues = &shared.tx_queues;
        let mut target = target.clone();
        let mut acked = resumes.then_some(0);
        if config.mode != Mode::Tcp {
            let wait = config.timeout;
            let opened = connect::open_stream(config, &target, queues, acked, Path::Xdp, wait);
            let reason = match opened {
                Ok(opened) => {
                    Sent::NOTHING.check(&target, opened.offer.committed)?;
                    let (session, max) = (opened.offer.session, opened.offer.max_payload);
                    match DatagramStream::open(config, &target, opened, shared) {
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
            Some(_) => retry_while_transient(config, Instant::now(), shared, open)?,
        };
        Sent::NOTHING.check(&target, opened.offer.committed)?;
        let (session, max) = (opened.offer.session, opened.offer.max_payload);
        let stream = Stream::new(config, &target, opened, shared);
        Ok((Self::Tcp(Box::new(stream)), session, max))
    }

    /// Opens a stream again over one path; returns how many of its batches are committed as well.
    pub(crate) fn reopen(
        config: &Config,
        target: &StreamId,
        shared: &Arc<Shared>,
        sent: Sent,
        path: Path,
        wait: Duration,
    ) -> Result<(Self, u64), Error> {
        let queues = &shared.tx_queues;
        let opened = connect::open_stream(config, target, queues, Some(sent.acked), path, wait)?;
        let committed = opened.offer.committed;
        sent.check(target, committed)?;
        if config.reroutes() {
            check_batch_size(config, target, shared, opened.offer.max_payload)?;
        }
        let link = match path {
            Path::Tcp => Self::Tcp(Box::new(Stream::new(config, target, opened, shared))),
            Path::Xdp => Self::Xdp(Box::new(DatagramStream::open(
                config, target, opened, shared,
            )?)),
        };
        Ok((link, committed))
    }

    /// Sends and takes what it can now, without waiting.
    pub(crate) fn step(&mut self, jobs: &Receiver<Job>, ready: Ready) -> Result<Step, Error> {
        match self {
            Self::Tcp(stream) => stream.step(jobs, ready),
            Self::Xdp(stream) => stream.step(jobs, ready),
        }
    }

    /// Ends this connection; another one continues.
    pub(crate) fn leave(&mut self, reason: &str) -> ResumeState {
        match self {
            Self::Tcp(stream) => stream.leave(reason.to_owned()),
            Self::Xdp(stream) => stream.leave(reason.to_owned()),
        }
    }

    /// Whether the next job could be begun now.
    pub(crate) fn may_take(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.may_take(),
            Self::Xdp(stream) => stream.may_take(),
        }
    }

    /// The socket of datagrams, and what it is to be watched for while the thread sleeps. It is not watched
    /// at other times: the kernel would look for a thread to wake with each packet that it has sent.
    pub(crate) fn datagrams(&self) -> Option<PollFd<'_>> {
        match self {
            Self::Tcp(_) => None,
            Self::Xdp(stream) => Some(stream.datagrams()),
        }
    }

    /// What it holds, how far it is, and what it needs.
    pub(crate) fn holdings(&self) -> Holdings {
        match self {
            Self::Tcp(stream) => stream.holdings(),
            Self::Xdp(stream) => stream.holdings(),
        }
    }

    /// Continues with what another connection left.
    pub(crate) fn take_over(&mut self, left: &mut ResumeState) {
        match self {
            Self::Tcp(stream) => stream.take_over(left),
            Self::Xdp(stream) => stream.take_over(left),
        }
    }
}

impl AsFd for StreamConnection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.socket().as_fd(),
            Self::Xdp(stream) => stream.control().as_fd(),
        }
    }
}

/// Whether a broker accepts full batches. Those of a publisher fit all brokers that could be reached at its
/// start; others may come later.
fn check_batch_size(
    config: &Config,
    target: &StreamId,
    shared: &Shared,
    accepted: u32,
) -> Result<(), Error> {
    let largest = shared.max_payload.load(Ordering::Relaxed) as usize;
    let full = config.batch_size.min(largest);
    if accepted as usize >= full {
        return Ok(());
    }
    Err(Error::Refused {
        broker: target.broker.clone(),
        code: Refusal::BatchSize as u16,
        text: format!(
            "it accepts batches of {accepted} bytes, but those of this publisher have {full}; raise its --segment-size"
        ),
    })
}

/// Whether the error concerns only the path, so that the broker may be reachable over the other one.
pub(crate) fn is_about_the_path(error: &Error) -> bool {
    match error {
        Error::PathDead { .. } => true,
        Error::Refused { code, .. } => *code == Refusal::Path as u16,
        _ => false,
    }
}
