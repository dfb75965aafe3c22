//! One broker writes a log, and readers can tell whether one does.
//!
//! Two files beside the log. A lock on the log itself would do neither: who may read it could hold a
//! lock that keeps the next broker out.
//! - `<topic>.lock` is the broker's alone, and whoever locks it is the only writer. Its text is the
//!   number of that process.
//! - `<topic>.writer` can be opened by whoever may read the log, and is locked while a broker has it.
//!   Each broker makes it anew and locks it before others can open it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use penstock_files::{Dir, Open};

use super::access::Access;
use super::{OpenError, lock};

/// Byte of either file that is locked.
const BYTE: u64 = 0;
/// Longest text of the lock file that is read, bytes.
const MAX_TEXT: usize = 20;

/// This process's hold on a log, in its directory.
#[derive(Debug)]
pub(super) struct WriterLock {
    pub(super) dir: Dir,
    log: PathBuf,
    lock: File,
    shown: Option<File>,
}

impl WriterLock {
    /// Takes the log at `log`, which need not be there yet.
    pub(super) fn take(dir: Dir, log: &Path) -> Result<Self, OpenError> {
        let name = beside(log, "lock");
        let file = dir.file(&name, Open::Make(0o600));
        let lock = file.map_err(OpenError::io("open for writing", log))?;
        let io = OpenError::io("lock", log);
        // Who has removed an empty log held the lock of a file that is not there any more.
        if !lock::try_lock(&lock, BYTE).map_err(&io)? || !dir.has(&name, &lock).map_err(&io)? {
            return Err(OpenError::Locked {
                path: log.to_owned(),
                holder: holder(&lock),
            });
        }
        // Best effort: it is for people, and a full file system may have no room for it.
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

    /// Shows those who may read the log that it has a writer.
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
    /// Removes the log and what lies beside it; who has it open keeps it.
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
        // child that is about to execute another program has them too.
        if let Some(shown) = &self.shown {
            // Once the files are removed, the name may be that of the next broker's file.
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

/// Name of the file beside a log.
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
        None => "its process is not known".to_owned(),
    }
}

#[cfg(test)]
impl WriterLock {
    /// As a child has the open file between fork and exec.
    pub(super) fn share(&self) -> File {
        self.lock.try_clone().expect("a free descriptor")
    }
}
