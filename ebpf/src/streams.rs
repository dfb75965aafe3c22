//! The open streams, in memory that the program reads: it drops packets of others.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Keys of streams, shared with the program. Changing them takes no privilege.
#[derive(Debug)]
pub struct Streams {
    memory: MmapRaw,
    places: usize,
}

/// Number of places for streams: a power of two, of which at most half is taken. So a new random key
/// finds its place free every other time at least.
pub(crate) fn places_for(streams: usize) -> u32 {
    u32::try_from(2 * streams.next_power_of_two()).expect("fewer streams than file descriptors")
}

impl Streams {
    /// Those in the program's map, and their number.
    pub(crate) fn of(map: BorrowedFd<'_>, places: u32) -> io::Result<Self> {
        let places = places as usize;
        let memory = MmapOptions::new()
            .len(places * size_of::<u64>())
            .map_raw(map.as_raw_fd())?;
        Ok(Self { memory, places })
    }

    /// Lets packets with this key through to their socket. Returns whether it could: another key may
    /// have the same place, and 0 is none.
    #[must_use]
    pub fn admit(&self, key: u64) -> bool {
        let place = self.place(key);
        let taken = place.compare_exchange(0, key, Ordering::AcqRel, Ordering::Relaxed);
        key != 0 && taken.is_ok()
    }

    /// Lets no packet with this key through any more; it was admitted.
    pub fn dismiss(&self, key: u64) {
        self.place(key).store(0, Ordering::Release);
    }

    fn place(&self, key: u64) -> &AtomicU64 {
        let number = key as usize & (self.places - 1);
        // SAFETY: the memory is of that many aligned numbers, lives as long as `self`, and is written
        // here only, atomically; the program reads each whole.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(number)) }
    }
}
