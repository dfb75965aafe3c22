//! Positions of a topic's streams that belong to no current session: those of an earlier broker, and
//! those whose session expired. A publisher that missed an acknowledgement resumes such a stream and
//! sends the batch again, so the broker must know that the batch is in the log.

use std::collections::BTreeMap;

/// At least this many streams are added before the next prune.
const MIN_BETWEEN_PRUNES: usize = 1024;

/// Streams by session and number.
#[derive(Debug)]
pub struct EarlierStreams {
    streams: BTreeMap<(u64, u32), Position>,
    /// Number of batches that the log's index holds.
    index_slots: u64,
    prune_at: usize,
}

#[derive(Debug, Clone, Copy)]
struct Position {
    /// Batches committed: the next has this number.
    committed: u64,
    /// The log's frontier at that time. Once the index has wrapped around since, it holds no batch of
    /// the stream.
    frontier: u64,
}

impl EarlierStreams {
    /// The streams that a log's index holds at this frontier.
    pub fn new(
        found: impl IntoIterator<Item = ((u64, u32), u64)>,
        frontier: u64,
        index_slots: u64,
    ) -> Self {
        let position = |committed| Position {
            committed,
            frontier,
        };
        let streams: BTreeMap<_, _> = found
            .into_iter()
            .map(|(stream, committed)| (stream, position(committed)))
            .collect();
        let prune_at = streams.len() + MIN_BETWEEN_PRUNES.max(streams.len() / 4);
        Self {
            streams,
            index_slots,
            prune_at,
        }
    }

    /// Number of committed batches of a stream, if it is known.
    pub fn committed(&self, session: u64, stream: u32) -> Option<u64> {
        let position = self.streams.get(&(session, stream))?;
        Some(position.committed)
    }

    /// Whether a stream of this session is known.
    pub fn has_session(&self, session: u64) -> bool {
        let streams = (session, 0)..=(session, u32::MAX);
        self.streams.range(streams).next().is_some()
    }

    /// Adds a stream whose session expired at this frontier.
    pub fn remember(&mut self, session: u64, stream: u32, committed: u64, frontier: u64) {
        let position = Position {
            committed,
            frontier,
        };
        self.streams.insert((session, stream), position);
        if self.streams.len() >= self.prune_at {
            let oldest = frontier.saturating_sub(self.index_slots);
            self.streams
                .retain(|_, position| position.frontier > oldest);
            let len = self.streams.len();
            self.prune_at = len + MIN_BETWEEN_PRUNES.max(len / 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_are_known_as_long_as_a_batch_of_theirs_may_be_in_the_index() {
        let slots = 4096;
        let mut earlier = EarlierStreams::new([((1, 0), 5), ((1, 3), 7)], 100, slots);
        assert_eq!(earlier.committed(1, 3), Some(7));
        assert_eq!(earlier.committed(1, 1), None);
        assert!(earlier.has_session(1) && !earlier.has_session(0) && !earlier.has_session(2));
        let frontiers = 101..=200_000;
        for frontier in frontiers.clone() {
            earlier.remember(frontier, 0, 1, frontier);
        }
        let last = *frontiers.end();
        for frontier in last - slots + 1..=last {
            assert_eq!(earlier.committed(frontier, 0), Some(1), "{frontier}");
        }
        assert!(!earlier.has_session(1));
        assert!(earlier.streams.len() as u64 <= slots + slots / 4 + 2 * MIN_BETWEEN_PRUNES as u64);
    }
}
