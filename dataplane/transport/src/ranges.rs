//! Sets of numbers that come nearly in order: packets received, bytes of a batch that are there.

/// Sorted, disjoint, not adjacent inclusive ranges; at most a fixed number of them.
#[derive(Debug, Clone, Default)]
pub struct Ranges {
    /// Rising.
    ranges: Vec<(u64, u64)>,
    most: usize,
}

impl Ranges {
    /// An empty set of at most `most` ranges; takes its memory at once.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            ranges: Vec::with_capacity(most + 1),
            most,
        }
    }

    /// An empty set of at most `most` ranges; allocates memory when needed.
    #[must_use]
    pub fn growing(most: usize) -> Self {
        Self {
            ranges: Vec::new(),
            most,
        }
    }

    /// Bytes of memory allocated.
    #[must_use]
    pub fn memory(&self) -> usize {
        self.ranges.capacity() * size_of::<(u64, u64)>()
    }

    /// Whether the allocated memory is full: one more range needs more.
    #[must_use]
    pub fn is_out_of_memory(&self) -> bool {
        self.ranges.len() == self.ranges.capacity()
    }

    /// Whether the numbers from `low` to `high` would form a new range, not extend another.
    #[must_use]
    pub fn adds_range(&self, low: u64, high: u64) -> bool {
        let first = self.ranges.partition_point(|&(_, to)| to + 1 < low);
        let next = self.ranges.get(first);
        next.is_none_or(|&(from, _)| from > high + 1)
    }

    /// Empties the set; it keeps its memory.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }

    /// The ranges, rising.
    #[must_use]
    pub fn ranges(&self) -> &[(u64, u64)] {
        &self.ranges
    }

    /// Whether one more range finds its place only by joining others.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.ranges.len() >= self.most
    }

    /// Whether the number is there.
    #[must_use]
    pub fn contains(&self, number: u64) -> bool {
        if self.ranges.last().is_none_or(|&(_, high)| high < number) {
            return false;
        }
        let at = self.ranges.partition_point(|&(_, high)| high < number);
        self.ranges.get(at).is_some_and(|&(low, _)| low <= number)
    }

    /// End (exclusive) of the range that begins with 0.
    #[must_use]
    pub fn prefix(&self) -> u64 {
        match self.ranges.first() {
            Some(&(0, high)) => high + 1,
            _ => 0,
        }
    }

    /// Whether it holds exactly the numbers below `end`, and at least one.
    #[must_use]
    pub fn is_prefix(&self, end: u64) -> bool {
        matches!(self.ranges[..], [(0, high)] if high + 1 == end)
    }

    /// The largest number.
    #[must_use]
    pub fn last(&self) -> Option<u64> {
        self.ranges.last().map(|&(_, high)| high)
    }

    /// Adds the numbers behind the largest one, up to `high`.
    ///
    /// # Panics
    /// If the set is empty.
    pub fn extend_last(&mut self, high: u64) {
        let (_, end) = self.ranges.last_mut().expect("there is a number");
        debug_assert!(*end < high && high < u64::MAX);
        *end = high;
    }

    /// How many of the numbers from `low` to `high` are not there yet.
    #[must_use]
    pub fn missing(&self, low: u64, high: u64) -> u64 {
        let overlap = |&(from, to): &(u64, u64)| to.min(high) - from.max(low) + 1;
        let first = self.ranges.partition_point(|&(_, to)| to < low);
        let inside = self.ranges[first..]
            .iter()
            .take_while(|&&(from, _)| from <= high);
        high - low + 1 - inside.map(overlap).sum::<u64>()
    }

    /// Adds the numbers from `low` to `high`. When there are too many ranges then, the lowest is
    /// forgotten.
    pub fn insert(&mut self, low: u64, high: u64) {
        debug_assert!(low <= high && high < u64::MAX);
        // Nearly always what comes is the next.
        if let Some((_, end)) = self.ranges.last_mut()
            && *end + 1 == low
        {
            *end = high;
            return;
        }
        // Ranges that touch the new one are joined with it.
        let first = self.ranges.partition_point(|&(_, to)| to + 1 < low);
        let behind = self.ranges.partition_point(|&(from, _)| from <= high + 1);
        if first == behind {
            self.ranges.insert(first, (low, high));
            if self.ranges.len() > self.most {
                self.ranges.remove(0);
            }
        } else {
            let joined = (
                low.min(self.ranges[first].0),
                high.max(self.ranges[behind - 1].1),
            );
            self.ranges[first] = joined;
            self.ranges.drain(first + 1..behind);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_the_set_of_what_was_inserted(inserts in vec((0u64..200, 0u64..20), 0..60)) {
            let mut ranges = Ranges::new(100);
            let mut model = BTreeSet::new();
            for (low, len) in inserts {
                let missing = (low..=low + len).filter(|n| !model.contains(n)).count() as u64;
                prop_assert_eq!(ranges.missing(low, low + len), missing);
                let (adds, before) = (ranges.adds_range(low, low + len), ranges.ranges().len());
                ranges.insert(low, low + len);
                prop_assert_eq!(adds, ranges.ranges().len() > before);
                model.extend(low..=low + len);
                let last = *model.last().unwrap();
                prop_assert_eq!(ranges.last(), Some(last));
                prop_assert_eq!(ranges.is_prefix(last + 1), model.len() as u64 == last + 1);
                prop_assert!(!ranges.is_prefix(last) && !ranges.is_prefix(last + 2));
                ranges.extend_last(last + 1);
                model.insert(last + 1);
            }
            for number in 0..230 {
                prop_assert_eq!(ranges.contains(number), model.contains(&number));
            }
            let prefix = (0..).find(|n| !model.contains(n)).unwrap();
            prop_assert_eq!(ranges.prefix(), prefix);
            let apart = ranges.ranges().windows(2).all(|pair| pair[0].1 + 1 < pair[1].0);
            prop_assert!(apart);
        }
    }

    #[test]
    fn the_lowest_range_gives_way() {
        let mut ranges = Ranges::new(2);
        for number in [1, 5, 9] {
            ranges.insert(number, number);
        }
        assert_eq!(ranges.ranges(), [(5, 5), (9, 9)]);
        assert!(ranges.is_full());
        ranges.insert(6, 8);
        assert_eq!(ranges.ranges(), [(5, 9)]);
        ranges.clear();
        assert_eq!(ranges.missing(0, 9), 10);
    }
}
