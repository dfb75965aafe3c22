//! What SIGINT and SIGTERM do: the first ends the program soon, whatever it waits for; the second at
//! once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_process::exit::INTERRUPTED;
use penstock_publisher::{Canceller, Progress};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::PROGRAM;

/// How long the end of what is under way may take after the signal: a handshake, the acks of what was
/// published.
const GRACE: Duration = Duration::from_secs(2);
/// How long the summary may take then.
const SUMMARY: Duration = Duration::from_secs(1);

/// What is known of signals, and what a signal needs to know.
pub struct Interrupt {
    flag: Arc<AtomicBool>,
    run: Arc<Run>,
}

/// How far the program is.
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
    /// Watches the signals from now on.
    pub fn watch() -> Result<Self> {
        let interrupt = Self {
            flag: Arc::default(),
            run: Arc::default(),
        };
        for signal in [SIGINT, SIGTERM] {
            let flag = || Arc::clone(&interrupt.flag);
            // In this order: only a second signal finds the flag set.
            signal_hook::flag::register_conditional_default(signal, flag())
                .and_then(|_| signal_hook::flag::register(signal, flag()))
                .context("cannot watch signals")?;
        }
        let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch signals")?;
        let run = Arc::clone(&interrupt.run);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                if signals.forever().next().is_some() {
                    run.end();
                }
            })
            .context("cannot start a thread")?;
        Ok(interrupt)
    }

    /// Set by the first signal.
    pub fn flag(&self) -> &AtomicBool {
        &self.flag
    }

    /// Whether there was a signal.
    pub fn came(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// There is a publisher that a signal has to cancel.
    pub fn connected(&self, canceller: Canceller, progress: Progress) {
        self.run.lock().publisher = Some((canceller, progress));
    }

    /// The summary is printed.
    pub fn finished(&self) {
        self.run.lock().is_finished = true;
        self.run.changed.notify_all();
    }
}

impl Run {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a panic elsewhere leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the program has finished; returns whether it has in time.
    fn wait(&self, longest: Duration) -> bool {
        let waited = self
            .changed
            .wait_timeout_while(self.lock(), longest, |state| !state.is_finished);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        state.is_finished
    }

    /// Ends the program: with a summary, if it can still write one.
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
