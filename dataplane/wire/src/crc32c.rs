//! CRC32C (RFC 3720 appendix B.4), the checksum of packets, batches and the log: of bytes, of bytes
//! that follow others, and of parts whose checksums are known.
//!
//! A CRC is linear, so the checksum of a whole follows from those of its parts without reading them
//! again. A publisher sums each part of a batch once, while it is in the first-level cache, and derives
//! the checksums of the batch and of each packet from that.

#[cfg(target_arch = "x86_64")]
mod fold;

use crc_fast::{CrcAlgorithm, Digest};

/// The generator polynomial of degree 32, reflected, without its highest term.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// CRC32C of `bytes`.
///
/// ```
/// use penstock_wire::crc32c::{Joiner, append, checksum};
///
/// // The check value of CRC-32/ISCSI.
/// assert_eq!(checksum(b"123456789"), 0xe306_9283);
/// assert_eq!(append(checksum(b"1234"), b"56789"), checksum(b"123456789"));
/// // Without reading the bytes again.
/// let joiner = Joiner::new(b"56789".len());
/// assert_eq!(joiner.join(checksum(b"1234"), checksum(b"56789")), checksum(b"123456789"));
/// ```
#[must_use]
pub fn checksum(bytes: &[u8]) -> u32 {
    append(0, bytes)
}

/// CRC32C of bytes whose checksum is `crc`, followed by `bytes`; 0 is the checksum of none.
#[inline]
#[must_use]
pub fn append(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if let Some(crc) = fold::append(crc, bytes) {
        return crc;
    }
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!crc));
    digest.update(bytes);
    digest.finalize() as u32
}

/// As [`append`], and copies `bytes` to `to`: both in one pass over them.
///
/// # Panics
/// If `to` has another length.
#[must_use]
pub fn append_and_copy(crc: u32, bytes: &[u8], to: &mut [u8]) -> u32 {
    assert_eq!(bytes.len(), to.len());
    #[cfg(target_arch = "x86_64")]
    if let Some(crc) = fold::append_and_copy(crc, bytes, to) {
        return crc;
    }
    to.copy_from_slice(bytes);
    append(crc, bytes)
}

/// Joins the checksums of two parts, of which the second has a length that is known beforehand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Joiner {
    len: usize,
    /// For each byte of a checksum, its contribution after the number of bytes that follow.
    contributions: Box<[[u32; 256]; 4]>,
}

impl Joiner {
    /// For second parts of `len` bytes. Takes some 50 µs.
    #[must_use]
    pub fn new(len: usize) -> Self {
        let shift = power_of_x(8 * len as u64);
        let contribution =
            |byte: usize, value: usize| multiply(shift, (value as u32) << (8 * byte));
        Self {
            len,
            contributions: Box::new(std::array::from_fn(|byte| {
                std::array::from_fn(|value| contribution(byte, value))
            })),
        }
    }

    /// Length of the second part, bytes.
    #[must_use]
    #[allow(
        clippy::len_without_is_empty,
        reason = "the length of a part, not of a collection"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Checksum of a part with checksum `first`, followed by one of [`Self::len`] bytes with checksum
    /// `second`.
    #[must_use]
    pub fn join(&self, first: u32, second: u32) -> u32 {
        let [a, b, c, d] = first.to_le_bytes();
        let table = &*self.contributions;
        table[0][usize::from(a)]
            ^ table[1][usize::from(b)]
            ^ table[2][usize::from(c)]
            ^ table[3][usize::from(d)]
            ^ second
    }
}

/// Product of two polynomials over GF(2), modulo the generator. Bits are reflected: the highest is x⁰.
const fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    let mut bit = 1 << 31;
    while bit != 0 {
        if a & bit != 0 {
            product ^= b;
        }
        b = (b >> 1) ^ (POLYNOMIAL * (b & 1));
        bit >>= 1;
    }
    product
}

/// xⁿ modulo the generator, reflected.
const fn power_of_x(mut n: u64) -> u32 {
    let mut power = 1 << 31;
    // x, x², x⁴, …
    let mut square = 1 << 30;
    while n > 0 {
        if n & 1 == 1 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        n >>= 1;
    }
    power
}

/// The definition, bit by bit, as an independent reference.
#[cfg(test)]
pub(super) fn bitwise(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |c, _| {
            (c >> 1) ^ (0x82f6_3b78 * (c & 1))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    #[test]
    fn the_check_value_is_the_published_one() {
        assert_eq!(checksum(b"123456789"), 0xe306_9283);
        assert_eq!(bitwise(b"123456789"), 0xe306_9283);
        assert_eq!(checksum(b""), 0);
    }

    #[test]
    fn every_length_is_summed_at_every_alignment() {
        let bytes: Vec<u8> = (0..2000u32).map(|n| ((n * n) >> 3) as u8).collect();
        for start in 0..40 {
            for len in (0..600).chain([1024, 1416, 1500, 1900]) {
                let part = &bytes[start..start + len];
                assert_eq!(checksum(part), bitwise(part), "{len} bytes from {start}");
                // Aligned otherwise, and with neighbours that stay as they are.
                let mut copy = vec![0xa5; len + 40];
                let to = &mut copy[start / 2..][..len];
                assert_eq!(
                    append_and_copy(0, part, to),
                    bitwise(part),
                    "{len} bytes from {start}"
                );
                assert_eq!(to, part);
                let beside = copy[..start / 2].iter().chain(&copy[start / 2 + len..]);
                assert!(
                    beside.into_iter().all(|byte| *byte == 0xa5),
                    "{len} bytes from {start}"
                );
            }
        }
    }

    proptest! {
        #[test]
        fn parts_make_the_whole(first in vec(any::<u8>(), 0..3000), second in vec(any::<u8>(), 0..3000)) {
            let whole = bitwise(&[&first[..], &second].concat());
            let (a, b) = (checksum(&first), checksum(&second));
            prop_assert_eq!(append(a, &second), whole);
            let mut copy = vec![0; second.len()];
            prop_assert_eq!(append_and_copy(a, &second, &mut copy), whole);
            prop_assert_eq!(&copy, &second);
            prop_assert_eq!(Joiner::new(second.len()).join(a, b), whole);
        }
    }
}
