//! Which users may read a log and register as readers.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::Path;

use penstock_files::Dir;

use super::OpenError;

/// Mode and group of a log and the files beside it.
///
/// Only the owner may write a log. Readers write their entries in the registry file, so each of them could
/// damage the entries of others: if the group may read the log, it may write that file, and no other user may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    mode: u32,
    group: Option<u32>,
    shared: bool,
}

impl Default for Access {
    /// The owner's group may read.
    fn default() -> Self {
        Self {
            mode: 0o640,
            group: None,
            shared: false,
        }
    }
}

impl Access {
    /// Access with this mode, and with this group if there is one.
    ///
    /// # Errors
    /// The rule that the mode violates: it lets others write, or the owner do less than read and write.
    pub fn new(mode: u32, group: Option<u32>) -> Result<Self, String> {
        if mode & !0o644 != 0 || mode & 0o600 != 0o600 {
            return Err(format!(
                "mode {mode:03o} is none of 600, 640, 604 and 644: others may read a log and not write it"
            ));
        }
        Ok(Self {
            mode,
            group,
            shared: false,
        })
    }

    /// Access for logs in a directory that other users can write to.
    #[must_use]
    pub fn in_shared_directory(self, shared: bool) -> Self {
        Self { shared, ..self }
    }

    /// Opens the directory of such logs.
    ///
    /// # Errors
    /// The owner of the directory, if other users could replace what is in it.
    pub fn open_directory(&self, path: &Path) -> io::Result<Dir> {
        match self.shared {
            true => Dir::open_shared(path),
            false => Dir::open(path),
        }
    }

    /// The group, if one was requested.
    #[must_use]
    pub fn group(&self) -> Option<u32> {
        self.group
    }

    /// Mode of a directory for such logs: those who may read the logs may also enter it.
    #[must_use]
    pub fn directory_mode(&self) -> u32 {
        let read = self.mode & 0o044;
        0o700 | read | read >> 2
    }

    pub(super) fn apply_to_log(self, path: &Path, file: &File) -> Result<(), OpenError> {
        self.apply(path, file, self.mode)
    }

    pub(super) fn apply_to_registry(self, path: &Path, file: &File) -> Result<(), OpenError> {
        let group = self.mode & 0o040;
        self.apply(path, file, 0o600 | group | group >> 1)
    }

    /// Applies mode and group where they differ; the file may be from an earlier broker with other
    /// settings.
    fn apply(self, path: &Path, file: &File, mode: u32) -> Result<(), OpenError> {
        let set = || -> io::Result<()> {
            let about = file.metadata()?;
            let group = self.group.filter(|group| *group != about.gid());
            if group.is_some() {
                fchown(file, None, group)?;
            }
            if about.mode() & 0o777 != mode {
                file.set_permissions(Permissions::from_mode(mode))?;
            }
            Ok(())
        };
        set().map_err(|source| OpenError::Access {
            path: path.to_owned(),
            mode,
            group: self
                .group
                .map_or_else(|| "as it is".to_owned(), |group| group.to_string()),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_that_may_read_a_log_may_enter_its_directory() {
        for (mode, directory) in [(0o600, 0o700), (0o640, 0o750), (0o644, 0o755)] {
            let access = Access::new(mode, None).unwrap();
            assert_eq!(access.directory_mode(), directory);
        }
    }

    #[test]
    fn only_the_owner_may_write_a_log() {
        for mode in 0..0o10000 {
            let allowed = [0o600, 0o604, 0o640, 0o644].contains(&mode);
            assert_eq!(Access::new(mode, None).is_ok(), allowed, "{mode:o}");
        }
    }
}
