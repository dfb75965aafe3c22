//! What an I/O thread sleeps on: sockets of its streams, and a publisher that has work for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Key of the event that [`Waker::wake`] causes.
const WAKE_UP: u64 = u64::MAX;
/// Events that are taken with one system call.
const EVENTS: usize = 64;

/// What a watched socket has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SocketEvent {
    pub(crate) key: usize,
    /// There is something to read, or the connection has ended, which reading tells.
    pub(crate) is_readable: bool,
    /// There is room to write.
    pub(crate) is_writable: bool,
}

/// An epoll instance and an eventfd in it. A thread that is awake is not woken: it looks for work before
/// it sleeps.
#[derive(Debug)]
pub(crate) struct Waker {
    epoll: Epoll,
    event: EventFd,
    is_sleeping: AtomicBool,
}

impl Waker {
    pub(crate) fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        // Edges: each write is an event, and nobody has to read the counter.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(&event, EpollEvent::new(flags, WAKE_UP))?;
        Ok(Self {
            epoll,
            event,
            is_sleeping: AtomicBool::new(false),
        })
    }

    /// Watches a socket for edges, until it is closed: whoever gets an event reads until nothing is left,
    /// and writes until there is no room.
    pub(crate) fn watch(&self, socket: impl AsFd, key: usize) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET;
        Ok(self.epoll.add(socket, EpollEvent::new(flags, key as u64))?)
    }

    /// Waits for events, and passes on those of sockets.
    pub(crate) fn wait(
        &self,
        longest: Duration,
        mut on_event: impl FnMut(SocketEvent),
    ) -> io::Result<()> {
        let mut events = [EpollEvent::empty(); EVENTS];
        // In milliseconds: one that is rounded down would end early, again and again.
        let longest = longest.as_nanos().div_ceil(1_000_000);
        let longest = EpollTimeout::try_from(longest).unwrap_or(EpollTimeout::MAX);
        let count = match self.epoll.wait(&mut events, longest) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => return Err(error.into()),
        };
        for event in events[..count].iter().filter(|e| e.data() != WAKE_UP) {
            let flags = event.events();
            on_event(SocketEvent {
                key: event.data() as usize,
                is_readable: flags.intersects(!EpollFlags::EPOLLOUT),
                is_writable: flags.contains(EpollFlags::EPOLLOUT),
            });
        }
        Ok(())
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
        match self.event.write(1) {
            // A counter that is full is an event that nobody has taken yet.
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Waker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn events(waker: &Waker, longest: Duration) -> Vec<SocketEvent> {
        let mut events = Vec::new();
        waker.wait(longest, |event| events.push(event)).unwrap();
        events
    }

    #[test]
    fn a_thread_is_woken_once_for_several_jobs_and_not_while_it_is_awake() {
        let waker = Waker::new().unwrap();
        waker.job_queued().unwrap();
        let awake = waker.event.read();
        assert_eq!(awake, Err(Errno::EAGAIN));
        waker.going_to_sleep();
        for _ in 0..3 {
            waker.job_queued().unwrap();
        }
        assert!(events(&waker, LONG).is_empty());
        assert_eq!(waker.event.read(), Ok(1));
        waker.going_to_sleep();
        waker.awake();
        waker.job_queued().unwrap();
        assert_eq!(waker.event.read(), Err(Errno::EAGAIN));
        // In any case, also again without a read in between.
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
        let event = |is_readable, is_writable| SocketEvent {
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
