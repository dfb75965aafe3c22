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
use crate::nic::PreparedNic;
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
    interface: PreparedNic,
}

/// The buffers that packets are received into.
#[derive(Debug, Clone, Copy)]
struct Buffers {
    mtu: u32,
    /// The longest packet that the program sees.
    longest: u32,
    /// The kernel copies packets into the buffers.
    copy: bool,
    /// The driver writes packets straight into the buffers.
    driver_writes: bool,
    /// Bytes of a buffer.
    frame_size: u32,
}

impl Buffers {
    fn new(config: &XdpSettings, facts: &Facts, mode: Mode) -> Self {
        let longest = match mode {
            Mode::Generic => LONGEST_PACKET,
            Mode::Native | Mode::Auto => facts.mtu,
        };
        // A generic program sees packets after the kernel has copied them.
        let copy = config.copy || mode == Mode::Generic;
        let driver_writes = !copy && facts.xdp.is_some_and(|xdp| xdp.zero_copy);
        Self {
            mtu: facts.mtu,
            longest,
            copy,
            driver_writes,
            frame_size: frame_size(longest, driver_writes),
        }
    }

    /// Bytes of payload that a buffer takes, at most.
    fn packet(&self) -> u32 {
        (self.mtu - IP_UDP).min(self.frame_size - HEADROOM)
    }

    /// The largest datagram that a packet in several buffers can be.
    fn max_datagram(&self) -> u32 {
        let buffers = MAX_BUFFERS as u32 * (self.frame_size - HEADROOM);
        self.mtu.min(buffers - ETHERNET) - IP_UDP
    }

    /// Whether a packet of this size fits into one buffer.
    fn fits(&self, packet: u32) -> bool {
        fits(packet, self.frame_size, self.driver_writes)
    }
}

/// The sockets of all queues.
struct Sockets {
    /// Those of each worker.
    by_worker: Vec<Vec<XskRxSocket>>,
    /// Whether all of them receive without a copy.
    zero_copy: bool,
}

impl Sockets {
    /// Opens `sharing` sockets on each queue, spreads them over the workers and has the program redirect to
    /// them.
    fn open(
        config: &XdpSettings,
        facts: &Facts,
        buffers: &Buffers,
        queues: &[usize],
        sharing: u32,
        steering: &mut Steering,
    ) -> Result<Self> {
        let mut by_worker: Vec<Vec<XskRxSocket>> =
            (0..config.workers).map(|_| Vec::new()).collect();
        let mut zero_copy = true;
        let mut next = 0;
        for &queue in queues {
            let settings = XskRxConfig {
                interface: facts.interface.clone(),
                queue: queue as u32,
                ring: config.ring,
                frame_size: buffers.frame_size,
                several_buffers: !buffers.fits(buffers.longest),
                copy: buffers.copy,
                busy_poll: config.busy_poll,
            };
            let ports = open_queue(&settings, sharing, buffers)?;
            for (number, port) in ports.into_iter().enumerate() {
                zero_copy &= port.is_zero_copy();
                steering.insert(queue as u32, number as u32, port.fd())?;
                by_worker[next % config.workers].push(port);
                next += 1;
            }
        }
        Ok(Self {
            by_worker,
            zero_copy,
        })
    }
}

/// Opens the sockets of one queue. Before Linux 6.6 a packet has one buffer; packets of the size of the MTU
/// may fit.
fn open_queue(settings: &XskRxConfig, sharing: u32, buffers: &Buffers) -> Result<Vec<XskRxSocket>> {
    let opened = XskRxSocket::open(settings, sharing).or_else(|error| {
        if !settings.several_buffers || !buffers.fits(buffers.mtu) {
            return Err(error);
        }
        let settings = XskRxConfig {
            several_buffers: false,
            ..settings.clone()
        };
        XskRxSocket::open(&settings, sharing)
    });
    Ok(opened?)
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
        nic: PreparedNic,
        listen: SocketAddr,
        max_streams: usize,
        shared: &Arc<Shared>,
        stop: &Arc<AtomicBool>,
    ) -> Result<(Self, Vec<(Worker, WorkerHandle)>)> {
        let facts = &nic.facts;
        let queues = match &config.queues {
            Some(queues) => queues.clone(),
            None => (0..facts.queues as usize).collect(),
        };
        // Workers share a queue if there are more workers than queues.
        let sharing = config.workers.div_ceil(queues.len()) as u32;
        let mut follower = Follower::open(facts.index, listen)?;
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
        let attached = steering.attach(&facts.interface, nic.mode, config.force)?;
        let buffers = Buffers::new(config, facts, attached.mode);
        let sockets = Sockets::open(config, facts, &buffers, &queues, sharing, &mut steering)?;
        let filter = Arc::new(Program(steering.streams()?));
        let pending_streams = Arc::new(PendingStreams::new(filter));
        let per_queue = u64::from(config.ring) * u64::from(buffers.packet());
        let workers = sockets.by_worker.into_iter().map(|ports| {
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
        let xdp = Self {
            steering,
            attached,
            serves_all: config.queues.is_none(),
            queues_seen: AtomicU32::new(queues.len() as u32),
            queues,
            zero_copy: sockets.zero_copy,
            max_datagram: buffers.max_datagram(),
            pending_streams,
            follower: Some(follower),
            interface: nic,
        };
        xdp.log_open(config.workers, &buffers);
        Ok((xdp, workers))
    }

    fn log_open(&self, workers: usize, buffers: &Buffers) {
        let &Buffers {
            mtu, frame_size, ..
        } = buffers;
        if self.max_datagram < mtu - IP_UDP {
            info!(
                mtu,
                max_datagram = self.max_datagram,
                "datagrams are smaller than the MTU: a packet must fit into its buffers"
            );
        }
        info!(
            interface = self.facts().interface,
            mode = %self.attached.mode,
            zero_copy = self.zero_copy,
            queues = ?self.queues,
            workers,
            mtu,
            frame_size,
            program = self.attached.id,
            "xdp path open"
        );
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

    /// Logs, once for each count, that the interface has more receive queues than sockets: another program
    /// changed it while the broker was serving all of its queues.
    pub fn check_queues(&self) {
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
