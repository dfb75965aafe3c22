//! Advisory locks that end with their holder, also when it is killed: open-file-description locks
//! (fcntl_locking(2), `F_OFD_SETLK`). They need no process numbers, so they hold across namespaces.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Takes an exclusive lock on one byte; `false` if another open file holds it.
pub(super) fn try_lock(file: &File, byte: u64) -> io::Result<bool> {
    match control(file, libc::F_OFD_SETLK, &mut request(libc::F_WRLCK, byte)) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// Releases the lock now: close(2) does not release it while a child that has not called execve(2) yet shares
/// the open file.
pub(super) fn unlock(file: &File, byte: u64) -> io::Result<()> {
    control(file, libc::F_OFD_SETLK, &mut request(libc::F_UNLCK, byte))
}

/// Whether another open file holds a lock on the byte.
pub(super) fn is_locked(file: &File, byte: u64) -> io::Result<bool> {
    let mut lock = request(libc::F_RDLCK, byte);
    control(file, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn request(kind: i32, byte: u64) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte as i64,
        l_len: 1,
        l_pid: 0,
    }
}

fn control(file: &File, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: the descriptor is open for as long as `file` is borrowed, and fcntl reads and writes
    // only the one flock that the exclusive borrow covers.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, lock) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}
