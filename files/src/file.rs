//! One file: never through a link, never anything but a regular file.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::geteuid;

use crate::walk::{self, Care, file_type};
use crate::{refuse, user_name};

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Open {
    /// To read what is there.
    Read,
    /// To read and write what is there.
    Write,
    /// To read and write; a missing file is made with this mode. What is in it stays.
    Make(u32),
    /// To read and write a file that was not there before, with this mode.
    New(u32),
}

/// What a file must be.
pub(crate) struct Rules<'a> {
    /// Owners that are right besides this user.
    owners: &'a [u32],
    /// With one name only: another one may be a hard link that somebody else made.
    one_link: bool,
}

impl Rules<'_> {
    /// This user's alone.
    pub(crate) const OWN: Self = Self {
        owners: &[],
        one_link: true,
    };

    fn check(&self, about: &FileStat) -> io::Result<()> {
        if file_type(about) != SFlag::S_IFREG {
            return refuse(format!("it is {}, not a file", describe(about)));
        }
        let me = geteuid().as_raw();
        if about.st_uid != me && !self.owners.contains(&about.st_uid) {
            let (owner, me) = (user_name(about.st_uid), user_name(me));
            return refuse(match self.one_link {
                true => format!("it is {owner}'s, not {me}'s: remove it, or name another one"),
                false => format!("it is {owner}'s, who could change it, not {me}'s: chown {me} it"),
            });
        }
        if self.one_link && about.st_nlink > 1 {
            return refuse(format!(
                "it has {} names (hard links), and writing to it would change them all: remove it, or name another one",
                about.st_nlink
            ));
        }
        Ok(())
    }
}

/// Opens a file that a user named, to write to it: a report, for instance. What is in it stays.
///
/// # Errors
/// If it is a link, no regular file, another user's, or known by another name as well.
pub fn open_to_write(path: &Path, mode: u32) -> io::Result<File> {
    let owners: &[u32] = &[0];
    let rules = Rules {
        owners,
        one_link: true,
    };
    open_at(path, Open::Make(mode), &rules)
}

/// Opens a file to read what decides something, such as keys. It must be this user's, root's, or of one
/// of `owners`.
///
/// # Errors
/// If it is missing, a link that others made leads to it, it is no regular file, or of somebody else.
pub fn open_to_read(path: &Path, owners: &[u32]) -> io::Result<File> {
    let mut all = vec![0];
    all.extend(owners);
    let rules = Rules {
        owners: &all,
        one_link: false,
    };
    // Services are given files by way of links (Kubernetes' secrets): those of root are followed.
    let (dir, name) = walk::directory_of_file(path)?;
    open_in(dir.as_fd(), &name, Open::Read, &rules)
}

/// Opens a regular file to read it, whoever's it is, without waiting for anything.
///
/// # Errors
/// If it is missing or anything else.
pub fn open_regular(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let mut options = File::options();
    let file = options.read(true).custom_flags(flags.bits()).open(path)?;
    let about = fstat(&file)?;
    match file_type(&about) {
        SFlag::S_IFREG => Ok(file),
        _ => refuse(format!("it is {}, not a file", describe(&about))),
    }
}

fn open_at(path: &Path, open: Open, rules: &Rules<'_>) -> io::Result<File> {
    let Some(Component::Normal(name)) = path.components().next_back() else {
        return Err(Errno::EISDIR.into());
    };
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let dir = walk::directory(parent, Care::Links, None)?;
    open_in(dir.as_fd(), name, open, rules)
}

pub(crate) fn open_in(
    dir: BorrowedFd<'_>,
    name: &OsStr,
    open: Open,
    rules: &Rules<'_>,
) -> io::Result<File> {
    // A name with a slash would be a path, of which only the end is not followed.
    if Path::new(name).components().count() != 1 || Path::new(name).file_name() != Some(name) {
        return Err(Errno::EINVAL.into());
    }
    let (access, mode) = match open {
        Open::Read => (OFlag::O_RDONLY, 0),
        Open::Write => (OFlag::O_RDWR, 0),
        Open::Make(mode) => (OFlag::O_RDWR | OFlag::O_CREAT, mode),
        Open::New(mode) => (OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL, mode),
    };
    // Not blocking: a FIFO would wait for its other end.
    let flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = match openat(dir, name, flags, Mode::from_bits_truncate(mode)) {
        Err(Errno::ELOOP) => {
            return refuse(
                "it is a symbolic link, which is not followed: remove it, or name another one"
                    .to_owned(),
            );
        }
        opened => opened?,
    };
    rules.check(&fstat(&file)?)?;
    Ok(file.into())
}

fn describe(about: &FileStat) -> &'static str {
    match file_type(about) {
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFIFO => "a FIFO",
        SFlag::S_IFSOCK => "a socket",
        SFlag::S_IFCHR | SFlag::S_IFBLK => "a device",
        _ => "something else",
    }
}
