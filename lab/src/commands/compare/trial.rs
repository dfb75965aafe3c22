//! One run of one path: brokers started, a load published, the host watched meanwhile.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use penstock_wire::message::OVERHEAD;

use super::contender::Contender;
use crate::measure::host::{Cpus, NetCounters};
use crate::report::model::per_gb;
use crate::settings::Pin;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::netns::Net;
use penstock_testbed::program_reports::{self, AckLatency};
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::running::Running;
use penstock_testbed::settings::{Workload, XdpMode};

/// Drops that an AF_XDP socket counts.
const SOCKET_DROPS: [&str; 3] = ["rx_dropped", "rx_ring_full", "rx_fill_ring_empty"];

/// Where the brokers are.
pub enum Site<'a> {
    /// In namespaces of this host, so many.
    Testbed { net: &'a Net, brokers: u32 },
    /// At these addresses, and run already.
    Remote(&'a str),
}

/// What is published.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub payload: ByteSize,
    pub message_size: ByteSize,
    /// None leaves it to the publisher.
    pub batch_size: Option<ByteSize>,
    /// Message bytes per second; none is full speed.
    pub bytes_per_second: Option<u64>,
    /// What xdp workers do while no packet comes.
    pub poll: &'static str,
}

impl Load {
    /// As fast as it goes.
    pub fn full_speed(
        payload: ByteSize,
        message_size: ByteSize,
        batch_size: Option<ByteSize>,
    ) -> Self {
        Self {
            payload,
            message_size,
            batch_size,
            bytes_per_second: None,
            poll: "adaptive",
        }
    }

    /// One message a batch, so that each leaves when it is due.
    pub fn at_rate(batches_per_second: u32, batch: u64, seconds: f64) -> Self {
        let batches = (f64::from(batches_per_second) * seconds).ceil();
        Self {
            payload: ByteSize(batches.max(1.0) as u64 * batch),
            message_size: ByteSize(batch),
            batch_size: Some(ByteSize(batch + OVERHEAD as u64)),
            bytes_per_second: Some(u64::from(batches_per_second) * batch),
            poll: "busy",
        }
    }
}

/// What a run brought.
#[derive(Debug, Clone, Copy)]
pub struct Trial {
    pub payload_mb_per_s: f64,
    pub messages_per_s: f64,
    /// CPU time in cores, and the busy share of the host's, 0 to 1.
    pub publisher_cores: f64,
    pub broker_cores: Option<f64>,
    pub host_busy: f64,
    /// Cores that neither kept busy: other programs, and threads of the kernel.
    pub other_cores: f64,
    pub host_cpu_s_per_gb: f64,
    /// None of remote brokers.
    pub broker_cpu_s_per_gb: Option<f64>,
    pub publisher_cpu_s_per_gb: f64,
    pub ack_latency_us: AckLatency,
    /// Packets that interfaces or sockets dropped.
    pub drops: u64,
    /// Packets that were sent again.
    pub retransmits: u64,
}

/// Cores for latency runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cores {
    pub workers: String,
    pub publisher: String,
}

/// What all runs of a comparison have in common.
pub struct Bench<'a> {
    pub site: Site<'a>,
    pub binaries: &'a Binaries,
    pub workload: &'a Workload,
    pub pin: Pin,
    /// None if there are too few to share out.
    pub cores: Option<Cores>,
    pub interrupt: &'a Interrupt,
}

impl Bench<'_> {
    /// Runs once; anything but a complete run over the path that was asked for is an error.
    pub fn run(&self, contender: Contender, load: &Load, folder: &Path) -> Result<Trial> {
        fs::create_dir(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let mut workload = self.workload.clone();
        workload.message_size = load.message_size;
        workload.batch_size = load.batch_size.or(workload.batch_size);
        let cores = self.cores.as_ref().filter(|_| match self.pin {
            Pin::Xdp => contender != Contender::Tcp && load.bytes_per_second.is_some(),
            Pin::Both => load.bytes_per_second.is_some(),
            Pin::None => false,
        });
        let source = Source::Synthetic(load.payload);
        let mut publish = Publish {
            program: &self.binaries.publisher,
            namespace: None,
            cpus: cores.map(|cores| cores.publisher.as_str()),
            brokers: String::new(),
            mode: contender.mode(),
            tx: None,
            workload: &workload,
            source: &source,
            rate: load.bytes_per_second,
            digest: false,
            folder,
        };
        match self.site {
            Site::Remote(addresses) => {
                publish.brokers = addresses.to_owned();
                self.publish(contender, &publish, None)
            }
            Site::Testbed { net, brokers } => {
                let buffers = BufferDir::create()?;
                let route = contender.route(load.poll);
                let brokers = Brokers {
                    count: brokers as usize,
                    net,
                    buffers: &buffers,
                    binaries: self.binaries,
                    route: &route,
                    workload: &workload,
                    cpus: cores.map(|cores| cores.workers.as_str()),
                    folder,
                };
                let cluster = brokers.start(self.interrupt)?;
                publish.brokers = cluster.addresses();
                publish.namespace = Some(net.publisher());
                self.publish(contender, &publish, Some(cluster))
            }
        }
    }

    fn publish(
        &self,
        contender: Contender,
        publish: &Publish<'_>,
        mut cluster: Option<Cluster>,
    ) -> Result<Trial> {
        let namespaces = self.namespaces();
        let brokers_cpu =
            |cluster: &Option<Cluster>| cluster.as_ref().map(Cluster::cpu_seconds).transpose();
        let counters = NetCounters::read(&namespaces)?;
        let brokers_before = brokers_cpu(&cluster)?;
        let host_before = Cpus::now()?;
        let watch = |_: &Running| cluster.as_mut().map_or(Ok(()), Cluster::check);
        let (sent, succeeded) = publish.run(watch, self.interrupt)?;
        let host_now = Cpus::now()?;
        let (host_cpu, host_busy) = (
            host_now.busy_since(&host_before),
            host_now.busy_share_since(&host_before),
        );
        let brokers_cpu = brokers_cpu(&cluster)?
            .zip(brokers_before)
            .map(|(now, before)| now - before);
        let counters = NetCounters::read(&namespaces)?.since(&counters);
        let brokers = cluster.map_or(Ok(Vec::new()), Cluster::stop)?;
        check(contender, &sent, succeeded, publish.folder)?;
        let bytes = sent.payload_bytes;
        Ok(Trial {
            payload_mb_per_s: sent.bandwidth_mb_per_s,
            messages_per_s: sent.messages_acked as f64 / sent.seconds,
            publisher_cores: sent.cpu_seconds / sent.seconds,
            broker_cores: brokers_cpu.map(|seconds| seconds / sent.seconds),
            host_busy,
            other_cores: host_busy * host_now.count() as f64
                - (sent.cpu_seconds + brokers_cpu.unwrap_or(0.0))
                    / host_now.seconds_since(&host_before),
            host_cpu_s_per_gb: per_gb(host_cpu, bytes),
            broker_cpu_s_per_gb: brokers_cpu.map(|seconds| per_gb(seconds, bytes)),
            publisher_cpu_s_per_gb: per_gb(sent.cpu_seconds, bytes),
            ack_latency_us: sent.ack_latency_us.context("the publisher saw no ack")?,
            drops: counters.drops + socket_drops(&brokers),
            retransmits: match contender {
                Contender::Tcp => counters.retransmits,
                Contender::Xdp(_) => sent.transport_sum("retransmits") as u64,
            },
        })
    }

    /// Namespaces whose counters tell what became of packets.
    fn namespaces(&self) -> Vec<Option<&str>> {
        match self.site {
            Site::Remote(_) => vec![None],
            Site::Testbed { net, brokers } => {
                let brokers = (0..brokers as usize).map(|index| Some(net.broker(index)));
                brokers.chain([Some(net.publisher())]).collect()
            }
        }
    }
}

/// Packets that AF_XDP sockets did not take and no interface counts: in native mode veth has them
/// among its own drops.
fn socket_drops(brokers: &[program_reports::Broker]) -> u64 {
    brokers
        .iter()
        .filter(|broker| broker.xdp_mode() == Some(XdpMode::Generic))
        .flat_map(|broker| SOCKET_DROPS.map(|name| broker.xdp_counter(name)))
        .sum()
}

/// A run counts only if everything was acked over the path that was asked for.
fn check(
    contender: Contender,
    sent: &program_reports::Publisher,
    succeeded: bool,
    folder: &Path,
) -> Result<()> {
    let log = folder.join("publisher.log");
    let (messages, acked) = (sent.messages_sent, sent.messages_acked);
    ensure!(
        succeeded && messages > 0 && acked == messages,
        "{acked} of {messages} messages were acked over {}; see {}",
        contender.name(),
        log.display()
    );
    ensure!(
        sent.path() == Some(contender.mode().name()),
        "a stream fell back or moved to another connection, so this does not measure {}; see {}",
        contender.name(),
        log.display()
    );
    Ok(())
}

impl Cores {
    /// Of the cores that this process may use; none if there are too few.
    pub fn of_host(workers: u32) -> Result<Option<Self>> {
        let allowed = sched_getaffinity(Pid::this()).context("cannot read the affinity mask")?;
        let cpus: Vec<_> = (0..CpuSet::count())
            .filter(|&cpu| allowed.is_set(cpu).unwrap_or(false))
            .collect();
        Ok(Self::share_out(&cpus, workers))
    }

    /// The last of `cpus` for workers, at most half of them; the others for the publisher.
    pub fn share_out(cpus: &[usize], workers: u32) -> Option<Self> {
        let count = (workers as usize).min(cpus.len() / 2);
        let (publisher, workers) = cpus.split_at(cpus.len() - count);
        let list = |cpus: &[usize]| {
            let names: Vec<_> = cpus.iter().map(usize::to_string).collect();
            names.join(",")
        };
        (count > 0).then(|| Self {
            workers: list(workers),
            publisher: list(publisher),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shared_out_if_there_are_two() {
        let shared = |cpus: &[usize], workers| {
            let cores = Cores::share_out(cpus, workers)?;
            Some((cores.workers, cores.publisher))
        };
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(shared(&[0], 1), None);
        assert_eq!(shared(&[0, 1], 1), pair("1", "0"));
        assert_eq!(shared(&[0, 2, 4, 5], 3), pair("4,5", "0,2"));
    }
}
