//! Directories that only trusted users can redirect.
//!
//! The lab runs as root and writes to a directory that its user names. If somebody else can change a
//! part of that path, they can put a link there and have root write wherever they like. Such a path is
//! refused. Trusted are root, the user that runs the lab or called sudo, and those who own the lab's
//! program or a directory above it: they could replace the program itself.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Component, Path, PathBuf, absolute};

use anyhow::{Context, Result, bail, ensure};
use nix::unistd::{getegid, geteuid};

/// Symbolic links in one path that the kernel follows (path_resolution(7)).
const MOST_LINKS: usize = 40;
const STICKY: u32 = 0o1000;
const GROUP_MAY_WRITE: u32 = 0o020;
const OTHERS_MAY_WRITE: u32 = 0o002;

/// Users and groups that may change a path.
#[derive(Debug)]
struct Trusted {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
}

impl Trusted {
    fn of_this_process() -> Self {
        let sudo = |name: &str| std::env::var(name).ok()?.parse::<u32>().ok();
        let mut users: BTreeSet<u32> = [0, geteuid().as_raw()].into();
        let mut groups: BTreeSet<u32> = [0, getegid().as_raw()].into();
        users.extend(sudo("SUDO_UID"));
        groups.extend(sudo("SUDO_GID"));
        let program = std::env::current_exe().unwrap_or_default();
        let owners = program.ancestors().filter_map(|path| path.metadata().ok());
        for owner in owners {
            users.insert(owner.uid());
            groups.insert(owner.gid());
        }
        Self { users, groups }
    }

    /// Fails if another user could put something else in place of `path`, or into it.
    fn check(&self, path: &Path, metadata: &Metadata) -> Result<()> {
        let (uid, mode) = (metadata.uid(), metadata.mode());
        ensure!(
            self.users.contains(&uid),
            "{} belongs to another user (uid {uid}), who could redirect what is written there",
            path.display()
        );
        // In a sticky directory only the owner of an entry renames it; entries are checked as well.
        if metadata.is_symlink() || mode & STICKY != 0 {
            return Ok(());
        }
        ensure!(
            mode & OTHERS_MAY_WRITE == 0,
            "anyone may change {} (mode {:o}), and redirect what is written there: chmod o-w it",
            path.display(),
            mode & 0o7777
        );
        ensure!(
            mode & GROUP_MAY_WRITE == 0 || self.groups.contains(&metadata.gid()),
            "group {} may change {} (mode {:o}), and redirect what is written there: chmod g-w it",
            metadata.gid(),
            path.display(),
            mode & 0o7777
        );
        Ok(())
    }
}

/// Creates a directory with all above it, unless it is there, and returns its path without links.
pub fn create_dir_all(path: &Path) -> Result<PathBuf> {
    create_as(path, &Trusted::of_this_process())
}

fn create_as(path: &Path, trusted: &Trusted) -> Result<PathBuf> {
    let whole = absolute(path).with_context(|| format!("cannot resolve {}", path.display()))?;
    // What is still to be walked, the next component last.
    let mut rest = reversed(&whole);
    let mut reached = PathBuf::from("/");
    let mut links = 0;
    while let Some(component) = rest.pop() {
        let next = match component.as_path() {
            name if name == Path::new("..") => {
                reached.pop();
                continue;
            }
            name => reached.join(name),
        };
        let metadata = look_or_create(&next)?;
        trusted.check(&next, &metadata)?;
        if metadata.is_symlink() {
            links += 1;
            ensure!(links <= MOST_LINKS, "{} leads in circles", path.display());
            let target = fs::read_link(&next)
                .with_context(|| format!("cannot read the link {}", next.display()))?;
            if target.is_absolute() {
                reached = PathBuf::from("/");
            }
            rest.extend(reversed(&target));
        } else if metadata.is_dir() {
            reached = next;
        } else {
            bail!("{} is not a directory", next.display());
        }
    }
    Ok(reached)
}

fn reversed(path: &Path) -> Vec<PathBuf> {
    let named = path
        .components()
        .filter(|component| matches!(component, Component::Normal(_) | Component::ParentDir));
    let mut parts: Vec<PathBuf> = named.map(|part| PathBuf::from(part.as_os_str())).collect();
    parts.reverse();
    parts
}

/// What is there; a directory if nothing was.
fn look_or_create(path: &Path) -> Result<Metadata> {
    let what = || format!("cannot examine {}", path.display());
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        found => return found.with_context(what),
    }
    match DirBuilder::new().mode(0o755).create(path) {
        // Somebody was faster: whoever it was is checked next.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        made => made.with_context(|| format!("cannot create {}", path.display()))?,
    }
    fs::symlink_metadata(path).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, chown, lchown, symlink};

    /// A directory that is this user's, with a sticky one in it, as /tmp is.
    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let shared = place.path().canonicalize().unwrap().join("shared");
        fs::create_dir(&shared).unwrap();
        set_mode(&shared, 0o1777);
        (place, shared)
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    }

    fn refusal(path: &Path) -> String {
        format!("{:#}", create_dir_all(path).unwrap_err())
    }

    #[test]
    fn a_path_is_made_and_links_of_one_s_own_are_followed() {
        let (_place, shared) = place();
        let made = create_dir_all(&shared.join("a/b")).unwrap();
        assert_eq!(made, shared.join("a/b"));
        assert_eq!(made.metadata().unwrap().mode() & 0o022, 0);
        symlink("a", shared.join("link")).unwrap();
        let linked = create_dir_all(&shared.join("link/../link/b/c")).unwrap();
        assert_eq!(linked, shared.join("a/b/c"));
        symlink("circle", shared.join("circle")).unwrap();
        assert!(refusal(&shared.join("circle")).contains("circles"));
        fs::write(shared.join("file"), "").unwrap();
        assert!(refusal(&shared.join("file/x")).contains("not a directory"));
    }

    #[test]
    fn what_others_may_change_is_refused() {
        let (_place, shared) = place();
        let open = shared.join("open");
        fs::create_dir(&open).unwrap();
        set_mode(&open, 0o777);
        assert!(refusal(&open.join("results")).contains("chmod o-w"));
        if !geteuid().is_root() {
            return;
        }
        let theirs = shared.join("theirs");
        fs::create_dir(&theirs).unwrap();
        chown(&theirs, Some(65_534), None).unwrap();
        assert!(refusal(&theirs).contains("uid 65534"));
        assert!(refusal(&theirs.join("results")).contains("uid 65534"));
        let link = shared.join("link");
        symlink("/etc", &link).unwrap();
        lchown(&link, Some(65_534), None).unwrap();
        assert!(refusal(&link).contains("uid 65534"));
        let group = shared.join("group");
        fs::create_dir(&group).unwrap();
        chown(&group, None, Some(65_534)).unwrap();
        set_mode(&group, 0o775);
        assert!(refusal(&group).contains("chmod g-w"));
    }
}
