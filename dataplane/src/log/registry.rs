//! Readers that a broker with `--full block` waits for: a small file beside the log, writable by
//! readers, so that the log itself can stay read-only for them.
//!
//! Each reader owns one slot, and a lock on the byte of the same number. The lock goes when the
//! reader goes, so a dead reader never holds up the broker for long.
//!
//! Whoever may register may also truncate the file or write anything into it. So nobody maps it:
//! reading what is no longer there is a short read, where a mapping gives SIGBUS. A slot counts only
//! with its check word, since the kernel promises no atomic copy of eight bytes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, Digest};
use penstock_files::{Dir, Open};

use super::OpenError;
use super::access::Access;
use super::layout::MAX_POSITION;
use super::lock;
use super::ring::{FREE, MAX_READERS, ReaderCursors};
use super::writer_lock::beside;

/// Bytes of a slot; the rest of its cache line is unused.
const SLOT_BYTES: usize = 64;
const BYTES: usize = MAX_READERS * SLOT_BYTES;
/// Bytes of a slot that are used: cursor, process, check word.
const USED: usize = 24;
/// Times that a slot is read again when its check word disagrees: its reader may be writing it.
const REREADS: usize = 2;

/// An open registry.
#[derive(Debug)]
pub(super) struct Registry {
    path: PathBuf,
    file: File,
}

/// What a reader says in its slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Nobody uses it.
    Free,
    /// A reader that needs every batch from this index on.
    Reader { cursor: u64 },
    /// No reader writes such a thing, unless it is being written at this moment.
    Invalid,
}

impl Slot {
    fn decode(number: usize, bytes: &[u8]) -> Self {
        let word = |n: usize| {
            let bytes = bytes[8 * n..].first_chunk();
            u64::from_le_bytes(*bytes.expect("a slot has three words"))
        };
        let (cursor, process, check) = (word(0), word(1), word(2));
        // What nobody has written yet is a hole, or was filled with ones by an earlier version.
        if cursor == FREE || (cursor, process, check) == (0, 0, 0) {
            return Self::Free;
        }
        match check == check_word(number, cursor, process) && cursor <= MAX_POSITION {
            true => Self::Reader { cursor },
            false => Self::Invalid,
        }
    }

    fn encode(number: usize, cursor: u64) -> [u8; USED] {
        let process = u64::from(std::process::id());
        let mut bytes = [0; USED];
        let words = [cursor, process, check_word(number, cursor, process)];
        for (chunk, word) in bytes.chunks_exact_mut(8).zip(words) {
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

fn check_word(number: usize, cursor: u64, process: u64) -> u64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for word in [number as u64, cursor, process] {
        digest.update(&word.to_le_bytes());
    }
    // Never 0, which is what a hole has.
    digest.finalize() | 1 << 63
}

impl Registry {
    /// The registry of the log at `log` in its directory, for its broker: makes it if need be, and
    /// frees the slots of readers that died while no broker ran.
    pub(super) fn make(dir: &Dir, log: &Path, access: Access) -> Result<Self, OpenError> {
        let path = log.with_extension("readers");
        let file = dir
            .file(&beside(log, "readers"), Open::Make(0o600))
            .map_err(OpenError::io("open for writing", &path))?;
        let registry = Self { path, file };
        // Whole, so that a reader finds room for its slot when the file system is full by then.
        allocate(&registry.file, BYTES as u64).map_err(|source| match source.kind() {
            io::ErrorKind::StorageFull => OpenError::NoSpace {
                path: registry.path.clone(),
                bytes: BYTES as u64,
            },
            _ => OpenError::io("allocate", &registry.path)(source),
        })?;
        access.apply_to_registry(&registry.path, &registry.file)?;
        registry
            .sweep()
            .map_err(OpenError::io("free reader slots in", &registry.path))?;
        Ok(registry)
    }

    /// The registry of the log at `log`, which is `owner`'s, for a reader.
    pub(super) fn open(log: &Path, owner: u32) -> Result<Self, OpenError> {
        let path = log.with_extension("readers");
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(&path);
        let file = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => OpenError::NoRegistry(path.clone()),
            io::ErrorKind::PermissionDenied => OpenError::Denied {
                path: path.clone(),
                action: "register in",
            },
            _ => OpenError::io("open for writing", &path)(source),
        })?;
        let about = file.metadata().map_err(OpenError::io("look at", &path))?;
        // The reader's user may be able to write what the log's owner is not: then the log's owner
        // must not be able to choose it.
        if !about.is_file() || about.uid() != owner || about.nlink() != 1 {
            let what = io::Error::other("it is no file of the log's owner with this name alone");
            return Err(OpenError::io("register in", &path)(what));
        }
        Ok(Self { path, file })
    }

    /// Takes a slot for this open registry; `cursor` is the oldest batch needed.
    pub(super) fn register(&self, cursor: u64) -> Result<usize, OpenError> {
        let io = |action| OpenError::io(action, &self.path);
        // Twice: the broker holds the lock of a slot for a moment when it frees it.
        for number in (0..MAX_READERS).chain(0..MAX_READERS) {
            let taken = lock::try_lock(&self.file, number as u64);
            if taken.map_err(io("lock a reader slot in"))? {
                self.announce(number, cursor).map_err(io("write to"))?;
                return Ok(number);
            }
        }
        Err(OpenError::TooManyReaders {
            path: self.path.clone(),
            places: MAX_READERS,
        })
    }

    /// Says what the reader of a slot needs from now on; [`FREE`] for nothing.
    pub(super) fn announce(&self, number: usize, cursor: u64) -> io::Result<()> {
        let bytes = Slot::encode(number, cursor);
        self.file.write_all_at(&bytes, offset_of(number))
    }

    /// Frees the slots of readers that are gone; returns how many there were.
    pub(super) fn sweep(&self) -> io::Result<usize> {
        let mut gone = 0;
        for (number, slot) in self.slots()?.into_iter().enumerate() {
            // With its lock, so that no reader takes the slot at this moment.
            if slot == Slot::Free || !lock::try_lock(&self.file, number as u64)? {
                continue;
            }
            let freed = self.announce(number, FREE);
            lock::unlock(&self.file, number as u64)?;
            freed?;
            gone += usize::from(slot != Slot::Invalid);
        }
        Ok(gone)
    }

    fn slots(&self) -> io::Result<[Slot; MAX_READERS]> {
        let mut slots = self.read()?;
        for _ in 0..REREADS {
            if !slots.contains(&Slot::Invalid) {
                break;
            }
            slots = self.read()?;
        }
        Ok(slots)
    }

    fn read(&self) -> io::Result<[Slot; MAX_READERS]> {
        let mut bytes = [0; BYTES];
        // What a short read leaves is zero: free.
        self.file.read_at(&mut bytes, 0)?;
        let slot = |number: usize| Slot::decode(number, &bytes[number * SLOT_BYTES..]);
        Ok(std::array::from_fn(slot))
    }
}

impl ReaderCursors for Registry {
    fn load(&self) -> [u64; MAX_READERS] {
        match self.slots() {
            Ok(slots) => slots.map(|slot| match slot {
                Slot::Reader { cursor } => cursor,
                Slot::Free | Slot::Invalid => FREE,
            }),
            // Unknown: no reader may lose anything by that. `sweep` tells of it.
            Err(_) => [0; MAX_READERS],
        }
    }
}

fn offset_of(number: usize) -> u64 {
    (number * SLOT_BYTES) as u64
}

/// Gives a file that is ours exactly this length, allocated; what is in it stays.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    if file.metadata()?.len() > bytes {
        file.set_len(bytes)?;
    }
    super::file::allocate(file, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;
    use std::collections::HashSet;
    use std::fs;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    fn make(dir: &TempDir) -> Registry {
        let open = Dir::open(dir.path()).unwrap();
        Registry::make(&open, &dir.path().join("topic.log"), Access::default()).unwrap()
    }

    fn open(dir: &TempDir) -> Result<Registry, OpenError> {
        let owner = dir.path().metadata().unwrap().uid();
        Registry::open(&dir.path().join("topic.log"), owner)
    }

    fn made() -> (TempDir, Registry, Registry) {
        let dir = TempDir::new().unwrap();
        let broker = make(&dir);
        let reader = open(&dir).unwrap();
        (dir, broker, reader)
    }

    fn cursors(registry: &Registry) -> Vec<u64> {
        let all = registry.load().into_iter();
        all.filter(|cursor| *cursor != FREE).collect()
    }

    #[test]
    fn what_readers_do_to_the_file_is_no_harm_to_the_broker() {
        let (_dir, broker, reader) = made();
        let slot = reader.register(7).unwrap();
        assert_eq!(cursors(&broker), [7]);
        for len in [0, 1, 23, 63, 4096, 1 << 30] {
            reader.file.set_len(len).unwrap();
            let seen = cursors(&broker);
            assert!(seen.is_empty() || seen == [7], "{len}: {seen:?}");
            broker.sweep().unwrap();
            reader.announce(slot, 7).unwrap();
            assert_eq!(cursors(&broker), [7], "a reader that goes on is back");
        }
        for word in [0u64, 1, u64::MAX - 1, 1 << 63, 0x4141_4141_4141_4141] {
            let garbage: Vec<u8> = std::iter::repeat_n(word.to_le_bytes(), BYTES / 8)
                .flatten()
                .collect();
            reader.file.write_all_at(&garbage, 0).unwrap();
            assert_eq!(cursors(&broker), [], "{word:x}");
            broker.sweep().unwrap();
        }
        // A slot that was copied over another's names its own number.
        reader.announce(slot, 9).unwrap();
        let mut bytes = [0; USED];
        reader.file.read_exact_at(&mut bytes, 0).unwrap();
        reader.file.write_all_at(&bytes, offset_of(5)).unwrap();
        assert_eq!(cursors(&broker), [9]);
    }

    #[test]
    fn slots_of_dead_readers_are_freed_also_those_from_before_the_broker() {
        let (dir, broker, reader) = made();
        let (first, second) = (reader.register(1).unwrap(), reader.register(2));
        // Another slot, for the first one is this open file's already.
        assert_eq!(first, second.unwrap());
        let other = open(&dir).unwrap();
        assert_ne!(other.register(3).unwrap(), first);
        assert_eq!(broker.sweep().unwrap(), 0);
        drop(other);
        assert_eq!(broker.sweep().unwrap(), 1);
        drop((broker, reader));
        assert_eq!(cursors(&make(&dir)), []);
    }

    #[test]
    fn readers_write_to_nothing_but_a_file_of_the_logs_owner() {
        let (dir, _broker, _reader) = made();
        let path = dir.path().join("topic.readers");
        let precious = dir.path().join("precious");
        fs::rename(&path, &precious).unwrap();
        symlink(&precious, &path).unwrap();
        open(&dir).unwrap_err();
        fs::remove_file(&path).unwrap();
        fs::hard_link(&precious, &path).unwrap();
        open(&dir).unwrap_err();
        fs::remove_file(&precious).unwrap();
        open(&dir).unwrap();
        let log = dir.path().join("topic.log");
        Registry::open(&log, 54_321).unwrap_err();
        fs::remove_file(&path).unwrap();
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        open(&dir).unwrap_err();
    }

    #[test]
    fn a_full_registry_says_so() {
        let (dir, _broker, _reader) = made();
        let all: Vec<_> = (0..MAX_READERS).map(|_| open(&dir).unwrap()).collect();
        let slots: HashSet<_> = all.iter().map(|one| one.register(0).unwrap()).collect();
        assert_eq!(slots.len(), MAX_READERS);
        let full = open(&dir).unwrap().register(0).unwrap_err();
        assert!(matches!(full, OpenError::TooManyReaders { places, .. } if places == MAX_READERS));
    }
}
