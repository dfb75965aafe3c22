// A broker of your own around Penstock's ingest path: one topic, one worker, tcp.
// `cargo run -p penstock-examples --example embed -- 127.0.0.1:1214 /dev/shm/penstock/demo.log`

use anyhow::{Context, Error, Result};
use penstock_ingest::session::admission::{
    Admission, Admit, Outcome, Refused, StreamRequest, StreamState,
};
use penstock_ingest::session::buffers::{RcvbufOn, RequestedBuffers};
use penstock_ingest::session::{Acceptor, Limits, Shared, listen};
use penstock_ingest::tcp::{Worker, WorkerConfig};
use penstock_log::{Access, Geometry, Log, LogOptions, RingFullPolicy};
use penstock_wire::handshake::Refusal;
use std::{collections::HashMap, env, net::TcpListener, path::Path, sync::Arc, thread};

pub(crate) const BUFFERS: RequestedBuffers = RequestedBuffers {
    rcvbuf: 4 << 20,
    sndbuf: 256 << 10,
    rcvbuf_on: RcvbufOn::Listener,
    force: false,
};

/// The log, and the batches committed per session and stream: a publisher continues after them.
struct Topic(Arc<Log>, HashMap<(u64, u32), Arc<StreamState>>);

impl Admit for Topic {
    fn check(&mut self, _: &StreamRequest<'_>) -> Result<(), Refused> {
        Ok(()) // Everyone may publish.
    }

    fn admit(&mut self, asked: &StreamRequest<'_>) -> Result<Outcome, Refused> {
        let refuse = |refusal, text| Refused { refusal, text };
        let (request, log) = (asked.request, Arc::clone(&self.0));
        let session = match request.session {
            0 => getrandom::u64().map_err(|e| refuse(Refusal::Resources, e.to_string()))?,
            earlier => earlier,
        };
        let (place, new) = ((session, request.stream), || StreamState::new(0).into());
        let lease = self.1.entry(place).or_insert_with(new).lease();
        let lease = lease.ok_or_else(|| refuse(Refusal::Busy, "already open".to_owned()))?;
        Ok(Outcome::Admitted(Box::new(Admission {
            max_payload: log.geometry().max_payload(),
            log,
            topic: asked.topic.to_owned(),
            tenant: asked.tenant,
            session,
            stream: request.stream,
            ack: request.ack,
            path: request.path,
            max_datagram: 0,
            lease,
        })))
    }
}

/// Serves publishers on `listener` for ever. Whatever they send goes into the log at `path`.
pub fn serve(listener: TcpListener, path: &Path) -> Result<()> {
    let options = LogOptions {
        geometry: Geometry::new(64 << 20, 8 << 20, 1 << 14).map_err(Error::msg)?,
        full: RingFullPolicy::Block,
        access: Access::default(),
        writers: 1,
    };
    let log = Arc::new(Log::open(path, &options)?);
    let committed = log.streams().into_iter();
    let streams = committed.map(|(place, batches)| (place, StreamState::new(batches).into()));
    let topic = Topic(log, streams.collect());
    let (shared, stop) = (Arc::<Shared>::default(), Arc::default());
    let (worker, _) = Worker::new(WorkerConfig::default(), shared.clone(), Arc::clone(&stop))?;
    let (limits, queues) = (Limits::default(), vec![worker.queue()]);
    let acceptor = Acceptor::new(listener, BUFFERS, limits, topic, queues, None, shared)?;
    thread::spawn(move || worker.run());
    Ok(acceptor.run(&stop)?)
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let mut next = || arguments.next().context("usage: embed ADDRESS LOG");
    serve(listen(next()?.parse()?, &BUFFERS)?, Path::new(&next()?))
}
