//! The thread that sends a batch which lingers too long, although it is not full.

use std::sync::{Arc, Mutex, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::Error;
use crate::batch_builder::BatchBuilder;

/// The running thread.
pub(crate) struct Linger {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

impl Linger {
    /// Looks twice in the time that a batch may linger, and sends one that it has seen before.
    pub(crate) fn start(linger: Duration, front: Arc<Mutex<BatchBuilder>>) -> Result<Self, Error> {
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let interval = (linger / 2).max(Duration::from_micros(50));
        let body = move || {
            let mut seen = None;
            while stopped
                .recv_timeout(interval)
                .is_err_and(|e| e.is_timeout())
            {
                // The publisher's thread holds it while it begins or ends a batch, or waits to.
                let mut front = match front.try_lock() {
                    Ok(front) => front,
                    Err(TryLockError::WouldBlock) => continue,
                    Err(TryLockError::Poisoned(_)) => return,
                };
                let (generation, filled) = front.lingering();
                if generation.is_some() && generation == seen {
                    front.send_lingering(filled);
                }
                seen = generation;
            }
        };
        let thread = thread::Builder::new()
            .name("linger".to_owned())
            .spawn(body)
            .map_err(|e| Error::Thread(e.to_string()))?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread.
    pub(crate) fn stop(self) {
        drop(self.stop);
        // It fails only by panicking, and the failure of a stream says more about that.
        let _ = self.thread.join();
    }
}
