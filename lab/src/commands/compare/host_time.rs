//! CPU time of the sending and of the receiving host, although both are namespaces of this machine.
//!
//! On veth, the kernel receives packets on the sender's core and in the sender's time. Samples of the
//! cores' call chains ([`penstock_ebpf::HostTimes`]) tell how long, and for which host. Each run has two
//! windows, one without sampling and one with it, so that its own cost is known too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use penstock_ebpf::{HostTime, HostTimes};
use penstock_log::{Reader, Start};

use super::contender::Contender;
use crate::measure::host::Cpus;
use crate::report::model::per_gb;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::netns::{self, Net};
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::running::Running;
use penstock_testbed::settings::Workload;

/// More than any window takes; the publisher is stopped before.
const ENDLESS: Source = Source::Synthetic(ByteSize::tib(64));
/// Until payload flows; longer than any handshake on a busy machine.
const FLOW_LIMIT: Duration = Duration::from_secs(20);
/// Windows open and rings are touched before anything is measured.
const SETTLE: Duration = Duration::from_millis(300);

/// Figures of a run: CPU seconds per 10^9 bytes of payload, and its rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HostCpuTimes {
    pub sending: f64,
    pub receiving: f64,
    /// Without making XDP buffers out of socket buffers, which no NIC does.
    pub receiving_without_conversion: f64,
    /// Of the whole machine, in the same window.
    pub both: f64,
    /// Payload in the window with the program, and share of the rate that it cost, 0 to 1.
    pub payload_mb_per_s: f64,
    pub probe_overhead: f64,
}

/// Everything that only grows, at one moment.
struct At {
    at: Instant,
    cpus: Cpus,
    payload: u64,
    kernel: HostTime,
}

/// One run over one path: `window` without the program, then as long with it.
pub fn measure(
    net: &Net,
    binaries: &Binaries,
    contender: Contender,
    window: Duration,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<HostCpuTimes> {
    let workload = Workload::default();
    let buffers = BufferDir::create()?;
    let route = contender.route("adaptive");
    let brokers = Brokers {
        count: 1,
        net,
        buffers: &buffers,
        binaries,
        route: &route,
        workload: &workload,
        cpus: None,
        folder,
    };
    let cluster = brokers.start(interrupt)?;
    let publish = Publish {
        program: &binaries.publisher,
        namespace: Some(net.publisher()),
        cpus: None,
        brokers: cluster.addresses(),
        mode: route.mode,
        tx: None,
        workload: &workload,
        source: &ENDLESS,
        rate: None,
        digest: false,
        folder,
    };
    let publisher = publish.start(&folder.join("publisher.json"))?;
    let mut run = Run {
        log: Reader::open(cluster.log_paths()[0], Start::End)?,
        cluster,
        publisher,
        interrupt,
    };
    run.until_it_flows()?;
    let without = run.window(window, None)?;
    let (sender, receiver) = (inode(net.publisher())?, inode(net.broker(0))?);
    // Only an interface with an XDP program polls by itself, unless GRO is on.
    let times = HostTimes::measure(sender, receiver, contender != Contender::Tcp)?;
    times.set_processes(run.publisher.id(), run.cluster.pids()[0])?;
    let with = run.window(window, Some(&times))?;
    drop(times);
    // It has no end of its own.
    drop(run.publisher);
    run.cluster.stop()?;
    Ok(of_hosts(&without, &with))
}

/// Inode of a namespace of the testbed.
fn inode(namespace: &str) -> Result<u32> {
    let path = netns::handle_path(namespace);
    let found = fs::metadata(&path).with_context(|| format!("cannot see {}", path.display()))?;
    Ok(u32::try_from(found.ino())?)
}

/// A publisher that sends to a broker without end.
struct Run<'a> {
    cluster: Cluster,
    publisher: Running,
    log: Reader,
    interrupt: &'a Interrupt,
}

impl Run<'_> {
    fn payload(&self) -> u64 {
        self.log.info().payload_bytes
    }

    fn until_it_flows(&mut self) -> Result<()> {
        let deadline = Instant::now() + FLOW_LIMIT;
        let mut flows_until = None;
        while flows_until.is_none_or(|until| Instant::now() < until) {
            self.pause()?;
            if flows_until.is_none() && self.payload() > 0 {
                flows_until = Some(Instant::now() + SETTLE);
            }
            ensure!(Instant::now() < deadline, "no payload after {FLOW_LIMIT:?}");
        }
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        self.cluster.check()?;
        if let Some(status) = self.publisher.ended()? {
            return Err(self.publisher.failure(&format!("ended ({status})")));
        }
        Ok(self.interrupt.pause()?)
    }

    fn window(&mut self, length: Duration, times: Option<&HostTimes>) -> Result<Window> {
        let start = self.at(times)?;
        while start.at.elapsed() < length {
            self.pause()?;
        }
        let end = self.at(times)?;
        Ok(Window::between(&start, &end))
    }

    fn at(&self, times: Option<&HostTimes>) -> Result<At> {
        Ok(At {
            at: Instant::now(),
            cpus: Cpus::now()?,
            payload: self.payload(),
            kernel: times.map(HostTimes::now).transpose()?.unwrap_or_default(),
        })
    }
}

/// What happened in a window; times are seconds.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    seconds: f64,
    host: f64,
    payload: u64,
    kernel: HostTime,
}

impl Window {
    fn between(start: &At, end: &At) -> Self {
        Self {
            seconds: (end.at - start.at).as_secs_f64(),
            host: end.cpus.busy_since(&start.cpus),
            payload: end.payload.saturating_sub(start.payload),
            kernel: end.kernel.since(&start.kernel),
        }
    }

    fn rate(&self) -> f64 {
        self.payload as f64 / self.seconds.max(f64::MIN_POSITIVE) / 1e6
    }
}

/// Moves what the kernel did for one host from the process that it interrupted to that host.
fn of_hosts(without: &Window, with: &Window) -> HostCpuTimes {
    let HostTime {
        processes: [publisher, broker],
        at_sender,
        at_receiver,
    } = with.kernel;
    let (to_sender, to_receiver) = (at_sender.while_in, at_receiver.while_in);
    let sending = publisher - to_receiver.sender + to_sender.receiver + to_sender.other;
    let receiving = broker - to_sender.receiver + to_receiver.sender + to_receiver.other;
    let cost = |ns: f64| per_gb(ns * 1e-9, with.payload);
    HostCpuTimes {
        sending: cost(sending),
        receiving: cost(receiving),
        receiving_without_conversion: cost(receiving - at_receiver.conversion),
        both: per_gb(with.host, with.payload),
        payload_mb_per_s: with.rate(),
        probe_overhead: 1.0 - with.rate() / without.rate().max(f64::MIN_POSITIVE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_ebpf::{Interrupted, Received};

    #[test]
    fn work_for_a_host_counts_as_its_own_whoever_was_interrupted() {
        let seconds = |sender: f64, receiver: f64, other: f64| Interrupted {
            sender: sender * 1e9,
            receiver: receiver * 1e9,
            other: other * 1e9,
        };
        let with = Window {
            seconds: 1.0,
            host: 2.0,
            payload: 1_000_000_000,
            kernel: HostTime {
                processes: [1.0e9, 0.7e9],
                at_sender: Received {
                    while_in: seconds(0.05, 0.1, 0.02),
                    conversion: 0.0,
                },
                at_receiver: Received {
                    while_in: seconds(0.4, 0.03, 0.1),
                    conversion: 0.2e9,
                },
            },
        };
        let without = Window {
            payload: 1_250_000_000,
            ..with
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        let found = of_hosts(&without, &with);
        close(found.sending, 1.0 - 0.4 + 0.1 + 0.02);
        close(found.receiving, 0.7 - 0.1 + 0.4 + 0.1);
        close(found.receiving_without_conversion, found.receiving - 0.2);
        close(found.both, 2.0);
        close(found.probe_overhead, 0.2);
    }
}
