//! CRC32C by carry-less multiplication of 256 bits, for processors that have it (Intel since Ice Lake,
//! AMD since Zen 3).
//!
//! A part of the message that stands `d` bits before another can be replaced by its product with
//! x^d mod P, added to the other ("Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
//! Instruction", Intel 2009). Four accumulators of 32 bytes run side by side, because a multiplication
//! takes longer than the time until the next can start. A copy costs next to nothing beside that: what is
//! loaded is stored as well, so that bytes need not be read again. docs/performance.md has the figures that
//! justify this beside `crc-fast`, which has no such code.

use std::arch::x86_64::{
    __m256i, _MM_HINT_ET0, _mm_clmulepi64_si128, _mm_crc32_u8, _mm_crc32_u64, _mm_extract_epi64,
    _mm_prefetch, _mm_xor_si128, _mm256_castsi256_si128, _mm256_clmulepi64_epi128,
    _mm256_extracti128_si256, _mm256_loadu_si256, _mm256_set_epi64x, _mm256_storeu_si256,
    _mm256_xor_si256,
};
use std::ptr;
use std::sync::atomic::{AtomicU8, Ordering};

use super::power_of_x;

/// Bytes of an accumulator.
const LANE: usize = 32;
/// Bytes of a cache line.
const LINE: usize = 64;
/// How far ahead the lines of the copy are fetched, bytes.
const FETCH_AHEAD: usize = 2048;
/// Bytes of all of them.
const LANES: usize = 4 * LANE;
/// Below this, the processor's CRC instruction is as fast.
const MIN_LEN: usize = LANES;

/// Multipliers for the lower and the upper 64 bits of 128 that stand `bits` before where they are
/// added. The product of two reflected numbers comes out shifted by one, hence the doubling.
const fn multipliers(bits: u64) -> [i64; 2] {
    [
        ((power_of_x(bits + 32) as u64) << 1) as i64,
        ((power_of_x(bits - 32) as u64) << 1) as i64,
    ]
}

const OVER_ALL: [i64; 2] = multipliers(8 * LANES as u64);
const OVER_ONE: [i64; 2] = multipliers(8 * LANE as u64);
const OVER_HALF: [i64; 2] = multipliers(4 * LANE as u64);

/// As [`super::append`]; none if this processor lacks an instruction.
pub(super) fn append(crc: u32, bytes: &[u8]) -> Option<u32> {
    // SAFETY: the processor has what the function is compiled for, and nothing is copied.
    has_instructions().then(|| unsafe { append_folded::<false>(crc, bytes, ptr::null_mut()) })
}

/// As [`super::append_and_copy`], of which it relies on the assertion; none if this processor lacks an
/// instruction.
pub(super) fn append_and_copy(crc: u32, bytes: &[u8], to: &mut [u8]) -> Option<u32> {
    assert_eq!(bytes.len(), to.len());
    // SAFETY: the processor has what the function is compiled for; `to` is as long as `bytes`.
    has_instructions().then(|| unsafe { append_folded::<true>(crc, bytes, to.as_mut_ptr()) })
}

/// Whether the processor has all the instructions: one of the constants below.
static SUPPORT: AtomicU8 = AtomicU8::new(UNKNOWN);
const UNKNOWN: u8 = 0;
const PRESENT: u8 = 1;
const ABSENT: u8 = 2;

/// Looked up for every packet, twice: one load, where four macros take some 30 instructions.
#[inline]
fn has_instructions() -> bool {
    // The value stands for nothing else in memory, so it needs no order.
    match SUPPORT.load(Ordering::Relaxed) {
        UNKNOWN => detect(),
        support => support == PRESENT,
    }
}

#[cold]
fn detect() -> bool {
    let has_all = is_x86_feature_detected!("vpclmulqdq")
        && is_x86_feature_detected!("pclmulqdq")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("sse4.2");
    SUPPORT.store(if has_all { PRESENT } else { ABSENT }, Ordering::Relaxed);
    has_all
}

/// With `COPY`, also writes the bytes to `to`.
///
/// # Safety
/// With `COPY`, `to` must be valid for writes of as many bytes.
#[target_feature(enable = "vpclmulqdq,pclmulqdq,avx2,sse4.2")]
unsafe fn append_folded<const COPY: bool>(crc: u32, bytes: &[u8], to: *mut u8) -> u32 {
    let (state, rest) = match bytes.len() >= MIN_LEN {
        // SAFETY: as our own.
        true => unsafe { fold::<COPY>(!crc, bytes, to) },
        false => (!crc, bytes),
    };
    let done = bytes.len() - rest.len();
    let (words, last) = rest.as_chunks::<8>();
    let mut state = u64::from(state);
    for (number, word) in words.iter().enumerate() {
        if COPY {
            // SAFETY: `to` is as long as `bytes`, and this word lies inside `bytes` at the same offset.
            unsafe { to.add(done + 8 * number).cast::<[u8; 8]>().write(*word) };
        }
        state = _mm_crc32_u64(state, u64::from_le_bytes(*word));
    }
    let done = bytes.len() - last.len();
    let mut state = state as u32;
    for (number, byte) in last.iter().enumerate() {
        if COPY {
            // SAFETY: as above.
            unsafe { to.add(done + number).write(*byte) };
        }
        state = _mm_crc32_u8(state, *byte);
    }
    !state
}

/// Folds all but the last bytes into 16, whose CRC is that of all; returns it, and those last bytes.
///
/// # Safety
/// As [`append_folded`]. There must be [`LANES`] bytes.
#[target_feature(enable = "vpclmulqdq,pclmulqdq,avx2,sse4.2")]
unsafe fn fold<const COPY: bool>(state: u32, bytes: &[u8], to: *mut u8) -> (u32, &[u8]) {
    let (blocks, rest) = bytes.as_chunks::<LANES>();
    // SAFETY: `to`, here and below, has room for what is loaded: as much lies before it in `bytes`.
    let mut sums = unsafe { load_all::<COPY>(&blocks[0], to) };
    sums[0] = _mm256_xor_si256(sums[0], _mm256_set_epi64x(0, 0, 0, i64::from(state)));
    let by = spread(OVER_ALL);
    for (number, block) in blocks.iter().enumerate().skip(1) {
        // SAFETY: as above.
        let next = unsafe { load_all::<COPY>(block, to.wrapping_add(number * LANES)) };
        sums = [
            fold_into(sums[0], by, next[0]),
            fold_into(sums[1], by, next[1]),
            fold_into(sums[2], by, next[2]),
            fold_into(sums[3], by, next[3]),
        ];
    }
    let by = spread(OVER_ONE);
    let mut sum = sums[0];
    for next in &sums[1..] {
        sum = fold_into(sum, by, *next);
    }
    let (lanes, rest) = rest.as_chunks::<LANE>();
    let done = blocks.len() * LANES;
    for (number, lane) in lanes.iter().enumerate() {
        // SAFETY: as above.
        let next = unsafe { load::<COPY>(lane, to.wrapping_add(done + number * LANE)) };
        sum = fold_into(sum, by, next);
    }
    let by = _mm256_castsi256_si128(spread(OVER_HALF));
    let (first, second) = (
        _mm256_castsi256_si128(sum),
        _mm256_extracti128_si256::<1>(sum),
    );
    let low = _mm_clmulepi64_si128::<0x00>(first, by);
    let high = _mm_clmulepi64_si128::<0x11>(first, by);
    let sum = _mm_xor_si128(_mm_xor_si128(low, high), second);
    let state = _mm_crc32_u64(0, _mm_extract_epi64::<0>(sum) as u64);
    let state = _mm_crc32_u64(state, _mm_extract_epi64::<1>(sum) as u64);
    (state as u32, rest)
}

/// `next`, and what `sum` contributes where it stands.
#[target_feature(enable = "vpclmulqdq,avx2")]
fn fold_into(sum: __m256i, by: __m256i, next: __m256i) -> __m256i {
    let low = _mm256_clmulepi64_epi128::<0x00>(sum, by);
    let high = _mm256_clmulepi64_epi128::<0x11>(sum, by);
    _mm256_xor_si256(_mm256_xor_si256(low, high), next)
}

#[target_feature(enable = "avx2")]
fn spread([low, high]: [i64; 2]) -> __m256i {
    _mm256_set_epi64x(high, low, high, low)
}

/// Asks for the lines of a block that is written soon, because packets mostly follow one another: a store to
/// a line that no cache holds takes as long as dozens of others.
fn fetch_to_write(block: *mut u8) {
    for line in 0..LANES / LINE {
        // SAFETY: a hint has no effect on memory, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(block.wrapping_add(line * LINE).cast()) };
    }
}

/// Loads a lane; with `COPY`, also writes it to `to`.
///
/// # Safety
/// With `COPY`, `to` must be valid for writes of `LANE` bytes.
#[target_feature(enable = "avx2")]
unsafe fn load<const COPY: bool>(lane: &[u8; LANE], to: *mut u8) -> __m256i {
    // SAFETY: reads the 32 bytes that are borrowed; the instruction asks for no alignment.
    let loaded = unsafe { _mm256_loadu_si256(lane.as_ptr().cast()) };
    if COPY {
        // SAFETY: as our own; the instruction asks for no alignment.
        unsafe { _mm256_storeu_si256(to.cast(), loaded) };
    }
    loaded
}

/// As [`load`].
///
/// # Safety
/// As [`load`].
#[target_feature(enable = "avx2")]
unsafe fn load_all<const COPY: bool>(block: &[u8; LANES], to: *mut u8) -> [__m256i; 4] {
    if COPY {
        fetch_to_write(to.wrapping_add(FETCH_AHEAD));
    }
    let (lanes, _) = block.as_chunks::<LANE>();
    // SAFETY: as our own.
    unsafe {
        [
            load::<COPY>(&lanes[0], to),
            load::<COPY>(&lanes[1], to.wrapping_add(LANE)),
            load::<COPY>(&lanes[2], to.wrapping_add(2 * LANE)),
            load::<COPY>(&lanes[3], to.wrapping_add(3 * LANE)),
        ]
    }
}
