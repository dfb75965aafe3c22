//! What a run needs around the processes: the programs, the namespaces, memory for the buffers.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
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
}

impl Drop for BufferDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
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
        fs::remove_dir_all(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}
