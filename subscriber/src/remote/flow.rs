//! Credit of a broker: how much it may send, and what the caller needs no more. Shared by the thread that reads
//! a connection and by the caller, who sends the requests.

use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex};

use penstock_auth::PacketKeys;
use penstock_runtime::poison::lock;
use penstock_wire::delivery::{Progress, Request, RequestFrame, Start, StartAt};
use socket2::SockRef;
use zerocopy::IntoBytes;

/// Buffers that are kept for further payloads.
const MAX_SPARE: usize = 64;

/// Credit of one broker, over all its connections.
#[derive(Debug)]
pub(super) struct Flow {
    /// Bytes that the broker may be ahead of the caller.
    window: u64,
    is_registered: bool,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Bytes of complete deliveries, over all connections.
    received: u64,
    /// Those that the caller has finished with.
    finished: u64,
    /// Index below which the caller needs nothing, in the log of this generation.
    needed_from: u64,
    generation: u64,
    connection: Option<Connection>,
    spare: Vec<Vec<u8>>,
    is_closed: bool,
}

#[derive(Debug)]
struct Connection {
    socket: TcpStream,
    keys: Option<Arc<PacketKeys>>,
    /// Frames sent.
    frames: u64,
    /// `received` when it was opened.
    base: u64,
    /// As last requested.
    credit: u64,
    needed_from: u64,
    /// Where the broker began, as far as is known: it takes no lower `needed_from`.
    began: Option<u64>,
}

impl Flow {
    pub(super) fn new(window: u64, is_registered: bool) -> Self {
        Self {
            window,
            is_registered,
            inner: Mutex::default(),
        }
    }

    /// Sends the first request over a new connection. `is_new_log`: indexes begin anew.
    pub(super) fn start(
        &self,
        socket: &TcpStream,
        keys: Option<Arc<PacketKeys>>,
        at: StartAt,
        is_new_log: bool,
    ) -> io::Result<()> {
        let socket = socket.try_clone()?;
        let mut inner = lock(&self.inner);
        if inner.is_closed {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        if is_new_log {
            inner.generation += 1;
            inner.needed_from = 0;
        }
        let base = inner.received;
        let mut connection = Connection {
            socket,
            keys,
            frames: 0,
            base,
            credit: (inner.finished + self.window).saturating_sub(base),
            needed_from: 0,
            began: match at {
                StartAt::Index(index) => Some(index),
                _ => None,
            },
        };
        let start = Request::Start(Start {
            at,
            is_registered: self.is_registered,
            credit: connection.credit,
        });
        connection.send(&start)?;
        inner.connection = Some(connection);
        Ok(())
    }

    /// The connection has ended.
    pub(super) fn end(&self) {
        lock(&self.inner).connection = None;
    }

    /// Ends the connection, and every later one.
    pub(super) fn close(&self) {
        let mut inner = lock(&self.inner);
        inner.is_closed = true;
        if let Some(connection) = inner.connection.take() {
            connection.cut();
        }
    }

    /// Bytes that the broker may send over the connection.
    pub(super) fn credit(&self) -> u64 {
        let inner = lock(&self.inner);
        inner.connection.as_ref().map_or(0, |open| open.credit)
    }

    /// A delivery of this many bytes is complete; it is about the batch with this index.
    pub(super) fn on_received(&self, bytes: u64, index: u64) {
        let mut inner = lock(&self.inner);
        inner.received += bytes;
        if let Some(connection) = &mut inner.connection {
            connection.began.get_or_insert(index);
        }
    }

    /// A buffer for a payload.
    pub(super) fn buffer(&self) -> Vec<u8> {
        lock(&self.inner).spare.pop().unwrap_or_default()
    }

    /// The caller has finished with deliveries of this many bytes, and needs no batch below `needed_from`.
    /// Requests more if that is due; lets the broker's log go on `at_once` if asked to.
    pub(super) fn finish(&self, finished: &mut Finished, at_once: bool) {
        let mut inner = lock(&self.inner);
        inner.finished += std::mem::take(&mut finished.bytes);
        let spare = finished.buffers.drain(..);
        let room = MAX_SPARE.saturating_sub(inner.spare.len());
        inner.spare.extend(spare.take(room));
        if finished.generation == inner.generation {
            inner.needed_from = inner.needed_from.max(finished.needed_from);
        }
        let (needed_from, limit) = (inner.needed_from, inner.finished + self.window);
        let Some(connection) = &mut inner.connection else {
            return;
        };
        let credit = limit.saturating_sub(connection.base).max(connection.credit);
        let more = credit - connection.credit;
        // What is held from an earlier connection is below the start of this one.
        let needed_from = needed_from.max(connection.began.unwrap_or(0));
        let releases = self.is_registered && needed_from > connection.needed_from;
        if more < self.window / 4 && !(at_once && releases) {
            return;
        }
        let progress = Progress {
            needed_from,
            credit,
        };
        match connection.send(&Request::Progress(progress)) {
            Ok(()) => {
                connection.credit = credit;
                connection.needed_from = needed_from;
            }
            // The reading thread notices it, and connects again.
            Err(_) => connection.cut(),
        }
    }
}

/// What the caller has finished with and the flow does not know yet.
#[derive(Debug, Default)]
pub(super) struct Finished {
    pub(super) bytes: u64,
    pub(super) needed_from: u64,
    /// Of the log that `needed_from` is about.
    pub(super) generation: u64,
    pub(super) buffers: Vec<Vec<u8>>,
}

impl Connection {
    /// Never waits: a broker that does not take a few bytes does not read at all.
    fn send(&mut self, request: &Request) -> io::Result<()> {
        let frame = RequestFrame::new(request);
        let mut bytes = frame.as_bytes().to_vec();
        if let Some(keys) = &self.keys {
            let tag = keys.seal_frame(self.frames, &[frame.as_bytes()]);
            bytes.extend_from_slice(&tag);
        }
        self.frames += 1;
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let sent = SockRef::from(&self.socket).send_with_flags(&bytes, flags)?;
        match sent == bytes.len() {
            true => Ok(()),
            false => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn cut(&self) {
        // Fails if the peer has closed it already.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}
