//! Errors of the shared buffer; each says which file and what to do.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::layout::HeaderError;

/// A log cannot be created, opened or registered with.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no such file.
    #[error("{path}: no such log; a broker makes <buffer-dir>/<topic>.log when the topic is first used", path = .0.display())]
    Missing(PathBuf),
    /// The file exists, but this user may not access it.
    #[error("{path}: this user may not {action} it; the broker's --buffer-mode and --buffer-group say who may", path = .path.display())]
    Denied {
        /// The file.
        path: PathBuf,
        /// What was attempted.
        action: &'static str,
    },
    /// The mode and group of the file cannot be set.
    #[error("{path}: cannot set mode {mode:03o} and group {group}: {source}; it must belong to the broker's user, who must be in that group (usermod -aG)", path = .path.display())]
    Access {
        /// The file.
        path: PathBuf,
        /// The mode.
        mode: u32,
        /// The group.
        group: String,
        /// The system's error.
        source: io::Error,
    },
    /// The requested geometry is invalid.
    #[error("{0}")]
    Geometry(String),
    /// The file is no log, or of another version, or damaged.
    #[error("{path}: {reason}; move the file away, or name another --buffer-dir", path = .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: HeaderError,
    },
    /// The file's geometry differs from the requested one.
    #[error("{path}: the file has {found}, but {asked} was asked for; use the same sizes, or move the file away", path = .path.display())]
    OtherGeometry {
        /// The file.
        path: PathBuf,
        /// Geometry in the file.
        found: String,
        /// The requested geometry.
        asked: String,
    },
    /// Another broker has the log open.
    #[error("{path}: another broker ({holder}) is writing this log; stop it, or choose another --buffer-dir", path = .path.display())]
    Locked {
        /// The log.
        path: PathBuf,
        /// The process that holds it, according to its lock file.
        holder: String,
    },
    /// The file system has not enough space for the whole log, or for its registry of readers.
    #[error("{path}: no room for {bytes} bytes; free some space, or choose a smaller --ring-size or another --buffer-dir", path = .path.display())]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Size of the file.
        bytes: u64,
    },
    /// The broker does not wait for readers of this log.
    #[error("{path}: no such file, because the broker of this log does not wait for readers; start it with --full block, or read without registering", path = .0.display())]
    NoRegistry(PathBuf),
    /// The log has not come as far as the batch to start at: it is not the log that it was.
    #[error("{path}: the log has {batches} batches, so it has no batch {index}: it was deleted and created anew; start at the oldest batch", path = .path.display())]
    Beyond {
        /// The log.
        path: PathBuf,
        /// Index of the batch to start at.
        index: u64,
        /// Batches that were committed since the log was created.
        batches: u64,
    },
    /// All reader slots are taken.
    #[error("{path}: all {slots} reader slots are taken; end a reader, or read without registering", path = .path.display())]
    TooManyReaders {
        /// The registry file.
        path: PathBuf,
        /// Number of slots.
        slots: usize,
    },
    /// Any other failure of the operating system.
    #[error("{path}: cannot {action}: {source}", path = .path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

impl OpenError {
    /// Describes a failed action on a file.
    pub(super) fn io(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

/// A batch could not be read; the next call continues after it.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum ReadError {
    /// The writer has overwritten batches before they were read.
    #[error(
        "lapped by the writer: {batches} batches with {messages} messages were overwritten before they were read"
    )]
    Lapped {
        /// Batches lost.
        batches: u64,
        /// Messages lost.
        messages: u64,
    },
    /// The broker stopped waiting for this reader, which continues like an unregistered one.
    #[error(
        "the broker evicted this reader, because it read nothing for the broker's --reader-timeout and blocked the log; from now on, batches may be overwritten before this reader reads them"
    )]
    Evicted,
    /// The descriptor of a batch fails its check.
    #[error("the descriptor of batch {index} is damaged; the batch is skipped")]
    Damaged {
        /// Position of the batch in the log.
        index: u64,
    },
}
