//! What a thread sleeps on: epoll(7) over its sockets, and an eventfd(2) for other threads that wake it.
//!
//! A wait is one system call. It counts in milliseconds and rounds up, so a thread neither wakes early nor
//! spins until its time comes. One that must wake to the microsecond waits with
//! [`sleep::until_ready`](crate::sleep::until_ready) for the poller's descriptor, and then takes the
//! events without waiting.
//!
//! The kernel watches what a descriptor refers to, not its number, and stops when the last duplicate is
//! closed. A socket that is closed or handed on while it is watched is therefore no danger to memory, and
//! its number may be watched anew at once; but as long as a duplicate is open, its events still come, under
//! a key that may belong to another socket by then, and nothing can stop them. So delete a socket before its
//! key is used again.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::task::Wake;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

/// Key of the event that [`Poller::notify`] causes.
const NOTIFICATION: u64 = u64::MAX;
/// Events that are taken with one system call.
const CAPACITY: usize = 1024;

/// What a socket is watched for. The end of a connection in both directions and errors are events in any
/// case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interest(EpollFlags);

impl Interest {
    /// Only the end of the connection.
    pub const NOTHING: Self = Self(EpollFlags::empty());
    /// That there is something to read, or nothing will come any more.
    pub const READABLE: Self = Self(EpollFlags::EPOLLIN);
    /// That there is room to write.
    pub const WRITABLE: Self = Self(EpollFlags::EPOLLOUT);

    /// Either.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// An event when this becomes so, and not as long as it is so. The thread then reads until nothing is
    /// left, and writes until there is no room.
    #[must_use]
    pub fn edges(self) -> Self {
        Self(self.0 | EpollFlags::EPOLLET)
    }
}

/// What a watched socket has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The socket's key.
    pub key: usize,
    /// There is something to read, or the connection has ended or failed, which reading tells.
    pub is_readable: bool,
    /// There is room to write.
    pub is_writable: bool,
}

/// The events of a wait.
#[derive(Debug)]
pub struct Events {
    buffer: Box<[EpollEvent]>,
    count: usize,
}

impl Default for Events {
    fn default() -> Self {
        Self {
            buffer: vec![EpollEvent::empty(); CAPACITY].into(),
            count: 0,
        }
    }
}

impl Events {
    /// Those of sockets.
    pub fn iter(&self) -> impl Iterator<Item = Event> {
        let sockets = self.all().filter(|event| event.data() != NOTIFICATION);
        sockets.map(|event| {
            let flags = event.events();
            Event {
                key: event.data() as usize,
                is_readable: flags.intersects(!EpollFlags::EPOLLOUT),
                is_writable: flags.contains(EpollFlags::EPOLLOUT),
            }
        })
    }

    /// Whether there was a notification.
    #[must_use]
    pub fn has_notification(&self) -> bool {
        self.all().any(|event| event.data() == NOTIFICATION)
    }

    fn all(&self) -> impl Iterator<Item = &EpollEvent> {
        self.buffer[..self.count].iter()
    }
}

/// The sockets of a thread, and the way to wake it. Its descriptor is readable while there are events.
#[derive(Debug)]
pub struct Poller {
    epoll: Epoll,
    notifier: EventFd,
}

impl Poller {
    /// A poller that watches nothing.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance or no eventfd.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let notifier = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        // Edge-triggered: each write is an event, so nothing reads the counter.
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        epoll.add(&notifier, EpollEvent::new(flags, NOTIFICATION))?;
        Ok(Self { epoll, notifier })
    }

    /// Watches a socket, whose events get this key. What it has already is an event.
    ///
    /// # Errors
    /// The kernel's answer: the socket is watched already, or too many are
    /// (`/proc/sys/fs/epoll/max_user_watches`).
    pub fn add(&self, socket: impl AsFd, key: usize, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.add(socket, event(key, interest))?)
    }

    /// Watches a socket for something else from now on.
    ///
    /// # Errors
    /// The kernel's answer: the socket is not watched.
    pub fn modify(&self, socket: impl AsFd, key: usize, interest: Interest) -> io::Result<()> {
        Ok(self.epoll.modify(socket, &mut event(key, interest))?)
    }

    /// Watches a socket no longer. Events that a wait took before stay in its [`Events`].
    ///
    /// # Errors
    /// The kernel's answer: the socket is not watched.
    pub fn delete(&self, socket: impl AsFd) -> io::Result<()> {
        Ok(self.epoll.delete(socket)?)
    }

    /// Waits until there are events or a notification, a signal comes, or `longest`, rounded up to
    /// milliseconds, is over. `events` are those of this wait alone.
    ///
    /// # Errors
    /// The kernel's answer, which no peer can cause.
    pub fn wait(&self, events: &mut Events, longest: Duration) -> io::Result<()> {
        let longest = longest.as_nanos().div_ceil(1_000_000);
        let longest = EpollTimeout::try_from(longest).unwrap_or(EpollTimeout::MAX);
        events.count = match self.epoll.wait(&mut events.buffer, longest) {
            Ok(count) => count,
            Err(Errno::EINTR) => 0,
            Err(error) => {
                events.count = 0;
                return Err(error.into());
            }
        };
        Ok(())
    }

    /// Ends the wait of another thread, or the next wait if there is none. Several notifications before
    /// the thread wakes are one.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn notify(&self) -> io::Result<()> {
        // The counter would be full after 2^64 notifications.
        self.notifier.write(1)?;
        Ok(())
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

fn event(key: usize, interest: Interest) -> EpollEvent {
    debug_assert_ne!(key as u64, NOTIFICATION);
    EpollEvent::new(interest.0, key as u64)
}

impl Wake for Poller {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // An eventfd refuses a notification only when there are already more than anything here could cause.
        let _ = self.notify();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use nix::sys::signal::{self, SaFlags, SigAction, SigHandler, SigSet, Signal};
    use socket2::SockRef;

    use super::*;
    use crate::sleep;

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(600);
    const KEY: usize = 7;

    /// A poller that watches one end of a connection.
    fn watching(interest: Interest) -> (Poller, Events, UnixStream, UnixStream) {
        let poller = Poller::new().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        poller.add(&ours, KEY, interest).unwrap();
        (poller, Events::default(), ours, theirs)
    }

    fn wait(poller: &Poller, events: &mut Events, longest: Duration) -> Vec<Event> {
        poller.wait(events, longest).unwrap();
        events.iter().collect()
    }

    fn of(is_readable: bool, is_writable: bool) -> [Event; 1] {
        [Event {
            key: KEY,
            is_readable,
            is_writable,
        }]
    }

    #[test]
    fn a_level_is_an_event_as_long_as_it_lasts() {
        let (poller, mut events, mut ours, mut theirs) = watching(Interest::READABLE);
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        theirs.write_all(b"x").unwrap();
        for _ in 0..2 {
            assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        }
        ours.read_exact(&mut [0]).unwrap();
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        // The end is something to read.
        theirs.shutdown(Shutdown::Write).unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
    }

    #[test]
    fn an_edge_is_one_event() {
        let both = Interest::READABLE.and(Interest::WRITABLE).edges();
        let (poller, mut events, mut ours, mut theirs) = watching(both);
        assert_eq!(wait(&poller, &mut events, LONG), of(false, true));
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        // Each arrival is one, whether what came before was read or not.
        for _ in 0..2 {
            theirs.write_all(b"x").unwrap();
            assert_eq!(wait(&poller, &mut events, LONG), of(true, true));
            assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        }
        ours.read_exact(&mut [0; 2]).unwrap();
        drop(theirs);
        assert!(wait(&poller, &mut events, LONG)[0].is_readable);
    }

    #[test]
    fn a_socket_that_is_ready_when_added_or_modified_has_an_event() {
        let poller = Poller::new().unwrap();
        let mut events = Events::default();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"x").unwrap();
        let edges = Interest::READABLE.edges();
        poller.add(&ours, KEY, edges).unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        poller.modify(&ours, KEY, edges).unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
    }

    #[test]
    fn interest_can_change() {
        let (poller, mut events, ours, mut theirs) = watching(Interest::NOTHING);
        theirs.write_all(b"x").unwrap();
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        poller.modify(&ours, KEY, Interest::WRITABLE).unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(false, true));
        poller.modify(&ours, KEY, Interest::READABLE).unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        poller.modify(&ours, KEY, Interest::NOTHING).unwrap();
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
    }

    #[test]
    fn the_end_of_a_connection_is_an_event_without_any_interest() {
        let (poller, mut events, _ours, theirs) = watching(Interest::NOTHING);
        drop(theirs);
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        // A reset over tcp.
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let theirs = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let poller = Poller::new().unwrap();
        poller.add(&ours, KEY, Interest::NOTHING).unwrap();
        SockRef::from(&theirs)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(theirs);
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
    }

    #[test]
    fn a_socket_that_was_deleted_has_no_events() {
        let (poller, mut events, ours, mut theirs) = watching(Interest::READABLE);
        theirs.write_all(b"x").unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        poller.delete(&ours).unwrap();
        // Those that were taken before are still there.
        assert_eq!(events.iter().count(), 1);
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
        assert!(poller.delete(&ours).is_err());
        assert!(poller.modify(&ours, KEY, Interest::READABLE).is_err());
        poller.add(&ours, KEY + 1, Interest::READABLE).unwrap();
        assert!(poller.add(&ours, KEY, Interest::READABLE).is_err());
        assert_eq!(wait(&poller, &mut events, LONG)[0].key, KEY + 1);
    }

    #[test]
    fn a_socket_is_watched_until_its_last_duplicate_is_closed() {
        let (poller, mut events, ours, mut theirs) = watching(Interest::READABLE);
        let duplicate = ours.try_clone().unwrap();
        theirs.write_all(b"x").unwrap();
        drop(ours);
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        drop(duplicate);
        assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
    }

    #[test]
    fn notifications_before_a_wait_are_one() {
        let (poller, mut events, _ours, mut theirs) = watching(Interest::READABLE);
        for _ in 0..2 {
            for _ in 0..3 {
                poller.notify().unwrap();
            }
            assert_eq!(wait(&poller, &mut events, LONG), []);
            assert!(events.has_notification());
            assert_eq!(wait(&poller, &mut events, Duration::ZERO), []);
            assert!(!events.has_notification());
        }
        theirs.write_all(b"x").unwrap();
        poller.notify().unwrap();
        assert_eq!(wait(&poller, &mut events, LONG), of(true, false));
        assert!(events.has_notification());
    }

    #[test]
    fn the_descriptor_is_readable_while_there_are_events() {
        let (poller, mut events, _ours, _theirs) = watching(Interest::READABLE);
        let is_readable = || {
            let mut watched = [nix::poll::PollFd::new(
                poller.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            sleep::until_ready(&mut watched, Duration::ZERO).unwrap();
            sleep::is_ready(&watched[0])
        };
        assert!(!is_readable());
        poller.notify().unwrap();
        assert!(is_readable() && is_readable());
        wait(&poller, &mut events, Duration::ZERO);
        assert!(!is_readable());
    }

    #[test]
    fn another_thread_is_woken_by_each_notification() {
        const TIMES: usize = 1000;
        let poller = Arc::new(Poller::new().unwrap());
        let flag = Arc::new(AtomicBool::new(false));
        let (theirs, raised) = (Arc::clone(&poller), Arc::clone(&flag));
        let thread = thread::spawn(move || {
            let mut events = Events::default();
            for _ in 0..TIMES {
                while !raised.swap(false, Ordering::Relaxed) {
                    // Without the notification it would not end.
                    theirs.wait(&mut events, LONG).unwrap();
                }
            }
        });
        for _ in 0..TIMES {
            flag.store(true, Ordering::Relaxed);
            poller.notify().unwrap();
            while flag.load(Ordering::Relaxed) {
                thread::yield_now();
            }
        }
        thread.join().unwrap();
    }

    #[test]
    fn a_wait_ends_after_its_time_however_short_or_long() {
        let (poller, mut events, _ours, _theirs) = watching(Interest::READABLE);
        let nearly_two = Duration::from_micros(1_001);
        for longest in [Duration::ZERO, Duration::from_nanos(1), nearly_two] {
            assert_eq!(wait(&poller, &mut events, longest), []);
            assert!(!events.has_notification());
        }
        poller.notify().unwrap();
        assert_eq!(wait(&poller, &mut events, Duration::MAX), []);
        assert!(events.has_notification());
    }

    #[test]
    fn a_signal_ends_a_wait_without_events_or_error() {
        extern "C" fn nothing(_: i32) {}
        // Nothing else here uses SIGURG, which is ignored unless it is caught.
        let action = SigAction::new(
            SigHandler::Handler(nothing),
            SaFlags::empty(),
            SigSet::empty(),
        );
        // SAFETY: the handler does nothing.
        unsafe { signal::sigaction(Signal::SIGURG, &action) }.unwrap();
        let (ours, waiting) = std::sync::mpsc::channel();
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let (poller, mut events, _ours, _theirs) = watching(Interest::READABLE);
            poller.notify().unwrap();
            wait(&poller, &mut events, LONG);
            // SAFETY: it has no preconditions.
            ours.send(unsafe { libc::pthread_self() }).unwrap();
            let found = wait(&poller, &mut events, LONG);
            over.store(true, Ordering::Relaxed);
            (found, events.has_notification())
        });
        let target = waiting.recv().unwrap();
        // It may not wait yet when the first comes.
        while !is_over.load(Ordering::Relaxed) {
            // SAFETY: the thread is joined below, so this is still its name, even if it has ended.
            unsafe { libc::pthread_kill(target, libc::SIGURG) };
            thread::yield_now();
        }
        assert_eq!(thread.join().unwrap(), (Vec::new(), false));
    }
}
