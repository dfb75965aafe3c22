//! Asks the processor for bytes that are about to be needed. A packet that the kernel, or a NIC, has just
//! written lies in no cache of this core; a fetch takes longer than all else that is done to a packet.

/// Bytes of a cache line.
const LINE: usize = 64;

/// Packets between the one that is fetched and the one that is processed.
pub const AHEAD: usize = 2;
/// Bytes to fetch: headers and the beginning of the payload. The processor notices by itself that the lines
/// behind are read one after the other.
const LEN: usize = 4 * LINE;

/// Fetches the beginning of a frame.
#[inline]
pub fn frame(frame: &[u8]) {
    for line in frame[..LEN.min(frame.len())].chunks(LINE) {
        #[cfg(target_arch = "x86_64")]
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a hint has no effect on memory, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast()) };
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }
}
