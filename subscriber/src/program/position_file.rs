//! The file that keeps how far a subscriber has come. It is replaced in one step.

use std::ffi::{OsStr, OsString};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use penstock_files::{Dir, Open};
use penstock_process::text::foreign;
use serde::{Deserialize, Serialize};

use crate::Position;

/// Largest file that is read, bytes. A position of as many streams as are remembered is smaller.
const MAX_LEN: u64 = 64 << 20;

/// What the file contains.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    topic: String,
    position: Position,
}

/// The position in a file; `None` if there is no such file.
///
/// # Errors
/// If the file cannot be read, or is about another topic.
pub fn load(path: &Path, topic: &str) -> Result<Option<Position>> {
    let shown = || format!("position file {}", path.display());
    let (dir, name) = place(path).with_context(shown)?;
    let file = match dir.file(&name, Open::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(shown),
    };
    let mut text = String::new();
    let read = file.take(MAX_LEN).read_to_string(&mut text);
    read.with_context(shown)?;
    let saved: Saved = serde_json::from_str(&text).with_context(shown)?;
    if saved.topic != topic {
        bail!(
            "{}: it is about topic {}, not {topic}: choose another file",
            shown(),
            foreign(&saved.topic)
        );
    }
    Ok(Some(saved.position))
}

/// Writes a position to a new file, which then takes the name.
///
/// # Errors
/// If that fails; the earlier file is then still there.
pub fn save(path: &Path, topic: &str, position: Position) -> Result<()> {
    let replaced = replace(path, topic, position);
    replaced.with_context(|| format!("cannot save the position in {}", path.display()))
}

fn replace(path: &Path, topic: &str, position: Position) -> Result<()> {
    let (dir, name) = place(path)?;
    let mut new = OsString::from(".");
    new.push(&name);
    new.push(".new");
    if dir.contains(&new)? {
        dir.remove(&new)?;
    }
    let mut file = dir.file(&new, Open::New(0o600))?;
    let saved = Saved {
        topic: topic.to_owned(),
        position,
    };
    let mut text = serde_json::to_vec(&saved)?;
    text.push(b'\n');
    file.write_all(&text)?;
    file.sync_data()?;
    Ok(dir.rename(&new, &name)?)
}

fn place(path: &Path) -> Result<(Dir, OsString)> {
    let name = path.file_name().map(OsStr::to_owned);
    let name = name.context("it names no file")?;
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    Ok((Dir::open_shared(&parent)?, name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LogPosition;

    #[test]
    fn a_position_is_kept_for_its_topic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p");
        assert_eq!(load(&path, "t").unwrap(), None);
        for next in [1, 2] {
            let mut position = Position::default();
            position
                .brokers
                .insert("a:1".to_owned(), LogPosition { next, log: 0 });
            save(&path, "t", position.clone()).unwrap();
            assert_eq!(load(&path, "t").unwrap(), Some(position));
        }
        let error = load(&path, "u").unwrap_err().to_string();
        assert!(error.contains("about topic t, not u"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        std::fs::write(&path, "{}").unwrap();
        assert!(load(&path, "t").is_err());
        assert!(save(&dir.path().join("no/p"), "t", Position::default()).is_err());
    }
}
