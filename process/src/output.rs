//! stdout: results of programs.
//!
//! A reader that has gone, as in `… | head`, has had enough: that is no failure. Anything else that
//! keeps a result from being written is one, for the result would be lost without a word.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// stdout without a buffer of its own, also where somebody else has made it non-blocking. Unlike
/// with [`print`], a reader that has gone is an error: [`is_reader_gone`] tells it.
#[derive(Debug, Default)]
pub struct Stdout(());

impl Stdout {
    /// The stdout of this process.
    #[must_use]
    pub fn new() -> Self {
        Self(())
    }
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        write_to(&io::stdout(), bytes, None)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Whether a write failed because nobody reads any more.
#[must_use]
pub fn is_reader_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Prints `text` as it is. That nobody reads it is no error.
///
/// # Errors
/// If stdout takes it not at all, or not whole; a full disk, for instance.
pub fn print(text: impl Display) -> Result<()> {
    write_all(&io::stdout(), &text.to_string(), None).context("cannot write to stdout")
}

/// Prints `text` and a newline, as [`print`] does.
///
/// # Errors
/// As with [`print`].
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// Prints a line as [`print_line`] does, but waits for a reader no longer than `limit`: for what is
/// said on the side.
///
/// # Errors
/// As with [`print`], or if nobody reads in time.
pub fn print_line_within(limit: Duration, text: impl Display) -> Result<()> {
    let deadline = Instant::now() + limit;
    write_all(&io::stdout(), &format!("{text}\n"), Some(deadline)).context("cannot write to stdout")
}

/// Prints a result to stderr, because stdout has the messages. Unlike a log line it is waited for.
///
/// # Errors
/// As with [`print`].
pub fn print_to_stderr(text: impl Display) -> Result<()> {
    crate::logging::flush();
    write_all(&io::stderr(), &format!("{text}\n"), None).context("cannot write to stderr")
}

fn write_all(stream: &impl AsFd, text: &str, deadline: Option<Instant>) -> io::Result<()> {
    let mut rest = text.as_bytes();
    while !rest.is_empty() {
        match write_to(stream, rest, deadline) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => rest = &rest[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if is_reader_gone(&error) => return Ok(()),
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Writes some of it, and waits for that if it must.
fn write_to(stream: &impl AsFd, bytes: &[u8], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        if let Some(deadline) = deadline {
            wait_for_room(stream, Some(deadline))?;
        }
        match nix::unistd::write(stream, bytes) {
            Ok(written) => return Ok(written),
            Err(Errno::EAGAIN) => wait_for_room(stream, deadline)?,
            // A process without stdout prints nothing, as with the standard library.
            Err(Errno::EBADF) => return Ok(bytes.len()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_for_room(stream: &impl AsFd, deadline: Option<Instant>) -> io::Result<()> {
    let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
        let left = deadline.saturating_duration_since(Instant::now());
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::POLLOUT)];
    match poll(&mut fds, timeout) {
        Ok(0) => Err(io::Error::new(io::ErrorKind::TimedOut, "nobody reads it")),
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        write_all(&writer, "text", None).unwrap();
    }

    #[test]
    fn a_full_disk_is_one() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = write_all(&full, "text", None).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::ENOSPC as i32));
    }

    #[test]
    fn nothing_is_lost_in_a_pipe_that_is_non_blocking() {
        let (mut reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let text = "0123456789".repeat(100_000);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                write_all(&writer, &text, None).unwrap();
                drop(writer);
            });
            let mut read = String::new();
            reader.read_to_string(&mut read).unwrap();
            assert!(read == text);
        });
    }

    #[test]
    fn what_nobody_reads_is_given_up_in_time() {
        let (_reader, writer) = io::pipe().unwrap();
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let deadline = Instant::now() + Duration::from_millis(20);
        let error = write_all(&writer, &"x".repeat(1 << 20), Some(deadline)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
