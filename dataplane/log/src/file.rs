//! The log as a file: creating, mapping, locking and recovering it.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::task::Waker;

use crossbeam_utils::CachePadded;
use penstock_files::Open;
use penstock_wire::reply::Fault;

use super::OpenError;
use super::access::Access;
use super::allocation::{allocate, make, no_space};
use super::layout::{Geometry, HeaderError};
use super::mapping::{LogInfo, Mapping};
use super::recovery::recover;
use super::registry::Registry;
use super::ring::{NOTHING_OPEN, Ring, WriterWatermark};
use super::slot::Found;
use super::watch::CommitWatch;
use super::writer_lock::WriterLock;

/// What a broker does when it would have to overwrite batches that a registered reader has not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingFullPolicy {
    /// Wait for the reader: nothing is lost, and publishers are blocked.
    Block,
    /// Wait, but let readers copy what they read, so that a reader that stops reading can be evicted.
    Evict,
    /// Overwrite; the reader learns how much it lost.
    Overwrite,
}

/// A registered reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReaderInfo {
    /// Its slot in the registry.
    pub slot: usize,
    /// Its process, as the reader reports it: a number in its own PID namespace.
    pub process: u64,
    /// Index of the oldest batch that it needs.
    pub cursor: u64,
    /// Batches that it has not read yet.
    pub unread_batches: u64,
    /// Bytes of the ring that those batches keep from being overwritten.
    pub unread_bytes: u64,
    /// Whether it blocks writers, or will soon.
    pub holds_up: bool,
}

/// Why a log can no longer be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// What happened to its file.
    pub reason: String,
    /// Whether a new log takes its place, so that streams can continue.
    pub is_replaced: bool,
}

/// Settings of a log.
#[derive(Debug, Clone)]
pub struct LogOptions {
    /// Sizes; must match those of an existing file.
    pub geometry: Geometry,
    /// What to do when registered readers lag.
    pub full: RingFullPolicy,
    /// Who may read the log and register.
    pub access: Access,
    /// Writers that may exist at once (one per worker).
    pub writers: usize,
}

/// State of an open log's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileState {
    /// In place, with its original length.
    Whole,
    /// Deleted or replaced: a reader that opens the path does not find this log.
    Gone,
    /// Truncated or extended: bytes beyond the end of the file cannot be accessed (SIGBUS).
    Resized {
        /// Its present length, bytes.
        bytes: u64,
    },
}

impl Lost {
    /// The error that its streams end with.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self.is_replaced {
            true => Fault::Shutdown,
            false => Fault::LogLost,
        }
    }
}

/// A log that this process writes.
#[derive(Debug)]
pub struct Log {
    pub(super) mapping: Mapping,
    registry: Option<Registry>,
    /// Cursors of readers that may still read payload in place, which an earlier broker let them
    /// borrow.
    borrowed: Vec<(usize, u64)>,
    lost: OnceLock<Lost>,
    pub(super) watch: CommitWatch,
    watermarks: Vec<CachePadded<WriterWatermark>>,
    pub(super) taken: Vec<AtomicBool>,
    /// Dropped last. `None` for a file without a directory, as in tests.
    pub(super) lock: Mutex<Option<WriterLock>>,
}

impl Log {
    /// Opens the log at `path` for writing, after recovery if its last writer died, or creates it.
    ///
    /// The whole file is allocated and touched at once: a full file system is an error here, not a bus error
    /// later, and the hot path has no page faults.
    ///
    /// # Errors
    /// [`OpenError`] says which file and what to do.
    pub fn open(path: &Path, options: &LogOptions) -> Result<Self, OpenError> {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let dir = options
            .access
            .open_directory(parent)
            .map_err(OpenError::io("create or open", path))?;
        // Lock first, then examine: the previous holder of the lock has finished with the file.
        let lock = WriterLock::take(dir, path)?;
        let name = path.file_name().unwrap_or_default();
        let there = lock.dir.contains(name);
        let is_new = !there.map_err(OpenError::io("look at", path))?;
        let file = match is_new {
            true => make(&lock.dir, path, name, options.geometry),
            false => lock.dir.file(name, Open::Write),
        };
        let file =
            file.map_err(|source| no_space(path, options.geometry, "open for writing", source))?;
        let mut lock = Some(lock);
        Self::of_locked_file(path, file, &mut lock, options).inspect_err(|_| {
            // A log that was only just created is empty: remove it, so that it does not hold space.
            if let Some(lock) = lock.take_if(|_| is_new) {
                let _ = lock.remove_files();
            }
        })
    }

    /// Opens the log in an open file.
    #[cfg(any(test, fuzzing))]
    pub(super) fn of_file(
        path: &Path,
        file: File,
        mut lock: Option<WriterLock>,
        options: &LogOptions,
    ) -> Result<Self, OpenError> {
        Self::of_locked_file(path, file, &mut lock, options)
    }

    /// Takes the lock only if it succeeds.
    fn of_locked_file(
        path: &Path,
        file: File,
        lock: &mut Option<WriterLock>,
        options: &LogOptions,
    ) -> Result<Self, OpenError> {
        let mapping = Mapping::map(path, file, true)?;
        if mapping.geometry != options.geometry {
            return Err(OpenError::OtherGeometry {
                path: path.to_owned(),
                found: mapping.geometry.to_string(),
                asked: options.geometry.to_string(),
            });
        }
        // An existing log may be a copy with holes (`cp --sparse`, `rsync -S`).
        allocate(&mapping.file, mapping.geometry.file_bytes())
            .map_err(|source| no_space(path, mapping.geometry, "allocate", source))?;
        let was_borrowed = mapping.control().granted.load(Ordering::Acquire) != u64::MAX;
        recover(&mapping).map_err(|what| OpenError::Header {
            path: path.to_owned(),
            reason: HeaderError::Control(what),
        })?;
        if mapping.identity().load(Ordering::Relaxed) == 0 {
            let identity = getrandom::u64().map_err(io::Error::other);
            let identity = identity.map_err(OpenError::io("make up an identity for", path))?;
            mapping.identity().store(identity.max(1), Ordering::Relaxed);
        }
        if options.full != RingFullPolicy::Block {
            // Every position counts as granted, so that no registered reader borrows payload from a
            // writer that does not wait for it.
            let granted = &mapping.control().granted;
            granted.store(u64::MAX, Ordering::Release);
        }
        options.access.apply_to_log(path, &mapping.file)?;
        mapping.populate()?;
        let registry = match (options.full, &*lock) {
            (RingFullPolicy::Block | RingFullPolicy::Evict, Some(lock)) => {
                Some(Registry::make(&lock.dir, path, options.access)?)
            }
            _ => None,
        };
        let borrowed = match &registry {
            Some(registry) if options.full == RingFullPolicy::Evict && was_borrowed => {
                let readers = registry.readers();
                let readers = readers.map_err(OpenError::io("read the registry of", path))?;
                readers.into_iter().map(|r| (r.slot, r.cursor)).collect()
            }
            _ => Vec::new(),
        };
        if let Some(lock) = lock {
            lock.show(options.access)?;
        }
        let watermarks = std::iter::repeat_with(CachePadded::<WriterWatermark>::default);
        Ok(Self {
            mapping,
            registry,
            borrowed,
            lost: OnceLock::new(),
            watch: CommitWatch::default(),
            watermarks: watermarks.take(options.writers).collect(),
            taken: std::iter::repeat_with(AtomicBool::default)
                .take(options.writers)
                .collect(),
            lock: Mutex::new(lock.take()),
        })
    }

    pub(super) fn release_writer(&self, number: usize) {
        self.watermarks[number]
            .open
            .store(NOTHING_OPEN, Ordering::Release);
        self.taken[number].store(false, Ordering::Release);
    }

    /// Sizes of the log.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.mapping.geometry
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mapping.path
    }

    /// The file itself, which a [`Span`](super::Span) lies in.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.mapping.file
    }

    /// A random number that tells this log from another one of the same name.
    #[must_use]
    pub fn identity(&self) -> u64 {
        self.mapping.identity().load(Ordering::Relaxed)
    }

    /// The current figures.
    #[must_use]
    pub fn info(&self) -> LogInfo {
        self.mapping.info()
    }

    /// Checks the file: two system calls, so not for the hot path.
    ///
    /// # Errors
    /// The system's error if the check fails.
    pub fn check_file(&self) -> io::Result<FileState> {
        let ours = self.mapping.file.metadata()?;
        if ours.len() != self.geometry().file_bytes() {
            return Ok(FileState::Resized { bytes: ours.len() });
        }
        match fs::symlink_metadata(&self.mapping.path) {
            Ok(there) if (there.dev(), there.ino()) == (ours.dev(), ours.ino()) => {
                Ok(FileState::Whole)
            }
            Ok(_) => Ok(FileState::Gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(FileState::Gone),
            Err(error) => Err(error),
        }
    }

    /// Checks whether the registry of readers is still in its place. A log without one passes.
    ///
    /// # Errors
    /// If the file cannot be looked up.
    pub fn check_registry(&self) -> io::Result<FileState> {
        let in_place = self.registry.as_ref().map(Registry::is_in_place);
        Ok(match in_place.transpose()? {
            Some(false) => FileState::Gone,
            Some(true) | None => FileState::Whole,
        })
    }

    /// Removes the log's file and the files beside it. Processes that have it open keep it; the next
    /// broker creates a new one.
    ///
    /// # Errors
    /// If one of them cannot be removed.
    pub fn remove_files(&self) -> io::Result<()> {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        lock.as_ref().map_or(Ok(()), WriterLock::remove_files)
    }

    /// The progress of each stream, by session and stream: the sequence number after its newest batch
    /// in the index. Streams whose batches have all left the index are missing.
    #[must_use]
    pub fn streams(&self) -> HashMap<(u64, u32), u64> {
        let ring = self.ring();
        let frontier = ring.frontier();
        let mut streams = HashMap::new();
        for index in frontier.saturating_sub(self.mapping.geometry.index_slots())..frontier {
            if let Found::Published(d, _) = ring.slot(index).read(index) {
                let next = streams.entry((d.session, d.stream)).or_insert(0);
                *next = d.batch_seq.saturating_add(1).max(*next);
            }
        }
        streams
    }

    /// Whether the log waits for registered readers when it is full.
    pub(super) fn waits_for_readers(&self) -> bool {
        self.registry.is_some()
    }

    /// Registered readers that the writers wait for, and the payload that the slowest of them has
    /// not read yet, bytes.
    #[must_use]
    pub fn backlog(&self) -> (usize, u64) {
        self.ring().backlog()
    }

    /// Names the thread that waits for batches; [`Self::wake_on_commit`] has it woken. The first call counts.
    pub fn set_waker(&self, waker: Waker) {
        self.watch.set(waker);
    }

    /// Has the thread of [`Self::set_waker`] woken by the next commit. It must look for batches once more before it
    /// sleeps: one may have been committed before this call.
    pub fn wake_on_commit(&self) {
        self.watch.arm();
    }

    /// Frees the slots of dead registered readers; returns how many.
    ///
    /// # Errors
    /// If the registry's locks cannot be queried.
    pub fn sweep_readers(&self) -> io::Result<usize> {
        self.registry.as_ref().map_or(Ok(0), Registry::sweep)
    }

    /// Registered readers that the writers wait for.
    ///
    /// # Errors
    /// If the registry cannot be read.
    pub fn readers(&self) -> io::Result<Vec<ReaderInfo>> {
        let Some(registry) = &self.registry else {
            return Ok(Vec::new());
        };
        let ring = self.ring();
        let readers = registry.readers()?.into_iter().map(|reader| {
            let (unread_batches, unread_bytes, holds_up) = ring.lag_of(reader.cursor);
            ReaderInfo {
                slot: reader.slot,
                process: reader.process,
                cursor: reader.cursor,
                unread_batches,
                unread_bytes,
                holds_up,
            }
        });
        Ok(readers.collect())
    }

    /// Stops waiting for a reader and leaves it a notice for its next read. Returns `false`, and keeps
    /// waiting, if the reader may still use bytes in place that it borrowed from an earlier broker.
    ///
    /// # Errors
    /// If the notice cannot be written; the reader is evicted all the same.
    pub fn evict_reader(&self, reader: &ReaderInfo) -> io::Result<bool> {
        let Some(registry) = &self.registry else {
            return Ok(false);
        };
        if self.borrowed.contains(&(reader.slot, reader.cursor)) {
            return Ok(false);
        }
        let epoch = self.mapping.epoch().load(Ordering::Relaxed);
        registry.evict(reader.slot, epoch).map(|()| true)
    }

    /// Marks the log as unusable, so that its streams end. Only the first call counts. Another log may be
    /// created in its place at once: a file that was truncated is renamed to `<topic>.log.lost`.
    pub fn set_lost(&self, lost: Lost) {
        let mut lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let has_left = lock.as_ref().is_some_and(|lock| {
            self.leave_name(lock).unwrap_or_else(|error| {
                tracing::warn!(log = %self.path().display(), %error, "cannot rename a truncated log");
                false
            })
        });
        if has_left {
            drop(lock.take());
        }
        drop(lock);
        // Keep the first reason.
        let _ = self.lost.set(lost);
    }

    /// Leaves the log's name to another file; returns whether another log may have it.
    fn leave_name(&self, lock: &WriterLock) -> io::Result<bool> {
        match self.check_file()? {
            FileState::Whole => Ok(false),
            FileState::Gone => Ok(true),
            FileState::Resized { .. } => {
                // The program that truncated it may have put another file there.
                if lock.has_log(&self.mapping.file)? {
                    lock.move_log_aside()?;
                }
                Ok(true)
            }
        }
    }

    /// Why the log can no longer be used, if so.
    #[must_use]
    pub fn lost(&self) -> Option<&Lost> {
        self.lost.get()
    }

    pub(super) fn watermark(&self, writer: usize) -> &WriterWatermark {
        &self.watermarks[writer]
    }

    pub(super) fn ring(&self) -> Ring<'_> {
        Ring {
            readers: self.registry.as_ref().map(|registry| registry as _),
            watermarks: &self.watermarks,
            ..self.mapping.ring()
        }
    }

    pub(super) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    pub(super) fn payload(&self, position: u64) -> *mut u8 {
        self.mapping.payload_at(position)
    }
}
