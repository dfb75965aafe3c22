//! Memory for the brokers' buffers.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::geteuid;
use tracing::{debug, info, warn};

use crate::netns;

/// Where buffers live: memory, like the brokers' own default.
const SHARED_MEMORY: &str = "/dev/shm";
/// Mode of a directory that is its user's alone.
const PRIVATE: u32 = 0o700;

/// The directory of this run's buffers; removed with its contents when dropped.
///
/// Any user may create entries in the shared memory. So this directory gets an unguessable name,
/// belongs to this user alone (mode 0700), and is used through its descriptor: an entry that takes its
/// place in the file system is never touched.
#[derive(Debug)]
pub struct BufferDir {
    path: PathBuf,
    dir: PrivateDir,
}

impl BufferDir {
    /// Creates it empty, after removing what killed labs left behind.
    pub fn create() -> Result<Self> {
        let root = Path::new(SHARED_MEMORY);
        sweep_stale(root)?;
        let path = tempfile::Builder::new()
            .prefix(&format!("penstock-{}-shm.", std::process::id()))
            .permissions(Permissions::from_mode(PRIVATE))
            .tempdir_in(root)
            .with_context(|| format!("cannot create a directory in {}", root.display()))?
            .keep();
        let what = || format!("{} is not the directory just made", path.display());
        let dir = PrivateDir::open(&path)
            .and_then(|dir| dir.context("it belongs to another user"))
            .with_context(what)?;
        // The kernel releases the lock when this process ends, however it does. That is how other labs
        // know.
        dir.0.try_lock().with_context(what)?;
        Ok(Self { path, dir })
    }

    /// Where broker `index` keeps its logs.
    pub fn of_broker(&self, index: usize) -> PathBuf {
        self.path.join(format!("b{index}"))
    }

    /// Empties it.
    pub fn clear(&self) -> Result<()> {
        self.dir
            .empty()
            .with_context(|| format!("cannot empty {}", self.path.display()))
    }

    /// Gives broker `index`, which must not have one yet, a file system that holds at most `bytes`.
    pub fn mount_limited(&self, index: usize, bytes: u64) -> Result<()> {
        let path = self.dir.path().join(format!("b{index}"));
        let what = || {
            format!(
                "cannot mount a file system at {}",
                self.of_broker(index).display()
            )
        };
        fs::create_dir(&path).with_context(what)?;
        let size = format!("size={bytes},mode=0700");
        mount(
            Some("tmpfs"),
            &path,
            Some("tmpfs"),
            MsFlags::empty(),
            Some(size.as_str()),
        )
        .with_context(what)
    }
}

impl Drop for BufferDir {
    fn drop(&mut self) {
        if let Err(error) = self.dir.remove(&self.path) {
            warn!("cannot remove {}: {error:#}", self.path.display());
        }
    }
}

/// An open directory of this user that no other user may change.
#[derive(Debug)]
struct PrivateDir(File);

impl PrivateDir {
    /// Opens it; `None` if it is a link, not a directory, another user's, or writable for others.
    fn open(path: &Path) -> Result<Option<Self>> {
        let flags = libc::O_DIRECTORY | libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let opened = OpenOptions::new().read(true).custom_flags(flags).open(path);
        let dir = match opened {
            Ok(dir) => dir,
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ELOOP | libc::ENOTDIR | libc::ENOENT | libc::EACCES)
                ) =>
            {
                return Ok(None);
            }
            Err(error) => {
                return Err(error).with_context(|| format!("cannot open {}", path.display()));
            }
        };
        let metadata = dir
            .metadata()
            .with_context(|| format!("cannot examine {}", path.display()))?;
        let is_private = metadata.uid() == geteuid().as_raw() && metadata.mode() & 0o022 == 0;
        Ok(is_private.then_some(Self(dir)))
    }

    /// A path to this directory that stays valid even if its name leads elsewhere by now.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }

    /// Unmounts the brokers' file systems, and removes all contents.
    fn empty(&self) -> Result<()> {
        let device = self.0.metadata().context("cannot examine it")?.dev();
        for entry in fs::read_dir(self.path()).context("cannot list it")? {
            let name = entry.context("cannot list it")?.file_name();
            let path = self.path().join(&name);
            let what = || format!("cannot remove {}", name.display());
            if is_mounted(&path, device).with_context(what)? {
                ensure!(
                    is_of_broker(&name),
                    "{} is a mount point that no lab created: umount it",
                    name.display()
                );
                let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
                umount2(&path, flags).with_context(what)?;
            }
            let removed = match fs::symlink_metadata(&path).with_context(what)?.is_dir() {
                true => fs::remove_dir_all(&path),
                false => fs::remove_file(&path),
            };
            removed.with_context(what)?;
        }
        Ok(())
    }

    /// Removes it with its contents; `path` is its name.
    fn remove(&self, path: &Path) -> Result<()> {
        self.empty()?;
        // Removes only an empty directory, and follows no link.
        fs::remove_dir(path).context("cannot remove it")
    }
}

/// Whether something is mounted on a directory below one of `device`; the target of a link does not
/// count.
fn is_mounted(path: &Path, device: u64) -> io::Result<bool> {
    let metadata = fs::symlink_metadata(path)?;
    Ok(metadata.is_dir() && metadata.dev() != device)
}

/// Whether this is the name of a broker's directory, on which [`BufferDir::mount_limited`] mounts.
fn is_of_broker(name: &OsStr) -> bool {
    let number = name.to_str().and_then(|name| name.strip_prefix('b'));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()))
}

/// Removes the directories of labs that were killed. Leaves alone what merely has such a name.
fn sweep_stale(root: &Path) -> Result<()> {
    let names = netns::file_names(root)?;
    for name in netns::stale(names.iter().map(String::as_str), netns::lab_is_alive) {
        let path = root.join(name);
        let Some(dir) = PrivateDir::open(&path)? else {
            debug!(
                "not removing {}: another user created it, or may change it",
                path.display()
            );
            continue;
        };
        // A lab in another PID namespace looks dead from here, but still holds its lock.
        if dir.0.try_lock().is_err() {
            continue;
        }
        info!("removing {}, left by a lab that was killed", path.display());
        dir.remove(&path)
            .with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::{CloneFlags, unshare};
    use std::os::unix::fs::{chown, symlink};

    /// A place like /dev/shm, with a directory that has the name of a dead lab.
    fn left_behind() -> (tempfile::TempDir, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(format!("penstock-{}-shm.abc", u32::MAX));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o700)).unwrap();
        (root, path)
    }

    #[test]
    fn what_a_killed_lab_left_is_removed_and_the_targets_of_links_in_it_are_not() {
        let (root, stale) = left_behind();
        let victim = root.path().join("victim");
        fs::create_dir(&victim).unwrap();
        fs::write(victim.join("precious"), "x").unwrap();
        symlink(&victim, stale.join("b0")).unwrap();
        fs::create_dir(stale.join("b1")).unwrap();
        fs::write(stale.join("b1").join("penstock.log"), "x").unwrap();
        sweep_stale(root.path()).unwrap();
        assert!(!stale.exists());
        assert!(victim.join("precious").exists());
    }

    #[test]
    fn a_directory_that_others_made_or_may_change_is_left_alone() {
        let (root, stale) = left_behind();
        let link = root.path().join(format!("penstock-{}-shm", u32::MAX - 1));
        let file = root.path().join(format!("penstock-{}-shm", u32::MAX - 2));
        let elsewhere = root.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        symlink(&elsewhere, &link).unwrap();
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&stale, Permissions::from_mode(0o777)).unwrap();
        sweep_stale(root.path()).unwrap();
        assert!(stale.exists() && link.is_symlink() && file.exists() && elsewhere.exists());
        if geteuid().is_root() {
            fs::set_permissions(&stale, Permissions::from_mode(0o700)).unwrap();
            chown(&stale, Some(65534), None).unwrap();
            sweep_stale(root.path()).unwrap();
            assert!(stale.exists());
        }
    }

    #[test]
    fn a_directory_whose_lab_still_has_its_lock_is_left_alone() {
        let (root, stale) = left_behind();
        let owner = PrivateDir::open(&stale).unwrap().unwrap();
        owner.0.try_lock().unwrap();
        sweep_stale(root.path()).unwrap();
        assert!(stale.exists());
        drop(owner);
        sweep_stale(root.path()).unwrap();
        assert!(!stale.exists());
    }

    #[test]
    fn a_mount_that_no_lab_made_is_left_and_one_of_a_broker_goes() {
        if !geteuid().is_root() {
            return;
        }
        // In a mount namespace of its own, which ends with the thread.
        std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            let none: Option<&str> = None;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
            let tmpfs = |path: &Path| {
                fs::create_dir(path).unwrap();
                mount(none, path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
                fs::write(path.join("file"), "x").unwrap();
            };
            let (root, stale) = left_behind();
            tmpfs(&stale.join("b0"));
            sweep_stale(root.path()).unwrap();
            assert!(!stale.exists());
            let (root, stale) = left_behind();
            tmpfs(&stale.join("precious"));
            let error = sweep_stale(root.path()).unwrap_err();
            assert!(format!("{error:#}").contains("umount"), "{error:#}");
            assert!(stale.join("precious").join("file").exists());
            umount2(&stale.join("precious"), MntFlags::MNT_DETACH).unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn this_run_s_directory_is_private_and_goes_with_it() {
        let buffers = BufferDir::create().unwrap();
        let metadata = fs::symlink_metadata(&buffers.path).unwrap();
        assert_eq!(metadata.mode() & 0o777, 0o700);
        fs::create_dir(buffers.of_broker(0)).unwrap();
        buffers.clear().unwrap();
        assert!(!buffers.of_broker(0).exists() && buffers.path.exists());
        let path = buffers.path.clone();
        drop(buffers);
        assert!(!path.exists());
    }
}
