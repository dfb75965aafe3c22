//! Handles SIGINT and SIGTERM: the first ends the program soon, whatever it waits for; the second ends
//! it at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use crate::{Canceller, Progress};
use anyhow::{Context, Result};
use penstock_process::exit::INTERRUPTED;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::PROGRAM;

/// Time for work in progress to end after the signal: a handshake, or the acks of published messages.
const GRACE: Duration = Duration::from_secs(2);
/// Time for the summary after that.
const SUMMARY: Duration = Duration::from_secs(1);

/// State of signals, and what the signal thread needs to know.
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    run: Arc<Run>,
}

/// How far the program has got.
#[derive(Default)]
struct Run {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    publisher: Option<(Canceller, Progress)>,
    is_finished: bool,
}

impl Interrupt {
    /// Installs the handlers and starts the signal thread.
    pub fn watch() -> Result<Self> {
        let interrupt = Self {
            flag: Arc::default(),
            run: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            let flag = || Arc::clone(&interrupt.flag);
            // In this order, so that only a second signal finds the flag set.
            signal_hook::flag::register_conditional_default(signal, flag())
                .and_then(|_| signal_hook::flag::register(signal, flag()))
                .context("cannot install signal handlers")?;
        }
        let mut signals =
            Signals::new([SIGINT, SIGTERM]).context("cannot install signal handlers")?;
        let run = Arc::clone(&interrupt.run);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                if signals.forever().next().is_some() {
                    run.end();
                }
            })
            .context("cannot start the signal thread")?;
        Ok(interrupt)
    }

    /// Set by the first signal.
    pub fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    /// Whether a signal has arrived.
    pub fn came(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Registers the publisher that a signal has to cancel.
    pub fn connected(&self, canceller: Canceller, progress: Progress) {
        self.run.lock().publisher = Some((canceller, progress));
    }

    /// Reports that the summary has been printed.
    pub fn finished(&self) {
        self.run.lock().is_finished = true;
        self.run.changed.notify_all();
    }
}

impl Run {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a panic elsewhere leaves the state consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the program has finished; returns whether it did in time.
    fn wait(&self, longest: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), longest, |state| !state.is_finished);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_finished
    }

    /// Ends the program, with a summary if it can still be written.
    fn end(&self) {
        if self.wait(GRACE) {
            return;
        }
        let publisher = self.lock().publisher.clone();
        let Some((canceller, progress)) = publisher else {
            exit("interrupted before anything was sent");
        };
        canceller.cancel();
        if self.wait(SUMMARY) {
            return;
        }
        let acked = progress.messages_acked();
        exit(&format!(
            "interrupted; {acked} messages had been acknowledged"
        ));
    }
}

fn exit(why: &str) -> ! {
    penstock_process::end(PROGRAM.name, why, INTERRUPTED)
}
