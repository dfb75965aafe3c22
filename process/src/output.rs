//! stdout: the results of programs.
//!
//! If the reader closes the pipe, as in `… | head`, that is not a failure. Any other write error is
//! one, because the result would be lost silently.

use std::fmt::Display;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Unbuffered stdout, even if another process has made it non-blocking. Unlike [`print()`], it returns an
/// error if the reader has closed the pipe: [`is_reader_gone`] detects it.
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

/// Whether a write failed because the reader has closed the pipe.
#[must_use]
pub fn is_reader_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::BrokenPipe
}

/// Prints `text` unchanged. A closed pipe is not an error.
///
/// # Errors
/// If stdout does not accept all of it; on a full disk, for instance.
pub fn print(text: impl Display) -> Result<()> {
    write_all(&io::stdout(), &text.to_string(), None).context("cannot write to stdout")
}

/// Prints `text` and a newline, as [`print()`] does.
///
/// # Errors
/// As with [`print()`].
pub fn print_line(text: impl Display) -> Result<()> {
    print(format_args!("{text}\n"))
}

/// Prints a line like [`print_line`], but waits at most `limit` for a reader: for secondary output.
///
/// # Errors
/// As with [`print()`], or if nothing reads in time.
pub fn print_line_within(limit: Duration, text: impl Display) -> Result<()> {
    let deadline = Instant::now() + limit;
    write_all(&io::stdout(), &format!("{text}\n"), Some(deadline)).context("cannot write to stdout")
}

/// Prints a result to stderr, because messages go to stdout. Unlike a log line, it waits to be written.
///
/// # Errors
/// As with [`print()`].
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

/// Writes some of it; waits if necessary.
fn write_to(stream: &impl AsFd, bytes: &[u8], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        if let Some(deadline) = deadline {
            wait_for_room(stream, Some(deadline))?;
        }
        match nix::unistd::write(stream, bytes) {
            Ok(written) => return Ok(written),
            Err(Errno::EAGAIN) => wait_for_room(stream, deadline)?,
            // A process without stdout prints nothing, as in the standard library.
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
        Ok(0) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "nothing reads from it",
        )),
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
