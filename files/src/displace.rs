//! A directory with a well-known name, in a place where every user can create files.
//!
//! In /dev/shm any user can take the name that root's broker uses, and the sticky bit keeps that user's
//! directory from everyone but root. Root renames it, unless a running program holds a lock on a file in
//! it, and deletes nothing.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, RenameFlags, ResolveFlag, openat2, renameat2};
use nix::sys::stat::{FileStat, SFlag, fstat, fstatat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

use crate::trust::is_trusted;
use crate::walk::{self, Care, file_type};
use crate::{NewDir, refuse, user_name};

/// Maximum number of files in another user's directory that are compared with the locks.
const MAX_FILES: usize = 65_536;
/// Maximum number of new names that are tried.
const MAX_NAMES: u32 = 1024;
/// Users below this number are services (login.defs(5), `UID_MIN`). Their directories exist on purpose: a
/// broker that runs as `penstock`, for instance, keeps its logs there while it is stopped.
const FIRST_PERSON: u32 = 1000;

/// What had the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Displaced {
    /// Its owner.
    pub owner: String,
    /// Its new path.
    pub path: PathBuf,
}

/// If another user took the name `path` first, root puts a new directory there and renames what that user
/// made, both in one step. Otherwise this does nothing: call [`Dir::make`](crate::Dir::make) next.
///
/// # Errors
/// If the other user's directory is in use, or cannot be renamed.
pub fn displace(path: &Path, new: &NewDir) -> io::Result<Option<Displaced>> {
    if !geteuid().is_root() {
        return Ok(None);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok(None);
    };
    // If the parent is missing or not safe, `Dir::make` reports it.
    let Ok(place) = walk::directory(parent, Care::Verified, None) else {
        return Ok(None);
    };
    let Some(there) = strangers(&place, name, new)? else {
        return Ok(None);
    };
    let owner = user_name(there.st_uid);
    let shown = path.display();
    if file_type(&there) == SFlag::S_IFDIR && is_in_use(&place, name)? {
        return refuse(format!(
            "{shown} belongs to {owner}, and a running program has locked files there: end it (fuser -v {shown}/*.lock shows which it is), or choose another directory"
        ));
    }
    match swap(&place, name, new, there.st_uid) {
        Ok(None) => Ok(None),
        Ok(Some(aside)) => Ok(Some(Displaced {
            owner,
            path: parent.join(aside),
        })),
        Err(error) => Err(io::Error::new(
            error.kind(),
            format!(
                "{shown} belongs to {owner} and cannot be renamed ({error}): mv -nT {shown} {shown}.{}, or choose another directory",
                there.st_uid
            ),
        )),
    }
}

/// What has the name, if it belongs to another person.
fn strangers(place: &OwnedFd, name: &OsStr, new: &NewDir) -> io::Result<Option<FileStat>> {
    match fstatat(place, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
        Err(Errno::ENOENT) => Ok(None),
        Err(error) => Err(error.into()),
        Ok(about) => Ok(is_strangers(&about, new).then_some(about)),
    }
}

fn is_strangers(about: &FileStat, new: &NewDir) -> bool {
    let owner = about.st_uid;
    !is_trusted(owner) && owner >= FIRST_PERSON && new.owner != Some(owner)
}

/// Exchanges what `owner` made for a new directory and returns its new name; none if it no longer exists.
fn swap(place: &OwnedFd, name: &OsStr, new: &NewDir, owner: u32) -> io::Result<Option<OsString>> {
    let aside = make_beside(place, name, new, owner)?;
    let remove = || unlinkat(place, &*aside, UnlinkatFlags::RemoveDir);
    // In one step: otherwise the other user could take the name again in between.
    match renameat2(place, &*aside, place, name, RenameFlags::RENAME_EXCHANGE) {
        Ok(()) => {}
        Err(error) => {
            remove()?;
            return match error {
                Errno::ENOENT => Ok(None),
                error => Err(error.into()),
            };
        }
    }
    // Another broker of root may have done the same a moment ago: give it its directory back.
    match fstatat(place, &*aside, AtFlags::AT_SYMLINK_NOFOLLOW) {
        // Its owner has already moved or removed it.
        Err(Errno::ENOENT) => Ok(Some(aside)),
        Err(error) => Err(error.into()),
        Ok(about) if is_strangers(&about, new) => Ok(Some(aside)),
        Ok(_) => {
            renameat2(place, &*aside, place, name, RenameFlags::RENAME_EXCHANGE)?;
            remove()?;
            Ok(None)
        }
    }
}

/// Makes the new directory under a free name.
fn make_beside(place: &OwnedFd, name: &OsStr, new: &NewDir, owner: u32) -> io::Result<OsString> {
    for number in 1..=MAX_NAMES {
        let mut aside = name.to_owned();
        aside.push(format!(".of-{owner}-{number}"));
        match fstatat(place, &*aside, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(_) => {}
            Err(Errno::ENOENT) => {
                let made = fstat(&walk::make(place, &aside, new)?)?.st_uid;
                if is_trusted(made) || new.owner == Some(made) {
                    return Ok(aside);
                }
                // Another user made it meanwhile.
            }
            Err(error) => return Err(error.into()),
        }
    }
    refuse(format!("{MAX_NAMES} other names are taken as well"))
}

/// Whether a running program holds a lock on a file in the directory, as every broker does.
fn is_in_use(place: &OwnedFd, name: &OsStr) -> io::Result<bool> {
    // A file system that another user mounted there may never answer.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_NO_XDEV | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let dir = match openat2(place, name, how) {
        Err(Errno::EXDEV) => {
            return refuse("another user's file system is mounted there: umount it".to_owned());
        }
        opened => opened?,
    };
    let device = fstat(&dir)?.st_dev;
    let entries = fs::read_dir(format!("/proc/self/fd/{}", dir.as_raw_fd()))?;
    let mut files = HashSet::new();
    for entry in entries.take(MAX_FILES) {
        match entry?.metadata() {
            Ok(about) if about.is_file() => drop(files.insert(about.ino())),
            _ => {}
        }
    }
    let locks = BufReader::new(fs::File::open("/proc/locks")?);
    for line in locks.lines() {
        if locked_file(&line?).is_some_and(|(on, inode)| on == device && files.contains(&inode)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Device and inode in a line of /proc/locks, such as `1: OFDLCK ADVISORY  WRITE -1 00:1b:2063 0 0`.
fn locked_file(line: &str) -> Option<(u64, u64)> {
    let mut parts = line
        .split_whitespace()
        .find(|word| word.matches(':').count() == 2)?
        .split(':');
    let mut hexadecimal = || u64::from_str_radix(parts.next()?, 16).ok();
    let device = nix::sys::stat::makedev(hexadecimal()?, hexadecimal()?);
    Some((device, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locked_files_are_told_by_device_and_inode() {
        let device = nix::sys::stat::makedev;
        for (line, wanted) in [
            (
                "1: OFDLCK ADVISORY  WRITE -1 00:1b:2063 0 0",
                Some((device(0, 0x1b), 2063)),
            ),
            (
                "2: FLOCK  ADVISORY  WRITE 7 fe:01:9 0 EOF",
                Some((device(0xfe, 1), 9)),
            ),
            (
                "3: -> POSIX  ADVISORY  READ 7 fe:01:9 0 EOF",
                Some((device(0xfe, 1), 9)),
            ),
            ("4: LEASE  ACTIVE    READ", None),
            ("", None),
        ] {
            assert_eq!(locked_file(line), wanted, "{line}");
        }
    }
}
