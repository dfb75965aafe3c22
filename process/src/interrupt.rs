//! Signals that ask a program to stop, as a flag that every wait looks at: so that what was made is
//! always taken down by the ordinary way out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

/// How long a wait loop sleeps between two looks; far below what a person notices.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A signal asked the program to stop.
#[derive(Debug, Error)]
#[error("interrupted by a signal")]
pub struct Interrupted;

/// Set once SIGINT, SIGTERM or SIGHUP has come.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Starts to catch the signals.
    pub fn install() -> Result<Self> {
        let interrupt = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&interrupt.0))
                .with_context(|| format!("cannot catch signal {signal}"))?;
        }
        Ok(interrupt)
    }

    /// Fails once a signal has come.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Interrupted);
        }
        Ok(())
    }

    /// One turn of a wait loop: looks for a signal, then sleeps for a moment.
    pub fn pause(&self) -> Result<(), Interrupted> {
        self.check()?;
        thread::sleep(LOOK_EVERY);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_flag_ends_every_wait() {
        let interrupt = Interrupt::default();
        assert!(interrupt.pause().is_ok());
        interrupt.0.store(true, Ordering::Relaxed);
        assert!(interrupt.check().is_err() && interrupt.pause().is_err());
    }
}
