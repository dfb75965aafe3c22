//! A thread that drives several streams: waits for their sockets, timers and jobs all at once, and lets
//! each do what it can.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::poll::{PollFd, PollFlags};
use penstock_runtime::poller::Events;
use penstock_runtime::sleep;

use crate::Error;
use crate::failure::Failure;
use crate::shared::Shared;
use crate::stream::connection::{Ready, StreamConnection, StreamContext};
use crate::stream::driver::{Progress, StreamDriver};
use crate::stream::metrics::Closed;
use crate::stream::waker::Waker;

/// Longest sleep.
const MAX_SLEEP: Duration = Duration::from_millis(100);
/// A thread with a single stream does not sleep for less: that is not worth a system call.
const MIN_SLEEP: Duration = Duration::from_micros(20);

/// What became of a stream.
pub(crate) type StreamResult = Result<Closed, Error>;

/// A stream, and when it is to go on.
struct Slot {
    /// None once it is over.
    driver: Option<StreamDriver>,
    result: Sender<StreamResult>,
    ready: Ready,
    wake_at: Instant,
}

impl Slot {
    fn has_work(&self) -> bool {
        self.driver.as_ref().is_some_and(StreamDriver::has_work)
    }

    fn datagrams(&self) -> Option<PollFd<'_>> {
        self.driver.as_ref().and_then(StreamDriver::datagrams)
    }
}

/// The thread's streams; the key of each is its place.
pub(crate) struct IoThread {
    waker: Arc<Waker>,
    events: Events,
    shared: Arc<Shared>,
    failure: Arc<Failure>,
    slots: Vec<Slot>,
    /// Of the streams that send datagrams.
    keys: Vec<usize>,
}

/// Tells the publisher that an I/O thread panicked.
struct PanicNote(Arc<Failure>);

impl Drop for PanicNote {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.note(Error::Thread("it panicked".to_owned()));
        }
    }
}

impl IoThread {
    pub(crate) fn new(shared: &Arc<Shared>, failure: &Arc<Failure>) -> Result<Self, Error> {
        let waker = Waker::new().map_err(|e| Error::Thread(e.to_string()))?;
        Ok(Self {
            waker: Arc::new(waker),
            events: Events::default(),
            shared: Arc::clone(shared),
            failure: Arc::clone(failure),
            slots: Vec::new(),
            keys: Vec::new(),
        })
    }

    pub(crate) fn waker(&self) -> &Arc<Waker> {
        &self.waker
    }

    /// Adds a stream, which is connected to this broker; returns where its result will come.
    pub(crate) fn add(
        &mut self,
        context: StreamContext,
        link: StreamConnection,
        broker: usize,
    ) -> Result<Receiver<StreamResult>, Error> {
        let (result, receiver) = bounded(1);
        let waker = Arc::clone(&self.waker);
        let key = self.slots.len();
        let driver = StreamDriver::new(context, link, broker, waker, key)?;
        self.slots.push(Slot {
            driver: Some(driver),
            result,
            ready: Ready::default(),
            wake_at: Instant::now(),
        });
        Ok(receiver)
    }

    /// Starts the thread, which ends after its last stream.
    pub(crate) fn spawn(self) -> Result<JoinHandle<()>, Error> {
        thread::Builder::new()
            .name("io".to_owned())
            .spawn(move || {
                let mut streams = self;
                // Dropped before the streams are, also by a panic, so that the reason is known once a stream is gone.
                let _note = PanicNote(Arc::clone(&streams.failure));
                if let Err(error) = streams.run() {
                    streams.failure.note(error);
                }
            })
            .map_err(|e| Error::Thread(e.to_string()))
    }

    fn run(&mut self) -> Result<(), Error> {
        let failed = |error: io::Error| Error::Thread(error.to_string());
        sleep::minimize_timer_slack().map_err(failed)?;
        let mut was_told = (false, false);
        while self.slots.iter().any(|slot| slot.driver.is_some()) {
            // Every stream is to see that the publisher is closed or dropped.
            let told = (self.shared.is_closed(), self.shared.is_abandoned());
            let next = self.step(Instant::now(), told != was_told);
            was_told = told;
            self.wait(next).map_err(failed)?;
        }
        Ok(())
    }

    /// Lets each stream go on that can, or all of them; returns when the next is to.
    fn step(&mut self, now: Instant, all: bool) -> Instant {
        let mut next = now + MAX_SLEEP;
        for slot in &mut self.slots {
            let is_due = all || slot.ready.any() || slot.wake_at <= now || slot.has_work();
            let Some(driver) = &mut slot.driver else {
                continue;
            };
            if is_due {
                match driver.step(now, std::mem::take(&mut slot.ready)) {
                    Ok(Progress::Wait(at)) => slot.wake_at = at,
                    Ok(Progress::Over(closed)) => {
                        // Nobody asks for the result of an abandoned stream.
                        let _ = slot.result.send(Ok(*closed));
                        slot.driver = None;
                        continue;
                    }
                    Err(error) => {
                        // Noted before the stream's queue goes, so that whoever finds it gone finds the
                        // reason.
                        self.failure.note(error);
                        let _ = slot.result.send(Err(Error::Failed));
                        slot.driver = None;
                        continue;
                    }
                }
            }
            next = next.min(slot.wake_at);
        }
        next
    }

    /// Waits until a socket has something, there is work, or it is this time.
    fn wait(&mut self, next: Instant) -> io::Result<()> {
        let now = Instant::now();
        let is_single = self.slots.len() == 1;
        let left = next.saturating_duration_since(now);
        if is_single && left < MIN_SLEEP && self.slots[0].datagrams().is_some() {
            self.slots[0].ready.has_datagrams = true;
            return Ok(());
        }
        if left.is_zero() {
            return self.poll(Duration::ZERO);
        }
        self.waker.going_to_sleep();
        let told = self.slots.iter().any(Slot::has_work);
        let polled = self.poll(if told { Duration::ZERO } else { left });
        self.waker.awake();
        polled
    }

    /// Takes the events of all sockets, and waits for the first.
    fn poll(&mut self, longest: Duration) -> io::Result<()> {
        match self.poll_datagrams(longest)? {
            None => self.take_events(longest),
            Some(true) => self.take_events(Duration::ZERO),
            Some(false) => Ok(()),
        }
    }

    /// Waits for the sockets of datagrams and the waker; says whether the waker has events, or nothing if
    /// there are no such sockets.
    fn poll_datagrams(&mut self, longest: Duration) -> io::Result<Option<bool>> {
        let mut keys = std::mem::take(&mut self.keys);
        keys.clear();
        let mut watched = Vec::new();
        for (key, slot) in self.slots.iter().enumerate() {
            if let Some(datagrams) = slot.datagrams() {
                keys.push(key);
                watched.push(datagrams);
            }
        }
        let has_events = if keys.is_empty() {
            None
        } else {
            watched.push(PollFd::new(self.waker.as_fd(), PollFlags::POLLIN));
            sleep::until_ready(&mut watched, longest)?;
            let mut sockets = watched.iter();
            keys.retain(|_| sockets.next().is_some_and(sleep::is_ready));
            sockets.next().map(sleep::is_ready)
        };
        drop(watched);
        for key in &keys {
            self.slots[*key].ready.has_datagrams = true;
        }
        self.keys = keys;
        Ok(has_events)
    }

    fn take_events(&mut self, longest: Duration) -> io::Result<()> {
        self.waker.wait(&mut self.events, longest)?;
        for event in self.events.iter() {
            let ready = &mut self.slots[event.key].ready;
            ready.is_readable |= event.is_readable;
            ready.is_writable |= event.is_writable;
        }
        Ok(())
    }
}
