//! A log file in memory, as writers and readers map it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::OpenError;
use super::allocation::no_space;
use super::layout::{self, CONTROL_OFFSET, EPOCH_OFFSET, Geometry, IDENTITY_OFFSET, INDEX_OFFSET};
use super::ring::{Control, Ring};
use super::sigbus::Watched;
use super::slot::{Descriptor, Slot};
use super::writer_lock;

/// Figures of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogInfo {
    /// Bytes of payload that the ring holds.
    pub ring_bytes: u64,
    /// Bytes of a segment.
    pub segment_bytes: u64,
    /// Batches that the index holds.
    pub index_slots: u64,
    /// Times that a writer has opened the log.
    pub epoch: u64,
    /// Batches committed since the log was created; the frontier.
    pub batches: u64,
    /// Messages committed since the log was created.
    pub messages: u64,
    /// Message bytes committed since the log was created, without framing.
    pub payload_bytes: u64,
}

/// A mapped log file; the base of [`Log`] and of a reader.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) path: PathBuf,
    pub(super) geometry: Geometry,
    /// Declared before the file and the mapping, because fields are dropped in this order.
    _watched: Watched,
    pub(super) file: File,
    map: MmapRaw,
}

impl Mapping {
    /// Maps an existing log for reading.
    pub(super) fn open_read_only(path: &Path) -> Result<Self, OpenError> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => OpenError::Missing(path.to_owned()),
            io::ErrorKind::PermissionDenied => OpenError::Denied {
                path: path.to_owned(),
                action: "read",
            },
            _ => OpenError::io("open", path)(source),
        })?;
        // The files beside the log are in the directory of the link's target, not of the link.
        let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        Self::map(&path, file, false)
    }

    pub(super) fn map(path: &Path, file: File, writable: bool) -> Result<Self, OpenError> {
        let geometry = read_geometry(path, &file)?;
        let options = {
            let mut options = MmapOptions::new();
            options.len(geometry.file_bytes() as usize);
            options
        };
        let map = match writable {
            true => options.map_raw(&file),
            false => options.map_raw_read_only(&file),
        }
        .map_err(OpenError::io("map", path))?;
        Ok(Self {
            path: path.to_owned(),
            geometry,
            _watched: Watched::new(map.as_ptr(), map.len(), file.as_raw_fd()),
            file,
            map,
        })
    }

    /// Touches every page, so that the hot path has no page faults.
    pub(super) fn populate(&self) -> Result<(), OpenError> {
        match self.map.advise(Advice::PopulateWrite) {
            // Kernels before 5.14 do not support it: pages are then touched on first use.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            Err(source) => Err(no_space(&self.path, self.geometry, "touch", source)),
            Ok(()) => Ok(()),
        }
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    pub(super) fn control(&self) -> &Control {
        // SAFETY: the mapping is page-aligned and longer than the control page; a Control consists
        // of atomic words, valid for any bit pattern and only accessed atomically. A reader's
        // mapping is read-only, and readers only load.
        unsafe { &*self.base().add(CONTROL_OFFSET).cast::<Control>() }
    }

    pub(super) fn slots(&self) -> &[Slot] {
        // SAFETY: the index lies inside the mapping (the file's length was checked against the
        // geometry), aligned to its slots; otherwise as in `control`.
        unsafe {
            let first = self.base().add(INDEX_OFFSET).cast::<Slot>();
            std::slice::from_raw_parts(first, self.geometry.index_slots() as usize)
        }
    }

    pub(super) fn epoch(&self) -> &AtomicU64 {
        // SAFETY: an aligned word inside the header page; otherwise as in `control`.
        unsafe { &*self.base().add(EPOCH_OFFSET).cast::<AtomicU64>() }
    }

    /// A random number that tells this log from another one of the same name; 0 until a writer of this version has
    /// opened it.
    pub(super) fn identity(&self) -> &AtomicU64 {
        // SAFETY: an aligned word inside the header page; otherwise as in `control`.
        unsafe { &*self.base().add(IDENTITY_OFFSET).cast::<AtomicU64>() }
    }

    /// View of the algorithm without readers and watermarks, as a reader has it.
    pub(super) fn ring(&self) -> Ring<'_> {
        Ring {
            geometry: self.geometry,
            control: self.control(),
            slots: self.slots(),
            readers: None,
            watermarks: &[],
        }
    }

    /// Where the byte at `position` lies.
    pub(super) fn payload_at(&self, position: u64) -> *mut u8 {
        // SAFETY: `offset_of` lies inside the mapping for every position.
        unsafe { self.base().add(self.geometry.offset_of(position)) }
    }

    /// Copies the payload of a batch that [`Geometry::may_hold`]; returns whether no writer touched it meanwhile.
    pub(super) fn copy_payload(&self, batch: &Descriptor, into: &mut Vec<u8>) -> bool {
        let len = batch.payload_len as usize;
        into.clear();
        into.reserve(len);
        // SAFETY: the batch lies inside one segment of the mapping, as the caller checked, and `into` has room for
        // it. A writer may be overwriting the bytes: then the copy is garbage, which `is_whole` detects, and
        // it is not used. Any bytes are valid `u8`s.
        unsafe {
            into.as_mut_ptr()
                .copy_from_nonoverlapping(self.payload_at(batch.position), len);
            into.set_len(len);
        }
        self.ring().is_whole(batch.position)
    }

    pub(super) fn is_written(&self) -> io::Result<bool> {
        writer_lock::is_written(&self.path)
    }

    pub(super) fn info(&self) -> LogInfo {
        let ring = self.ring();
        // If a slot is reused while its totals are read, they belong to a later batch. The slot of the newest
        // batch is not reused; if the batch is missing nevertheless, the slot is damaged, and so may be its
        // totals.
        loop {
            let batches = ring.frontier();
            let totals = ring.totals_below(batches);
            let newest = batches.checked_sub(1);
            let is_there = newest.is_none_or(|newest| ring.slot(newest).holds(newest));
            if is_there || ring.frontier() == batches {
                return LogInfo {
                    ring_bytes: self.geometry.ring_bytes(),
                    segment_bytes: self.geometry.segment_bytes(),
                    index_slots: self.geometry.index_slots(),
                    epoch: self.epoch().load(Ordering::Relaxed),
                    batches,
                    messages: totals.messages,
                    payload_bytes: totals.payload_bytes,
                };
            }
        }
    }
}

fn read_geometry(path: &Path, file: &File) -> Result<Geometry, OpenError> {
    use std::os::unix::fs::FileExt;
    let io = OpenError::io("read", path);
    let about = file.metadata().map_err(&io)?;
    if !about.is_file() {
        return Err(io(io::Error::other("it is not a regular file")));
    }
    let len = about.len();
    let mut header = vec![0; layout::HEADER_LEN.min(len as usize)];
    file.read_exact_at(&mut header, 0).map_err(&io)?;
    Geometry::decode(&header, len).map_err(|reason| OpenError::Header {
        path: path.to_owned(),
        reason,
    })
}
