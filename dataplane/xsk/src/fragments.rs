//! A datagram's payload, read from front to back, in however many buffers it lies.

use super::port::MAX_BUFFERS;

/// What is left to be read.
#[derive(Debug)]
pub struct Pieces<'a> {
    current: &'a [u8],
    further: &'a [&'a [u8]],
    left: usize,
}

/// Where some of it lies: the first so many are in use.
pub type Parts<'a> = [&'a [u8]; MAX_BUFFERS];

impl<'a> Pieces<'a> {
    /// `len` bytes from `start` of the first of `buffers` on; those are at least one and at most
    /// [`MAX_BUFFERS`].
    #[inline]
    pub fn new(buffers: &'a [&'a [u8]], start: usize, len: usize) -> Self {
        Self {
            current: &buffers[0][start..],
            further: &buffers[1..],
            left: len,
        }
    }

    /// Whether nothing is left.
    #[inline]
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.left == 0
    }

    /// The next `len` bytes as parts, in order: returns how many parts, or nothing if it is not as
    /// long.
    #[inline]
    pub fn take(&mut self, len: usize, parts: &mut Parts<'a>) -> Option<usize> {
        self.left = self.left.checked_sub(len)?;
        let (mut count, mut missing) = (0, len);
        loop {
            let (part, rest) = self.current.split_at(missing.min(self.current.len()));
            if !part.is_empty() {
                parts[count] = part;
                count += 1;
            }
            self.current = rest;
            missing -= part.len();
            if missing == 0 {
                return Some(count);
            }
            (self.current, self.further) = {
                let (next, further) = self.further.split_first()?;
                (*next, further)
            };
        }
    }

    /// The next `len` bytes, if they lie in one buffer; nothing is read otherwise.
    #[inline]
    pub fn take_whole(&mut self, len: usize) -> Option<&'a [u8]> {
        let left = self.left.checked_sub(len)?;
        let (whole, rest) = self.current.split_at_checked(len)?;
        (self.current, self.left) = (rest, left);
        Some(whole)
    }

    /// The next `N` bytes, copied.
    #[inline]
    pub fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if let Some((whole, rest)) = self.current.split_first_chunk()
            && let Some(left) = self.left.checked_sub(N)
        {
            // Nearly always.
            (self.current, self.left) = (rest, left);
            return Some(*whole);
        }
        let mut parts: Parts<'a> = [&[]; MAX_BUFFERS];
        let count = self.take(N, &mut parts)?;
        let mut bytes = [0; N];
        let mut at = 0;
        for part in &parts[..count] {
            bytes[at..at + part.len()].copy_from_slice(part);
            at += part.len();
        }
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_reads_the_same_however_it_lies(
            buffers in vec(vec(any::<u8>(), 0..20), 1..=MAX_BUFFERS),
            lens in vec(0usize..12, 0..40),
            start in 0usize..20,
            more in 0usize..3,
        ) {
            let start = start.min(buffers[0].len());
            let whole = &buffers.concat()[start..];
            let buffers: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
            // Padding may follow; a header may also claim more than there is.
            let len = whole.len().saturating_sub(1) + more;
            let mut pieces = Pieces::new(&buffers, start, len);
            let mut at = 0;
            for want in lens {
                let mut parts: Parts<'_> = [&[]; MAX_BUFFERS];
                let got = match pieces.take_whole(want) {
                    Some(whole) => Some(whole.to_vec()),
                    None => pieces.take(want, &mut parts).map(|count| parts[..count].concat()),
                };
                if at + want > len.min(whole.len()) {
                    prop_assert_eq!(got, None);
                    break;
                }
                prop_assert_eq!(got.as_deref(), Some(&whole[at..at + want]));
                at += want;
                prop_assert_eq!(pieces.is_empty(), at == len);
            }
        }
    }

    #[test]
    fn an_array_may_lie_across_buffers() {
        let buffers: [&[u8]; 3] = [b"..ab", b"c", b"defg"];
        let mut pieces = Pieces::new(&buffers, 2, 6);
        assert_eq!(pieces.take_array(), Some(*b"abcde"));
        assert_eq!(pieces.take_array::<2>(), None);
    }
}
