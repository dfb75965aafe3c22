//! Signals that end or reload the broker, and the notice of a shortened log: a thread passes their names
//! on.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use crossbeam_channel::Sender;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use penstock_log::notify_shortened_logs;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;

use crate::liveness::{IDLE_ROUND_MS, Pulse};

/// Name that stands for the notice of a shortened log.
pub const SHORTENED_LOG: &str = "SIGBUS";

/// For each signal, its name and the read end of the stream that its handler writes to.
#[derive(Debug)]
pub struct SignalPipes(Vec<(&'static str, UnixStream)>);

impl SignalPipes {
    /// Sets the handlers; from now on these signals do not end the process.
    ///
    /// # Errors
    /// If there is no descriptor left, or a handler cannot be set.
    pub fn open() -> io::Result<Self> {
        let mut pipes = Vec::new();
        for (name, signal) in [("SIGHUP", SIGHUP), ("SIGINT", SIGINT), ("SIGTERM", SIGTERM)] {
            let (reader, writer) = pair()?;
            pipe::register(signal, writer)?;
            pipes.push((name, reader));
        }
        let (reader, writer) = pair()?;
        notify_shortened_logs(writer);
        pipes.push((SHORTENED_LOG, reader));
        Ok(Self(pipes))
    }

    /// Passes on the name of each signal until the receiver is dropped.
    ///
    /// # Errors
    /// If signals cannot be waited for.
    pub fn hand_on(&mut self, pulse: &Pulse, to: &Sender<&'static str>) -> io::Result<()> {
        loop {
            pulse.count();
            let fds = self
                .0
                .iter()
                .map(|(_, pipe)| PollFd::new(pipe.as_fd(), PollFlags::POLLIN));
            let mut fds: Vec<_> = fds.collect();
            match poll(&mut fds, PollTimeout::from(IDLE_ROUND_MS)) {
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            for (name, pipe) in &self.0 {
                // Signals that arrive together count as one, as in the kernel.
                if matches!((&*pipe).read(&mut [0; 64]), Ok(1..)) && to.send(name).is_err() {
                    return Ok(());
                }
            }
        }
    }
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (reader, writer) = UnixStream::pair()?;
    reader.set_nonblocking(true)?;
    writer.set_nonblocking(true)?;
    Ok((reader, writer))
}
