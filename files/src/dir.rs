//! A directory that nobody else can write to.

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

/// How a directory is made, if it is missing.
#[derive(Debug, Clone, Copy)]
pub struct NewDir {
    /// Its mode, whatever the umask is.
    pub mode: u32,
    /// Its owner, if it is to be another one than who makes it.
    pub owner: Option<u32>,
    /// Its group, likewise.
    pub group: Option<u32>,
}

impl NewDir {
    /// A directory on the way to the one that is wanted.
    pub(crate) fn parent() -> Self {
        Self {
            mode: 0o755,
            owner: None,
            group: None,
        }
    }
}

/// An open directory. Unless it was opened as a shared one, it belongs to this user or root, and nobody
/// else can replace anything in it: neither by writing to it, nor by writing to one of its parents.
#[derive(Debug)]
pub struct Dir(OwnedFd);

impl Dir {
    /// Opens the directory at `path`.
    ///
    /// # Errors
    /// If it is missing or somebody else could replace what is in it.
    pub fn open(path: &Path) -> io::Result<Self> {
        walk::directory(path, Care::Verified, None).map(Self)
    }

    /// Opens the directory at `path`, which others may write to: links that they made are not followed,
    /// and files are looked at one by one, but they may be removed.
    ///
    /// # Errors
    /// If it is missing, or others' links lead to it.
    pub fn open_shared(path: &Path) -> io::Result<Self> {
        walk::directory(path, Care::Links, None).map(Self)
    }

    /// Opens the directory at `path`, or makes it, and its parents with mode 755.
    ///
    /// # Errors
    /// As [`Self::open`], or if it cannot be made.
    pub fn make(path: &Path, new: &NewDir) -> io::Result<Self> {
        walk::directory(path, Care::Verified, Some(new)).map(Self)
    }

    /// As [`Self::make`], where `trusted` may own and change directories on the way and this one as well.
    /// Also returns the path without links, which nobody but them can redirect.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_for(path: &Path, new: &NewDir, trusted: &Trusted) -> io::Result<(Self, PathBuf)> {
        let (dir, path) = walk::resolve(path, Care::Verified, Some(new), trusted)?;
        Ok((Self(dir), path))
    }

    /// Opens a regular file of this user's in the directory, which has no other name.
    ///
    /// # Errors
    /// If it is missing, or anything else.
    pub fn file(&self, name: &OsStr, open: Open) -> io::Result<File> {
        open_in(self.0.as_fd(), name, open, &Rules::OWN)
    }

    /// Whether anything has the name.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn contains(&self, name: &OsStr) -> io::Result<bool> {
        Ok(self.stat(name)?.is_some())
    }

    /// Whether an open file still has the name.
    ///
    /// # Errors
    /// If that cannot be told.
    pub fn has(&self, name: &OsStr, file: &File) -> io::Result<bool> {
        let ours = fstat(file)?;
        let there = self.stat(name)?;
        Ok(there.is_some_and(|there| (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)))
    }

    /// Removes a Unix socket of this user's or root's, if there is one of the name.
    ///
    /// # Errors
    /// If something else has the name, or it cannot be removed.
    pub fn remove_socket(&self, name: &OsStr) -> io::Result<()> {
        let Some(about) = self.stat(name)? else {
            return Ok(());
        };
        if walk::file_type(&about) != SFlag::S_IFSOCK || !is_trusted(about.st_uid) {
            let owner = user_name(about.st_uid);
            return refuse(format!(
                "something of {owner}'s that is no socket of ours has the name: remove it"
            ));
        }
        self.remove(name)
    }

    /// Gives a Unix socket of this user's another mode.
    ///
    /// # Errors
    /// If something else has the name.
    pub fn set_socket_mode(&self, name: &OsStr, mode: u32) -> io::Result<()> {
        let socket = walk::peek(&self.0, name)?;
        let about = fstat(&socket)?;
        if walk::file_type(&about) != SFlag::S_IFSOCK || about.st_uid != geteuid().as_raw() {
            return refuse("something that is no socket of ours took its place".to_owned());
        }
        // A socket cannot be opened, and its name may lead elsewhere by now.
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        fs::set_permissions(path, Permissions::from_mode(mode))
    }

    /// Removes a file.
    ///
    /// # Errors
    /// If it cannot be removed; one that is missing is no error.
    pub fn remove(&self, name: &OsStr) -> io::Result<()> {
        match unlinkat(&self.0, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives a file another name in the directory.
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
