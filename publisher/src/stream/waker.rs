//! What an I/O thread sleeps on: sockets of its streams, and a publisher that has work for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use penstock_runtime::poller::{Events, Interest, Poller};

/// A poller of edges. A thread that is awake is not woken: it looks for work before it sleeps.
#[derive(Debug)]
pub(crate) struct Waker {
    poller: Poller,
    is_sleeping: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            poller: Poller::new()?,
            is_sleeping: AtomicBool::new(false),
        })
    }

    /// Watches a socket for edges, until it is closed: the receiver of an event must read until nothing is left,
    /// and writes until there is no room.
    pub(crate) fn watch(&self, socket: impl AsFd, key: usize) -> io::Result<()> {
        let both = Interest::READABLE.and(Interest::WRITABLE);
        self.poller.add(socket, key, both.edges())
    }

    /// Waits for events.
    pub(crate) fn wait(&self, events: &mut Events, longest: Duration) -> io::Result<()> {
        self.poller.wait(events, longest)
    }

    /// The thread is about to sleep; it must look for work once more before it does.
    pub(crate) fn going_to_sleep(&self) {
        self.is_sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    pub(crate) fn awake(&self) {
        self.is_sleeping.store(false, Ordering::Relaxed);
    }

    /// Tells of a job that was queued before.
    pub(crate) fn job_queued(&self) -> io::Result<()> {
        // Pairs with the fence in `going_to_sleep`: either this sees that the thread sleeps, or the thread
        // sees the job.
        fence(Ordering::SeqCst);
        let sleeps = self.is_sleeping.load(Ordering::Relaxed);
        // Only one of several jobs wakes it.
        if sleeps && self.is_sleeping.swap(false, Ordering::Relaxed) {
            self.wake()
        } else {
            Ok(())
        }
    }

    /// Wakes the thread in any case.
    pub(crate) fn wake(&self) -> io::Result<()> {
        self.poller.notify()
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use penstock_runtime::poller::Event;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn events(waker: &Waker, longest: Duration) -> Vec<Event> {
        let mut events = Events::default();
        waker.wait(&mut events, longest).unwrap();
        events.iter().collect()
    }

    /// Whether the thread would be woken.
    fn is_woken(waker: &Waker) -> bool {
        let mut events = Events::default();
        waker.wait(&mut events, Duration::ZERO).unwrap();
        events.has_notification()
    }

    #[test]
    fn a_thread_is_woken_once_for_several_jobs_and_not_while_it_is_awake() {
        let waker = Waker::new().unwrap();
        waker.job_queued().unwrap();
        assert!(!is_woken(&waker));
        waker.going_to_sleep();
        waker.job_queued().unwrap();
        assert!(is_woken(&waker));
        for _ in 0..2 {
            waker.job_queued().unwrap();
            assert!(!is_woken(&waker));
        }
        waker.going_to_sleep();
        waker.awake();
        waker.job_queued().unwrap();
        assert!(!is_woken(&waker));
        // In any case.
        for _ in 0..2 {
            waker.wake().unwrap();
            assert!(events(&waker, LONG).is_empty());
        }
    }

    #[test]
    fn events_of_sockets_tell_what_there_is() {
        let waker = Waker::new().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        waker.watch(&ours, 7).unwrap();
        let event = |is_readable, is_writable| Event {
            key: 7,
            is_readable,
            is_writable,
        };
        assert_eq!(events(&waker, LONG), [event(false, true)]);
        assert!(events(&waker, Duration::ZERO).is_empty());
        theirs.write_all(b"x").unwrap();
        assert_eq!(events(&waker, LONG), [event(true, true)]);
        ours.read_exact(&mut [0]).unwrap();
        drop(theirs);
        assert!(events(&waker, LONG)[0].is_readable);
        drop(ours);
        assert!(events(&waker, Duration::from_micros(10)).is_empty());
    }
}
