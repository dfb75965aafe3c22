//! One run: a broker whose buffer is sized in one way, a publisher that sends as fast as it can, and
//! both ends of their connection as the kernel reports them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;

use super::flags::Rcvbuf;
use crate::measure::rmem::RmemMax;
use crate::report::model::RcvbufRun;
use penstock_diagnose::namespaces::Namespace;
use penstock_diagnose::sockets::Socket;
use penstock_process::interrupt::Interrupt;
use penstock_runtime::tcp_info::TcpInfo;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster, PORT};
use penstock_testbed::netns::{self, Net};
use penstock_testbed::program_reports;
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::settings::{Mode, Route, Workload};

/// Time limit for the connection; longer than any delay and handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(20);
/// Batches in flight: 64 MiB, so that the window is the first limit.
const IN_FLIGHT: u32 = 1024;
/// More than any run takes.
pub const ENDLESS: Source = Source::Synthetic(ByteSize::tib(64));

/// Where the broker sets its buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    None,
    Accepted,
    Listener,
    Both,
    /// Both, past rmem_max.
    Force,
}

impl Case {
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Accepted,
        Self::Listener,
        Self::Both,
        Self::Force,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Accepted => "accepted",
            Self::Listener => "listener",
            Self::Both => "both",
            Self::Force => "force",
        }
    }

    fn workload(self, rcvbuf: ByteSize) -> Workload {
        let on = match self {
            Self::Force => Self::Both,
            other => other,
        };
        Workload {
            rcvbuf: Some(rcvbuf),
            rcvbuf_on: Some(on.name().to_owned()),
            rcvbuf_force: self == Self::Force,
            in_flight: Some(IN_FLIGHT),
            ..Workload::default()
        }
    }
}

/// What all runs share.
pub struct Bench<'a> {
    pub options: &'a Rcvbuf,
    pub binaries: &'a Binaries,
    pub net: &'a Net,
    pub seconds: Duration,
    pub folder: &'a Path,
    pub interrupt: &'a Interrupt,
}

/// The connection at one moment: the broker's end and the publisher's.
struct ConnectionSample {
    at: Instant,
    receiver: Socket,
    received: TcpInfo,
    sent: TcpInfo,
}

impl Bench<'_> {
    /// One run; its logs go to `name` in the folder.
    pub fn run(&self, case: Case, rmem_max: u64, name: &str) -> Result<RcvbufRun> {
        let folder = self.folder.join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let buffers = BufferDir::create()?;
        let workload = case.workload(self.options.rcvbuf);
        let changed = RmemMax::set(rmem_max)?;
        let mut cluster = self.brokers(&buffers, &workload, &folder)?;
        let publish = Publish {
            program: &self.binaries.publisher,
            namespace: Some(self.net.publisher()),
            cpus: None,
            brokers: cluster.addresses(),
            mode: Mode::Tcp,
            tx: None,
            workload: &workload,
            source: &ENDLESS,
            rate: None,
            digest: false,
            folder: &folder,
        };
        let mut publisher = publish.start(&folder.join("publisher.json"))?;
        let ends = Ends::open(self.net)?;
        let first = self.first_sample(&ends)?;
        // The kernel reads it only when a buffer is set or a connection accepted.
        drop(changed);
        let mut last = None;
        while first.at.elapsed() < self.seconds {
            self.interrupt.pause()?;
            cluster.check()?;
            last = ends.sample()?;
            if last.is_none() || publisher.ended()?.is_some() {
                return Err(publisher.failure("stopped sending before the run's end"));
            }
        }
        // It is no longer needed; the broker sees the connection end.
        drop(publisher);
        let connections = cluster.stop()?.into_iter().flat_map(|b| b.connections);
        let connection = connections.last().context("the broker saw no connection")?;
        figures(&connection, &first, &last.context("the run was too short")?)
    }

    fn brokers(&self, buffers: &BufferDir, workload: &Workload, folder: &Path) -> Result<Cluster> {
        let route = Route {
            mode: Mode::Tcp,
            tx: None,
            xdp_mode: None,
            poll: None,
        };
        let brokers = Brokers {
            count: 1,
            net: self.net,
            buffers,
            binaries: self.binaries,
            route: &route,
            workload,
            cpus: None,
            folder,
        };
        brokers.start(self.interrupt)
    }

    /// The first sample after the broker has answered, and so has sized the socket.
    fn first_sample(&self, ends: &Ends) -> Result<ConnectionSample> {
        let deadline = Instant::now() + CONNECT_LIMIT;
        loop {
            if let Some(sample) = ends.sample()?
                && sample.received.bytes_sent > 0
            {
                return Ok(sample);
            }
            ensure!(
                Instant::now() < deadline,
                "no connection after {CONNECT_LIMIT:?}; see publisher.log and broker-0.log in {}",
                self.folder.display()
            );
            self.interrupt.pause()?;
        }
    }
}

/// The namespaces of both ends.
struct Ends {
    broker: Namespace,
    publisher: Namespace,
}

impl Ends {
    fn open(net: &Net) -> Result<Self> {
        Ok(Self {
            broker: Namespace::open(&netns::handle_path(net.broker(0)))?,
            publisher: Namespace::open(&netns::handle_path(net.publisher()))?,
        })
    }

    /// `None` while there is no connection.
    fn sample(&self) -> Result<Option<ConnectionSample>> {
        let at = Instant::now();
        let (theirs, ours) = (self.broker.diag.sockets()?, self.publisher.diag.sockets()?);
        let is_it = |s: &&Socket| !s.is_listening() && s.local.port() == PORT && s.info.is_some();
        let Some(receiver) = theirs.into_iter().find(|s| is_it(&s)) else {
            return Ok(None);
        };
        let mirrored = |s: &&Socket| s.local == receiver.remote && s.remote == receiver.local;
        let sent = ours.iter().find(mirrored).and_then(|s| s.info);
        let both = receiver.info.zip(sent);
        Ok(both.map(|(received, sent)| ConnectionSample {
            at,
            receiver,
            received,
            sent,
        }))
    }
}

fn figures(
    connection: &program_reports::Connection,
    first: &ConnectionSample,
    last: &ConnectionSample,
) -> Result<RcvbufRun> {
    let seconds = last.at.duration_since(first.at).as_secs_f64();
    let percent = |of: fn(&TcpInfo) -> u64| {
        100.0 * of(&last.sent).saturating_sub(of(&first.sent)) as f64 * 1e-6 / seconds
    };
    let received = last.received.bytes_received - first.received.bytes_received;
    let memory = last.receiver.memory.as_ref();
    let at_accept = "the broker does not report its windows at accept; rebuild it";
    Ok(RcvbufRun {
        rcvbuf_requested: connection.rcvbuf_requested,
        rcvbuf_effective: connection.rcvbuf_effective,
        rcvbuf_final: memory.map_or(0, |m| m.receive_queue_max).into(),
        rcvbuf_capped: connection.rcvbuf_capped,
        window_scale: last.received.rcv_wscale().into(),
        rcv_ssthresh_first: connection.rcv_ssthresh_first.context(at_accept)?,
        rcv_ssthresh_final: last.received.rcv_ssthresh.into(),
        rcv_space_first: connection.rcv_space_first.context(at_accept)?,
        rcv_space_final: last.received.rcv_space.into(),
        mb_per_s: received as f64 / 1e6 / seconds,
        rwnd_limited_percent: percent(|info| info.rwnd_limited),
        sndbuf_limited_percent: percent(|info| info.sndbuf_limited),
        rtt_ms: f64::from(last.sent.rtt) / 1e3,
    })
}
