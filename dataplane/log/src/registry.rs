//! Readers that a broker with `--full block` waits for: a small file beside the log, writable by
//! readers, so that the log itself can stay read-only for them.
//!
//! Each reader owns one slot, and holds a lock on the byte of the same number. The kernel releases the
//! lock when the reader ends, so a dead reader does not block the broker for long.
//!
//! A process that may register may also truncate the file or write anything into it. So no process maps
//! it: reading beyond the end is a short read, where a mapping would raise SIGBUS. A slot counts only
//! if its check word fits, because the kernel does not promise an atomic copy of eight bytes.
//!
//! The broker can evict a reader that is alive but does not read: it records that it no longer waits
//! for the slot, and leaves a notice in it.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use penstock_files::{Dir, Open};
use penstock_wire::crc32c;

use super::OpenError;
use super::access::Access;
use super::layout::MAX_POSITION;
use super::lock;
use super::ring::{FREE, MAX_READERS, ReaderCursors};
use super::writer_lock::beside;

/// Bytes of a slot; the rest of its cache line is unused.
const SLOT_BYTES: usize = 64;
const BYTES: usize = MAX_READERS * SLOT_BYTES;
/// Bytes of a slot that the reader writes: cursor, process, check word.
const USED: usize = 24;
/// Bytes after them that the broker writes: the epoch in which it evicted the reader, check word.
const NOTICE: usize = 16;
/// Number of retries when a slot's check word does not fit: its reader may be writing it.
const REREADS: usize = 2;

/// An open registry.
#[derive(Debug)]
pub(super) struct Registry {
    path: PathBuf,
    file: File,
    /// Slots whose readers are evicted, one bit each; only the broker uses it.
    evicted: AtomicU64,
}

/// A registered reader, as its slot describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Registration {
    pub(super) slot: usize,
    pub(super) cursor: u64,
    pub(super) process: u64,
}

/// Contents of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Slot {
    /// Free.
    Free,
    /// A reader that needs every batch from this index on, and its process.
    Reader { cursor: u64, process: u64 },
    /// Inconsistent. A reader never leaves a slot so; it may be writing it at this moment.
    Invalid,
}

impl Slot {
    fn decode(number: usize, bytes: &[u8]) -> Self {
        let word = |n: usize| {
            let bytes = bytes[8 * n..].first_chunk();
            u64::from_le_bytes(*bytes.expect("a slot has three words"))
        };
        let (cursor, process, check) = (word(0), word(1), word(2));
        // An unwritten slot is a hole, or an earlier version filled it with ones.
        if cursor == FREE || (cursor, process, check) == (0, 0, 0) {
            return Self::Free;
        }
        match check == check_word(number, cursor, process) && cursor <= MAX_POSITION {
            true => Self::Reader { cursor, process },
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
    let words = [number as u64, cursor, process].map(u64::to_le_bytes);
    // Never 0, which is the content of a hole.
    u64::from(crc32c::checksum(words.as_flattened())) | 1 << 63
}

impl Registry {
    /// Opens the registry of the log at `log` in its directory, for its broker. Creates it if
    /// necessary, and frees the slots of readers that died while no broker ran.
    pub(super) fn make(dir: &Dir, log: &Path, access: Access) -> Result<Self, OpenError> {
        let path = log.with_extension("readers");
        let file = dir
            .file(&beside(log, "readers"), Open::Make(0o600))
            .map_err(OpenError::io("open for writing", &path))?;
        let registry = Self {
            path,
            file,
            evicted: AtomicU64::new(0),
        };
        // Allocated in full, so that a reader can write its slot even if the file system is full by
        // then.
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

    /// Opens the registry of the log at `log`, which belongs to `owner`, for a reader.
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
        // The reader's user may be able to write files that the log's owner cannot write, so the owner
        // must not be able to make the reader open such a file.
        if !about.is_file() || about.uid() != owner || about.nlink() != 1 {
            let what = io::Error::other("it must belong to the log's owner and have no other name");
            return Err(OpenError::io("register in", &path)(what));
        }
        Ok(Self {
            path,
            file,
            evicted: AtomicU64::new(0),
        })
    }

    /// Whether the file still has its name.
    pub(super) fn is_in_place(&self) -> io::Result<bool> {
        let ours = self.file.metadata()?;
        match std::fs::symlink_metadata(&self.path) {
            Ok(there) => Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes a slot for this open registry. `cursor` is the oldest batch needed, and `epoch` is that of
    /// the log.
    pub(super) fn register(&self, cursor: u64, epoch: u64) -> Result<usize, OpenError> {
        let io = |action| OpenError::io(action, &self.path);
        // Two attempts, because the broker briefly holds the lock of a slot that it frees.
        for number in (0..MAX_READERS).chain(0..MAX_READERS) {
            let taken = lock::try_lock(&self.file, number as u64);
            if taken.map_err(io("lock a reader slot in"))? {
                // The broker has not noticed yet that the evicted reader is gone.
                if self.is_evicted(number, epoch).map_err(io("read"))? {
                    lock::unlock(&self.file, number as u64).map_err(io("unlock a slot in"))?;
                    continue;
                }
                self.announce(number, cursor).map_err(io("write to"))?;
                return Ok(number);
            }
        }
        Err(OpenError::TooManyReaders {
            path: self.path.clone(),
            slots: MAX_READERS,
        })
    }

    /// Writes what the reader of a slot needs from now on; [`FREE`] if nothing.
    pub(super) fn announce(&self, number: usize, cursor: u64) -> io::Result<()> {
        let bytes = Slot::encode(number, cursor);
        self.file.write_all_at(&bytes, offset_of(number))
    }

    /// Whether a slot still contains what this process announced: other readers can write to the file.
    pub(super) fn still_says(&self, number: usize, cursor: u64) -> io::Result<bool> {
        let mut bytes = [0; USED];
        let len = self.file.read_at(&mut bytes, offset_of(number))?;
        Ok(len == USED && bytes == Slot::encode(number, cursor))
    }

    /// Frees the slots of dead readers; returns how many.
    pub(super) fn sweep(&self) -> io::Result<usize> {
        let mut gone = 0;
        for (number, slot) in self.slots()?.into_iter().enumerate() {
            let evicted = self.evicted.load(Ordering::Acquire) & bit(number) != 0;
            // Under its lock, so that no reader takes the slot at this moment.
            if slot == Slot::Free && !evicted || !lock::try_lock(&self.file, number as u64)? {
                continue;
            }
            let mut freed = self.announce(number, FREE);
            if evicted {
                let notice = offset_of(number) + USED as u64;
                freed = freed.and(self.file.write_all_at(&[0; NOTICE], notice));
                self.evicted.fetch_and(!bit(number), Ordering::AcqRel);
            }
            lock::unlock(&self.file, number as u64)?;
            freed?;
            gone += usize::from(!evicted && slot != Slot::Invalid);
        }
        Ok(gone)
    }

    /// Registered readers that are not evicted.
    pub(super) fn readers(&self) -> io::Result<Vec<Registration>> {
        let evicted = self.evicted.load(Ordering::Acquire);
        let slots = self.slots()?.into_iter().enumerate();
        let readers = slots.filter_map(|(slot, found)| match found {
            Slot::Reader { cursor, process } if evicted & bit(slot) == 0 => Some(Registration {
                slot,
                cursor,
                process,
            }),
            _ => None,
        });
        Ok(readers.collect())
    }

    /// Stops waiting for the reader of a slot, and leaves it a notice.
    ///
    /// # Errors
    /// If the notice cannot be written; the reader is evicted all the same.
    pub(super) fn evict(&self, number: usize, epoch: u64) -> io::Result<()> {
        let words = [epoch, notice_word(number, epoch)].map(u64::to_le_bytes);
        let written = self
            .file
            .write_all_at(words.as_flattened(), offset_of(number) + USED as u64);
        self.evicted.fetch_or(bit(number), Ordering::AcqRel);
        written
    }

    /// Whether the broker of this epoch evicted the reader of a slot.
    pub(super) fn is_evicted(&self, number: usize, epoch: u64) -> io::Result<bool> {
        let mut bytes = [0; NOTICE];
        let len = self
            .file
            .read_at(&mut bytes, offset_of(number) + USED as u64)?;
        let words = [epoch, notice_word(number, epoch)].map(u64::to_le_bytes);
        Ok(len == NOTICE && bytes == words.as_flattened())
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
        // Bytes that a short read leaves at zero mean a free slot.
        self.file.read_at(&mut bytes, 0)?;
        let slot = |number: usize| Slot::decode(number, &bytes[number * SLOT_BYTES..]);
        Ok(std::array::from_fn(slot))
    }
}

impl ReaderCursors for Registry {
    fn load(&self) -> [u64; MAX_READERS] {
        let evicted = self.evicted.load(Ordering::Acquire);
        match self.slots() {
            Ok(slots) => std::array::from_fn(|number| match slots[number] {
                Slot::Reader { cursor, .. } if evicted & bit(number) == 0 => cursor,
                Slot::Reader { .. } | Slot::Free | Slot::Invalid => FREE,
            }),
            // Unknown, so nothing may be overwritten that the reader might need. `sweep` reports it.
            Err(_) => [0; MAX_READERS],
        }
    }
}

/// Check word of a notice. It differs from a slot's check word even if epoch and cursor are equal.
fn notice_word(number: usize, epoch: u64) -> u64 {
    check_word(number, epoch, u64::MAX)
}

fn bit(number: usize) -> u64 {
    1 << number
}

fn offset_of(number: usize) -> u64 {
    (number * SLOT_BYTES) as u64
}

/// Sets a file to exactly this length and allocates it; keeps its contents.
fn allocate(file: &File, bytes: u64) -> io::Result<()> {
    if file.metadata()?.len() > bytes {
        file.set_len(bytes)?;
    }
    super::allocation::allocate(file, bytes)
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

    const EPOCH: u64 = 3;

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
    fn no_change_of_the_file_by_readers_harms_the_broker() {
        let (_dir, broker, reader) = made();
        let slot = reader.register(7, EPOCH).unwrap();
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
        // A slot that was copied over another one contains its own number, so its check word does not
        // fit.
        reader.announce(slot, 9).unwrap();
        let mut bytes = [0; USED];
        reader.file.read_exact_at(&mut bytes, 0).unwrap();
        reader.file.write_all_at(&bytes, offset_of(5)).unwrap();
        assert_eq!(cursors(&broker), [9]);
    }

    #[test]
    fn slots_of_dead_readers_are_freed_also_those_older_than_the_broker() {
        let (dir, broker, reader) = made();
        let (first, second) = (
            reader.register(1, EPOCH).unwrap(),
            reader.register(2, EPOCH),
        );
        // It takes another slot, because the first one already belongs to this open file.
        assert_eq!(first, second.unwrap());
        let other = open(&dir).unwrap();
        assert_ne!(other.register(3, EPOCH).unwrap(), first);
        assert_eq!(broker.sweep().unwrap(), 0);
        drop(other);
        assert_eq!(broker.sweep().unwrap(), 1);
        drop((broker, reader));
        assert_eq!(cursors(&make(&dir)), []);
    }

    #[test]
    fn readers_write_only_to_a_file_of_the_logs_owner() {
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
    fn a_full_registry_refuses_readers_with_the_reason() {
        let (dir, _broker, _reader) = made();
        let all: Vec<_> = (0..MAX_READERS).map(|_| open(&dir).unwrap()).collect();
        let slots: HashSet<_> = all
            .iter()
            .map(|one| one.register(0, EPOCH).unwrap())
            .collect();
        assert_eq!(slots.len(), MAX_READERS);
        let full = open(&dir).unwrap().register(0, EPOCH).unwrap_err();
        assert!(matches!(full, OpenError::TooManyReaders { slots, .. } if slots == MAX_READERS));
    }

    #[test]
    fn an_evicted_reader_blocks_nothing_and_its_slot_is_freed_at_its_end() {
        let (dir, broker, reader) = made();
        let slot = reader.register(7, EPOCH).unwrap();
        assert!(!reader.is_evicted(slot, EPOCH).unwrap());
        broker.evict(slot, EPOCH).unwrap();
        assert_eq!(cursors(&broker), []);
        assert_eq!(broker.readers().unwrap(), []);
        // Even if the reader continues to write its slot, and no matter which slots are swept.
        reader.announce(slot, 8).unwrap();
        assert_eq!(broker.sweep().unwrap(), 0);
        assert_eq!(cursors(&broker), []);
        assert!(reader.is_evicted(slot, EPOCH).unwrap());
        assert!(
            !reader.is_evicted(slot, EPOCH + 1).unwrap(),
            "of an earlier broker"
        );
        // No reader gets its slot before the broker knows that it is free.
        let other = open(&dir).unwrap();
        drop(reader);
        assert_ne!(other.register(9, EPOCH).unwrap(), slot);
        assert_eq!(broker.sweep().unwrap(), 0, "it did not die unnoticed");
        let third = open(&dir).unwrap();
        assert_eq!(third.register(10, EPOCH).unwrap(), slot);
        assert_eq!(cursors(&broker), [10, 9]);
    }
}
