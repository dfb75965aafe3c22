//! A stream after its handshake, and the queue from which a worker takes it.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender};
use penstock_auth::PacketKeys;
use penstock_runtime::poller::Poller;

use super::admission::Admission;
use super::buffers::EffectiveBuffers;

/// A stream that the accept loop has opened.
#[derive(Debug)]
pub(crate) struct AcceptedStream {
    pub(crate) socket: TcpStream,
    pub(crate) peer: SocketAddr,
    pub(crate) buffers: EffectiveBuffers,
    pub(crate) admission: Admission,
    /// Keys of its packets and frames, if they are authenticated.
    pub(crate) keys: Option<Arc<PacketKeys>>,
}

/// The queue of streams for one worker.
#[derive(Debug, Clone)]
pub struct StreamQueue {
    sender: Sender<AcceptedStream>,
    poller: Arc<Poller>,
    /// Number of streams in the queue or served by the worker.
    load: Arc<AtomicUsize>,
}

impl StreamQueue {
    /// A queue for the worker that waits on `poller`.
    pub(crate) fn new(poller: Arc<Poller>) -> (Self, Receiver<AcceptedStream>) {
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

    /// Queues a stream and wakes the worker.
    pub(crate) fn push(&self, stream: AcceptedStream) -> io::Result<()> {
        self.load.fetch_add(1, Ordering::Relaxed);
        if self.sender.send(stream).is_err() {
            return Err(io::Error::other("the worker has ended"));
        }
        self.poller.notify()
    }

    /// Notes that the worker has ended a stream.
    pub(crate) fn stream_ended(&self) {
        self.load.fetch_sub(1, Ordering::Relaxed);
    }
}
