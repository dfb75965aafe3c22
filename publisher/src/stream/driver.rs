//! A stream over all its connections: sends and takes what it can each time that it is called, and never
//! waits. Another connection is opened by a thread of its own, at its home or, while that is lost, at another
//! broker.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, never};
use nix::poll::PollFd;

use crate::Error;
use crate::batch::pool::{BufferPlan, Share};
use crate::batch::sealed_batch::Job;
use crate::shared::Shared;
use crate::stream::connection::{
    Holdings, Ready, ResumeState, Step, StreamConnection, StreamContext,
};
use crate::stream::metrics::{Closed, RerouteMetrics, StreamMetrics};
use crate::stream::resume::{Next, Reconnect, ReconnectDeadline, Reconnecting};
use crate::stream::return_home::{ReturnHome, is_home_back};
use crate::stream::search::Found;
use crate::stream::waker::Waker;

/// Interval at which a stream without a connection checks whether it has one. Normally the thread that opens
/// it wakes this one.
const CONNECTION_CHECK: Duration = Duration::from_millis(200);

/// A stream that holds batches and has finished none for this time counts as stalled: the others continue
/// with other buffers.
const STALLED_AFTER: Duration = Duration::from_millis(10);

/// What a step of a stream came to.
pub(crate) enum Progress {
    /// It goes on at this time, or earlier if there is something to do.
    Wait(Instant),
    /// The stream is over.
    Over(Box<Closed>),
}

/// What a stream asks of the publisher's buffers.
struct PoolShare {
    shared: Arc<Shared>,
    /// What its pool knows.
    told: Share,
    /// Batches that may wait in front of the stream.
    most_queued: usize,
    done: u64,
    /// Since when it has held something and nothing was done.
    since: Instant,
}

impl PoolShare {
    fn new(shared: &Arc<Shared>, most_queued: usize, now: Instant) -> Self {
        Self {
            shared: Arc::clone(shared),
            told: Share::default(),
            most_queued,
            done: 0,
            since: now,
        }
    }

    /// Follows a stream that is connected; returns when it counts as stalled if nothing happens.
    fn follow(&mut self, now: Instant, holdings: Holdings) -> Option<Instant> {
        let Holdings { held, done, needed } = holdings;
        if held == 0 || done != self.done {
            self.since = now;
        }
        self.done = done;
        let stalls_at = self.since + STALLED_AFTER;
        if held > 0 && now >= stalls_at {
            self.stall(held);
            return None;
        }
        self.tell(Share { needed, stalled: 0 });
        (held > 0).then_some(stalls_at)
    }

    /// The `held` batches of the stream do not come back soon.
    fn stall(&mut self, held: usize) {
        self.tell(Share {
            needed: 0,
            stalled: held + self.most_queued,
        });
    }

    fn tell(&mut self, share: Share) {
        self.shared.pool.share(self.told, share);
        self.told = share;
    }
}

impl Drop for PoolShare {
    fn drop(&mut self) {
        self.tell(Share::default());
    }
}

enum State {
    Connected(StreamConnection),
    Reconnecting(Reconnecting),
    /// The broker ended the stream while it was idle; the next job opens another connection.
    Idle(Box<ResumeState>),
    /// The stream is over, or failed.
    Over,
}

/// One stream.
pub(crate) struct StreamDriver {
    context: StreamContext,
    waker: Arc<Waker>,
    /// The stream's key among those of its I/O thread.
    key: usize,
    /// The broker that it uses, or used last.
    current: usize,
    return_home: ReturnHome,
    /// In place of the jobs, while it begins none.
    no_jobs: Receiver<Job>,
    reroutes: RerouteMetrics,
    deadline: ReconnectDeadline,
    share: PoolShare,
    state: State,
}

impl StreamDriver {
    /// A stream that is connected to the broker `current`; its I/O thread waits for the connection's events with
    /// `waker`, and knows it by `key`.
    pub(crate) fn new(
        context: StreamContext,
        link: StreamConnection,
        current: usize,
        waker: Arc<Waker>,
        key: usize,
    ) -> Result<Self, Error> {
        watch(&waker, &link, key)?;
        let most_queued = BufferPlan::new(&context.config).most_queued;
        let share = PoolShare::new(&context.shared, most_queued, Instant::now());
        let mut reroutes = RerouteMetrics::default();
        if current != context.home {
            context.is_away.store(true, Ordering::Relaxed);
            reroutes.reroutes = 1;
        }
        Ok(Self {
            share,
            context,
            waker,
            key,
            current,
            return_home: ReturnHome::default(),
            no_jobs: never(),
            reroutes,
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

    /// Whether there is something to do that no socket reports.
    pub(crate) fn has_work(&self) -> bool {
        match &self.state {
            State::Connected(link) => {
                (!self.jobs().is_empty() && link.may_take()) || self.return_home.is_over()
            }
            State::Reconnecting(reconnecting) => reconnecting.is_over(),
            State::Idle(_) => !self.context.jobs.is_empty(),
            State::Over => false,
        }
    }

    /// The jobs that may be begun.
    fn jobs(&self) -> &Receiver<Job> {
        match self.return_home.holds_back() {
            true => &self.no_jobs,
            false => &self.context.jobs,
        }
    }

    fn is_away(&self) -> bool {
        self.current != self.context.home
    }

    /// Does what can be done now.
    pub(crate) fn step(&mut self, now: Instant, ready: Ready) -> Result<Progress, Error> {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Connected(link) if self.is_away() => self.step_away(now, link, ready),
            State::Connected(link) => self.step_connected(now, link, ready),
            State::Reconnecting(reconnecting) => match reconnecting.outcome() {
                None => {
                    self.state = State::Reconnecting(reconnecting);
                    Ok(Progress::Wait(now + CONNECTION_CHECK))
                }
                Some(outcome) => self.continue_with(now, outcome?),
            },
            State::Idle(leftover) if self.context.shared.is_abandoned() => {
                Ok(self.over(leftover.account))
            }
            State::Idle(leftover) if self.has_job_or_end() => {
                self.deadline = ReconnectDeadline::new();
                self.reconnect(now, leftover)
            }
            State::Idle(leftover) => {
                if self.is_away() && is_home_back(now, &self.context)? {
                    // Its next connection is tried there first.
                    self.arrive(self.context.home);
                }
                self.state = State::Idle(leftover);
                Ok(Progress::Wait(now + CONNECTION_CHECK))
            }
            State::Over => Err(Error::Failed),
        }
    }

    fn step_connected(
        &mut self,
        now: Instant,
        mut link: StreamConnection,
        ready: Ready,
    ) -> Result<Progress, Error> {
        match link.step(self.jobs(), ready)? {
            Step::Wait(at) => {
                let holdings = link.holdings();
                let stalls_at = self.share.follow(now, holdings);
                self.reroutes.follow(now, holdings);
                self.state = State::Connected(link);
                Ok(Progress::Wait(
                    stalls_at.map_or(at, |stalls| stalls.min(at)),
                ))
            }
            Step::Ended(account) => Ok(self.over(*account)),
            Step::Reconnects(leftover) => {
                // The old connection is closed before a new one is opened.
                drop(link);
                self.return_home = ReturnHome::Away;
                self.leave(now, leftover)
            }
        }
    }

    /// A step of a stream that is connected to another broker than its home.
    fn step_away(
        &mut self,
        now: Instant,
        mut link: StreamConnection,
        ready: Ready,
    ) -> Result<Progress, Error> {
        let (context, holdings) = (&self.context, link.holdings());
        let returned = self.return_home.step(now, context, &self.waker, holdings)?;
        if let Some(found) = returned {
            let left = link.leave("the stream's home is back");
            drop(link);
            return self.go_home(now, found, left);
        }
        match self.step_connected(now, link, ready)? {
            Progress::Wait(at) => Ok(Progress::Wait(at.min(now + CONNECTION_CHECK))),
            over @ Progress::Over(_) => Ok(over),
        }
    }

    fn go_home(
        &mut self,
        now: Instant,
        found: Found,
        left: ResumeState,
    ) -> Result<Progress, Error> {
        let link = found.take_over(&self.context, left);
        self.arrive(self.context.home);
        self.go_on(now, link)
    }

    /// The stream uses this broker from now on.
    fn arrive(&mut self, broker: usize) {
        let home = self.context.home;
        if broker != self.current {
            match broker == home {
                true => self.reroutes.returns += 1,
                false => self.reroutes.reroutes += 1,
            }
        }
        self.current = broker;
        self.context
            .is_away
            .store(broker != home, Ordering::Relaxed);
    }

    fn over(&mut self, account: StreamMetrics) -> Progress {
        let mut closed = account.close();
        let summary = &mut closed.summary;
        self.reroutes.sum_up(summary);
        if self.is_away() {
            let brokers = &self.context.brokers;
            summary.at = Some(brokers.address(self.current).to_owned());
        }
        Progress::Over(Box::new(closed))
    }

    fn leave(&mut self, now: Instant, leftover: Box<ResumeState>) -> Result<Progress, Error> {
        // The broker ended an idle stream because another needs its place. A stream that reconnects
        // without work would only make the broker end the next idle one.
        if leftover.was_idle && leftover.unacked.is_empty() {
            self.state = State::Idle(leftover);
            return Ok(Progress::Wait(now));
        }
        self.reconnect(now, leftover)
    }

    fn reconnect(&mut self, now: Instant, left: Box<ResumeState>) -> Result<Progress, Error> {
        self.share.stall(left.unacked.len());
        if self.context.config.reroutes() {
            // Others get the next batches until it is known where this one goes on.
            self.context.is_away.store(true, Ordering::Relaxed);
            self.reroutes.on_lost(now, &left);
        }
        let reconnect = Reconnect {
            config: Arc::clone(&self.context.config),
            target: self.context.target.clone(),
            home: self.context.home,
            current: self.current,
            brokers: Arc::clone(&self.context.brokers),
            shared: Arc::clone(&self.context.shared),
            left: *left,
            deadline: self.deadline.clone(),
        };
        self.state = State::Reconnecting(reconnect.start(Arc::clone(&self.waker))?);
        Ok(Progress::Wait(now + CONNECTION_CHECK))
    }

    fn continue_with(
        &mut self,
        now: Instant,
        (next, deadline): (Next, ReconnectDeadline),
    ) -> Result<Progress, Error> {
        self.deadline = deadline;
        match next {
            Next::StreamConnection(link, broker) => {
                self.reroutes.on_found(broker != self.current);
                self.arrive(broker);
                self.go_on(now, link)
            }
            Next::Cancelled(account) => Ok(self.over(*account)),
        }
    }

    fn go_on(&mut self, now: Instant, link: StreamConnection) -> Result<Progress, Error> {
        watch(&self.waker, &link, self.key)?;
        self.state = State::Connected(link);
        // What waits is begun before the broker is heard: it is owed from now on, even if the broker
        // has closed the connection already.
        self.step(now, Ready::default())
    }

    /// Whether there is a job, or the publisher is closed.
    fn has_job_or_end(&self) -> bool {
        let mut select = Select::new();
        select.recv(&self.context.jobs);
        select.try_ready().is_ok()
    }
}

fn watch(waker: &Waker, link: &StreamConnection, key: usize) -> Result<(), Error> {
    let watched = waker.watch(link, key);
    watched.map_err(|error: io::Error| Error::Thread(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::batch::pool::Pool;

    #[test]
    fn a_stream_that_stalls_leaves_the_others_their_buffers_until_it_goes_on() {
        let config = Config::new(["a:1", "b:1"].map(str::to_owned), "t");
        let plan = BufferPlan::new(&config);
        let shared = Arc::new(Shared::new(Pool::new(plan, config.batch_size)));
        let start = Instant::now();
        let mut share = PoolShare::new(&shared, plan.most_queued, start);
        let in_use = || shared.pool.in_use() - plan.least;
        let holds = |held, done| Holdings {
            held,
            done,
            needed: 0,
        };
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(share.follow(at(100), holds(0, 0)), None);
        assert_eq!(share.follow(at(100), holds(3, 0)), Some(at(110)));
        assert_eq!(share.follow(at(109), holds(5, 0)), Some(at(110)));
        assert_eq!(in_use(), 0);
        assert_eq!(share.follow(at(110), holds(5, 0)), None);
        assert_eq!(in_use(), 5 + plan.most_queued);
        assert_eq!(share.follow(at(300), holds(5, 1)), Some(at(310)));
        assert_eq!(in_use(), 0);
        // It lost its connection.
        share.stall(2);
        assert_eq!(in_use(), 2 + plan.most_queued);
        drop(share);
        assert_eq!(in_use(), 0);
    }
}
