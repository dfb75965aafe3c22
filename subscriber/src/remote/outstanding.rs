//! What a broker delivered and the caller has not finished with, in the order of the broker's log.

use std::collections::VecDeque;

use super::LogPosition;

/// A delivery that is not finished.
#[derive(Debug)]
struct Entry {
    is_finished: bool,
    /// Where the log goes on behind it.
    end: LogPosition,
    /// Number of the log, which rises when the broker makes it anew.
    generation: u64,
}

/// The deliveries of one broker.
#[derive(Debug)]
pub(super) struct Outstanding {
    entries: VecDeque<Entry>,
    /// Number of the first entry.
    first: u64,
    log: u64,
    generation: u64,
    /// Everything before it is finished, and the generation of its log.
    position: Option<LogPosition>,
    position_generation: u64,
}

impl Outstanding {
    pub(super) fn new(position: Option<LogPosition>) -> Self {
        Self {
            entries: VecDeque::new(),
            first: 0,
            log: position.map_or(0, |position| position.log),
            generation: 0,
            position,
            position_generation: 0,
        }
    }

    /// Deliveries from now on are of this log.
    pub(super) fn on_connected(&mut self, log: u64, is_new_log: bool) {
        self.log = log;
        if is_new_log {
            self.generation += 1;
            let entry = self.push(0, 0);
            self.finish(entry);
        } else if let Some(position) = &mut self.position {
            position.log = log;
        }
    }

    /// Adds a delivery about batch `index`, behind which batch `next` comes; returns its number.
    pub(super) fn push(&mut self, index: u64, next: u64) -> u64 {
        let begin = LogPosition {
            next: index,
            log: self.log,
        };
        self.position.get_or_insert(begin);
        self.entries.push_back(Entry {
            is_finished: false,
            end: LogPosition {
                next,
                log: self.log,
            },
            generation: self.generation,
        });
        self.first + self.entries.len() as u64 - 1
    }

    /// The caller needs the delivery with this number no more.
    pub(super) fn finish(&mut self, number: u64) {
        let entry = (number - self.first) as usize;
        self.entries[entry].is_finished = true;
        while self.entries.front().is_some_and(|entry| entry.is_finished) {
            let entry = self.entries.pop_front().expect("it is there");
            self.first += 1;
            self.position = Some(entry.end);
            self.position_generation = entry.generation;
        }
    }

    /// The first batch that is not finished.
    pub(super) fn position(&self) -> Option<LogPosition> {
        self.position
    }

    /// Index of that batch, and the generation of its log.
    pub(super) fn needed_from(&self) -> (u64, u64) {
        let next = self.position.map_or(0, |position| position.next);
        (next, self.position_generation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_position_moves_over_finished_deliveries_only() {
        let mut log = Outstanding::new(Some(LogPosition { next: 5, log: 0 }));
        let [a, b, c] = [6, 7, 8].map(|next| log.push(next - 1, next));
        log.finish(b);
        assert_eq!(log.needed_from(), (5, 0));
        log.finish(a);
        assert_eq!(log.needed_from(), (7, 0));
        // The broker makes its log anew while a batch is still in use.
        log.on_connected(9, true);
        let d = log.push(0, 1);
        log.finish(d);
        assert_eq!(log.position(), Some(LogPosition { next: 7, log: 0 }));
        log.finish(c);
        assert_eq!(log.position(), Some(LogPosition { next: 1, log: 9 }));
        assert_eq!(log.needed_from(), (1, 1));
    }
}
