//! Prefetches received packets. A packet that the kernel or a NIC has just written is in no cache of this
//! core, and such a cache miss costs more than all other work on the packet.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Distance in packets between the one that is fetched and the one that is processed.
pub const AHEAD: usize = 2;
/// Bytes to fetch: headers and the beginning of the payload. The hardware prefetcher fetches the lines
/// behind them.
const LEN: usize = 4 * LINE;

/// Fetches the beginning of a frame.
#[inline]
pub fn frame(frame: &[u8]) {
    for line in frame[..LEN.min(frame.len())].chunks(LINE) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch has no effect on memory, at any address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}
