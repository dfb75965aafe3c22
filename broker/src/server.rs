//! Puts the broker together: logs, listener, workers; runs until a signal comes.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, Sender};
use penstock_dataplane::tcp::{
    Acceptor, Shared, Worker, WorkerHandle, WorkerStats, buffers::RcvbufOn, listen,
};
use penstock_dataplane::xdp::XdpStats;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{info, warn};

use crate::cli::Config;
use crate::machine;
use crate::report::Report;
use crate::topics::{Sessions, Topics};
use crate::xdp::Xdp;

/// Runs the broker; returns when a signal ends it, or a thread fails.
pub fn run(config: &Config) -> Result<()> {
    let started = Instant::now();
    raise_limits(config);
    let topics = Topics::new(
        config.buffer_dir.clone(),
        config.log.clone(),
        config.max_topics,
    )?;
    let topics = Arc::new(topics);
    for topic in &config.topics {
        topics.open(topic).map_err(|e| anyhow!("{e}"))?;
    }
    let listener = open_listener(config)?;
    let address = listener
        .local_addr()
        .context("cannot read the listener's address")?;
    let shared = Arc::new(Shared::default());
    let stop = Arc::new(AtomicBool::new(false));
    // Whatever ends the broker says so here.
    let (ending, ended) = crossbeam_channel::unbounded();
    watch_signals(ending.clone())?;
    let (workers, handles) = start_workers(config, &shared, &stop, &ending)?;
    let xdp = open_xdp(config, address, &shared, &stop, &ending)?;
    let sessions = Sessions::new(Arc::clone(&topics));
    let acceptor = Acceptor::new(
        listener,
        config.buffers,
        config.limits.clone(),
        sessions,
        handles.clone(),
        xdp.as_ref().map(|(xdp, _)| xdp.offer()),
        Arc::clone(&shared),
    )
    .context("cannot start the accept loop")?;
    let waker = acceptor.poller();
    let flag = Arc::clone(&stop);
    let accepting = spawn("accept", ending, move || acceptor.run(&flag))?;

    println!("penstock-broker ready on {address}");
    std::io::stdout()
        .flush()
        .context("cannot write to stdout")?;
    let reason = ended
        .recv()
        .unwrap_or_else(|_| "no thread is left".to_owned());
    info!("ending: {reason}");

    stop.store(true, Ordering::Release);
    waker.notify().context("cannot wake the accept loop")?;
    join(accepting)?.context("the accept loop failed")?;
    let mut stats = stop_workers(workers, &handles)?;
    let mut worker_count = handles.len();
    let xdp = match xdp {
        None => None,
        Some((xdp, workers)) => {
            worker_count += workers.len();
            let (all, packets) = crate::xdp::sum(stop_xdp_workers(workers)?);
            stats.merge(&all);
            Some(xdp.report(packets)?)
        }
    };
    let report = Report::new(
        address,
        worker_count,
        started.elapsed(),
        &stats,
        xdp,
        topics.list(),
        &shared,
    )?;
    if let Some(path) = &config.report {
        report.write(path)?;
    }
    Ok(())
}

fn open_listener(config: &Config) -> Result<TcpListener> {
    listen(config.listen, &config.buffers).map_err(|error| {
        let hint = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "; another program has the port: stop it (ss -ltnp shows it) or use --listen"
            }
            std::io::ErrorKind::AddrNotAvailable => {
                "; the address is not one of this host's (ip addr shows them)"
            }
            std::io::ErrorKind::PermissionDenied if config.buffers.force => {
                "; --rcvbuf-force needs CAP_NET_ADMIN: run with sudo, or without the flag"
            }
            std::io::ErrorKind::PermissionDenied => "; ports below 1024 need CAP_NET_BIND_SERVICE",
            _ => "",
        };
        anyhow!("cannot listen on {}: {error}{hint}", config.listen)
    })
}

fn raise_limits(config: &Config) {
    let wanted = (config.limits.max_connections + config.limits.max_handshakes) as u64 + 64;
    match machine::raise_open_files() {
        Ok(limit) if limit < wanted => warn!(
            limit,
            wanted, "the limit of open files is lower than all connections may need (ulimit -Hn)"
        ),
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot raise the limit of open files"),
    }
    if config.buffers.force && config.buffers.rcvbuf_on == RcvbufOn::None {
        warn!("--rcvbuf-force has no effect with --rcvbuf-on none");
    }
}

fn watch_signals(ending: Sender<String>) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
                if ending.send(name.to_owned()).is_err() {
                    return;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

type WorkerThread = JoinHandle<std::io::Result<WorkerStats>>;

fn start_workers(
    config: &Config,
    shared: &Arc<Shared>,
    stop: &Arc<AtomicBool>,
    ending: &Sender<String>,
) -> Result<(Vec<WorkerThread>, Vec<WorkerHandle>)> {
    let start = |number: usize| {
        let (worker, handle) =
            Worker::new(config.worker.clone(), Arc::clone(shared), Arc::clone(stop))
                .context("cannot start a worker")?;
        let cpu = config.cpus.get(number % config.cpus.len().max(1)).copied();
        let (pinned, pinning) = crossbeam_channel::bounded(1);
        let thread = spawn(&format!("worker-{number}"), ending.clone(), move || {
            let result = cpu.map_or(Ok(()), machine::pin_to);
            // The other end waits for this before it goes on.
            let _ = pinned.send(result);
            worker.run()
        })?;
        check_pinned(cpu, &pinning)?;
        Ok((thread, handle))
    };
    let started: Result<Vec<_>> = (0..config.tcp_workers).map(start).collect();
    Ok(started?.into_iter().unzip())
}

type XdpThread = JoinHandle<std::io::Result<(WorkerStats, XdpStats)>>;
type XdpWorkers = Vec<(XdpThread, penstock_dataplane::xdp::WorkerHandle)>;

/// Opens the xdp path, if it is asked for and can be had.
fn open_xdp(
    config: &Config,
    address: SocketAddr,
    shared: &Arc<Shared>,
    stop: &Arc<AtomicBool>,
    ending: &Sender<String>,
) -> Result<Option<(Xdp, XdpWorkers)>> {
    let Some(wanted) = &config.xdp else {
        return Ok(None);
    };
    let (xdp, workers) = match Xdp::open(wanted, address, shared, stop) {
        Ok(open) => open,
        Err(error) if config.xdp_may_fail => {
            warn!("serving over tcp alone: {error:#}");
            return Ok(None);
        }
        Err(error) => return Err(error.context("the xdp path cannot be opened")),
    };
    let start = |(number, (worker, handle)): (usize, (penstock_dataplane::xdp::Worker, _))| {
        let cpu = config.cpus.get(number % config.cpus.len().max(1)).copied();
        let (pinned, pinning) = crossbeam_channel::bounded(1);
        let thread = spawn(&format!("xdp-{number}"), ending.clone(), move || {
            let result = cpu.map_or(Ok(()), machine::pin_to);
            // The other end waits for this before it goes on.
            let _ = pinned.send(result);
            worker.run()
        })?;
        check_pinned(cpu, &pinning)?;
        Ok((thread, handle))
    };
    let threads = workers.into_iter().enumerate().map(start);
    Ok(Some((xdp, threads.collect::<Result<_>>()?)))
}

fn stop_xdp_workers(workers: XdpWorkers) -> Result<Vec<(WorkerStats, XdpStats)>> {
    for (_, handle) in &workers {
        handle.wake().context("cannot wake a worker")?;
    }
    let results = workers
        .into_iter()
        .map(|(thread, _)| join(thread)?.context("an xdp worker failed; is its interface gone?"));
    results.collect()
}

fn check_pinned(cpu: Option<usize>, pinning: &Receiver<std::io::Result<()>>) -> Result<()> {
    let result = pinning.recv().context("a worker ended at once")?;
    result.with_context(|| {
        format!(
            "cannot pin a worker to core {}; see --cpus and nproc",
            cpu.unwrap_or_default()
        )
    })
}

/// Starts a thread that reports when it ends before it was told to.
fn spawn<T: Send + 'static>(
    name: &str,
    ending: Sender<String>,
    body: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<JoinHandle<std::io::Result<T>>> {
    let label = name.to_owned();
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = body();
            // Nobody listens any more when the broker is ending already.
            let _ = ending.send(format!("{label} ended"));
            result
        })
        .with_context(|| format!("cannot start thread {name}"))
}

fn stop_workers(workers: Vec<WorkerThread>, handles: &[WorkerHandle]) -> Result<WorkerStats> {
    for handle in handles {
        handle.wake().context("cannot wake a worker")?;
    }
    let mut sum = WorkerStats::default();
    for worker in workers {
        sum.merge(&join(worker)?.context("a worker failed")?);
    }
    Ok(sum)
}

fn join<T>(thread: JoinHandle<T>) -> Result<T> {
    thread
        .join()
        .map_err(|_| anyhow!("a thread panicked; its message is above"))
}
