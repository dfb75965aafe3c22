//! The only way to stderr: lines go into a bounded queue, and one thread writes them.
//!
//! Nothing here panics or blocks its caller, whatever stderr is: closed, full, a pipe that nobody
//! reads, a terminal that was stopped. What cannot be queued or written is dropped and counted.

use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Lines that wait for the thread at most.
const QUEUE: usize = 1024;
/// What one write may take so that a pipe that poll(2) calls writable does not block (pipe(7)).
const PIPE_BUF: usize = 4096;

/// What the thread gets.
enum Item {
    Text(Vec<u8>),
    /// To be answered once all before it is written.
    Flush(Sender<()>),
}

static QUEUED: OnceLock<Sender<Item>> = OnceLock::new();
/// Lines that were dropped and not yet reported.
static UNREPORTED: AtomicU64 = AtomicU64::new(0);
/// Lines that were dropped in all.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// Starts the thread that writes. Until then lines are written by their callers, as far as stderr
/// takes them at once. It inherits the privileges of the calling thread.
pub fn start() -> io::Result<()> {
    if QUEUED.get().is_some() {
        return Ok(());
    }
    let (sender, receiver) = bounded(QUEUE);
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write_queued(&receiver))?;
    // Nobody else starts it; a second queue would be dropped, and its thread end.
    let _ = QUEUED.set(sender);
    Ok(())
}

/// Writes `text`, now or soon, or drops and counts it.
pub fn say(text: Vec<u8>) {
    if !offer(text) {
        count_dropped(1);
    }
}

/// Writes `text`, now or soon, unless stderr is busy; whether it will.
pub fn offer(text: Vec<u8>) -> bool {
    match QUEUED.get() {
        None => write_at_once(&text),
        Some(queue) => queue.try_send(Item::Text(text)).is_ok(),
    }
}

/// Waits until all that was said is written, for at most `limit`.
pub fn flush(limit: Duration) {
    let Some(queue) = QUEUED.get() else {
        return;
    };
    let deadline = Instant::now() + limit;
    let (done, written) = bounded(1);
    // A queue that stays full is what the limit is for.
    if queue.send_deadline(Item::Flush(done), deadline).is_ok() {
        let _ = written.recv_deadline(deadline);
    }
}

/// Lines that were dropped because stderr could not take them.
pub fn dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

fn count_dropped(lines: u64) {
    DROPPED.fetch_add(lines, Ordering::Relaxed);
    UNREPORTED.fetch_add(lines, Ordering::Relaxed);
}

fn write_queued(queue: &Receiver<Item>) {
    // Whether a failed write left the beginning of a line behind.
    let mut torn = false;
    for item in queue {
        match item {
            // The other end has given up waiting when this fails.
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

/// What stands before the next line: the end of a torn one, and how many are missing.
fn report_of_dropped(torn: bool) -> Vec<u8> {
    let end = if torn { "\n" } else { "" };
    match UNREPORTED.swap(0, Ordering::Relaxed) {
        0 => end.to_owned().into_bytes(),
        dropped => {
            format!("{end}{dropped} log lines are missing: stderr did not take them\n").into_bytes()
        }
    }
}

/// Writes as much as stderr takes without blocking; whether that is all.
fn write_at_once(text: &[u8]) -> bool {
    text.chunks(PIPE_BUF).all(|chunk| {
        let stderr = io::stderr();
        let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        let ready = poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0);
        ready && nix::unistd::write(&stderr, chunk).is_ok_and(|written| written == chunk.len())
    })
}

/// Writes all of it, however long that takes; otherwise the error is how many bytes were written.
fn write_blocking(text: &[u8]) -> Result<(), usize> {
    let stderr = io::stderr();
    let mut written = 0;
    while written < text.len() {
        match nix::unistd::write(&stderr, &text[written..]) {
            Ok(0) => return Err(written),
            Ok(more) => written += more,
            Err(Errno::EINTR) => {}
            // Somebody else has made it non-blocking.
            Err(Errno::EAGAIN) => {
                let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
                // Should it fail, the next write says why.
                let _ = poll(&mut fds, PollTimeout::NONE);
            }
            Err(_) => return Err(written),
        }
    }
    Ok(())
}
