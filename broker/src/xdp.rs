//! Sets up the xdp path: a socket for each receive queue, the program on the interface, workers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::{Context, Result};
use penstock_ebpf::{Attached, Mode, Outcomes, Steering, Streams};
use penstock_ingest::session::{DatagramPath, PendingStreams, Shared, StreamFilter, WorkerStats};
use penstock_ingest::xdp::{Worker, WorkerConfig, WorkerHandle, XdpStats};
use penstock_nic::{Facts, quote};
use penstock_wire::packet::DATA_MAGIC;
use penstock_xsk::{
    ETHERNET, HEADROOM, LONGEST_PACKET, MAX_BUFFERS, XskRxConfig, XskRxSocket, fits, frame_size,
};
use serde::Serialize;
use tracing::{info, warn};

use crate::following::Follower;
use crate::nic::Ready;
use crate::xdp_settings::XdpSettings;

/// Headers of IPv4 and UDP.
const IP_UDP: u32 = 28;

/// The opened path. Dropping it removes the program from the interface.
pub struct Xdp {
    steering: Steering,
    attached: Attached,
    queues: Vec<usize>,
    /// Whether it serves all of the interface's queues.
    serves_all: bool,
    /// The number of queues when last checked.
    queues_seen: AtomicU32,
    zero_copy: bool,
    max_datagram: u32,
    pending_streams: Arc<PendingStreams>,
    follower: Option<Follower>,
    /// Dropped last: the settings are reverted after the program is removed.
    interface: Ready,
}

/// The path's part of the report.
#[derive(Debug, Serialize)]
pub struct XdpReport {
    interface: String,
    /// How the interface runs the program: native or generic.
    xdp_mode: String,
    zero_copy: bool,
    queues: Vec<usize>,
    /// Packets by the program's outcome; missing if the kernel does not report them.
    #[serde(serialize_with = "as_map", skip_serializing_if = "Option::is_none")]
    outcomes: Option<Outcomes>,
    #[serde(flatten)]
    stats: XdpStats,
}

impl Xdp {
    /// Opens the sockets, attaches the program and creates the workers. The interface must be free: a
    /// socket would only report that the queue is busy.
    pub fn open(
        config: &XdpSettings,
        ready: Ready,
        listen: SocketAddr,
        max_streams: usize,
        shared: &Arc<Shared>,
        stop: &Arc<AtomicBool>,
    ) -> Result<(Self, Vec<(Worker, WorkerHandle)>)> {
        let interface = &ready.facts.interface;
        let mtu = ready.facts.mtu;
        let queues = match &config.queues {
            Some(queues) => queues.clone(),
            None => (0..ready.facts.queues as usize).collect(),
        };
        // Workers share a queue if there are more workers than queues.
        let sharing = config.workers.div_ceil(queues.len()) as u32;
        let mut follower = Follower::open(ready.facts.index, listen)?;
        let mut steering = Steering::load(&penstock_ebpf::Config {
            addresses: follower.addresses()?,
            port: listen.port(),
            magic: DATA_MAGIC,
            queues: queues.iter().max().map_or(1, |last| *last as u32 + 1),
            sockets_per_queue: sharing,
            streams: max_streams,
        })?;
        follower.update_from_now_on(steering.addresses()?);
        // Until it has sockets to redirect packets to, the program passes them to the kernel.
        let attached = steering.attach(interface, ready.mode, config.force)?;
        let longest = match attached.mode {
            Mode::Generic => LONGEST_PACKET,
            Mode::Native | Mode::Auto => mtu,
        };
        // A generic program sees packets after the kernel has copied them.
        let copy = config.copy || attached.mode == Mode::Generic;
        let driver_writes = !copy && ready.facts.xdp.is_some_and(|xdp| xdp.zero_copy);
        let frame_size = frame_size(longest, driver_writes);
        let mut ports: Vec<Vec<XskRxSocket>> = (0..config.workers).map(|_| Vec::new()).collect();
        let mut zero_copy = true;
        let mut next = 0;
        for &queue in &queues {
            let settings = XskRxConfig {
                interface: interface.clone(),
                queue: queue as u32,
                ring: config.ring,
                frame_size,
                several_buffers: !fits(longest, frame_size, driver_writes),
                copy,
                busy_poll: config.busy_poll,
            };
            let opened = XskRxSocket::open(&settings, sharing).or_else(|error| {
                // Before Linux 6.6 a packet has one buffer; packets of the size of the MTU may fit.
                if !settings.several_buffers || !fits(mtu, frame_size, driver_writes) {
                    return Err(error);
                }
                let settings = XskRxConfig {
                    several_buffers: false,
                    ..settings.clone()
                };
                XskRxSocket::open(&settings, sharing)
            });
            for (number, port) in opened?.into_iter().enumerate() {
                zero_copy &= port.is_zero_copy();
                steering.insert(queue as u32, number as u32, port.fd())?;
                ports[next % config.workers].push(port);
                next += 1;
            }
        }
        let filter = Arc::new(Program(steering.streams()?));
        let pending_streams = Arc::new(PendingStreams::new(filter));
        let per_queue =
            u64::from(config.ring) * u64::from((mtu - IP_UDP).min(frame_size - HEADROOM));
        let workers = ports.into_iter().map(|ports| {
            let worker = WorkerConfig {
                verify_on_receive: config.verify_on_receive,
                polling: config.polling,
                idle_timeout: config.idle_timeout,
                // A quarter stays free for retransmissions.
                capacity: per_queue * ports.len() as u64 * 3 / 4 / u64::from(sharing),
            };
            let (pending_streams, shared) = (Arc::clone(&pending_streams), Arc::clone(shared));
            Worker::new(worker, ports, pending_streams, shared, Arc::clone(stop))
                .context("cannot start a worker")
        });
        let workers = workers.collect::<Result<Vec<_>>>()?;
        let max_datagram =
            mtu.min(MAX_BUFFERS as u32 * (frame_size - HEADROOM) - ETHERNET) - IP_UDP;
        if max_datagram < mtu - IP_UDP {
            info!(
                mtu,
                max_datagram,
                "datagrams are smaller than the MTU: a packet must fit into its buffers"
            );
        }
        info!(
            interface,
            mode = %attached.mode,
            zero_copy,
            queues = ?queues,
            workers = config.workers,
            mtu,
            frame_size,
            program = attached.id,
            "xdp path open"
        );
        let xdp = Self {
            steering,
            attached,
            serves_all: config.queues.is_none(),
            queues_seen: AtomicU32::new(queues.len() as u32),
            queues,
            zero_copy,
            max_datagram,
            pending_streams,
            follower: Some(follower),
            interface: ready,
        };
        Ok((xdp, workers))
    }

    /// The interface, as it was found.
    pub fn facts(&self) -> &Facts {
        &self.interface.facts
    }

    /// The task that follows the interface's addresses, to be run in a thread of its own; available
    /// once.
    pub fn follower(&mut self) -> Option<Follower> {
        self.follower.take()
    }

    /// The interface's current name, or the one it had when the path was opened.
    pub fn name(&self) -> String {
        let facts = self.facts();
        let now = penstock_nic::name_of(facts.index).ok().flatten();
        now.unwrap_or_else(|| facts.interface.clone())
    }

    /// Logs, once for each count, that the interface has more receive queues than sockets: somebody
    /// changed it while the broker was serving all of its queues.
    pub fn look_at_queues(&self) {
        let Some(now) = penstock_nic::rx_queues(self.facts().index) else {
            return;
        };
        let before = self.queues_seen.swap(now, Ordering::Relaxed);
        if now > before && self.serves_all && now as usize > self.queues.len() {
            warn!(
                "{} now has {now} receive queues, but only {} have a socket: payload on the others goes to the kernel instead of the broker; restart the broker, or restore the number of queues with ethtool -L {}",
                self.name(),
                self.queues.len(),
                quote(&self.name())
            );
        }
    }

    /// Stops offering the path, because its interface is gone.
    pub fn close(&self) {
        self.pending_streams.close();
    }

    /// What the accept loop needs in order to offer the path.
    pub fn offer(&self) -> DatagramPath {
        DatagramPath {
            pending_streams: Arc::clone(&self.pending_streams),
            max_datagram: self.max_datagram,
        }
    }

    /// The path's part of the report.
    pub fn report(&self, stats: XdpStats) -> XdpReport {
        let outcomes = self.steering.outcomes();
        // Older kernels do not let a process without CAP_BPF read a map's counters.
        let outcomes = outcomes.inspect_err(|error| warn!("{error}; the report omits them"));
        XdpReport {
            interface: self.interface.facts.interface.clone(),
            xdp_mode: self.attached.mode.to_string(),
            zero_copy: self.zero_copy,
            queues: self.queues.clone(),
            outcomes: outcomes.ok(),
            stats,
        }
    }
}

/// The program accepts packets of open streams only.
#[derive(Debug)]
struct Program(Streams);

impl StreamFilter for Program {
    fn insert(&self, key: u64) -> bool {
        self.0.admit(key)
    }

    fn remove(&self, key: u64) {
        self.0.dismiss(key);
    }
}

/// Adds up the workers' results.
pub fn sum(results: Vec<(WorkerStats, XdpStats)>) -> (WorkerStats, XdpStats) {
    let mut sum = (WorkerStats::default(), XdpStats::default());
    for (stats, xdp) in &results {
        sum.0.merge(stats);
        sum.1.merge(xdp);
    }
    sum
}

fn as_map<S: serde::Serializer>(
    outcomes: &Option<Outcomes>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(outcomes.iter().flat_map(Outcomes::named))
}
