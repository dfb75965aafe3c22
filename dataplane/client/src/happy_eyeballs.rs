//! Connects to whichever of a broker's addresses answers first (RFC 8305, "Happy Eyeballs"): an address
//! that drops packets costs a moment, not the whole timeout.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

/// Delay before the next address is tried in parallel (RFC 8305 section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Connects to one of the addresses, starting attempts in turn and running them in parallel.
///
/// # Errors
/// What failed at each address, once all of them failed or the time is over.
pub fn connect(addresses: &[SocketAddr], timeout: Duration) -> io::Result<TcpStream> {
    let begun = Instant::now();
    let deadline = begun + timeout;
    let mut untried = interleaved(addresses).into_iter();
    // Every address gets an attempt, however short the timeout is.
    let delay = ATTEMPT_DELAY.min(timeout / (addresses.len() as u32 + 1));
    let mut next_start = begun;
    let mut attempts: Vec<(SocketAddr, Socket)> = Vec::new();
    let mut failures = Vec::new();
    loop {
        while attempts.is_empty() || Instant::now() >= next_start {
            let Some(address) = untried.next() else {
                break;
            };
            match start(address) {
                Ok(socket) => {
                    attempts.push((address, socket));
                    next_start = Instant::now() + delay;
                }
                Err(error) => failures.push((address, error)),
            }
        }
        if attempts.is_empty() {
            return Err(joined(failures));
        }
        let until = match untried.len() {
            0 => deadline,
            _ => next_start.min(deadline),
        };
        let ready = wait(&attempts, until.saturating_duration_since(Instant::now()))?;
        for index in ready.into_iter().rev() {
            let (address, socket) = attempts.swap_remove(index);
            match socket.take_error()? {
                None => {
                    socket.set_nonblocking(false)?;
                    return Ok(socket.into());
                }
                Some(error) => {
                    failures.push((address, error));
                    next_start = Instant::now();
                }
            }
        }
        if Instant::now() >= deadline {
            let late = || io::Error::new(io::ErrorKind::TimedOut, "connection timed out");
            let started = attempts.into_iter().map(|(address, _)| address);
            failures.extend(started.chain(untried).map(|address| (address, late())));
            return Err(joined(failures));
        }
    }
}

/// Addresses with alternating families, in their given order, starting with the family of the first one
/// (RFC 8305 section 4).
fn interleaved(addresses: &[SocketAddr]) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (mut first, mut second): (Vec<_>, Vec<_>) = addresses
        .iter()
        .copied()
        .partition(|address| address.is_ipv6() == first_is_v6);
    let mut all = Vec::with_capacity(addresses.len());
    let (mut first, mut second) = (first.drain(..), second.drain(..));
    loop {
        let before = all.len();
        all.extend(first.next());
        all.extend(second.next());
        if all.len() == before {
            return all;
        }
    }
}

fn start(address: SocketAddr) -> io::Result<Socket> {
    let kind = Type::STREAM.nonblocking().cloexec();
    let socket = Socket::new(Domain::for_address(address), kind, Some(Protocol::TCP))?;
    match socket.connect(&address.into()) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => Ok(socket),
    }
}

/// Attempts that have finished; waits at most `most`.
fn wait(attempts: &[(SocketAddr, Socket)], most: Duration) -> io::Result<Vec<usize>> {
    let mut waiting: Vec<_> = attempts
        .iter()
        .map(|(_, socket)| PollFd::new(socket.as_fd(), PollFlags::POLLOUT))
        .collect();
    // Rounded up, to avoid spinning in the last part of a millisecond.
    let most = most + Duration::from_micros(999);
    let most = PollTimeout::try_from(most).unwrap_or(PollTimeout::MAX);
    match poll(&mut waiting, most) {
        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = waiting.iter().enumerate();
    let ready = ready.filter(|(_, socket)| socket.any().unwrap_or(false));
    Ok(ready.map(|(index, _)| index).collect())
}

/// The error if no address could be reached.
fn joined(mut failures: Vec<(SocketAddr, io::Error)>) -> io::Error {
    if failures.len() < 2 {
        let only = failures.pop().map(|(_, error)| error);
        return only.unwrap_or_else(|| io::Error::other("no address"));
    }
    let kind = failures[0].1.kind();
    let all = failures
        .iter()
        .map(|(address, error)| format!("{address}: {error}"));
    io::Error::new(kind, all.collect::<Vec<_>>().join(", "))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A listener with a full backlog, for which the kernel drops further connection attempts.
    struct Swallowing {
        address: SocketAddr,
        _listener: Socket,
        _waiting: Vec<Socket>,
    }

    impl Swallowing {
        fn new() -> Self {
            let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
            listener.bind(&any.into()).unwrap();
            listener.listen(0).unwrap();
            let address = listener.local_addr().unwrap().as_socket().unwrap();
            let waiting = (0..4).map(|_| start(address).unwrap()).collect();
            Self {
                address,
                _listener: listener,
                _waiting: waiting,
            }
        }
    }

    fn refusing() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    }

    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn an_address_that_swallows_packets_or_refuses_does_not_keep_from_the_next() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let good = listener.local_addr().unwrap();
        let swallowing = Swallowing::new();
        for addresses in [
            vec![swallowing.address, good],
            vec![refusing(), good],
            vec![swallowing.address, refusing(), swallowing.address, good],
            vec![good, swallowing.address],
        ] {
            // Trying one address after the other would take 600 s.
            let socket = connect(&addresses, LONG).unwrap();
            assert_eq!(socket.peer_addr().unwrap(), good);
            socket.set_nonblocking(true).unwrap();
        }
    }

    #[test]
    fn the_time_is_over_for_all_at_once() {
        let swallowing = Swallowing::new();
        let error = connect(&[swallowing.address; 3], Duration::from_millis(40)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert_eq!(error.to_string().matches("timed out").count(), 3, "{error}");
        let error = connect(&[refusing()], LONG).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        let two = [refusing(), refusing()];
        let error = connect(&two, LONG).unwrap_err();
        assert!(error.to_string().contains(&two[1].to_string()), "{error}");
        assert!(connect(&[], LONG).is_err());
    }

    #[test]
    fn families_take_turns() {
        let parse = |text: &str| -> SocketAddr { text.parse().unwrap() };
        let [a, b, c] = ["[fd00::1]:1", "[fd00::2]:1", "[fd00::3]:1"].map(parse);
        let [d, e] = ["10.0.0.1:1", "10.0.0.2:1"].map(parse);
        assert_eq!(interleaved(&[a, b, c, d, e]), [a, d, b, e, c]);
        assert_eq!(interleaved(&[d, a]), [d, a]);
        assert_eq!(interleaved(&[]), []);
    }
}
