//! The only way to stderr: lines go into a bounded queue, and one thread writes them.
//!
//! Nothing here panics or blocks its caller, whatever the state of stderr: closed, full, a pipe without
//! a reader, a stopped terminal. Lines that cannot be queued or written are dropped and counted.

use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Capacity of the queue, lines.
const QUEUE: usize = 1024;
/// Size of one write that cannot block on a pipe which poll(2) reports as writable (pipe(7)).
const PIPE_BUF: usize = 4096;

/// Messages to the writer thread.
enum Item {
    Text(Vec<u8>),
    /// Reply once everything before it has been written.
    Flush(Sender<()>),
}

static QUEUED: OnceLock<Sender<Item>> = OnceLock::new();
/// Dropped lines that have not been reported yet.
static UNREPORTED: AtomicU64 = AtomicU64::new(0);
/// Total number of dropped lines.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Starts the writer thread. Until then, callers write their lines themselves, as far as stderr accepts
/// them at once. The thread inherits the caller's privileges.
pub fn start() -> io::Result<()> {
    if QUEUED.get().is_some() {
        return Ok(());
    }
    let (sender, receiver) = bounded(QUEUE);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_queued(&receiver))?;
    // Only one caller can set the queue; a second queue is dropped, and its thread ends.
    let _ = QUEUED.set(sender);
    Ok(())
}

/// Writes `text` now or soon; drops and counts it if that is impossible.
pub fn say(text: Vec<u8>) {
    if !offer(text) {
        count_dropped(1);
    }
}

/// Writes `text` now or soon, unless stderr is busy; returns whether it will be written.
pub fn offer(text: Vec<u8>) -> bool {
    match QUEUED.get() {
        None => write_at_once(&text),
        Some(queue) => queue.try_send(Item::Text(text)).is_ok(),
    }
}

/// Waits until all earlier lines are written, for at most `limit`.
pub fn flush(limit: Duration) {
    let Some(queue) = QUEUED.get() else {
        return;
    };
    let deadline = Instant::now() + limit;
    let (done, written) = bounded(1);
    // The limit also covers a queue that stays full.
    if queue.send_deadline(Item::Flush(done), deadline).is_ok() {
        let _ = written.recv_deadline(deadline);
    }
}

/// Number of lines dropped because stderr did not accept them.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

fn count_dropped(lines: u64) {
    DROPPED.fetch_add(lines, Ordering::Relaxed);
    UNREPORTED.fetch_add(lines, Ordering::Relaxed);
}

fn write_queued(queue: &Receiver<Item>) {
    // Whether a failed write left an incomplete line.
    let mut torn = false;
    for item in queue {
        match item {
            // This fails if the caller has stopped waiting.
            Item::Flush(done) => drop(done.try_send(())),
            Item::Text(text) => {
                let missing = report_of_dropped(torn);
                let lines = [&missing[..], &text].concat();
                if let Err(written) = write_blocking(&lines) {
                    torn = match written {
                        0 => torn,
                        written => lines[written - 1] != b'\n',
                    };
                    count_dropped(1);
                } else {
                    torn = false;
                }
            }
        }
    }
}

/// Text before the next line: it completes an incomplete line and reports how many are missing.
fn report_of_dropped(torn: bool) -> Vec<u8> {
    let end = if torn { "\n" } else { "" };
    match UNREPORTED.swap(0, Ordering::Relaxed) {
        0 => end.to_owned().into_bytes(),
        dropped => format!("{end}{dropped} log lines are missing: stderr did not accept them\n")
            .into_bytes(),
    }
}

/// Writes as much as stderr accepts without blocking; returns whether that is everything.
fn write_at_once(text: &[u8]) -> bool {
    text.chunks(PIPE_BUF).all(|chunk| {
        let stderr = io::stderr();
        let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        ready && nix::unistd::write(&stderr, chunk).is_ok_and(|written| written == chunk.len())
    })
}

/// Writes everything, however long that takes; on failure returns how many bytes were written.
fn write_blocking(text: &[u8]) -> Result<(), usize> {
    let stderr = io::stderr();
    let mut written = 0;
    while written < text.len() {
        match nix::unistd::write(&stderr, &text[written..]) {
            Ok(0) => return Err(written),
            Ok(more) => written += more,
            Err(Errno::EINTR) => {}
            // Another process has made it non-blocking.
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                // If poll fails, the next write reports why.
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            Err(_) => return Err(written),
        }
    }
    Ok(())
}
