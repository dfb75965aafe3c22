//! What a run needs around the processes: the programs, the namespaces, memory for the buffers.

use std::path::{Path, PathBuf};
use std::{fs, io};

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tracing::{info, warn};

use crate::netns;

/// Where buffers live: memory, like the brokers' own default.
const SHARED_MEMORY: &str = "/dev/shm";

/// The programs of this workspace that the lab runs.
#[derive(Debug, Clone)]
pub struct Binaries {
    pub broker: PathBuf,
    pub publisher: PathBuf,
    pub subscriber: PathBuf,
}

impl Binaries {
    /// Finds them in `dir`, or beside the running program.
    pub fn find(dir: Option<&Path>) -> Result<Self> {
        let own = std::env::current_exe().context("cannot tell where this program is")?;
        let dir = dir
            .or(own.parent())
            .context("this program is in no directory")?;
        let dir = dir
            .canonicalize()
            .with_context(|| format!("no such directory: {}", dir.display()))?;
        let find = |name: &str| {
            let path = dir.join(name);
            ensure!(
                path.is_file(),
                "{name} is not in {}; build it with `cargo build --release`, or give --bin-dir",
                dir.display()
            );
            Ok(path)
        };
        Ok(Self {
            broker: find("penstock-broker")?,
            publisher: find("penstock-publisher")?,
            subscriber: find("penstock-subscriber")?,
        })
    }
}

/// The directory of this run's buffers; removed with its contents when dropped.
#[derive(Debug)]
pub struct BufferDir(PathBuf);

impl BufferDir {
    /// Creates it empty, after removing what killed labs left behind.
    pub fn create() -> Result<Self> {
        sweep_stale()?;
        let path = Path::new(SHARED_MEMORY).join(format!("penstock-{}-shm", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self(path))
    }

    /// Where broker `index` keeps its logs.
    pub fn of_broker(&self, index: usize) -> PathBuf {
        self.0.join(format!("b{index}"))
    }

    /// Empties it.
    pub fn clear(&self) -> Result<()> {
        remove(&self.0)
            .and_then(|()| fs::create_dir(&self.0))
            .with_context(|| format!("cannot empty {}", self.0.display()))
    }

    /// Gives broker `index`, which must not have one yet, a directory that holds so many bytes only.
    pub fn bound(&self, index: usize, bytes: u64) -> Result<()> {
        let path = self.of_broker(index);
        let what = || format!("cannot mount a file system at {}", path.display());
        fs::create_dir(&path).with_context(what)?;
        let size = format!("size={bytes}");
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

/// Removes a directory of buffers, and what is mounted in it.
fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        // Fails where nothing is mounted, which is what is wanted.
        let _ = umount2(&entry?.path(), MntFlags::MNT_DETACH);
    }
    fs::remove_dir_all(path)
}

impl Drop for BufferDir {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            warn!("{} is left behind: {error}", self.0.display());
        }
    }
}

fn sweep_stale() -> Result<()> {
    let root = Path::new(SHARED_MEMORY);
    let names = netns::file_names(root)?;
    for name in netns::stale(names.iter().map(String::as_str), netns::lab_is_alive) {
        let path = root.join(name);
        info!(
            "removing {}, left behind by a lab that was killed",
            path.display()
        );
        remove(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
