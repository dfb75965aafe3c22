//! Walks from the root directory to a path, one component at a time.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fchmod, fstat, mkdirat};
use nix::unistd::{Group, User, fchownat, geteuid};

use crate::trust::{Trusted, is_trusted};
use crate::{NewDir, refuse, user_name};

/// Maximum number of links on one path, as in the kernel.
const MAX_LINKS: u32 = 40;
const STICKY: u32 = 0o1000;

/// Requirements on the directories on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Care {
    /// No other user can replace any of them, or anything in the last one.
    Verified,
    /// Links made by others are not followed.
    Links,
}

/// Opens the directory at `path`; creates missing ones if `new` says how.
pub(crate) fn directory(path: &Path, care: Care, new: Option<&NewDir>) -> io::Result<OwnedFd> {
    resolve(path, care, new, &Trusted::default()).map(|(dir, _)| dir)
}

/// As [`directory`], with others who are trusted too; also returns the path without links.
pub(crate) fn resolve(
    path: &Path,
    care: Care,
    new: Option<&NewDir>,
    trusted: &Trusted,
) -> io::Result<(OwnedFd, PathBuf)> {
    let mut walk = Walk::new(path, care, trusted)?;
    walk.other_owner = new.and_then(|new| new.owner);
    while let Some(name) = walk.rest.pop() {
        let last = walk.rest.is_empty();
        walk.step(&name, last, new)?;
    }
    if care == Care::Verified {
        walk.verify(true)?;
    }
    Ok((walk.dir, walk.at))
}

/// The directory of the file at `path`, and the file's name there. Links at the end are followed as those
/// on the way are. Each is looked up once: its owner is checked and its target read through one
/// descriptor, so no user can replace the link in between.
pub(crate) fn directory_of_file(path: &Path) -> io::Result<(OwnedFd, OsString)> {
    let trusted = Trusted::default();
    let mut walk = Walk::new(path, Care::Links, &trusted)?;
    while let Some(name) = walk.rest.pop() {
        if !walk.rest.is_empty() {
            walk.step(&name, false, None)?;
            continue;
        }
        if name == ".." {
            break;
        }
        let there = peek(&walk.dir, &name)?;
        let about = fstat(&there)?;
        if file_type(&about) != SFlag::S_IFLNK {
            return Ok((walk.dir, name));
        }
        walk.follow(&name, &there, &about)?;
    }
    Err(Errno::EISDIR.into())
}

struct Walk<'a> {
    care: Care,
    trusted: &'a Trusted,
    dir: OwnedFd,
    /// Path of `dir`, for messages.
    at: PathBuf,
    /// Components still to come, the next one last.
    rest: Vec<OsString>,
    links: u32,
    /// Accepted owner of the last directory, besides this user and root.
    other_owner: Option<u32>,
    /// Owner of the root directory, which every path depends on. Not always 0: in a user namespace the
    /// host's root has no number.
    root_owner: u32,
}

impl<'a> Walk<'a> {
    fn new(path: &Path, care: Care, trusted: &'a Trusted) -> io::Result<Self> {
        let dir = open_root()?;
        let root_owner = fstat(&dir)?.st_uid;
        let mut walk = Self {
            care,
            trusted,
            dir,
            at: PathBuf::from("/"),
            rest: Vec::new(),
            links: 0,
            other_owner: None,
            root_owner,
        };
        walk.push(&std::path::absolute(path)?);
        Ok(walk)
    }

    fn push(&mut self, path: &Path) {
        for component in path.components().rev() {
            if let Component::Normal(_) | Component::ParentDir = component {
                self.rest.push(component.as_os_str().to_owned());
            }
        }
    }

    fn step(&mut self, name: &OsStr, last: bool, new: Option<&NewDir>) -> io::Result<()> {
        if self.care == Care::Verified {
            self.verify(false)?;
        }
        let there = match peek(&self.dir, name) {
            Err(Errno::ENOENT) if new.is_some() => {
                let parents = NewDir::parent();
                make(&self.dir, name, new.filter(|_| last).unwrap_or(&parents))
            }
            opened => opened.map_err(io::Error::from),
        };
        let there = there.map_err(|error| self.about(name, error))?;
        let about = fstat(&there)?;
        match file_type(&about) {
            SFlag::S_IFLNK => self.follow(name, &there, &about),
            SFlag::S_IFDIR => {
                match name == ".." {
                    true => drop(self.at.pop()),
                    false => self.at.push(name),
                }
                self.dir = there;
                Ok(())
            }
            _ => Err(self.about(name, Errno::ENOTDIR.into())),
        }
    }

    fn follow(&mut self, name: &OsStr, link: &OwnedFd, about: &FileStat) -> io::Result<()> {
        if !self.is_trusted(about.st_uid) {
            return refuse(format!(
                "{} is a symbolic link that {} made, which is not followed: give the path that it leads to",
                self.at.join(name).display(),
                user_name(about.st_uid)
            ));
        }
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(self.about(name, Errno::ELOOP.into()));
        }
        let target = PathBuf::from(readlinkat(link, "")?);
        if target.is_absolute() {
            self.dir = open_root()?;
            self.at = PathBuf::from("/");
        }
        self.push(&target);
        Ok(())
    }

    /// Checks that no other user can replace what is in `dir`. In a directory with the sticky bit, all
    /// users may create files, but not replace those of others. `last` is the directory for our own
    /// files.
    fn verify(&self, last: bool) -> io::Result<()> {
        let about = fstat(&self.dir)?;
        let (owner, mode) = (about.st_uid, about.st_mode);
        let trusted = match last {
            true => self.trusted.has_user(owner) || self.other_owner == Some(owner),
            false => self.is_trusted(owner),
        };
        let path = self.at.display();
        if !trusted {
            let (owner, me) = (user_name(owner), user_name(geteuid().as_raw()));
            return refuse(format!(
                "{path} belongs to {owner}, who could replace the files of {me} there: remove it, or choose another directory"
            ));
        }
        let by_group = mode & 0o020 != 0
            && !self.trusted.has_group(about.st_gid)
            && !is_private_group(owner, about.st_gid);
        if mode & STICKY == 0 && (by_group || mode & 0o002 != 0) {
            return refuse(format!(
                "{path} has mode {:03o}, so other users could replace the files there: chmod go-w {path}, or choose another directory",
                mode & 0o7777
            ));
        }
        Ok(())
    }

    fn is_trusted(&self, uid: u32) -> bool {
        self.trusted.has_user(uid) || uid == self.root_owner
    }

    fn about(&self, name: &OsStr, error: io::Error) -> io::Error {
        // Keeps the error's kind and number for callers.
        match self.rest.is_empty() {
            true => error,
            false => io::Error::new(
                error.kind(),
                format!("{}: {error}", self.at.join(name).display()),
            ),
        }
    }
}

/// Whether a group contains only its user, as distributions create one for each user: then the group's
/// write permission gives no other user access. Root's group counts as root.
fn is_private_group(owner: u32, gid: u32) -> bool {
    if gid == 0 {
        return true;
    }
    let (Ok(Some(user)), Ok(Some(group))) =
        (User::from_uid(owner.into()), Group::from_gid(gid.into()))
    else {
        return false;
    };
    user.name == group.name && group.mem.iter().all(|member| *member == user.name)
}

fn open_root() -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open("/", flags, Mode::empty())
}

/// Opens the entry of this name without side effects.
pub(crate) fn peek(dir: &OwnedFd, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(dir, name, flags, Mode::empty())
}

/// Creates a directory with exactly this mode, whatever the umask is.
pub(crate) fn make(dir: &OwnedFd, name: &OsStr, new: &NewDir) -> io::Result<OwnedFd> {
    match mkdirat(dir, name, Mode::S_IRWXU) {
        // Another process was faster; what it created is checked like any existing directory.
        Err(Errno::EEXIST) => return Ok(peek(dir, name)?),
        made => made?,
    }
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let made = openat(dir, name, flags, Mode::empty())?;
    if !is_trusted(fstat(&made)?.st_uid) {
        return refuse("another user replaced it while it was being created".to_owned());
    }
    if new.owner.is_some() || new.group.is_some() {
        let (uid, gid) = (new.owner.map(Into::into), new.group.map(Into::into));
        fchownat(made.as_fd(), "", uid, gid, AtFlags::AT_EMPTY_PATH)?;
    }
    fchmod(&made, Mode::from_bits_truncate(new.mode))?;
    Ok(made)
}

pub(crate) fn file_type(about: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(about.st_mode & SFlag::S_IFMT.bits())
}
