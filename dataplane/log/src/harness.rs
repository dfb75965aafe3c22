//! Small logs, written, damaged and looked at: for tests and for fuzzing.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use penstock_wire::batch::checksum;

use super::layout::INDEX_OFFSET;
use super::slot::SLOT_BYTES;
use super::*;

const SEGMENT: u64 = 4096;
const SLOTS: u64 = 8;

/// Stream, sequence number and payload of a batch.
pub(crate) type Written = (u32, u64, Vec<u8>);

/// A ring of two segments with eight index slots.
pub(crate) fn small() -> LogOptions {
    LogOptions {
        geometry: Geometry::new(2 * SEGMENT, SEGMENT, SLOTS).expect("a good geometry"),
        full: RingFullPolicy::Overwrite,
        access: Access::default(),
        writers: 4,
    }
}

/// A payload that tells its place.
pub(crate) fn payload(stream: u32, seq: u64, len: usize) -> Vec<u8> {
    (0..len)
        .map(|n| (n as u64 * 31 + seq * 7 + u64::from(stream) * 13) as u8)
        .collect()
}

pub(crate) fn commit_for(stream: u32, batch_seq: u64, messages: u32, payload: &[u8]) -> Commit {
    Commit {
        session: 0xabc,
        stream,
        batch_seq,
        messages,
        checksum: checksum(batch_seq, messages, payload),
        arrival_unix_ns: 1,
    }
}

/// Writes one batch, waiting for its grant.
pub(crate) fn write(writer: &mut Writer, stream: u32, seq: u64, bytes: &[u8]) -> u64 {
    let reservation = writer.reserve(bytes.len() as u32);
    while !writer.is_granted(&reservation) {
        thread::yield_now();
    }
    writer.place(&reservation, 0, bytes);
    writer.commit(reservation, &commit_for(stream, seq, 1, bytes))
}

pub(crate) fn drain(reader: &mut Reader) -> Vec<Written> {
    let mut read = Vec::new();
    while let Some(batch) = reader.next().expect("nothing is lost or damaged") {
        batch.verify().expect("it is whole");
        read.push((batch.stream, batch.batch_seq, batch.payload.to_vec()));
    }
    read
}

/// A file without a name, which is gone with its last user.
pub(crate) struct Nameless(File);

impl Nameless {
    pub(crate) fn new() -> io::Result<Self> {
        const NAME: &CStr = c"penstock-test.log";
        // SAFETY: memfd_create reads the name, which is a C string, and nothing else of ours.
        let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made the descriptor, and no other code owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }.into()))
    }

    /// Opens the log in the file, as a broker that starts now would.
    pub(crate) fn log(&self) -> Result<Log, OpenError> {
        let file = self.0.try_clone().expect("a free descriptor");
        Log::of_file(&self.path(), file, None, &small())
    }

    /// Opens the file anew, each time.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// What a [`small`] log's file holds, as a broker that is started now finds it.
#[derive(Clone)]
pub(crate) struct Snapshot(Vec<(u64, Vec<u8>)>);

impl Snapshot {
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let geometry = small().geometry;
        let ring = (geometry.segments_offset(), geometry.ring_bytes() as usize);
        let parts = [
            (0, INDEX_OFFSET),
            (INDEX_OFFSET as u64, SLOTS as usize * SLOT_BYTES),
            ring,
        ];
        let file = File::open(path)?;
        let read = |(offset, len)| {
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, offset)?;
            Ok((offset, bytes))
        };
        parts
            .into_iter()
            .map(read)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// Of a log with so many batches of 700 bytes.
    pub(crate) fn with_batches(batches: u64) -> io::Result<Self> {
        let file = Nameless::new()?;
        Self(Vec::new()).write_to(&file.0)?;
        file.0.write_all_at(&small().geometry.encode(), 0)?;
        let log = Arc::new(file.log().map_err(io::Error::other)?);
        for seq in 0..batches {
            write(&mut log.writer(), 0, seq, &payload(0, seq, 700));
        }
        Self::of(&file.path())
    }

    pub(crate) fn write_to(&self, file: &File) -> io::Result<()> {
        file.set_len(small().geometry.file_bytes())?;
        let mut parts = self.0.iter();
        parts.try_for_each(|(offset, bytes)| file.write_all_at(bytes, *offset))
    }

    /// Flips bits of the byte at a position that counts through all parts.
    pub(crate) fn damage(&mut self, at: usize, bits: u8) {
        let all: usize = self.0.iter().map(|(_, bytes)| bytes.len()).sum();
        let mut at = at % all;
        for (_, bytes) in &mut self.0 {
            match bytes.get_mut(at) {
                Some(byte) => return *byte ^= bits,
                None => at -= bytes.len(),
            }
        }
    }
}

/// Opens a log that may be damaged as readers and a broker do: each of them terminates, and the
/// broker refuses it with a reason or can go on with it. Returns what readers with `--verify` get.
pub(crate) fn look_at(snapshot: &Snapshot) -> io::Result<HashSet<Written>> {
    let file = Nameless::new()?;
    let path = file.path();
    snapshot.write_to(&file.0)?;
    let mut served = HashSet::new();
    read_all(&path, &mut served);
    match file.log() {
        Ok(log) => {
            let log = Arc::new(log);
            read_all(&path, &mut served);
            let _ = log.streams();
            let mut reader = Reader::open(&path, Start::End).expect("a broker has it open");
            for seq in 0..3 {
                write(&mut log.writer(), 9, seq, &payload(9, seq, 50));
            }
            assert_eq!(drain(&mut reader).len(), 3, "a recovered log is a good one");
        }
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("move the file away"), "{text}");
        }
    }
    Ok(served)
}

fn read_all(path: &Path, served: &mut HashSet<Written>) {
    for start in [Start::Oldest, Start::End] {
        let Ok(mut reader) = Reader::open(path, start) else {
            return;
        };
        let _ = reader.info();
        // More calls than there can be batches, damage and gaps.
        for call in 0.. {
            assert!(call <= 3 * SLOTS, "a reader goes round in circles");
            match reader.next() {
                Ok(Some(batch)) if batch.verify().is_ok() => {
                    served.insert((batch.stream, batch.batch_seq, batch.payload.to_vec()));
                }
                Ok(None) => break,
                Ok(Some(_)) | Err(_) => {}
            }
        }
    }
}
