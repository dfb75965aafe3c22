//! `net.core.rmem_max` for a while.
//!
//! It is one value for the whole host: network namespaces show it, but only the first one can write
//! it (seen on Linux 6.18). So it is put back however the lab ends: by a child that waits for the
//! lab's end of a pipe to close, which the kernel sees to, and no signal from the terminal reaches.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use tracing::warn;

const RMEM_MAX: &str = "/proc/sys/net/core/rmem_max";
/// Waits for the end of its input, then writes a value to a file.
const KEEPER: &str = r#"trap "" INT TERM HUP; cat >/dev/null; echo "$1" >"$0""#;

/// The value before comes back when this is dropped.
#[derive(Debug)]
pub struct RmemMax {
    before: u64,
    keeper: Option<Child>,
    _alone: File,
}

/// The value there is, bytes.
pub fn rmem_max() -> Result<u64> {
    read(Path::new(RMEM_MAX))
}

impl RmemMax {
    /// Sets it, bytes.
    pub fn set(bytes: u64) -> Result<Self> {
        Self::set_in(Path::new(RMEM_MAX), bytes)
    }

    fn set_in(path: &Path, bytes: u64) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        file.try_lock().with_context(|| {
            format!(
                "another experiment is changing {}; wait for its end",
                path.display()
            )
        })?;
        let mut changed = Self {
            before: read(path)?,
            keeper: None,
            _alone: file,
        };
        if changed.before != bytes {
            changed.keeper = Some(keeper(path, changed.before)?);
            fs::write(path, bytes.to_string()).with_context(|| {
                format!(
                    "cannot set {}, which takes root outside of any container",
                    path.display()
                )
            })?;
            let now = read(path)?;
            ensure!(
                now == bytes,
                "{} is {now} after it was set to {bytes}",
                path.display()
            );
        }
        Ok(changed)
    }
}

impl Drop for RmemMax {
    fn drop(&mut self) {
        let Some(mut keeper) = self.keeper.take() else {
            return;
        };
        drop(keeper.stdin.take());
        if !keeper.wait().is_ok_and(|status| status.success()) {
            warn!("net.core.rmem_max was not put back to {}", self.before);
        }
    }
}

fn keeper(path: &Path, before: u64) -> Result<Child> {
    Command::new("sh")
        .args(["-c", KEEPER])
        .arg(path)
        .arg(before.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .context("cannot start the shell that puts net.core.rmem_max back")
}

fn read(path: &Path) -> Result<u64> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    let value = text.trim().parse();
    value.with_context(|| format!("{} holds no number: {text:?}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_before_comes_back_and_nobody_else_changes_it_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rmem_max");
        fs::write(&path, "100\n").unwrap();
        let changed = RmemMax::set_in(&path, 200).unwrap();
        assert_eq!(read(&path).unwrap(), 200);
        let other = RmemMax::set_in(&path, 300).unwrap_err();
        assert!(format!("{other:#}").contains("another experiment"));
        drop(changed);
        assert_eq!(read(&path).unwrap(), 100);
        assert!(RmemMax::set_in(&path, 100).unwrap().keeper.is_none());
    }

    #[test]
    fn the_keeper_acts_when_its_input_ends_and_not_on_a_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rmem_max");
        fs::write(&path, "7").unwrap();
        let mut keeper = keeper(&path, 5).unwrap();
        assert_eq!(read(&path).unwrap(), 7);
        drop(keeper.stdin.take());
        assert!(keeper.wait().unwrap().success());
        assert_eq!(read(&path).unwrap(), 5);
    }
}
