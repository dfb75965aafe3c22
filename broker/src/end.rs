//! What ends the broker, and what fails on the way.

use std::fmt::{self, Display};
use std::time::Instant;

use anyhow::{Result, anyhow};
use penstock_flags::explain;
use penstock_process::supervisor::{Ended, Supervised};

/// What ended the broker.
pub enum End {
    Signal(&'static str),
    Thread(Ended),
    ShortenedLog,
    /// The broker cannot start or continue.
    Failed(String),
}

impl From<anyhow::Error> for End {
    fn from(error: anyhow::Error) -> Self {
        Self::Failed(explain(error.as_ref()))
    }
}

impl Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(name) => f.write_str(name),
            Self::Thread(ended) => ended.fmt(f),
            Self::Failed(error) => f.write_str(error),
            Self::ShortenedLog => f.write_str(
                "a log was shortened under the broker, or its file system has no room for a hole in it (SIGBUS)",
            ),
        }
    }
}

/// Failures, from the cause of the end to the last thread that did not end in order.
pub struct Failures {
    pub list: Vec<String>,
    /// The thread that was the cause.
    thread: Option<String>,
}

impl Failures {
    pub fn new(end: &End) -> Self {
        match end {
            End::Signal(_) => Self {
                list: Vec::new(),
                thread: None,
            },
            End::ShortenedLog | End::Failed(_) => Self {
                list: vec![end.to_string()],
                thread: None,
            },
            End::Thread(ended) => Self {
                list: vec![ended.to_string()],
                thread: Some(ended.thread.clone()),
            },
        }
    }

    pub fn of<T>(&mut self, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| self.list.push(explain(error.as_ref())))
            .ok()
    }

    pub fn of_thread<T>(&mut self, thread: Supervised<T>, deadline: Instant) -> Option<T> {
        let known = self.thread.as_deref() == Some(thread.name());
        match thread.join(deadline) {
            Err(_) if known => None,
            joined => self.of(joined),
        }
    }

    pub fn into_result(self) -> Result<()> {
        match self.list.is_empty() {
            true => Ok(()),
            false => Err(anyhow!(self.list.join("; "))),
        }
    }
}
