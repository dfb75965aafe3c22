//! Memory of idle streams in a broker: streams that are open and send nothing.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::unistd::pipe2;

use penstock_diagnose::broker_stats::{self, BrokerSnapshot};
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::Brokers;
use penstock_testbed::netns::Net;
use penstock_testbed::programs::Binaries;
use penstock_testbed::running::{Running, inside};
use penstock_testbed::settings::{Mode, Route, Workload};
use procfs::process::Process;

/// Streams that make the broker allocate what it needs once.
const FIRST: u32 = 32;
/// Streams that are counted.
const MORE: u32 = 256;
/// Time to open them on a busy machine.
const OPEN_LIMIT: Duration = Duration::from_secs(30);

/// One run; bytes of the broker's own memory for each further stream.
pub fn measure(
    net: &Net,
    binaries: &Binaries,
    route: &Route,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<f64> {
    let buffers = BufferDir::create()?;
    let workload = Workload::default();
    let brokers = Brokers {
        count: 1,
        net,
        buffers: &buffers,
        binaries,
        route,
        workload: &workload,
        cpus: None,
        folder,
    };
    let cluster = brokers.start(interrupt)?;
    let pid = cluster.pids()[0];
    let socket = broker_stats::socket_path(pid).context("the broker has no socket for figures")?;
    let open = |number: u32, streams: u32| -> Result<Idle> {
        let log = folder.join(format!("publisher-{number}.log"));
        let address = cluster.addresses();
        Idle::start(net, binaries, route.mode, &address, streams, &log)
    };
    let mut first = open(1, FIRST)?;
    until_open(&socket, FIRST, &mut [&mut first], interrupt)?;
    let before = anonymous_bytes(pid)?;
    let mut more = open(2, MORE)?;
    until_open(
        &socket,
        FIRST + MORE,
        &mut [&mut first, &mut more],
        interrupt,
    )?;
    let after = anonymous_bytes(pid)?;
    // Publishers first: a broker that ends before them has errors to report.
    drop((first, more));
    Ok(after.saturating_sub(before) as f64 / f64::from(MORE))
}

/// A publisher that waits for its input.
struct Idle {
    publisher: Running,
    /// The other end of its standard input.
    _input: OwnedFd,
}

impl Idle {
    fn start(
        net: &Net,
        binaries: &Binaries,
        mode: Mode,
        brokers: &str,
        streams: u32,
        log: &Path,
    ) -> Result<Self> {
        let (reading, writing) = pipe2(OFlag::O_CLOEXEC).context("cannot create a pipe")?;
        let mut command = inside(net.publisher(), &binaries.publisher);
        command.args(["--brokers", brokers, "--mode", mode.name(), "--input", "-"]);
        command.args(["--threads-per-broker", &streams.to_string()]);
        command.stdin(Stdio::from(reading));
        Ok(Self {
            publisher: Running::start("publisher", &mut command, None, log)?,
            _input: writing,
        })
    }
}

fn until_open(
    socket: &Path,
    streams: u32,
    publishers: &mut [&mut Idle],
    interrupt: &Interrupt,
) -> Result<()> {
    let deadline = Instant::now() + OPEN_LIMIT;
    loop {
        let open = BrokerSnapshot::query(socket)?.open_streams();
        if open >= streams as usize {
            return Ok(());
        }
        for idle in publishers.iter_mut() {
            if let Some(status) = idle.publisher.ended()? {
                return Err(idle.publisher.failure(&format!("ended ({status})")));
            }
        }
        ensure!(
            Instant::now() < deadline,
            "only {open} of {streams} streams are open after {OPEN_LIMIT:?}"
        );
        interrupt.pause()?;
    }
}

/// Memory of a process that is neither a file's nor shared.
fn anonymous_bytes(pid: u32) -> Result<u64> {
    let process = Process::new(pid.try_into().context("no process has this number")?)?;
    let kib = process.status()?.rssanon;
    Ok(kib.with_context(|| format!("/proc/{pid}/status has no RssAnon"))? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_of_a_process_is_read() {
        assert!(anonymous_bytes(std::process::id()).unwrap() > 0);
    }
}
