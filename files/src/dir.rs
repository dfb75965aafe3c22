//! A directory that no other user can write to.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, renameat};
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use crate::file::{Open, Rules, open_in};
use crate::trust::{Trusted, is_trusted};
use crate::walk::{self, Care};
use crate::{refuse, user_name};

/// How to create a directory if it is missing.
#[derive(Debug, Clone, Copy)]
pub struct NewDir {
    /// Its mode, whatever the umask is.
    pub mode: u32,
    /// Its owner, if not the creator.
    pub owner: Option<u32>,
    /// Its group, if not the creator's.
    pub group: Option<u32>,
}

impl NewDir {
    /// How to create the parents of the requested directory.
    pub(crate) fn parent() -> Self {
        Self {
            mode: 0o755,
            owner: None,
            group: None,
        }
    }
}

/// An open directory. Unless it was opened as a shared one, it belongs to this user or root, and no
/// other user can replace anything in it, neither by writing to it nor by writing to one of its
/// parents.
#[derive(Debug)]
pub struct Dir(OwnedFd);

impl Dir {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// If it is missing, or another user could replace what is in it.
    pub fn open(path: &Path) -> io::Result<Self> {
        walk::directory(path, Care::Verified, None).map(Self)
    }

    /// Opens the directory at `path`, which others may write to. Links made by others are not followed,
    /// and each file is checked, but others may remove files.
    ///
    /// # Errors
    /// If it is missing, or the path contains links made by others.
    pub fn open_shared(path: &Path) -> io::Result<Self> {
        walk::directory(path, Care::Links, None).map(Self)
    }

    /// Opens the directory at `path`, or creates it, and its parents with mode 755.
    ///
    /// # Errors
    /// As [`Self::open`], or if it cannot be created.
    pub fn make(path: &Path, new: &NewDir) -> io::Result<Self> {
        walk::directory(path, Care::Verified, Some(new)).map(Self)
    }

    /// As [`Self::make`], but users in `trusted` may own and change directories on the path and this one.
    /// Also returns the path without links, which only they can redirect.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_for(path: &Path, new: &NewDir, trusted: &Trusted) -> io::Result<(Self, PathBuf)> {
        let (dir, path) = walk::resolve(path, Care::Verified, Some(new), trusted)?;
        Ok((Self(dir), path))
    }

    /// Opens a regular file of this user in the directory, with no other name.
    ///
    /// # Errors
    /// If it is missing, or not such a file.
    pub fn file(&self, name: &OsStr, open: Open) -> io::Result<File> {
        open_in(self.0.as_fd(), name, open, &Rules::OWN)
    }

    /// Whether an entry of this name exists.
    ///
    /// # Errors
    /// If that cannot be determined.
    pub fn contains(&self, name: &OsStr) -> io::Result<bool> {
        Ok(self.stat(name)?.is_some())
    }

    /// Whether an open file still has this name.
    ///
    /// # Errors
    /// If that cannot be determined.
    pub fn has(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let ours = fstat(file)?;
        let there = self.stat(name)?;
        Ok(there.is_some_and(|there| (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)))
    }

    /// Removes a Unix socket of this user or root, if there is one of this name.
    ///
    /// # Errors
    /// If the entry is not such a socket, or cannot be removed.
    pub fn remove_socket(&self, name: &OsStr) -> io::Result<()> {
        let Some(about) = self.stat(name)? else {
            return Ok(());
        };
        if walk::file_type(&about) != SFlag::S_IFSOCK || !is_trusted(about.st_uid) {
            let owner = user_name(about.st_uid);
            return refuse(format!(
                "an entry of this name belongs to {owner} and is no socket of ours: remove it"
            ));
        }
        self.remove(name)
    }

    /// Sets the mode of a Unix socket of this user.
    ///
    /// # Errors
    /// If the entry is not such a socket.
    pub fn set_socket_mode(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let socket = walk::peek(&self.0, name)?;
        let about = fstat(&socket)?;
        if walk::file_type(&about) != SFlag::S_IFSOCK || about.st_uid != geteuid().as_raw() {
            return refuse("an entry that is no socket of ours replaced it".to_owned());
        }
        // A socket cannot be opened with open(2), and its name may lead elsewhere by now.
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        fs::set_permissions(path, Permissions::from_mode(mode))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If it cannot be removed; a missing one is no error.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Renames a file within the directory.
    ///
    /// # Errors
    /// If it cannot be renamed.
    pub fn rename(&self, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(renameat(&self.0, from, &self.0, to)?)
    }

    fn stat(&self, name: &OsStr) -> io::Result<Option<FileStat>> {
        match fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(about) => Ok(Some(about)),
            Err(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
