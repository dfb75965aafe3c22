//! Sequential access to a datagram's payload, which may lie in several buffers.

use super::rx_socket::MAX_BUFFERS;

/// Reads a payload from front to back.
#[derive(Debug)]
pub struct FragmentReader<'a> {
    current: &'a [u8],
    further: &'a [&'a [u8]],
    left: usize,
}

/// Fragments of a payload in order; unused ones at the end are empty.
pub type Fragments<'a> = [&'a [u8]; MAX_BUFFERS];

impl<'a> FragmentReader<'a> {
    /// Reads `len` bytes from offset `start` of the first of `buffers`, which are 1 to [`MAX_BUFFERS`].
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

    /// Takes the next `len` bytes as fragments; returns the number of fragments, or `None` if fewer bytes
    /// are left.
    #[inline]
    pub fn take(&mut self, len: usize, fragments: &mut Fragments<'a>) -> Option<usize> {
        self.left = self.left.checked_sub(len)?;
        let (mut count, mut missing) = (0, len);
        loop {
            let (fragment, rest) = self.current.split_at(missing.min(self.current.len()));
            if !fragment.is_empty() {
                fragments[count] = fragment;
                count += 1;
            }
            self.current = rest;
            missing -= fragment.len();
            if missing == 0 {
                return Some(count);
            }
            (self.current, self.further) = {
                let (next, further) = self.further.split_first()?;
                (*next, further)
            };
        }
    }

    /// Takes the next `len` bytes if they lie in one buffer; reads nothing otherwise.
    #[inline]
    pub fn take_whole(&mut self, len: usize) -> Option<&'a [u8]> {
        let left = self.left.checked_sub(len)?;
        let (whole, rest) = self.current.split_at_checked(len)?;
        (self.current, self.left) = (rest, left);
        Some(whole)
    }

    /// Copies the next `N` bytes.
    #[inline]
    pub fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        if let Some((whole, rest)) = self.current.split_first_chunk()
            && let Some(left) = self.left.checked_sub(N)
        {
            // The usual case.
            (self.current, self.left) = (rest, left);
            return Some(*whole);
        }
        let mut fragments: Fragments<'a> = [&[]; MAX_BUFFERS];
        let count = self.take(N, &mut fragments)?;
        let mut bytes = [0; N];
        let mut at = 0;
        for fragment in &fragments[..count] {
            bytes[at..at + fragment.len()].copy_from_slice(fragment);
            at += fragment.len();
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
        fn the_distribution_over_buffers_does_not_matter(
            buffers in vec(vec(any::<u8>(), 0..20), 1..=MAX_BUFFERS),
            lens in vec(0usize..12, 0..40),
            start in 0usize..20,
            more in 0usize..3,
        ) {
            let start = start.min(buffers[0].len());
            let whole = &buffers.concat()[start..];
            let buffers: Vec<&[u8]> = buffers.iter().map(Vec::as_slice).collect();
            // Padding may follow, and a header may claim more bytes than the buffers have.
            let len = whole.len().saturating_sub(1) + more;
            let mut reader = FragmentReader::new(&buffers, start, len);
            let mut at = 0;
            for want in lens {
                let mut fragments: Fragments<'_> = [&[]; MAX_BUFFERS];
                let got = match reader.take_whole(want) {
                    Some(whole) => Some(whole.to_vec()),
                    None => reader.take(want, &mut fragments).map(|count| fragments[..count].concat()),
                };
                if at + want > len.min(whole.len()) {
                    prop_assert_eq!(got, None);
                    break;
                }
                prop_assert_eq!(got.as_deref(), Some(&whole[at..at + want]));
                at += want;
                prop_assert_eq!(reader.is_empty(), at == len);
            }
        }
    }

    #[test]
    fn an_array_may_span_buffers() {
        let buffers: [&[u8]; 3] = [b"..ab", b"c", b"defg"];
        let mut reader = FragmentReader::new(&buffers, 2, 6);
        assert_eq!(reader.take_array(), Some(*b"abcde"));
        assert_eq!(reader.take_array::<2>(), None);
    }
}
