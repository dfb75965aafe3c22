//! Files of a log: made whole or not at all, with their blocks allocated.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use penstock_files::{Dir, Open};

use super::OpenError;
use super::layout::Geometry;
use super::sync::crash_point;
use super::writer_lock::beside;

/// Creates the file under a temporary name and renames it into place, so that no crash leaves half a
/// log. The temporary name is always the same, so that a file left by a crash is reused.
pub(super) fn make(dir: &Dir, path: &Path, name: &OsStr, geometry: Geometry) -> io::Result<File> {
    let temporary = beside(path, "new");
    make_as(dir, &temporary, name, geometry).inspect_err(|_| {
        // Best effort: a file that could not be created may be missing here.
        let _ = dir.remove(&temporary);
    })
}

pub(super) fn make_as(
    dir: &Dir,
    temporary: &OsStr,
    name: &OsStr,
    geometry: Geometry,
) -> io::Result<File> {
    use std::os::unix::fs::FileExt;
    let file = dir.file(temporary, Open::Make(0o600))?;
    crash_point();
    file.set_len(0)?;
    crash_point();
    allocate(&file, geometry.file_bytes())?;
    crash_point();
    file.write_all_at(&geometry.encode(), 0)?;
    crash_point();
    dir.rename(temporary, name)?;
    crash_point();
    Ok(file)
}

/// Reports lack of space; EFAULT means a page that the kernel cannot create
/// (madvise(2)).
pub(super) fn no_space(
    path: &Path,
    geometry: Geometry,
    action: &'static str,
    source: io::Error,
) -> OpenError {
    match source.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::ENOMEM | libc::EFAULT) => OpenError::NoSpace {
            path: path.to_owned(),
            bytes: geometry.file_bytes(),
        },
        _ => OpenError::io(action, path)(source),
    }
}

/// Allocates the whole file on its file system; keeps its contents.
pub(super) fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open; posix_fallocate touches no memory of ours.
        match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as i64) } {
            0 => return Ok(()),
            libc::EINTR => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}
