//! Signals that ask a program to stop set a flag that every wait checks, so that the program always
//! removes what it made on its ordinary way out.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use thiserror::Error;

/// Interval at which a wait loop checks the flag; far below what a person notices.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A signal asked the program to stop.
#[derive(Debug, Error)]
#[error("interrupted by a signal")]
pub struct Interrupted;

/// Set once SIGINT, SIGTERM or SIGHUP has arrived.
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

    /// Fails once a signal has arrived.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Interrupted);
        }
        Ok(())
    }

    /// One iteration of a wait loop: checks for a signal, then sleeps.
    pub fn pause(&self) -> Result<(), Interrupted> {
        self.check()?;
        thread::sleep(POLL_INTERVAL);
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
