//! The writers of one worker: one for each log that its streams write.

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use super::{Log, Writer};

/// Writers by number. The worker drops a log's writer with the last stream that writes it, so that the
/// log can be closed.
#[derive(Debug, Default)]
pub struct Writers(Vec<Option<Shared>>);

/// A writer, and how many streams have it.
#[derive(Debug)]
struct Shared {
    writer: Writer,
    streams: usize,
}

impl Writers {
    /// Returns the number of the log's writer for one more stream; it is valid until [`Self::leave`].
    pub fn join(&mut self, log: &Arc<Log>) -> usize {
        let is_of_log = |shared: &Option<Shared>| {
            shared
                .as_ref()
                .is_some_and(|s| Arc::ptr_eq(s.writer.log(), log))
        };
        if let Some(number) = self.0.iter().position(is_of_log) {
            self.shared(number).streams += 1;
            return number;
        }
        let new = Some(Shared {
            writer: log.writer(),
            streams: 1,
        });
        match self.0.iter().position(Option::is_none) {
            Some(free) => {
                self.0[free] = new;
                free
            }
            None => {
                self.0.push(new);
                self.0.len() - 1
            }
        }
    }

    /// Ends the use of a writer by a stream that joined.
    pub fn leave(&mut self, number: usize) {
        let shared = self.shared(number);
        shared.streams -= 1;
        if shared.streams == 0 {
            self.0[number] = None;
        }
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Writer> {
        self.0.iter().flatten().map(|shared| &shared.writer)
    }

    fn shared(&mut self, number: usize) -> &mut Shared {
        self.0[number].as_mut().expect("a stream has it")
    }
}

impl Index<usize> for Writers {
    type Output = Writer;

    fn index(&self, number: usize) -> &Writer {
        &self.0[number].as_ref().expect("a stream has it").writer
    }
}

impl IndexMut<usize> for Writers {
    fn index_mut(&mut self, number: usize) -> &mut Writer {
        &mut self.shared(number).writer
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::harness::small;

    #[test]
    fn a_log_has_one_writer_until_its_last_stream_leaves() {
        let dir = TempDir::new().unwrap();
        let open = |name: &str| Arc::new(Log::open(&dir.path().join(name), &small()).unwrap());
        let (a, b) = (open("a.log"), open("b.log"));
        let mut writers = Writers::default();
        let first = writers.join(&a);
        let other = writers.join(&b);
        assert_eq!(writers.join(&a), first);
        assert!(Arc::ptr_eq(writers[other].log(), &b));
        writers.leave(first);
        assert_eq!(writers.iter().count(), 2, "a stream still writes it");
        writers.leave(first);
        assert_eq!(Arc::strong_count(&a), 1, "it can be closed");
        assert!(
            Arc::ptr_eq(writers[other].log(), &b),
            "others keep their numbers"
        );
        assert_eq!(writers.join(&a), first, "its place is taken again");
    }
}
