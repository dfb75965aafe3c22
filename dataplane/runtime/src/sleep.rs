//! Sleeping threads of the data plane: until a descriptor is ready, or a timeout expires.

use std::io;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, ppoll};
use nix::sys::prctl;
use nix::sys::time::TimeSpec;

/// Lets this thread's sleeps end when they should: the kernel rounds them up by 50 microseconds
/// otherwise (`PR_SET_TIMERSLACK`, prctl(2)).
///
/// # Errors
/// The kernel's answer.
pub fn minimize_timer_slack() -> io::Result<()> {
    Ok(prctl::set_timerslack(1)?)
}

/// Sleeps until one of `descriptors` has what is asked of it, a signal comes, or `longest` is over;
/// their `revents` say which. Unlike epoll(7), nothing of it stays behind that the kernel would have
/// to tell of every packet.
///
/// # Errors
/// The kernel's answer.
pub fn until_ready(descriptors: &mut [PollFd<'_>], longest: Duration) -> io::Result<()> {
    match ppoll(descriptors, Some(TimeSpec::from_duration(longest)), None) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Whether a descriptor has something, or has failed, which reading from it will tell.
#[must_use]
pub fn is_ready(descriptor: &PollFd<'_>) -> bool {
    descriptor.any().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use nix::poll::PollFlags;

    use super::*;

    #[test]
    fn sleep_ends_when_a_descriptor_is_ready() {
        minimize_timer_slack().unwrap();
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let mut watched = [PollFd::new(theirs.as_fd(), PollFlags::POLLIN)];
        until_ready(&mut watched, Duration::from_millis(1)).unwrap();
        assert!(!is_ready(&watched[0]));
        ours.write_all(b"x").unwrap();
        until_ready(&mut watched, Duration::from_secs(60)).unwrap();
        assert!(is_ready(&watched[0]));
    }
}
