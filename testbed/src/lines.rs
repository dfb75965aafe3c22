//! Numbered lines of different lengths, for runs that account for every message: a lost, duplicated, torn or
//! reordered line shows, and the lines of a killed publisher can be recognised.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use fastrand::Rng;
use sha2::{Digest, Sha256};

/// Maximum length of a line without name and number.
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
    /// Writes `size` bytes of lines to `path`; each begins with the sender's name.
    pub fn write(path: PathBuf, name: &str, size: usize, rng: &mut Rng) -> Result<Self> {
        let (mut text, mut ends) = (Vec::with_capacity(size + LONGEST), Vec::new());
        while text.len() < size {
            let filler = rng.alphanumeric();
            let filler = std::iter::repeat_n(filler, rng.usize(..LONGEST));
            let filler: String = filler.collect();
            writeln!(text, "{name} {} {filler}", ends.len()).expect("memory takes all");
            ends.push(text.len());
        }
        fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { path, text, ends })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Number of lines.
    pub fn count(&self) -> usize {
        self.ends.len()
    }

    /// Returns a line without its newline, if it exists.
    pub fn get(&self, number: usize) -> Option<&[u8]> {
        let end = *self.ends.get(number)?;
        let start = number.checked_sub(1).map_or(0, |before| self.ends[before]);
        Some(&self.text[start..end - 1])
    }

    /// SHA-256 of the first `count` lines, as publishers and subscribers compute it; `None` if there are fewer.
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
        let lines = Lines::write(
            dir.path().join("lines"),
            "a",
            1 << 20,
            &mut Rng::with_seed(1),
        )
        .unwrap();
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

    #[test]
    fn lines_can_be_had_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lines");
        let lines = Lines::write(path, "me", 10_000, &mut Rng::with_seed(1)).unwrap();
        let text = fs::read_to_string(lines.path()).unwrap();
        for (number, line) in text.lines().enumerate() {
            assert_eq!(lines.get(number), Some(line.as_bytes()));
            assert!(line.starts_with(&format!("me {number} ")));
        }
        assert_eq!(lines.count(), text.lines().count());
        assert_eq!(lines.get(lines.count()), None);
    }
}
