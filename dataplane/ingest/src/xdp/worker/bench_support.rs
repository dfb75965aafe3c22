//! A worker without sockets, for `benches/`: frames in memory take the way of received packets, from the
//! first header byte to the ACK.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use penstock_auth::PacketKeys;
use penstock_log::Log;
use penstock_transport::Nanos;
use penstock_wire::handshake::{AckLevel, Path};
use penstock_wire::packet::{Data, StreamKey};
use penstock_xsk::{Endpoint, FrameTemplate, prefetch};
use zerocopy::IntoBytes;

use super::{Polling, Worker, WorkerConfig};
use crate::session::accepted_stream::AcceptedStream;
use crate::session::admission::{Admission, StreamState};
use crate::session::buffers::{RcvbufOn, RequestedBuffers};
use crate::session::peer::{Host, Tenant};
use crate::session::pending_streams::PendingStreams;
use crate::session::stream_filter::{FilterEntry, StreamFilter};

/// Packets of a burst: as many as a worker takes from a socket at a time.
pub const BURST: usize = penstock_xsk::BURST;

/// Lets every packet through.
#[derive(Debug)]
struct OpenFilter;

impl StreamFilter for OpenFilter {
    fn insert(&self, _: u64) -> bool {
        true
    }

    fn remove(&self, _: u64) {}
}

/// A worker to which frames are handed instead of received.
#[derive(Debug)]
pub struct SocketlessWorker {
    worker: Worker,
    filter: Arc<dyn StreamFilter>,
    /// The publishers' ends of the control connections.
    controls: Vec<TcpStream>,
}

impl SocketlessWorker {
    /// A worker without streams.
    ///
    /// # Errors
    /// If the kernel gives no epoll instance.
    pub fn new() -> io::Result<Self> {
        let filter: Arc<dyn StreamFilter> = Arc::new(OpenFilter);
        let pending_streams = Arc::new(PendingStreams::new(Arc::clone(&filter)));
        let config = WorkerConfig {
            verify_on_receive: false,
            polling: Polling::Busy,
            idle_timeout: Duration::from_secs(3600),
            capacity: 4 << 20,
        };
        let (worker, _) = Worker::new(
            config,
            Vec::new(),
            pending_streams,
            Arc::default(),
            Arc::default(),
        )?;
        Ok(Self {
            worker,
            filter,
            controls: Vec::new(),
        })
    }

    /// Opens a stream of a publisher at `peer` that writes `log`. The worker takes it up with its first
    /// packet.
    ///
    /// # Errors
    /// If no control connection can be made over loopback.
    pub fn open(
        &mut self,
        key: StreamKey,
        peer: SocketAddr,
        log: &Arc<Log>,
        keys: Option<PacketKeys>,
    ) -> io::Result<()> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let control = TcpStream::connect(listener.local_addr()?)?;
        let (socket, _) = listener.accept()?;
        socket.set_nonblocking(true)?;
        let buffers = RequestedBuffers {
            rcvbuf: 0,
            sndbuf: 1 << 16,
            rcvbuf_on: RcvbufOn::None,
            force: false,
        };
        let lease = Arc::new(StreamState::new(0)).lease();
        let opened = AcceptedStream {
            buffers: buffers.apply_to_accepted(&socket)?,
            socket,
            peer,
            admission: Admission {
                log: Arc::clone(log),
                topic: "bench".to_owned(),
                tenant: Tenant {
                    host: Host::of(peer),
                    key: None,
                },
                session: key.key,
                stream: u32::from(key.stream),
                ack: AckLevel::Committed,
                path: Path::Xdp,
                max_payload: log.geometry().max_payload(),
                max_datagram: 1472,
                lease: lease.expect("no other connection holds this stream"),
            },
            keys: keys.map(Arc::new),
        };
        let filter_entry = FilterEntry::new(&self.filter, key).expect("the filter is open");
        self.worker
            .table
            .pending_streams
            .insert(filter_entry, opened);
        self.controls.push(control);
        Ok(())
    }

    /// What a worker does with packets that a socket has for it: at most [`BURST`] of them. Returns how
    /// many ACKs that made.
    #[inline(never)]
    pub fn receive(&mut self, frames: &[&[u8]]) -> u64 {
        let table = &mut self.worker.table;
        let acks = table.metrics.xdp.acks;
        let now = table.now();
        for (index, frame) in frames.iter().enumerate() {
            if let Some(later) = frames.get(index + prefetch::AHEAD) {
                prefetch::frame(later);
            }
            table.datagram(0, &[frame], now);
        }
        let now = table.now();
        table.commit_dirty(now);
        table.write_acks(now, |_, frame| {
            std::hint::black_box(frame);
        });
        table.metrics.xdp.acks - acks
    }

    /// What a worker does now and then, as if this much time had passed. Its clock stays, so packets may not
    /// follow.
    ///
    /// # Errors
    /// If the kernel does not answer for the control connections.
    pub fn tick(&mut self, after: Duration) -> io::Result<()> {
        let now = self.worker.table.now() + Nanos::from(after);
        self.worker.tick(now)
    }

    /// Packets whose payload was placed.
    #[must_use]
    pub fn placed(&self) -> u64 {
        self.worker.table.metrics.xdp.placed
    }
}

/// A frame as the broker's interface gets it: headers from one end to another, a packet.
#[must_use]
pub fn frame(from: &Endpoint, to: &Endpoint, header: &Data, payload: &[u8]) -> Vec<u8> {
    let headers = FrameTemplate::new(from, to);
    let mut frame = vec![0; headers.len()];
    let parts = [header.as_bytes(), payload];
    headers.write(&mut frame, &parts);
    frame.extend(parts.concat());
    frame
}
