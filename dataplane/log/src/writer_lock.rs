//! Ensures that only one broker writes a log, and lets readers detect whether one does.
//!
//! It uses two files beside the log. A lock on the log itself would not do: a process that may read the
//! log could hold a lock that keeps the next broker out.
//! - `<topic>.lock` is accessible to the broker only; the process that locks it is the only writer. Its
//!   text is the number of that process.
//! - `<topic>.writer` is readable by every user who may read the log, and locked while a broker has the log
//!   open. Each broker creates it anew and locks it before others can open it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use penstock_files::{Dir, Open};

use super::access::Access;
use super::{OpenError, lock};

/// Byte that is locked in either file.
const BYTE: u64 = 0;
/// Maximum number of bytes read from the lock file.
const MAX_TEXT: usize = 20;

/// This process's lock on a log, in its directory.
#[derive(Debug)]
pub(super) struct WriterLock {
    pub(super) dir: Dir,
    log: PathBuf,
    lock: File,
    shown: Option<File>,
}

impl WriterLock {
    /// Locks the log at `log`, which need not exist yet.
    pub(super) fn take(dir: Dir, log: &Path) -> Result<Self, OpenError> {
        let name = beside(log, "lock");
        let file = dir.file(&name, Open::Make(0o600));
        let lock = file.map_err(OpenError::io("open for writing", log))?;
        let io = OpenError::io("lock", log);
        // Another broker may have removed an empty log: then its lock was on a file that is gone.
        if !lock::try_lock(&lock, BYTE).map_err(&io)? || !dir.has(&name, &lock).map_err(&io)? {
            return Err(OpenError::Locked {
                path: log.to_owned(),
                holder: holder(&lock),
            });
        }
        // Best effort: the text is for people, and a full file system may have no space for it.
        let _ = lock
            .set_len(0)
            .and_then(|()| lock.write_all_at(std::process::id().to_string().as_bytes(), 0));
        Ok(Self {
            dir,
            log: log.to_owned(),
            lock,
            shown: None,
        })
    }

    /// Shows readers of the log that it has a writer.
    pub(super) fn show(&mut self, access: Access) -> Result<(), OpenError> {
        let name = beside(&self.log, "writer");
        let path = self.log.with_extension("writer");
        let io = |action| OpenError::io(action, &path);
        self.dir.remove(&name).map_err(io("remove"))?;
        let file = self.dir.file(&name, Open::New(0o600));
        let file = file.map_err(io("create"))?;
        lock::try_lock(&file, BYTE).map_err(io("lock"))?;
        access.apply_to_log(&path, &file)?;
        self.shown = Some(file);
        Ok(())
    }
}

impl WriterLock {
    /// Whether `file` still has the log's name.
    pub(super) fn has_log(&self, file: &File) -> io::Result<bool> {
        let log = self.log.file_name().unwrap_or_default();
        self.dir.has(log, file)
    }

    /// Gives the log a name that no topic has; an earlier log of that name goes.
    pub(super) fn move_log_aside(&self) -> io::Result<()> {
        let log = self.log.file_name().unwrap_or_default();
        self.dir.rename(log, &beside(&self.log, "log.lost"))
    }

    /// Removes the log and the files beside it; processes that have them open keep them.
    pub(super) fn remove_files(&self) -> io::Result<()> {
        let log = self.log.file_name().unwrap_or_default();
        self.dir.remove(log)?;
        for extension in ["readers", "writer", "lock"] {
            self.dir.remove(&beside(&self.log, extension))?;
        }
        Ok(())
    }
}

impl Drop for WriterLock {
    fn drop(&mut self) {
        // Best effort: the locks end with the open files at the latest. Closing is not enough while a
        // child that has not yet executed its program holds them as well.
        if let Some(shown) = &self.shown {
            // Once the files are removed, the next broker may already have created files with these
            // names.
            let name = beside(&self.log, "writer");
            if self.dir.has(&name, shown).unwrap_or(false) {
                let _ = self.dir.remove(&name);
            }
            let _ = lock::unlock(shown, BYTE);
        }
        let _ = lock::unlock(&self.lock, BYTE);
    }
}

/// Whether a broker has the log open.
pub(super) fn is_written(log: &Path) -> io::Result<bool> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY);
    match options.open(log.with_extension("writer")) {
        Ok(file) => lock::is_locked(&file, BYTE),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Path of a file beside a log.
pub(super) fn beside(log: &Path, extension: &str) -> OsString {
    let path = log.with_extension(extension);
    path.file_name().unwrap_or_default().to_owned()
}

fn holder(lock: &File) -> String {
    let mut text = [0; MAX_TEXT];
    let len = lock.read_at(&mut text, 0).unwrap_or(0);
    let number = std::str::from_utf8(&text[..len]).ok();
    match number.and_then(|number| number.parse::<u32>().ok()) {
        Some(process) => format!("process {process}"),
        None => "process unknown".to_owned(),
    }
}

#[cfg(test)]
impl WriterLock {
    /// Simulates a child that holds the open file between fork and exec.
    pub(super) fn share(&self) -> File {
        self.lock.try_clone().expect("a free descriptor")
    }
}
