//! A log reader with an idle strategy, so that following a log costs little when nothing comes.

use std::ops::Deref;
use std::path::Path;
use std::thread;
use std::time::Duration;

use penstock_log::{Batch, LogInfo, OpenError, Overwritten, ReadError, Reader, Start};
use penstock_wire::message::Messages;

/// Empty looks before the first sleep.
const SPINS: u32 = 100;
/// Longest sleep between two looks.
const LONGEST_REST: Duration = Duration::from_millis(1);

/// Follows one log.
#[derive(Debug)]
pub struct Subscriber {
    reader: Reader,
    idle_looks: u32,
}

/// What the log has next.
#[derive(Debug)]
pub enum Event<'a> {
    /// A batch; its bytes stay valid until the next look.
    Batch(Received<'a>),
    /// The writer went over batches before they were read.
    Lost {
        /// Batches lost.
        batches: u64,
        /// Messages lost.
        messages: u64,
    },
    /// The broker evicted this subscriber, because it read nothing for too long.
    Evicted,
    /// A batch's entry in the index is damaged; it was skipped.
    Damaged {
        /// Position of the batch in the log.
        index: u64,
    },
    /// Nothing new.
    Idle,
}

/// A batch, with its messages.
#[derive(Debug, Clone, Copy)]
pub struct Received<'a>(Batch<'a>);

impl<'a> Received<'a> {
    pub(crate) fn new(batch: Batch<'a>) -> Self {
        Self(batch)
    }

    /// The messages, in order; an error means that the payload contradicts its header.
    #[must_use]
    pub fn messages(&self) -> Messages<'a> {
        Messages::new(self.0.payload)
    }
}

impl<'a> Deref for Received<'a> {
    type Target = Batch<'a>;

    fn deref(&self) -> &Batch<'a> {
        &self.0
    }
}

impl Subscriber {
    /// Opens the log at `path`.
    ///
    /// # Errors
    /// [`OpenError`] when there is no such file or it is no log of this version.
    pub fn open(path: &Path, start: Start) -> Result<Self, OpenError> {
        Ok(Self {
            reader: Reader::open(path, start)?,
            idle_looks: 0,
        })
    }

    /// Makes a broker with `--full block` wait for this subscriber.
    ///
    /// # Errors
    /// [`OpenError`] when the file beside the log cannot be written, or all places are taken.
    pub fn register(&mut self) -> Result<(), OpenError> {
        self.reader.register()
    }

    /// The next batch, or why there is none. Never blocks.
    // Named as what it does; an Iterator cannot lend from itself.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Event<'_> {
        match self.reader.next() {
            Ok(Some(batch)) => {
                self.idle_looks = 0;
                Event::Batch(Received(batch))
            }
            Ok(None) => Event::Idle,
            Err(ReadError::Lapped { batches, messages }) => Event::Lost { batches, messages },
            Err(ReadError::Evicted) => Event::Evicted,
            Err(ReadError::Damaged { index }) => Event::Damaged { index },
        }
    }

    /// Waits a little after [`Event::Idle`]: spins first, then sleeps up to a millisecond.
    pub fn rest(&mut self) {
        self.idle_looks = self.idle_looks.saturating_add(1);
        match self.idle_looks.checked_sub(SPINS) {
            None => std::hint::spin_loop(),
            Some(sleeps) => {
                let rest = Duration::from_micros(1 << sleeps.min(10));
                thread::sleep(rest.min(LONGEST_REST));
            }
        }
    }

    /// Whether a broker has the log open for writing.
    #[must_use]
    pub fn writer_is_alive(&self) -> bool {
        self.reader.writer_is_alive()
    }

    /// Figures of the log.
    #[must_use]
    pub fn info(&self) -> LogInfo {
        self.reader.info()
    }

    /// What the log no longer held when it was opened.
    #[must_use]
    pub fn overwritten(&self) -> Overwritten {
        self.reader.overwritten()
    }
}
