//! The programs of this workspace that runs start.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

/// The programs of this workspace that the lab runs.
#[derive(Debug, Clone)]
pub struct Binaries {
    /// `penstock-broker`.
    pub broker: PathBuf,
    /// `penstock-publisher`.
    pub publisher: PathBuf,
    /// `penstock-subscriber`.
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
