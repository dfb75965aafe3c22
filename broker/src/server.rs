//! Puts the broker together: logs, listener, workers; runs until a signal comes.

use std::io::Write;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use penstock_dataplane::auth::Keys;
use penstock_dataplane::tcp::{
    Acceptor, Shared, Worker, WorkerHandle, WorkerStats, buffers::RcvbufOn, listen,
};
use penstock_dataplane::xdp::{self, XdpStats};
use penstock_nic::Link;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tracing::{info, warn};

use crate::cli::Config;
use crate::live::{self, Sources};
use crate::report::{Report, Target};
use crate::sessions::Sessions;
use crate::topics::{self, Topics};
use crate::xdp::Xdp;
use crate::{keys, machine, memory, nic, privileges};

/// How often the link of the xdp path's interface is looked at.
const LINK_CHECK: Duration = Duration::from_millis(500);

/// Runs the broker; returns when a signal ends it, or a thread fails.
pub fn run(config: &Config) -> Result<()> {
    let started = Instant::now();
    raise_limits(config);
    // Now, so that a signal during what follows is not the end before anything is undone.
    let signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("cannot watch signals")?;
    let user = config.user.as_deref().map(privileges::find_user);
    let user = user.transpose()?;
    if config.buffers.force {
        privileges::require("--rcvbuf-force", privileges::FORCE_BUFFERS)?;
    }
    let keys = config.auth_keys.as_deref().map(keys::load).transpose()?;
    let mut report_to = config.report.as_deref().map(Target::open).transpose()?;
    topics::make_directory(&config.buffer_dir, user.as_ref(), config.log.access.group())?;
    let listener = open_listener(config)?;
    let address = listener
        .local_addr()
        .context("cannot read the listener's address")?;
    if keys.is_none() {
        keys::warn_without(address);
    }
    let shared = Arc::new(Shared::default());
    let stop = Arc::new(AtomicBool::new(false));
    // The xdp path may end before the broker does.
    let stop_xdp = Arc::new(AtomicBool::new(false));
    let (xdp, xdp_workers) = open_xdp(config, address, &shared, &stop_xdp)?.unzip();

    let kept: &[_] = match config.buffers.force {
        true => privileges::FORCE_BUFFERS,
        false => &[],
    };
    if privileges::give_up(user.as_ref(), kept)? {
        let kept = (!kept.is_empty()).then(|| privileges::names(kept));
        info!(user = config.user, kept, "privileges given up");
    }
    let topics = open_topics(config)?;
    let (workers, handles) = make_workers(config, &shared, &stop)?;
    let (jobs, opener) = crossbeam_channel::unbounded();
    let acceptor = Acceptor::new(
        listener,
        config.buffers,
        config.limits.clone(),
        Sessions::new(Arc::clone(&topics), config.limits.share_percent, jobs),
        handles.clone(),
        xdp.as_ref().map(Xdp::offer),
        Arc::clone(&shared),
    )
    .context("cannot start the accept loop")?
    .with_keys(keys.clone(), config.packet_auth);
    // Whatever ends the broker says so here.
    let (ending, ended) = crossbeam_channel::unbounded();
    let waker = acceptor.poller();
    let opening = {
        let (topics, waker) = (Arc::clone(&topics), Arc::clone(&waker));
        move || {
            // A loop that cannot be woken looks again within a second.
            topics.serve(&opener, || drop(waker.notify()));
            Ok(())
        }
    };
    let flag = Arc::clone(&stop);
    // The only thread that needs what was kept: it sizes the buffers of accepted sockets.
    let told = Told(Arc::clone(&stop), ending.clone());
    let accepting = spawn("accept", &told, move || acceptor.run(&flag))?;
    privileges::keep(&[])?;
    let opening = spawn("topics", &told, opening)?;
    watch_signals(signals, keys, ending.clone())?;
    let workers = start_workers(config, workers, &told)?;
    let told = Told(Arc::clone(&stop_xdp), ending);
    let xdp_workers = start_xdp_workers(config, xdp_workers.unwrap_or_default(), &told)?;

    let sources = Sources {
        started,
        listen: address,
        topics: Arc::clone(&topics),
        shared: Arc::clone(&shared),
        tcp: handles.clone(),
        xdp: xdp_workers.iter().map(|(_, h)| h.clone()).collect(),
    };
    // Not every file system takes sockets, and a path may be too long for one.
    let _live = live::serve(&config.buffer_dir, sources)
        .inspect_err(|error| warn!("penstock-lab diagnose will see less: {error:#}"));

    println!("penstock-broker ready on {address}");
    std::io::stdout()
        .flush()
        .context("cannot write to stdout")?;
    let stop_path = |xdp: &Xdp| {
        xdp.close();
        stop_xdp.store(true, Ordering::Release);
        wake_xdp_workers(&xdp_workers)
    };
    let reason = wait_for_end(&ended, xdp.as_ref(), stop_path)?;
    info!("ending: {reason}");

    stop.store(true, Ordering::Release);
    stop_xdp.store(true, Ordering::Release);
    waker.notify().context("cannot wake the accept loop")?;
    join(accepting)?.context("the accept loop failed")?;
    // Nobody asks it for logs any more.
    join(opening)?.context("the thread that opens logs failed")?;
    let mut stats = stop_workers(workers, &handles)?;
    let worker_count = handles.len() + xdp_workers.len();
    let (all, packets) = crate::xdp::sum(stop_xdp_workers(xdp_workers)?);
    stats.merge(&all);
    let report = Report::new(
        address,
        worker_count,
        started.elapsed(),
        &stats,
        xdp.map(|xdp| xdp.report(packets)),
        topics.list(),
        &shared,
    )?;
    if let Some(to) = &mut report_to {
        report.write(to)?;
    }
    Ok(())
}

/// Returns the reason, once something ends the broker. Meanwhile looks after the link of the xdp
/// path; when its interface is gone, calls `stop_path`.
fn wait_for_end(
    ended: &Receiver<String>,
    xdp: Option<&Xdp>,
    stop_path: impl Fn(&Xdp) -> Result<()>,
) -> Result<String> {
    let mut link = xdp.map_or(Link::Gone, |xdp| xdp.facts().link);
    loop {
        let watched = xdp.filter(|_| link != Link::Gone);
        let timeout = watched.map_or(Duration::MAX, |_| LINK_CHECK);
        match ended.recv_timeout(timeout) {
            Ok(reason) => return Ok(reason),
            Err(RecvTimeoutError::Disconnected) => return Ok("no thread is left".to_owned()),
            Err(RecvTimeoutError::Timeout) => {}
        }
        // Without a free descriptor it cannot be seen for now.
        let seen = watched.map(|xdp| (xdp, penstock_nic::link(xdp.facts().index)));
        if let Some((xdp, Ok(now))) = seen
            && now != link
        {
            link = now;
            tell_link(&xdp.facts().interface, now);
            if now == Link::Gone {
                stop_path(xdp)?;
            }
        }
    }
}

fn tell_link(name: &str, link: Link) {
    match link {
        Link::Up => info!("{name} is up"),
        Link::NoCarrier => warn!("{name} has no carrier: nothing comes in over it"),
        Link::Down => warn!("{name} is down: nothing comes in before it is up again"),
        Link::Gone => {
            warn!("{name} is gone: from now on over tcp alone, until the broker is restarted");
        }
    }
}

fn open_topics(config: &Config) -> Result<Arc<Topics>> {
    let topics = Topics::new(
        config.buffer_dir.clone(),
        config.log.clone(),
        config.topic.clone(),
    )?;
    for topic in &config.topics {
        topics.open_own(topic).map_err(|e| anyhow!("{e}"))?;
    }
    memory::warn_if_short(
        &config.buffer_dir,
        config.log.geometry.file_bytes(),
        (config.topic.max - config.topics.len()) as u64,
    );
    Ok(Arc::new(topics))
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

fn watch_signals(
    mut signals: Signals,
    keys: Option<Arc<Keys>>,
    ending: Sender<String>,
) -> Result<()> {
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            for signal in signals.forever() {
                if signal == SIGHUP
                    && let Some(keys) = &keys
                {
                    keys::reload(keys);
                    continue;
                }
                let name = signal_hook::low_level::signal_name(signal).unwrap_or("signal");
                if ending.send(name.to_owned()).is_err() {
                    return;
                }
            }
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn make_workers(
    config: &Config,
    shared: &Arc<Shared>,
    stop: &Arc<AtomicBool>,
) -> Result<(Vec<Worker>, Vec<WorkerHandle>)> {
    let make = |_| {
        Worker::new(config.worker.clone(), Arc::clone(shared), Arc::clone(stop))
            .context("cannot start a worker")
    };
    let made: Result<Vec<_>> = (0..config.tcp_workers).map(make).collect();
    Ok(made?.into_iter().unzip())
}

type WorkerThread = JoinHandle<std::io::Result<WorkerStats>>;

fn start_workers(config: &Config, workers: Vec<Worker>, told: &Told) -> Result<Vec<WorkerThread>> {
    let start = |(number, worker): (usize, Worker)| {
        let name = format!("worker-{number}");
        spawn_pinned(config, number, &name, told, move || worker.run())
    };
    workers.into_iter().enumerate().map(start).collect()
}

type XdpThread = JoinHandle<std::io::Result<(WorkerStats, XdpStats)>>;
type XdpWorkers = Vec<(penstock_dataplane::xdp::Worker, xdp::WorkerHandle)>;

/// Opens the xdp path, if it is asked for and can be had.
fn open_xdp(
    config: &Config,
    address: SocketAddr,
    shared: &Arc<Shared>,
    stop: &Arc<AtomicBool>,
) -> Result<Option<(Xdp, XdpWorkers)>> {
    let Some(wanted) = &config.xdp else {
        return Ok(None);
    };
    let open = || {
        privileges::require("it", privileges::XDP)?;
        let ready = nic::prepare(wanted, address)?;
        let most = config.limits.max_connections;
        Xdp::open(wanted, ready, address, most, shared, stop)
    };
    match open() {
        Ok(open) => Ok(Some(open)),
        Err(error) if config.xdp_may_fail => {
            warn!("serving over tcp alone: {error:#}");
            Ok(None)
        }
        Err(error) => Err(error.context("the xdp path cannot be opened")),
    }
}

fn start_xdp_workers(
    config: &Config,
    workers: XdpWorkers,
    told: &Told,
) -> Result<Vec<(XdpThread, xdp::WorkerHandle)>> {
    let start = |(number, (worker, handle)): (usize, (penstock_dataplane::xdp::Worker, _))| {
        let name = format!("xdp-{number}");
        let thread = spawn_pinned(config, number, &name, told, move || worker.run())?;
        Ok((thread, handle))
    };
    workers.into_iter().enumerate().map(start).collect()
}

fn wake_xdp_workers(workers: &[(XdpThread, xdp::WorkerHandle)]) -> Result<()> {
    let mut handles = workers.iter().map(|(_, handle)| handle);
    handles.try_for_each(|handle| handle.wake().context("cannot wake a worker"))
}

fn stop_xdp_workers(
    workers: Vec<(XdpThread, xdp::WorkerHandle)>,
) -> Result<Vec<(WorkerStats, XdpStats)>> {
    wake_xdp_workers(&workers)?;
    let results = workers
        .into_iter()
        .map(|(thread, _)| join(thread)?.context("an xdp worker failed"));
    results.collect()
}

/// Starts a worker's thread on the core that is its turn, if cores are given.
fn spawn_pinned<T: Send + 'static>(
    config: &Config,
    number: usize,
    name: &str,
    told: &Told,
    body: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<JoinHandle<std::io::Result<T>>> {
    let cpu = config.cpus.get(number % config.cpus.len().max(1)).copied();
    let (pinned, pinning) = crossbeam_channel::bounded(1);
    let thread = spawn(name, told, move || {
        let result = cpu.map_or(Ok(()), machine::pin_to);
        // The other end waits for this before it goes on.
        let _ = pinned.send(result);
        body()
    })?;
    let result = pinning.recv().context("a worker ended at once")?;
    result.with_context(|| {
        format!(
            "cannot pin a worker to core {}; see --cpus and nproc",
            cpu.unwrap_or_default()
        )
    })?;
    Ok(thread)
}

/// The flag that tells threads to end, and where one says so that ends without.
struct Told(Arc<AtomicBool>, Sender<String>);

/// Starts a thread that reports when it ends before it was told to.
fn spawn<T: Send + 'static>(
    name: &str,
    told: &Told,
    body: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<JoinHandle<std::io::Result<T>>> {
    let label = name.to_owned();
    let (told, ending) = (Arc::clone(&told.0), told.1.clone());
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let result = body();
            if !told.load(Ordering::Acquire) {
                // Nobody listens any more when the broker is ending already.
                let _ = ending.send(format!("{label} ended"));
            }
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
