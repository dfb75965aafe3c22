//! The queue from which a worker takes accepted connections.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender};
use penstock_runtime::poller::Poller;

use super::accepted_stream::AcceptedStream;
use super::accepted_subscriber::AcceptedSubscriber;

/// Streams for a worker of the tcp path.
pub type StreamQueue = WorkQueue<AcceptedStream>;
/// Subscribers for the worker that serves them.
pub type SubscriberQueue = WorkQueue<AcceptedSubscriber>;

/// The queue of connections for one worker.
#[derive(Debug)]
pub struct WorkQueue<T> {
    sender: Sender<T>,
    poller: Arc<Poller>,
    /// Number of connections in the queue or served by the worker.
    load: Arc<AtomicUsize>,
}

impl<T> Clone for WorkQueue<T> {
    fn clone(&self) -> Self {
        Self {
            sender: self.sender.clone(),
            poller: Arc::clone(&self.poller),
            load: Arc::clone(&self.load),
        }
    }
}

impl<T> WorkQueue<T> {
    /// A queue for the worker that waits on `poller`, and its other end.
    #[must_use]
    pub fn new(poller: Arc<Poller>) -> (Self, Receiver<T>) {
        let (sender, receiver) = crossbeam_channel::unbounded();
        let queue = Self {
            sender,
            poller,
            load: Arc::default(),
        };
        (queue, receiver)
    }

    pub(crate) fn load(&self) -> usize {
        self.load.load(Ordering::Relaxed)
    }

    /// Queues a connection and wakes the worker.
    pub(crate) fn push(&self, accepted: T) -> io::Result<()> {
        self.load.fetch_add(1, Ordering::Relaxed);
        if self.sender.send(accepted).is_err() {
            return Err(io::Error::other("the worker has ended"));
        }
        self.poller.notify()
    }

    /// Notes that the worker has ended a connection.
    pub fn ended(&self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
    }
}
