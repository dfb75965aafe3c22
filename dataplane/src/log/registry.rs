//! Readers that a broker with `--full block` waits for: a small file beside the log, writable by
//! readers, so that the log itself can stay read-only for them.
//!
//! Each reader owns one place: a cursor in the mapping and a lock on the byte of the same number.
//! The lock goes when the reader goes, so a dead reader never holds up the broker for long.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use memmap2::{MmapOptions, MmapRaw};

use super::OpenError;
use super::access::Access;
use super::lock;
use super::ring::{FREE, Place};

/// Places in a registry.
const PLACES: usize = 64;
const BYTES: u64 = (PLACES * size_of::<Place>()) as u64;

/// A mapped registry.
#[derive(Debug)]
pub(super) struct Registry {
    path: PathBuf,
    file: File,
    map: MmapRaw,
}

impl Registry {
    /// The registry of the log at `log`, for its broker.
    pub(super) fn make(log: &Path, access: Access) -> Result<Self, OpenError> {
        let registry = Self::open(log)?;
        access.apply_to_registry(&registry.path, &registry.file)?;
        Ok(registry)
    }

    /// Opens the registry of the log at `log`, or makes it.
    pub(super) fn open(log: &Path) -> Result<Self, OpenError> {
        let path = log.with_extension("readers");
        let io = |action| {
            let path = &path;
            move |source: io::Error| match source.kind() {
                io::ErrorKind::PermissionDenied => OpenError::Denied {
                    path: path.clone(),
                    action: "register in",
                },
                io::ErrorKind::StorageFull => OpenError::NoSpace {
                    path: path.clone(),
                    bytes: BYTES,
                },
                _ => OpenError::io(action, path)(source),
            }
        };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io("open for writing"))?;
        initialise(&file).map_err(io("initialise"))?;
        let map = MmapOptions::new()
            .len(BYTES as usize)
            .map_raw(&file)
            .map_err(io("map"))?;
        Ok(Self { path, file, map })
    }

    pub(super) fn places(&self) -> &[Place] {
        // SAFETY: the mapping is page-aligned, BYTES long and lives as long as self; a Place is one
        // atomic word plus padding, valid for any bit pattern, and only accessed atomically.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast::<Place>(), PLACES) }
    }

    /// Takes a place for this open registry; `cursor` is the oldest batch needed.
    pub(super) fn register(&self, cursor: u64) -> Result<usize, OpenError> {
        for (number, place) in self.places().iter().enumerate() {
            let taken = lock::try_lock(&self.file, number as u64)
                .map_err(OpenError::io("lock a reader place in", &self.path))?;
            if taken {
                place.cursor.store(cursor, Ordering::SeqCst);
                return Ok(number);
            }
        }
        Err(OpenError::TooManyReaders {
            path: self.path.clone(),
            places: PLACES,
        })
    }

    /// Frees the places of readers that are gone; returns how many there were.
    pub(super) fn sweep(&self) -> io::Result<usize> {
        let mut gone = 0;
        for (number, place) in self.places().iter().enumerate() {
            if place.cursor.load(Ordering::Acquire) != FREE
                && !lock::is_locked(&self.file, number as u64)?
            {
                place.cursor.store(FREE, Ordering::Release);
                gone += 1;
            }
        }
        Ok(gone)
    }
}

/// Gives a new file its size and free places. Whoever comes second finds it done: the file gets
/// its size only by a write of the whole content.
fn initialise(file: &File) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    if file.metadata()?.len() < BYTES {
        file.write_all_at(&[0xff; BYTES as usize], 0)?;
    }
    Ok(())
}
