//! Log lines that peers can cause, at a limited rate: a flood must not fill the disk.

use std::time::{Duration, Instant};

/// Lines that may be written in a [`WINDOW`].
const LINES: u32 = 10;
const WINDOW: Duration = Duration::from_secs(1);

/// Counts the lines of one kind.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    since: Option<Instant>,
    lines: u32,
}

/// Whether a line is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is.
    Write,
    /// It is, as the last one for now; the counters go on.
    WriteLast,
    /// It is not.
    Skip,
}

impl LogLimit {
    pub(crate) fn next(&mut self, now: Instant) -> Verdict {
        if self.since.is_none_or(|since| now - since >= WINDOW) {
            (self.since, self.lines) = (Some(now), 0);
        }
        self.lines = self.lines.saturating_add(1);
        match self.lines {
            ..LINES => Verdict::Write,
            LINES => Verdict::WriteLast,
            _ => Verdict::Skip,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_a_second_and_no_more() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        for _ in 1..LINES {
            assert_eq!(limit.next(start), Verdict::Write);
        }
        assert_eq!(limit.next(start), Verdict::WriteLast);
        let later = start + WINDOW - Duration::from_nanos(1);
        assert_eq!(limit.next(later), Verdict::Skip);
        assert_eq!(limit.next(start + WINDOW), Verdict::Write);
    }
}
