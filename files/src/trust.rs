//! Users whose directories and links count as our own.

use std::collections::BTreeSet;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::unistd::geteuid;

/// Root and the user of this process, and further users and groups.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trusted {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
}

impl Trusted {
    /// Includes those who control this process anyway: the user who called sudo, and everyone who could
    /// replace the program itself, because they own it or can write to a directory above it.
    #[must_use]
    pub fn with_those_in_control() -> Self {
        let sudo = std::env::var("SUDO_UID").ok();
        let program = std::env::current_exe().unwrap_or_default();
        Self::of(sudo.as_deref(), &program)
    }

    fn of(sudo: Option<&str>, program: &Path) -> Self {
        let mut trusted = Self::default();
        let sudo = sudo.and_then(|uid| uid.parse::<u32>().ok());
        trusted.users.extend(sudo);
        for about in program.ancestors().filter_map(|path| path.metadata().ok()) {
            trusted.add_owner(&about);
        }
        trusted
    }

    fn add_owner(&mut self, about: &Metadata) {
        self.users.insert(about.uid());
        // In a sticky directory the group can add files, but not replace the files of others.
        if about.mode() & 0o1020 == 0o020 {
            self.groups.insert(about.gid());
        }
    }

    pub(crate) fn has_user(&self, uid: u32) -> bool {
        is_trusted(uid) || self.users.contains(&uid)
    }

    pub(crate) fn has_group(&self, gid: u32) -> bool {
        self.groups.contains(&gid)
    }
}

/// Whether a user is root or the one of this process.
pub(crate) fn is_trusted(uid: u32) -> bool {
    uid == 0 || uid == geteuid().as_raw()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, chown};

    #[test]
    fn those_who_could_replace_the_program_are_trusted_and_no_other_group() {
        let top = tempfile::tempdir().unwrap();
        let [plain, shared, sticky] =
            ["plain", "shared", "sticky"].map(|name| top.path().join(name));
        for (dir, mode) in [(&plain, 0o755), (&shared, 0o775), (&sticky, 0o1775)] {
            fs::create_dir(dir).unwrap();
            fs::set_permissions(dir, Permissions::from_mode(mode)).unwrap();
        }
        let program = shared.join("program");
        fs::write(&program, "").unwrap();
        let group = shared.metadata().unwrap().gid();
        for (dir, is_in_control) in [(&plain, false), (&shared, true), (&sticky, false)] {
            let mut trusted = Trusted::default();
            trusted.add_owner(&dir.metadata().unwrap());
            assert_eq!(trusted.has_group(group), is_in_control, "{dir:?}");
        }
        if !geteuid().is_root() {
            return;
        }
        chown(&program, Some(54_321), None).unwrap();
        let trusted = Trusted::of(Some("54322"), &program);
        assert!(trusted.has_user(0) && trusted.has_user(54_321) && trusted.has_user(54_322));
        for sudo in [None, Some(""), Some("root")] {
            assert!(!Trusted::of(sudo, &plain).has_user(54_322));
        }
    }
}
