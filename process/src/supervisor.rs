//! Supervised threads: an end without a stop request, also by a panic, is reported to
//! the main thread. Waiting for a thread at the end has a time limit.

use std::fmt::{self, Display};
use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use crate::text::foreign;
use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use crate::run::message;

/// Starts threads and reports their end.
#[derive(Debug)]
pub struct Supervisor {
    sender: Sender<Ended>,
    ended: Receiver<Ended>,
}

/// A thread that ended without a stop request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Name of the thread.
    pub thread: String,
    /// How it ended.
    pub cause: Cause,
}

/// How a thread ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// Without an error.
    Returned,
    /// With this error.
    Failed(String),
    /// With a panic and its message.
    Panicked(String),
}

impl Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let thread = &self.thread;
        match &self.cause {
            Cause::Returned => write!(f, "thread {thread} ended"),
            Cause::Failed(error) => write!(f, "thread {thread} failed: {error}"),
            Cause::Panicked(said) => write!(f, "thread {thread} panicked: {said}"),
        }
    }
}

/// A thread started by a [`Supervisor`].
#[derive(Debug)]
pub struct Supervised<T> {
    name: String,
    outcome: Receiver<Result<T>>,
}

impl Default for Supervisor {
    fn default() -> Self {
        let (sender, ended) = unbounded();
        Self { sender, ended }
    }
}

impl Supervisor {
    /// Reports each thread that ended before its `stop` flag was set.
    #[must_use]
    pub fn ended(&self) -> &Receiver<Ended> {
        &self.ended
    }

    /// Starts a thread that runs `body`, which must return once `stop` is set.
    ///
    /// # Errors
    /// If the system cannot start a thread.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        stop: &Arc<AtomicBool>,
        body: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<Supervised<T>> {
        let (told, outcome) = bounded(1);
        let (label, ending, stop) = (name.to_owned(), self.sender.clone(), Arc::clone(stop));
        let supervised = move || {
            let ran = panic::catch_unwind(AssertUnwindSafe(body));
            let (cause, result) = match ran {
                Ok(Ok(value)) => (Cause::Returned, Ok(value)),
                Ok(Err(error)) => (Cause::Failed(format!("{error:#}")), Err(error)),
                Err(payload) => {
                    let said = foreign(message(&*payload)).to_string();
                    (
                        Cause::Panicked(said.clone()),
                        Err(anyhow!("panicked: {said}")),
                    )
                }
            };
            // If the process is already ending, nothing receives these.
            let _ = told.send(result);
            if cause != Cause::Returned || !stop.load(Ordering::Acquire) {
                let _ = ending.send(Ended {
                    thread: label,
                    cause,
                });
            }
        };
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(supervised)
            .with_context(|| format!("cannot start thread {name}"))?;
        Ok(Supervised {
            name: name.to_owned(),
            outcome,
        })
    }
}

impl<T> Supervised<T> {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits for its end, until `deadline` at most, and returns its result.
    ///
    /// # Errors
    /// If it failed or panicked, or has not ended by then.
    pub fn join(self, deadline: Instant) -> Result<T> {
        let name = &self.name;
        match self.outcome.recv_deadline(deadline) {
            Ok(outcome) => outcome.with_context(|| format!("thread {name}")),
            Err(RecvTimeoutError::Timeout) => bail!("thread {name} hangs: it does not end"),
            Err(RecvTimeoutError::Disconnected) => bail!("thread {name} left no result"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn every_unexpected_end_is_told() {
        let supervisor = Supervisor::default();
        let stop = Arc::default();
        let next = || supervisor.ended().recv_deadline(soon()).unwrap();
        supervisor.spawn("a", &stop, || Ok(())).unwrap();
        assert_eq!(next().to_string(), "thread a ended");
        supervisor
            .spawn::<()>("b", &stop, || bail!("no room"))
            .unwrap();
        assert_eq!(next().to_string(), "thread b failed: no room");
        let thread = supervisor
            .spawn("c", &stop, || -> Result<()> { panic!("a\x1bbug {}", 7) })
            .unwrap();
        assert_eq!(next().to_string(), "thread c panicked: a\\x1bbug 7");
        let error = format!("{:#}", thread.join(soon()).unwrap_err());
        assert_eq!(error, "thread c: panicked: a\\x1bbug 7");
    }

    #[test]
    fn an_end_that_was_asked_for_is_not_told_but_a_panic_is() {
        let supervisor = Supervisor::default();
        let stop = Arc::new(AtomicBool::new(true));
        let thread = supervisor.spawn("a", &stop, || Ok(7)).unwrap();
        assert_eq!(thread.join(soon()).unwrap(), 7);
        let thread = supervisor
            .spawn("b", &stop, || -> Result<()> { panic!("late") })
            .unwrap();
        assert!(thread.join(soon()).is_err());
        let told = supervisor.ended().recv_deadline(soon()).unwrap();
        assert_eq!(told.thread, "b");
    }

    #[test]
    fn one_that_hangs_is_not_waited_for() {
        let supervisor = Supervisor::default();
        let (release, held) = bounded::<()>(0);
        let thread = supervisor
            .spawn("a", &Arc::default(), move || {
                let _ = held.recv();
                Ok(())
            })
            .unwrap();
        let error = thread.join(Instant::now()).unwrap_err().to_string();
        assert_eq!(error, "thread a hangs: it does not end");
        drop(release);
    }
}
