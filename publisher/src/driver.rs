//! A stream over all its connections: sends and takes what it can each time that it is called, and never
//! waits. Another connection is opened by a thread of its own.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Select;
use nix::poll::PollFd;

use crate::Error;
use crate::account::Closed;
use crate::link::{Leftover, Link, Ready, Step, StreamContext};
use crate::reconnect::{Next, Reconnect, ReconnectDeadline, Reconnecting};
use crate::waker::Waker;

/// How often a stream without a connection checks whether that has changed: it is told, so this is for the
/// worst case.
const LOOK: Duration = Duration::from_millis(200);

/// What a step of a stream came to.
pub(crate) enum Progress {
    /// It goes on at this time, or earlier if there is something to do.
    Wait(Instant),
    /// The stream is over.
    Over(Box<Closed>),
}

enum State {
    Connected(Link),
    Reconnecting(Reconnecting),
    /// The broker ended the stream while it was idle; the next job opens another connection.
    Idle(Box<Leftover>),
    /// The stream is over, or failed.
    Over,
}

/// One stream.
pub(crate) struct StreamDriver {
    context: StreamContext,
    waker: Arc<Waker>,
    /// The stream's key among those of its I/O thread.
    key: usize,
    deadline: ReconnectDeadline,
    state: State,
}

impl StreamDriver {
    /// A stream that is connected; its I/O thread waits for the connection's events with `waker`, and knows
    /// it by `key`.
    pub(crate) fn new(
        context: StreamContext,
        link: Link,
        waker: Arc<Waker>,
        key: usize,
    ) -> Result<Self, Error> {
        watch(&waker, &link, key)?;
        Ok(Self {
            context,
            waker,
            key,
            deadline: ReconnectDeadline::new(),
            state: State::Connected(link),
        })
    }

    /// The socket of datagrams, and what it is to be watched for.
    pub(crate) fn datagrams(&self) -> Option<PollFd<'_>> {
        match &self.state {
            State::Connected(link) => link.datagrams(),
            _ => None,
        }
    }

    /// Whether there is something to do that no socket tells.
    pub(crate) fn has_work(&self) -> bool {
        match &self.state {
            State::Connected(link) => !self.context.jobs.is_empty() && link.may_take(),
            State::Reconnecting(reconnecting) => reconnecting.is_over(),
            State::Idle(_) => !self.context.jobs.is_empty(),
            State::Over => false,
        }
    }

    /// Does what can be done now.
    pub(crate) fn step(&mut self, now: Instant, ready: Ready) -> Result<Progress, Error> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Connected(mut link) => match link.step(&self.context, ready)? {
                Step::Wait(at) => {
                    self.state = State::Connected(link);
                    Ok(Progress::Wait(at))
                }
                Step::Ended(account) => Ok(Progress::Over(Box::new(account.close()))),
                Step::Moves(leftover) => {
                    // The old connection is closed before a new one is opened.
                    drop(link);
                    self.leave(now, leftover)
                }
            },
            State::Reconnecting(reconnecting) => match reconnecting.outcome() {
                None => {
                    self.state = State::Reconnecting(reconnecting);
                    Ok(Progress::Wait(now + LOOK))
                }
                Some(outcome) => self.continue_with(now, outcome?),
            },
            State::Idle(leftover) if self.context.shared.is_abandoned() => {
                Ok(Progress::Over(Box::new(leftover.account.close())))
            }
            State::Idle(leftover) if self.has_job_or_end() => {
                self.deadline = ReconnectDeadline::new();
                self.reconnect(now, leftover)
            }
            State::Idle(leftover) => {
                self.state = State::Idle(leftover);
                Ok(Progress::Wait(now + LOOK))
            }
            State::Over => Err(Error::Failed),
        }
    }

    fn leave(&mut self, now: Instant, leftover: Box<Leftover>) -> Result<Progress, Error> {
        // The broker ended an idle stream because another needs its place. A stream that reconnects
        // without work would only make the broker end the next idle one.
        if leftover.was_idle && leftover.unacked.is_empty() {
            self.state = State::Idle(leftover);
            return Ok(Progress::Wait(now));
        }
        self.reconnect(now, leftover)
    }

    fn reconnect(&mut self, now: Instant, left: Box<Leftover>) -> Result<Progress, Error> {
        let reconnect = Reconnect {
            config: Arc::clone(&self.context.config),
            target: self.context.target.clone(),
            shared: Arc::clone(&self.context.shared),
            left: *left,
            deadline: self.deadline,
        };
        self.state = State::Reconnecting(reconnect.start(Arc::clone(&self.waker))?);
        Ok(Progress::Wait(now + LOOK))
    }

    fn continue_with(
        &mut self,
        now: Instant,
        (next, deadline): (Next, ReconnectDeadline),
    ) -> Result<Progress, Error> {
        self.deadline = deadline;
        match next {
            Next::Link(link) => {
                watch(&self.waker, &link, self.key)?;
                self.state = State::Connected(link);
                // What waits is begun before the broker is heard: it is owed from now on, even if the broker
                // has closed the connection already.
                self.step(now, Ready::default())
            }
            Next::Cancelled(account) => Ok(Progress::Over(Box::new(account.close()))),
        }
    }

    /// Whether there is a job, or the publisher is closed.
    fn has_job_or_end(&self) -> bool {
        let mut select = Select::new();
        select.recv(&self.context.jobs);
        select.try_ready().is_ok()
    }
}

fn watch(waker: &Waker, link: &Link, key: usize) -> Result<(), Error> {
    let watched = waker.watch(link, key);
    watched.map_err(|error: io::Error| Error::Thread(error.to_string()))
}
