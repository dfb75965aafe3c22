//! Readiness for service managers and scripts: the protocol of sd_notify(3), and a line on a descriptor
//! that the parent opened.
//!
//! This is our own code and not a crate, because nothing here may block: the process must continue when
//! the service manager does not read.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use tracing::warn;

use crate::exit::wrong_usage;

/// How long a line for `--ready-fd` waits for room in its pipe.
const READY_WAIT_MS: u16 = 1000;

/// The service manager that started this process, if any.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// Connects to the socket in `NOTIFY_SOCKET`, with the watchdog of `WATCHDOG_USEC`. The socket
    /// stays open when the process drops its privileges.
    #[must_use]
    pub fn from_env() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self::default();
        };
        let socket = connect(&name)
            .inspect_err(|error| warn!(%error, socket = ?name, "cannot reach the service manager"))
            .ok();
        let number = |name| env::var(name).ok()?.parse::<u64>().ok();
        // The variable may be meant for a parent of this process (sd_watchdog_enabled(3)).
        let ours = env::var_os("WATCHDOG_PID").is_none()
            || number("WATCHDOG_PID") == Some(process::id().into());
        let micros = number("WATCHDOG_USEC").filter(|micros| ours && *micros > 0);
        Self {
            socket,
            watchdog: micros.map(Duration::from_micros),
        }
    }

    /// The interval in which it expects a sign of progress.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.filter(|_| self.socket.is_some())
    }

    /// Reports that the service is up, or up again after a reload.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}\n", status.replace('\n', " ")));
    }

    /// Reports that the configuration is being reloaded; [`Self::ready`] follows.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.send(&format!(
            "RELOADING=1\nMONOTONIC_USEC={}\n",
            now.as_micros()
        ));
    }

    /// Reports that the service is about to end.
    pub fn stopping(&self) {
        self.send("STOPPING=1\n");
    }

    /// Reports that the service makes progress.
    pub fn alive(&self) {
        self.send("WATCHDOG=1\n");
    }

    fn send(&self, state: &str) {
        // If the manager does not read in time, or is gone, its own watchdog notices.
        let sent = self.socket.as_ref().map(|s| s.send(state.as_bytes()));
        if let Some(Err(error)) = sent {
            warn!(%error, "cannot notify the service manager: {}", state.trim_end());
        }
    }
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match name.as_bytes() {
        [b'@', rest @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(rest)?)?,
        _ => socket.connect(name)?,
    }
    Ok(socket)
}

/// The descriptor of `--ready-fd`.
#[derive(Debug)]
pub struct ReadyFd(OwnedFd);

impl ReadyFd {
    /// Takes ownership of the descriptor. Call this before the process opens anything, so that an open
    /// descriptor must have been inherited.
    ///
    /// # Errors
    /// Wrong usage if it is not open, not writable, or one of the first three.
    pub fn take(number: RawFd) -> Result<Self> {
        if number < 3 {
            return Err(wrong_usage(format!(
                "--ready-fd {number} is stdin, stdout or stderr: give 3 or higher, as in `--ready-fd 3 3>FILE`"
            )));
        }
        // SAFETY: F_GETFL with any number touches no memory; the kernel answers EBADF for a closed one.
        let flags = unsafe { nix::libc::fcntl(number, nix::libc::F_GETFL) };
        if flags < 0 {
            return Err(wrong_usage(format!(
                "--ready-fd {number}: {}: open it for this program, as in `--ready-fd {number} {number}>FILE`",
                Errno::last().desc()
            )));
        }
        if OFlag::from_bits_truncate(flags) & OFlag::O_ACCMODE == OFlag::O_RDONLY {
            return Err(wrong_usage(format!(
                "--ready-fd {number} is open for reading only; open it for writing"
            )));
        }
        // SAFETY: it is open, and by contract nothing in this process owns it yet.
        let fd = unsafe { OwnedFd::from_raw_fd(number) };
        fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .with_context(|| format!("--ready-fd {number}"))?;
        Ok(Self(fd))
    }

    /// Writes `READY=1` and a newline, and closes the descriptor.
    ///
    /// # Errors
    /// If nothing reads it in time, or the reader is gone.
    pub fn ready(self) -> Result<()> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLOUT)];
        let answer = "READY=1\n";
        let written = match poll(&mut fds, PollTimeout::from(READY_WAIT_MS)) {
            Ok(0) => Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "nothing reads from it",
            )),
            Ok(_) => nix::unistd::write(&self.0, answer.as_bytes()).map_err(io::Error::from),
            Err(error) => Err(error.into()),
        };
        match written.context("cannot write to --ready-fd")? {
            written if written == answer.len() => Ok(()),
            _ => Err(anyhow::anyhow!(
                "--ready-fd accepted only a part of the line"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Usage;
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    #[test]
    fn a_manager_that_does_not_read_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let ours = ServiceManager {
            socket: Some(connect(path.as_os_str()).unwrap()),
            watchdog: None,
        };
        ours.ready("serving");
        (0..10_000).for_each(|_| ours.alive());
        let mut bytes = [0; 100];
        let len = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"READY=1\nSTATUS=serving\n");
        let len = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..len], b"WATCHDOG=1\n");
    }

    #[test]
    fn abstract_names_are_understood() {
        let name = format!("penstock-notify-{}", process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        let socket = connect(format!("@{name}").as_ref()).unwrap();
        let ours = ServiceManager {
            socket: Some(socket),
            watchdog: None,
        };
        ours.reloading();
        let mut bytes = [0; 100];
        let len = manager.recv(&mut bytes).unwrap();
        assert!(bytes[..len].starts_with(b"RELOADING=1\nMONOTONIC_USEC="));
    }

    #[test]
    fn a_descriptor_must_be_open_for_writing() {
        for (number, words) in [(0, "stdin"), (-1, "stdin"), (9999, "Bad file")] {
            let error = ReadyFd::take(number).unwrap_err();
            assert!(
                error.is::<Usage>() && error.to_string().contains(words),
                "{error}"
            );
        }
        let (reader, writer) = io::pipe().unwrap();
        let number = reader.into_raw_fd();
        let error = ReadyFd::take(number).unwrap_err();
        assert!(error.to_string().contains("for reading only"), "{error}");
        // SAFETY: the number was released above, and `take` has not touched it.
        let mut reader = io::PipeReader::from(unsafe { OwnedFd::from_raw_fd(number) });
        ReadyFd::take(writer.into_raw_fd())
            .unwrap()
            .ready()
            .unwrap();
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        assert_eq!(said, "READY=1\n");
    }
}
