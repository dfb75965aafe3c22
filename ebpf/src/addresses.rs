//! The addresses that payload may be sent to, in memory that the program reads.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};

/// Maximum number of addresses of a broker.
pub const MAX_ADDRESSES: usize = 64;
/// Layout of the program's `struct addresses`: a count, and two halves of each address.
const WORDS: usize = 1 + 2 * MAX_ADDRESSES;

/// A broker's addresses, shared with the program. Changing them needs no privilege.
#[derive(Debug)]
pub struct Addresses {
    memory: MmapRaw,
}

impl Addresses {
    /// The addresses in the program's map.
    pub(crate) fn of(map: BorrowedFd<'_>) -> io::Result<Self> {
        let memory = MmapOptions::new()
            .len(WORDS * size_of::<u64>())
            .map_raw(map.as_raw_fd())?;
        Ok(Self { memory })
    }

    /// Lets the program accept packets to these addresses, and to no others. An address that stays
    /// keeps its slot, so it is never missing during the change. Returns whether there was room for
    /// all.
    #[must_use]
    pub fn set(&self, addresses: &[IpAddr]) -> bool {
        let wanted: Vec<_> = addresses.iter().copied().map(key_of).collect();
        let mut present = [(0, 0); MAX_ADDRESSES];
        for (place, there) in present.iter_mut().enumerate() {
            *there = self.get(place);
            if *there != (0, 0) && !wanted.contains(there) {
                *there = (0, 0);
                self.put(place, *there);
            }
        }
        let mut room = true;
        for key in wanted {
            if present.contains(&key) {
                continue;
            }
            match present.iter().position(|there| *there == (0, 0)) {
                Some(place) => {
                    present[place] = key;
                    self.put(place, key);
                }
                None => room = false,
            }
        }
        let count = present.iter().rposition(|there| *there != (0, 0));
        let count = count.map_or(0, |last| last as u64 + 1);
        self.word(0).store(count, Ordering::Release);
        room
    }

    fn get(&self, place: usize) -> (u64, u64) {
        let half = |half| self.word(1 + 2 * place + half).load(Ordering::Relaxed);
        (half(0), half(1))
    }

    /// The program may read between the two writes. An address that is half old and half new belongs to
    /// no host, and a packet to it still needs a stream key.
    fn put(&self, place: usize, (high, low): (u64, u64)) {
        self.word(1 + 2 * place).store(high, Ordering::Release);
        self.word(2 + 2 * place).store(low, Ordering::Release);
    }

    fn word(&self, number: usize) -> &AtomicU64 {
        assert!(number < WORDS);
        // SAFETY: the memory consists of that many aligned numbers, lives as long as `self`, and is
        // only written here, atomically; the program reads each number whole.
        unsafe { AtomicU64::from_ptr(self.memory.as_mut_ptr().cast::<u64>().add(number)) }
    }
}

/// The halves of an address as they lie in a packet; IPv4 addresses are stored as IPv4-mapped IPv6
/// ones.
fn key_of(address: IpAddr) -> (u64, u64) {
    let octets = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
    .octets();
    let (halves, _) = octets.as_chunks::<8>();
    (u64::from_ne_bytes(halves[0]), u64::from_ne_bytes(halves[1]))
}
