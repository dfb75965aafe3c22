//! Opens single files: never through a link, and only regular files.

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
    /// To read an existing file.
    Read,
    /// To read and write an existing file.
    Write,
    /// To read and write; a missing file is created with this mode, an existing one keeps its contents.
    Make(u32),
    /// To read and write a new file, created with this mode.
    New(u32),
}

/// Requirements on a file.
pub(crate) struct Rules<'a> {
    /// Accepted owners besides this user.
    owners: &'a [u32],
    /// Requires that it has one name only: another user may have made a second one as a hard link.
    one_link: bool,
}

impl Rules<'_> {
    /// Only files of this user.
    pub(crate) const OWN: Self = Self {
        owners: &[],
        one_link: true,
    };

    fn check(&self, about: &FileStat) -> io::Result<()> {
        if file_type(about) != SFlag::S_IFREG {
            return refuse(format!("it is {}, not a regular file", describe(about)));
        }
        let me = geteuid().as_raw();
        if about.st_uid != me && !self.owners.contains(&about.st_uid) {
            let (owner, me) = (user_name(about.st_uid), user_name(me));
            return refuse(match self.one_link {
                true => format!("it is {owner}'s, not {me}'s: remove it, or choose another one"),
                false => format!("it is {owner}'s, who could change it, not {me}'s: chown {me} it"),
            });
        }
        if self.one_link && about.st_nlink > 1 {
            return refuse(format!(
                "it has {} names (hard links), and writing to it would change them all: remove it, or choose another one",
                about.st_nlink
            ));
        }
        Ok(())
    }
}

/// Opens a file that a user named, for writing: a report, for instance. Keeps its contents.
///
/// # Errors
/// If it is a link, not a regular file, another user's, or has another name as well.
pub fn open_to_write(path: &Path, mode: u32) -> io::Result<File> {
    let owners: &[u32] = &[0];
    let rules = Rules {
        owners,
        one_link: true,
    };
    open_at(path, Open::Make(mode), &rules)
}

/// Opens a file whose contents are security-relevant, such as keys. It must belong to this user, to
/// root, or to one of `owners`.
///
/// # Errors
/// If it is missing, not a regular file, another user's, or reached through a link that others made.
pub fn open_to_read(path: &Path, owners: &[u32]) -> io::Result<File> {
    let mut all = vec![0];
    all.extend(owners);
    let rules = Rules {
        owners: &all,
        one_link: false,
    };
    // Services receive files through links (Kubernetes secrets), so links made by root are followed.
    let (dir, name) = walk::directory_of_file(path)?;
    open_in(dir.as_fd(), &name, Open::Read, &rules)
}

/// Opens a regular file for reading, whoever owns it, without blocking.
///
/// # Errors
/// If it is missing or not a regular file.
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
    // A name with a slash would be a path, and only its last component is protected by O_NOFOLLOW.
    if Path::new(name).components().count() != 1 || Path::new(name).file_name() != Some(name) {
        return Err(Errno::EINVAL.into());
    }
    let (access, mode) = match open {
        Open::Read => (OFlag::O_RDONLY, 0),
        Open::Write => (OFlag::O_RDWR, 0),
        Open::Make(mode) => (OFlag::O_RDWR | OFlag::O_CREAT, mode),
        Open::New(mode) => (OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL, mode),
    };
    // Non-blocking: opening a FIFO would wait for its other end.
    let flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = match openat(dir, name, flags, Mode::from_bits_truncate(mode)) {
        Err(Errno::ELOOP) => {
            return refuse(
                "it is a symbolic link, which is not followed: remove it, or choose another one"
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
