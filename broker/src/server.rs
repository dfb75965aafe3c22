//! Assembles the broker (logs, listener, workers) and runs it until a signal arrives.

use std::fmt::{self, Display};
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::Receiver;
use penstock_auth::Keys;
use penstock_flags::explain;
use penstock_ingest::session::buffers::RcvbufOn;
use penstock_ingest::session::{Acceptor, Shared, WorkerStats, listen};
use penstock_ingest::tcp::{Worker, WorkerHandle};
use penstock_ingest::xdp::{self, XdpStats};
use penstock_log::report_shortened_logs;
use penstock_nic::Link;
use penstock_process::notify::{ReadyFd, ServiceManager};
use penstock_process::supervisor::{Ended, Supervised, Supervisor};
use penstock_process::{logging, output};
use tracing::{info, warn};

use crate::cli::Config;
use crate::live::{self, Sources};
use crate::liveness::{CHECK_EVERY, Liveness, Pulse};
use crate::report::{Report, Target};
use crate::sessions::Sessions;
use crate::signals::{SHORTENED_LOG, SignalPipes};
use crate::threads::{spawn, spawn_pinned};
use crate::topics::{self, Topics};
use crate::upkeep::Upkeep;
use crate::xdp::Xdp;
use crate::{keys, machine, memory, nic, privileges};

/// The thread that accepts connections.
const ACCEPT: &str = "accept";
/// Time between two checks of the link of the xdp path's interface.
const LINK_CHECK: Duration = Duration::from_millis(500);
/// Time limit for a reader to take the readiness line.
const READY_WAIT: Duration = Duration::from_secs(1);

/// Time limit for threads to end.
const JOIN_WAIT: Duration = Duration::from_secs(5);
/// The same where some have met a shortened log: they do not end.
const JOIN_WAIT_SHORTENED: Duration = Duration::from_secs(1);

/// Runs the broker. Returns when a signal ends it; fails when a thread ends unexpectedly.
pub fn run(config: &Config) -> Result<()> {
    let started = Instant::now();
    // Before this process opens anything, so that the number refers to the descriptor that it
    // inherited.
    let ready_fd = config.ready_fd.map(ReadyFd::take).transpose()?;
    let manager = ServiceManager::from_env();
    report_shortened_logs("penstock-broker").context("cannot install the SIGBUS handler")?;
    raise_limits(config);
    // Now, so that a signal during start-up still restores what was changed.
    let signals = SignalPipes::open().context("cannot watch signals")?;
    let user = config.user.as_deref().map(privileges::find_user);
    let user = user.transpose()?;
    if config.buffers.force {
        privileges::require("--rcvbuf-force", privileges::FORCE_BUFFERS)?;
    }
    let keys = config
        .auth_keys
        .as_deref()
        .map(|path| keys::load(path, user.as_ref()))
        .transpose()?;
    let mut report_to = config.report.as_deref().map(Target::open).transpose()?;
    topics::make_directory(&config.buffer_dir, user.as_ref(), config.log.access)?;
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
    let (mut xdp, xdp_workers) = open_xdp(config, address, &shared, &stop_xdp)?.unzip();

    let kept: &[_] = match config.buffers.force {
        true => privileges::FORCE_BUFFERS,
        false => &[],
    };
    if privileges::give_up(user.as_ref(), kept)? {
        let kept = (!kept.is_empty()).then(|| privileges::names(kept));
        info!(user = config.user, kept, "privileges dropped");
    }
    let topics = open_topics(config)?;
    let (workers, handles) = make_workers(config, &shared, &stop)?;
    let (jobs, opener) = crossbeam_channel::unbounded();
    let acceptor = Acceptor::new(
        listener,
        config.buffers,
        config.limits.clone(),
        Sessions::new(Arc::clone(&topics), config.limits.share_percent, jobs),
        workers.iter().map(Worker::queue).collect(),
        xdp.as_ref().map(Xdp::offer),
        Arc::clone(&shared),
    )
    .context("cannot start the accept loop")?
    .with_keys(keys.clone(), config.packet_auth);
    let supervisor = Supervisor::default();
    let log_bytes = config.log.geometry.file_bytes();
    let mut liveness = Liveness::new(manager.watchdog(), log_bytes);
    let mut pulse_of = |thread| {
        let pulse = Pulse::default();
        liveness.watch(thread, pulse.clone(), Instant::now());
        pulse
    };
    let [opening_pulse, signals_pulse, upkeep_pulse, figures_pulse] =
        ["topics", "signals", "upkeep", "figures"].map(&mut pulse_of);
    liveness.watch(ACCEPT, acceptor.rounds(), started);
    let waker = acceptor.poller();
    let opening = {
        let (topics, waker) = (Arc::clone(&topics), Arc::clone(&waker));
        move || {
            // A loop that cannot be woken polls again within a second.
            topics.serve(&opener, &opening_pulse, || drop(waker.notify()));
            Ok(())
        }
    };
    let flag = Arc::clone(&stop);
    // The only thread that needs the remaining capability: it sizes the buffers of accepted sockets.
    let accepting = spawn(&supervisor, ACCEPT, &stop, move || acceptor.run(&flag))?;
    privileges::keep(&[])?;
    // This thread ends with the accept loop, its only client; its end is not a cause of its own.
    let follows = Arc::new(AtomicBool::new(true));
    let opening = spawn(&supervisor, "topics", &follows, opening)?;
    logging::start_thread().context("cannot start a thread")?;
    let signals = watch_signals(&supervisor, &stop, signals, signals_pulse)?;
    // Dropped when the broker ends.
    let (stop_upkeep, upkeep_stopped) = crossbeam_channel::bounded(0);
    let upkeep = Upkeep::new(
        config.upkeep.clone(),
        config.topics.clone(),
        Arc::clone(&topics),
        Arc::clone(&shared),
    );
    let upkeep = spawn(&supervisor, "upkeep", &stop, move || {
        upkeep.run(&upkeep_pulse, &upkeep_stopped);
        Ok(())
    })?;
    let workers = start_workers(config, &supervisor, workers, &stop)?;
    if let Some(follower) = xdp.as_mut().and_then(Xdp::follower) {
        // This thread waits for the kernel, and ends with the process.
        let pulse = Pulse::default();
        liveness.watch("addresses", pulse.clone(), Instant::now());
        spawn(&supervisor, "addresses", &stop, move || {
            follower.run(&pulse)
        })?;
    }
    let xdp_workers = xdp_workers.unwrap_or_default();
    let xdp_workers = start_xdp_workers(config, &supervisor, xdp_workers, &stop_xdp)?;
    let now = Instant::now();
    for (thread, handle) in workers.iter().zip(&handles) {
        liveness.watch(thread.name(), handle.rounds(), now);
    }
    for (thread, handle) in &xdp_workers {
        liveness.watch(thread.name(), handle.rounds(), now);
    }

    let sources = Sources {
        started,
        listen: address,
        topics: Arc::clone(&topics),
        shared: Arc::clone(&shared),
        tcp: handles.clone(),
        xdp: xdp_workers.iter().map(|(_, h)| h.clone()).collect(),
    };
    // Some file systems do not support sockets, and a path may be too long for one.
    let _live = live::serve(
        &config.buffer_dir,
        config.log.access,
        sources,
        &supervisor,
        &stop,
        &figures_pulse,
    )
    .inspect_err(|error| {
        warn!("penstock-lab diagnose cannot read live figures: {error:#}");
        liveness.forget("figures");
    });

    tell_ready(address, ready_fd, &manager)?;
    let mut watch = Watch {
        supervisor: &supervisor,
        signals,
        manager: &manager,
        keys: keys.as_deref(),
        address,
        xdp: xdp.as_ref(),
        stop_path: &|xdp| {
            xdp.close();
            stop_xdp.store(true, Ordering::Release);
            wake_xdp_workers(&xdp_workers)
        },
        xdp_threads: xdp_workers
            .iter()
            .map(|(thread, _)| thread.name())
            .collect(),
        liveness,
    };
    let end = watch.wait_for_end()?;
    info!("ending: {end}");
    manager.stopping();

    stop.store(true, Ordering::Release);
    stop_xdp.store(true, Ordering::Release);
    let mut failures = Failures::new(&end);
    failures.of(waker.notify().context("cannot wake the accept loop"));
    for handle in &handles {
        failures.of(handle.wake().context("cannot wake a worker"));
    }
    failures.of(wake_xdp_workers(&xdp_workers));
    let deadline = Instant::now()
        + match end {
            End::ShortenedLog => JOIN_WAIT_SHORTENED,
            End::Signal(_) | End::Thread(_) => JOIN_WAIT,
        };
    drop(stop_upkeep);
    failures.of_thread(upkeep, deadline);
    if failures.of_thread(accepting, deadline).is_some() {
        // No thread requests logs from it any more.
        failures.of_thread(opening, deadline);
    }
    let mut stats = WorkerStats::default();
    for (worker, handle) in workers.into_iter().zip(&handles) {
        // A thread that does not report its result was already reported as hanging.
        let did = failures.of_thread(worker, deadline);
        stats.merge(&did.unwrap_or_else(|| handle.now().stats));
    }
    let worker_count = handles.len() + xdp_workers.len();
    let xdp_did = xdp_workers.into_iter().map(|(worker, handle)| {
        let did = failures.of_thread(worker, deadline);
        did.unwrap_or_else(|| (handle.now().stats, handle.now().xdp))
    });
    let (all, packets) = crate::xdp::sum(xdp_did.collect());
    stats.merge(&all);
    let report = Report::new(
        address,
        worker_count,
        started.elapsed(),
        &stats,
        xdp.map(|xdp| xdp.report(packets)),
        topics.list(),
        &shared,
        (end.to_string(), failures.list.clone()),
    )?;
    if let Some(to) = &mut report_to {
        failures.of(report.write(to));
    }
    failures.into_result()
}

/// Announces readiness: on stdout, to the service manager, on `--ready-fd`.
fn tell_ready(
    address: SocketAddr,
    ready_fd: Option<ReadyFd>,
    manager: &ServiceManager,
) -> Result<()> {
    let line = format_args!("penstock-broker ready on {address}");
    output::print_line_within(READY_WAIT, line)?;
    manager.ready(&format!("serving publishers on {address}"));
    // The receiver of the message has gone; publishers can connect all the same.
    if let Some(Err(error)) = ready_fd.map(ReadyFd::ready) {
        warn!("{error:#}");
    }
    Ok(())
}

/// What ended the broker.
enum End {
    Signal(&'static str),
    Thread(Ended),
    ShortenedLog,
}

impl Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Signal(name) => f.write_str(name),
            Self::Thread(ended) => ended.fmt(f),
            Self::ShortenedLog => f.write_str(
                "a log was shortened under the broker, or its file system has no room for a hole in it (SIGBUS)",
            ),
        }
    }
}

/// Failures, from the cause of the end to the last thread that did not end in order.
struct Failures {
    list: Vec<String>,
    /// The thread that was the cause.
    thread: Option<String>,
}

impl Failures {
    fn new(end: &End) -> Self {
        match end {
            End::Signal(_) => Self {
                list: Vec::new(),
                thread: None,
            },
            End::ShortenedLog => Self {
                list: vec![end.to_string()],
                thread: None,
            },
            End::Thread(ended) => Self {
                list: vec![ended.to_string()],
                thread: Some(ended.thread.clone()),
            },
        }
    }

    fn of<T>(&mut self, result: Result<T>) -> Option<T> {
        result
            .map_err(|error| self.list.push(explain(error.as_ref())))
            .ok()
    }

    fn of_thread<T>(&mut self, thread: Supervised<T>, deadline: Instant) -> Option<T> {
        let known = self.thread.as_deref() == Some(thread.name());
        match thread.join(deadline) {
            Err(_) if known => None,
            joined => self.of(joined),
        }
    }

    fn into_result(self) -> Result<()> {
        match self.list.is_empty() {
            true => Ok(()),
            false => Err(anyhow!(self.list.join("; "))),
        }
    }
}

/// What the main thread watches while the broker serves.
struct Watch<'a> {
    supervisor: &'a Supervisor,
    signals: Receiver<&'static str>,
    manager: &'a ServiceManager,
    keys: Option<&'a Keys>,
    address: SocketAddr,
    xdp: Option<&'a Xdp>,
    /// Closes the xdp path when its interface is gone.
    stop_path: &'a dyn Fn(&Xdp) -> Result<()>,
    xdp_threads: Vec<&'a str>,
    liveness: Liveness,
}

impl Watch<'_> {
    /// Returns what ended the broker. Until then it reloads keys on request, watches the link of the
    /// xdp path, and reports the threads' progress to the service manager.
    fn wait_for_end(&mut self) -> Result<End> {
        let every = self.manager.watchdog().map_or(CHECK_EVERY, |watchdog| {
            (watchdog / 4).clamp(Duration::from_millis(20), CHECK_EVERY)
        });
        let ticks = crossbeam_channel::tick(every);
        let looks = match self.xdp {
            Some(_) => crossbeam_channel::tick(LINK_CHECK),
            None => crossbeam_channel::never(),
        };
        let mut link = self.xdp.map_or(Link::Gone, |xdp| xdp.facts().link);
        loop {
            crossbeam_channel::select_biased! {
                recv(self.supervisor.ended()) -> ended => return Ok(End::Thread(ended?)),
                recv(self.signals) -> signal => match signal {
                    Ok("SIGHUP") => self.reload(),
                    Ok(SHORTENED_LOG) => return Ok(End::ShortenedLog),
                    Ok(name) => return Ok(End::Signal(name)),
                    // The thread has ended: the supervisor is about to tell why.
                    Err(_) => self.signals = crossbeam_channel::never(),
                },
                recv(ticks) -> now => if self.liveness.check(now?) {
                    self.manager.alive();
                },
                recv(looks) -> _ => link = self.look_at_link(link)?,
            }
        }
    }

    fn reload(&self) {
        self.manager.reloading();
        match self.keys {
            Some(keys) => keys::reload(keys),
            None => info!("nothing to reload: there is no --auth-keys"),
        }
        self.manager
            .ready(&format!("serving publishers on {}", self.address));
    }

    fn look_at_link(&mut self, link: Link) -> Result<Link> {
        let Some(xdp) = self.xdp.filter(|_| link != Link::Gone) else {
            return Ok(link);
        };
        // Without a free descriptor the link cannot be checked for now.
        let now = penstock_nic::link(xdp.facts().index).unwrap_or(link);
        xdp.look_at_queues();
        if now != link {
            tell_link(&xdp.name(), now);
            if now == Link::Gone {
                (self.stop_path)(xdp)?;
                for thread in &self.xdp_threads {
                    self.liveness.forget(thread);
                }
            }
        }
        Ok(now)
    }
}

fn tell_link(name: &str, link: Link) {
    match link {
        Link::Up => info!("{name} is up"),
        Link::NoCarrier => warn!("{name} has no carrier: the xdp path receives nothing"),
        Link::Down => warn!("{name} is down: the xdp path receives nothing until it is up again"),
        Link::Gone => {
            warn!("{name} is gone: the broker serves over tcp only until it is restarted");
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
                "; the address is not one of this host's (ip addr shows them; one that is tentative can be used a second or two later)"
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
            wanted,
            "the limit on open files is too low for the maximum number of connections; raise it (ulimit -Hn)"
        ),
        Ok(_) => {}
        Err(error) => warn!(%error, "cannot raise the limit of open files"),
    }
    if config.buffers.force && config.buffers.rcvbuf_on == RcvbufOn::None {
        warn!("--rcvbuf-force has no effect with --rcvbuf-on none");
    }
}

/// Passes on the names of signals, from a thread of its own.
fn watch_signals(
    supervisor: &Supervisor,
    stop: &Arc<AtomicBool>,
    mut signals: SignalPipes,
    pulse: Pulse,
) -> Result<Receiver<&'static str>> {
    let (sender, names) = crossbeam_channel::unbounded();
    spawn(supervisor, "signals", stop, move || {
        // If nothing receives them, the broker is ending.
        signals.hand_on(&pulse, &sender)
    })?;
    Ok(names)
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

fn start_workers(
    config: &Config,
    supervisor: &Supervisor,
    workers: Vec<Worker>,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<Supervised<WorkerStats>>> {
    let start = |(number, worker): (usize, Worker)| {
        let name = format!("worker-{number}");
        spawn_pinned(config, supervisor, (&name, number), stop, move || {
            worker.run()
        })
    };
    workers.into_iter().enumerate().map(start).collect()
}

type XdpThread = Supervised<(WorkerStats, XdpStats)>;
type XdpWorkers = Vec<(penstock_ingest::xdp::Worker, xdp::WorkerHandle)>;

/// Opens the xdp path, if it was requested and is available.
fn open_xdp(
    config: &Config,
    address: SocketAddr,
    shared: &Arc<Shared>,
    stop: &Arc<AtomicBool>,
) -> Result<Option<(Xdp, XdpWorkers)>> {
    let Some(wanted) = &config.xdp else {
        if config.xdp_may_fail {
            warn!(
                "serving over tcp only: --mode auto needs --iface to open the xdp path{}",
                nic::candidates(address)
            );
        }
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
            warn!("serving over tcp only: {error:#}");
            Ok(None)
        }
        Err(error) => Err(error.context("cannot open the xdp path")),
    }
}

fn start_xdp_workers(
    config: &Config,
    supervisor: &Supervisor,
    workers: XdpWorkers,
    stop: &Arc<AtomicBool>,
) -> Result<Vec<(XdpThread, xdp::WorkerHandle)>> {
    let start = |(number, (worker, handle)): (usize, (penstock_ingest::xdp::Worker, _))| {
        let name = format!("xdp-{number}");
        let thread = spawn_pinned(config, supervisor, (&name, number), stop, move || {
            worker.run()
        })?;
        Ok((thread, handle))
    };
    workers.into_iter().enumerate().map(start).collect()
}

fn wake_xdp_workers(workers: &[(XdpThread, xdp::WorkerHandle)]) -> Result<()> {
    let mut handles = workers.iter().map(|(_, handle)| handle);
    handles.try_for_each(|handle| handle.wake().context("cannot wake a worker"))
}
