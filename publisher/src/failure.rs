//! Why a publisher failed.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use penstock_runtime::poison::lock;

use crate::Error;

/// The first failure of any stream.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    happened: AtomicBool,
    error: Mutex<Option<Error>>,
}

impl Failure {
    /// Keeps an error, if it is the first.
    pub(crate) fn note(&self, error: Error) {
        lock(&self.error).get_or_insert(error);
        self.happened.store(true, Ordering::Release);
    }

    /// From now on, [`Self::check`] fails, without a reason.
    pub(crate) fn cancel(&self) {
        self.happened.store(true, Ordering::Release);
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.happened.load(Ordering::Acquire) {
            Err(self.take())
        } else {
            Ok(())
        }
    }

    /// The first failure; returned once.
    pub(crate) fn take(&self) -> Error {
        lock(&self.error).take().unwrap_or(Error::Failed)
    }
}
