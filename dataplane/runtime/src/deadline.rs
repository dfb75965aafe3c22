//! Reads from and writes to a peer with a total deadline, no matter how slowly its bytes arrive.
//!
//! A socket's own timeout restarts with each byte, so a peer that sends one byte at a time can block a
//! `read_exact` without limit.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use socket2::SockRef;

/// Fills `bytes` before the deadline. Changes the socket's read timeout.
///
/// # Errors
/// `TimedOut` at the deadline, `UnexpectedEof` when the peer closes earlier, or the system's error.
pub fn read_exact<S>(socket: &S, mut bytes: &mut [u8], deadline: Instant) -> io::Result<()>
where
    S: AsFd,
    for<'a> &'a S: Read,
{
    while !bytes.is_empty() {
        let left = remaining(deadline)?;
        SockRef::from(socket).set_read_timeout(Some(left))?;
        match { socket }.read(bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => bytes = &mut bytes[read..],
            Err(error) => retry(error)?,
        }
    }
    Ok(())
}

/// Reads until the peer closes: at most `limit` bytes, before the deadline. Changes the socket's read
/// timeout.
///
/// # Errors
/// `TimedOut` at the deadline, `FileTooLarge` when there is more, or the system's error.
pub fn read_to_end<S>(socket: &S, limit: usize, deadline: Instant) -> io::Result<Vec<u8>>
where
    S: AsFd,
    for<'a> &'a S: Read,
{
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let left = remaining(deadline)?;
        SockRef::from(socket).set_read_timeout(Some(left))?;
        match { socket }.read(&mut chunk) {
            Ok(0) => return Ok(bytes),
            Ok(read) if bytes.len() + read > limit => {
                return Err(io::Error::new(
                    io::ErrorKind::FileTooLarge,
                    format!("the answer is longer than {limit} bytes"),
                ));
            }
            Ok(read) => bytes.extend_from_slice(&chunk[..read]),
            Err(error) => retry(error)?,
        }
    }
}

/// Writes all of `bytes` before the deadline. Changes the socket's write timeout.
///
/// # Errors
/// `TimedOut` at the deadline, or the system's error.
pub fn write_all<S>(socket: &S, mut bytes: &[u8], deadline: Instant) -> io::Result<()>
where
    S: AsFd,
    for<'a> &'a S: Write,
{
    while !bytes.is_empty() {
        let left = remaining(deadline)?;
        SockRef::from(socket).set_write_timeout(Some(left))?;
        match { socket }.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => bytes = &bytes[written..],
            Err(error) => retry(error)?,
        }
    }
    Ok(())
}

/// The time left; never zero, because a zero timeout means no timeout.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(io::ErrorKind::TimedOut.into()),
        // The kernel rounds timeouts below a microsecond down to zero, which means no timeout
        // (socket(7)).
        left => Ok(left.max(Duration::from_micros(1))),
    }
}

/// Whether to check the deadline and try again: the kernel reports a socket timeout as `WouldBlock`.
fn retry(error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(()),
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// Runs `test` against a peer that sends a byte every millisecond until the test ends.
    fn against_dripping(test: impl FnOnce(&UnixStream)) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) && theirs.write_all(b"x").is_ok() {
                    thread::sleep(Duration::from_millis(1));
                }
            });
            test(&ours);
            over.store(true, Ordering::Relaxed);
        });
    }

    #[test]
    fn a_slow_trickle_of_bytes_does_not_extend_the_deadline() {
        against_dripping(|socket| {
            let deadline = Instant::now() + Duration::from_millis(50);
            let error = read_exact(socket, &mut [0; 1 << 20], deadline).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            let deadline = Instant::now() + Duration::from_millis(50);
            let error = read_to_end(socket, 1 << 20, deadline).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        });
    }

    #[test]
    fn an_endless_answer_is_cut_off() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let flood = thread::spawn(move || while theirs.write_all(&[0; 4096]).is_ok() {});
        let deadline = Instant::now() + Duration::from_secs(60);
        let error = read_to_end(&ours, 100_000, deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge);
        drop(ours);
        flood.join().unwrap();
    }

    #[test]
    fn a_peer_that_does_not_read_causes_a_timeout() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_millis(50);
        let error = write_all(&ours, &[0; 16 << 20], deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }

    #[test]
    fn complete_answers_are_returned() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        write_all(&theirs, b"hello", deadline).unwrap();
        let mut bytes = [0; 5];
        read_exact(&ours, &mut bytes, deadline).unwrap();
        assert_eq!(&bytes, b"hello");
        write_all(&theirs, b"rest", deadline).unwrap();
        drop(theirs);
        assert_eq!(read_to_end(&ours, 4, deadline).unwrap(), b"rest");
        let error = read_exact(&ours, &mut bytes, deadline).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
