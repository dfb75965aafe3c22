//! Which stream has which transmit queue: an AF_XDP socket has a queue to itself.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};

use penstock_runtime::poison::lock;

/// Queues of a publisher's interfaces that streams have.
#[derive(Debug, Default)]
pub(crate) struct TxQueues {
    /// Interface's index, and queue.
    taken: Mutex<HashSet<(u32, u32)>>,
}

impl TxQueues {
    /// The first of `queues` of an interface that no stream has.
    pub(crate) fn take(self: &Arc<Self>, interface: u32, queues: &[u32]) -> Option<Lease> {
        let mut taken = lock(&self.taken);
        let free = queues
            .iter()
            .find(|queue| taken.insert((interface, **queue)));
        free.map(|&queue| Lease {
            queues: Arc::clone(self),
            interface,
            queue,
        })
    }
}

/// A queue that is a stream's as long as this lives.
#[derive(Debug)]
pub(crate) struct Lease {
    queues: Arc<TxQueues>,
    interface: u32,
    pub(crate) queue: u32,
}

impl Drop for Lease {
    fn drop(&mut self) {
        lock(&self.queues.taken).remove(&(self.interface, self.queue));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_belongs_to_one_stream_at_a_time() {
        let queues = Arc::new(TxQueues::default());
        let first = queues.take(2, &[0, 3]).unwrap();
        let second = queues.take(2, &[0, 3]).unwrap();
        assert_eq!((first.queue, second.queue), (0, 3));
        assert!(queues.take(2, &[0, 3]).is_none());
        // Another interface has queues of its own.
        assert_eq!(queues.take(5, &[0]).unwrap().queue, 0);
        drop(first);
        assert_eq!(queues.take(2, &[3, 0]).unwrap().queue, 0);
    }
}
