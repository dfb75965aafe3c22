//! The directory of the logs: created if necessary, and checked.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, Uid, User, access, geteuid};
use penstock_files::{Dir, NewDir, displace};
use penstock_log::Access;
use tracing::warn;

/// Default directory of the logs, for root and for services.
pub const DEFAULT: &str = "/dev/shm/penstock";

/// Creates the directory of the logs if it does not exist, readable for those who may read the logs. A
/// new one belongs to `owner`, and to the group of the logs if one is given.
pub fn make(directory: &Path, owner: Option<&User>, access: Access) -> Result<()> {
    let group = access.group();
    let new = NewDir {
        mode: access.directory_mode(),
        owner: owner.map(|user| user.uid.as_raw()),
        group: group.or(owner.map(|user| user.gid.as_raw())),
    };
    let name = directory.display();
    // Every user knows this name and can take it. Only root can rename what is there, and only for this
    // default name: a user who gives another directory may mean the existing one.
    if directory == Path::new(DEFAULT)
        && let Some(other) =
            displace(directory, &new).with_context(|| format!("cannot create {name}"))?
    {
        let (owner, path) = (other.owner, other.path.display());
        warn!(
            "{name} belonged to {owner}, and no running program had locked files there: renamed it to {path}"
        );
    }
    if directory.exists() {
        // `check` checks it later, as the broker's user.
        return Ok(());
    }
    Dir::make(directory, &new)
        .map(drop)
        .with_context(|| format!("cannot create {name}; choose another --buffer-dir"))
}

/// Whether this user can create logs in the directory, and no other user can replace them.
pub fn check(directory: &Path, access: Access) -> Result<()> {
    check_writable(directory)?;
    let me = user_name(geteuid());
    let name = directory.display();
    access
        .open_directory(directory)
        .with_context(|| format!("user {me} cannot create logs in {name} (--buffer-dir)"))?;
    let mode = fs::metadata(directory).map_or(0o777, |about| about.mode());
    let missing = access.directory_mode() & !mode & 0o011;
    if missing != 0 {
        warn!(
            "{name} has mode {:03o}, which keeps out some users who may read the logs; chmod {:03o} {name}",
            mode & 0o777,
            access.directory_mode()
        );
    }
    Ok(())
}

fn user_name(uid: Uid) -> String {
    match User::from_uid(uid) {
        Ok(Some(user)) => user.name,
        _ => uid.to_string(),
    }
}

/// Root without capabilities has no more rights than any other owner, so the check applies to root as
/// well.
fn check_writable(directory: &Path) -> Result<()> {
    let Err(error) = access(directory, AccessFlags::W_OK | AccessFlags::X_OK) else {
        return Ok(());
    };
    let (me, dir) = (user_name(geteuid()), directory.display());
    let about = fs::metadata(directory).ok();
    if about.as_ref().is_some_and(|about| !about.is_dir()) {
        bail!("{dir} is not a directory; choose another --buffer-dir");
    }
    // A different owner helps only against EACCES, not against a read-only file system, for instance.
    if error != Errno::EACCES {
        bail!("user {me} cannot create logs in {dir}: {error}; choose another --buffer-dir");
    }
    let owner = about.map(|about| user_name(Uid::from_raw(about.uid())));
    let owner = owner.unwrap_or_else(|| "another user".to_owned());
    bail!(
        "user {me} cannot create logs in {dir}, which belongs to {owner}: {error}; chown {me} {dir}, start the broker as {owner} (--user), or choose another --buffer-dir"
    )
}
