//! What every publisher sends: the same lines, numbered and of different lengths, so that what came of
//! one that was killed can be told from its beginning.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fastrand::Rng;
use sha2::{Digest, Sha256};

/// Bytes of all of them.
const SIZE: usize = 8 << 20;
/// Longest line beside its number.
const LONGEST: usize = 600;

/// A file of lines.
#[derive(Debug)]
pub struct Lines {
    path: PathBuf,
    text: Vec<u8>,
    /// Where each line ends, its newline included.
    ends: Vec<usize>,
}

impl Lines {
    /// Writes them to `path`.
    pub fn write(path: PathBuf, rng: &mut Rng) -> Result<Self> {
        let (mut text, mut ends) = (Vec::with_capacity(SIZE + LONGEST), Vec::new());
        while text.len() < SIZE {
            let filler = rng.alphanumeric();
            let filler = std::iter::repeat_n(filler, rng.usize(..LONGEST));
            writeln!(text, "{} {}", ends.len(), filler.collect::<String>())
                .expect("memory takes all");
            ends.push(text.len());
        }
        fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, text, ends })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// SHA-256 of the first `count`, as publishers and subscribers compute it; none if there are not
    /// so many.
    pub fn digest(&self, count: u64) -> Option<String> {
        let end = match usize::try_from(count).ok()? {
            0 => 0,
            count => *self.ends.get(count - 1)?,
        };
        let hash = Sha256::digest(&self.text[..end]);
        Some(hash.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginnings_have_digests() {
        let dir = tempfile::tempdir().unwrap();
        let lines = Lines::write(dir.path().join("lines"), &mut Rng::with_seed(1)).unwrap();
        let text = fs::read_to_string(lines.path()).unwrap();
        let count = text.lines().count() as u64;
        let first: String = text
            .lines()
            .take(2)
            .map(|line| format!("{line}\n"))
            .collect();
        let wanted = Sha256::digest(first.as_bytes());
        let wanted: String = wanted.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(lines.digest(2), Some(wanted));
        assert!(lines.digest(0).is_some() && lines.digest(count).is_some());
        assert_eq!(lines.digest(count + 1), None);
    }
}
