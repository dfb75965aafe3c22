//! Runs the broker: starts its threads, serves until something ends it, and reports.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{Receiver, Sender};
use penstock_ingest::session::{Acceptor, SubscriberService, WorkerStats};
use penstock_ingest::tcp::{Worker, WorkerHandle};
use penstock_ingest::xdp::{self, XdpStats};
use penstock_process::notify::ReadyFd;
use penstock_process::supervisor::{Supervised, Supervisor};
use penstock_process::{logging, output};
use penstock_runtime::poller::Poller;
use penstock_serve as serve;
use tracing::{info, warn};

use crate::cli::Config;
use crate::end::{End, Failures};
use crate::liveness::{Liveness, Pulse};
use crate::report::Report;
use crate::sessions::Sessions;
use crate::setup::{ForThreads, Setup};
use crate::signals::SignalPipes;
use crate::stats_socket::{self, Sources, StatsSocket};
use crate::threads::{spawn, spawn_pinned};
use crate::topics::{Job, Topics};
use crate::upkeep::Upkeep;
use crate::watch::Watch;
use crate::xdp::Xdp;
use crate::{memory, privileges};

/// The thread that accepts connections.
const ACCEPT: &str = "accept";
/// Time limit for a reader to take the readiness line.
const READY_WAIT: Duration = Duration::from_secs(1);
/// Time limit for threads to end.
const JOIN_WAIT: Duration = Duration::from_secs(5);
/// The same where some have met a shortened log: they do not end.
const JOIN_WAIT_SHORTENED: Duration = Duration::from_secs(1);

/// Runs the broker. Returns when a signal ends it; fails when a thread ends unexpectedly.
///
/// An error before the first thread starts is a failed start. Any later one ends the broker in order, with
/// its report.
pub fn run(config: &Config) -> Result<()> {
    let (setup, for_threads) = Setup::complete(config)?;
    let ForThreads {
        listener,
        signals,
        xdp_workers,
    } = for_threads;
    let topics = open_topics(config)?;
    let workers = make_workers(config, &setup)?;
    let serving = make_server(config, &setup)?;
    let (jobs, opener) = crossbeam_channel::unbounded();
    let sessions = Sessions::new(Arc::clone(&topics), config.limits.share_percent, jobs);
    let acceptor = Acceptor::new(
        listener,
        config.buffers,
        config.limits.clone(),
        sessions,
        workers.iter().map(|(worker, _)| worker.queue()).collect(),
        setup.xdp.as_ref().map(Xdp::offer),
        Arc::clone(&setup.shared),
    )
    .context("cannot start the accept loop")?
    .with_subscribers(serving.as_ref().map(|(service, ..)| service.clone()))
    .with_keys(setup.keys.clone(), config.packet_auth);
    let mut broker = Broker::new(config, setup, topics, acceptor.poller());
    let end = broker.serve(ThreadBodies {
        acceptor,
        opener,
        signals,
        workers,
        xdp_workers,
        serving,
    });
    broker.shut_down(&end.unwrap_or_else(End::from))
}

/// The broker while it serves.
struct Broker<'a> {
    config: &'a Config,
    setup: Setup,
    topics: Arc<Topics>,
    supervisor: Supervisor,
    liveness: Liveness,
    /// Wakes the accept loop.
    waker: Arc<Poller>,
    threads: Threads,
    /// The socket for live figures; removed when dropped.
    stats_socket: Option<StatsSocket>,
}

/// What the threads run.
struct ThreadBodies {
    acceptor: Acceptor<Sessions>,
    /// Requests for the thread that opens logs.
    opener: Receiver<Job>,
    signals: SignalPipes,
    workers: Vec<(Worker, WorkerHandle)>,
    xdp_workers: Vec<(xdp::Worker, xdp::WorkerHandle)>,
    serving: Option<Serving>,
}

/// The service for remote subscribers, and the worker behind it.
type Serving = (SubscriberService, serve::Worker, serve::WorkerHandle);

/// The threads that were started, which are joined in the end.
#[derive(Default)]
struct Threads {
    accepting: Option<Supervised<()>>,
    opening: Option<Supervised<()>>,
    /// Ends when the sender is dropped.
    upkeep: Option<(Sender<()>, Supervised<()>)>,
    workers: Vec<(Supervised<WorkerStats>, WorkerHandle)>,
    xdp_workers: Vec<(XdpThread, xdp::WorkerHandle)>,
    /// Serves remote subscribers.
    serving: Option<(Supervised<serve::ServeStats>, serve::WorkerHandle)>,
}

type XdpThread = Supervised<(WorkerStats, XdpStats)>;

impl<'a> Broker<'a> {
    fn new(config: &'a Config, setup: Setup, topics: Arc<Topics>, waker: Arc<Poller>) -> Self {
        let log_bytes = config.log.geometry.file_bytes();
        Self {
            config,
            topics,
            supervisor: Supervisor::default(),
            liveness: Liveness::new(setup.manager.watchdog(), log_bytes),
            waker,
            threads: Threads::default(),
            stats_socket: None,
            setup,
        }
    }

    /// Starts all threads, announces that the broker is ready, and returns what ends it.
    fn serve(&mut self, bodies: ThreadBodies) -> Result<End> {
        self.start_accepting(bodies.acceptor)?;
        self.start_opening(bodies.opener)?;
        logging::start_thread().context("cannot start a thread")?;
        let signals = self.start_signals(bodies.signals)?;
        self.start_upkeep()?;
        self.start_workers(bodies.workers)?;
        self.start_xdp(bodies.xdp_workers)?;
        self.start_serving(bodies.serving)?;
        self.serve_figures();
        self.announce()?;
        self.watch(signals)
    }

    /// A pulse that the thread of this name counts.
    fn pulse_of(&mut self, thread: &str) -> Pulse {
        let pulse = Pulse::default();
        self.liveness.watch(thread, pulse.clone(), Instant::now());
        pulse
    }

    fn start_accepting(&mut self, acceptor: Acceptor<Sessions>) -> Result<()> {
        self.liveness
            .watch(ACCEPT, acceptor.rounds(), self.setup.started);
        let stop = Arc::clone(&self.setup.stop);
        // The only thread that needs the remaining capability: it sizes the buffers of accepted sockets.
        let accepting = spawn(&self.supervisor, ACCEPT, &self.setup.stop, move || {
            acceptor.run(&stop)
        })?;
        self.threads.accepting = Some(accepting);
        privileges::keep(&[])
    }

    /// Starts the thread that opens logs.
    fn start_opening(&mut self, opener: Receiver<Job>) -> Result<()> {
        let pulse = self.pulse_of("topics");
        let (topics, waker) = (Arc::clone(&self.topics), Arc::clone(&self.waker));
        // This thread ends with the accept loop, its only client; its end is not a cause of its own.
        let follows = Arc::new(AtomicBool::new(true));
        let opening = spawn(&self.supervisor, "topics", &follows, move || {
            // A loop that cannot be woken polls again within a second.
            topics.serve(&opener, &pulse, || drop(waker.notify()));
            Ok(())
        })?;
        self.threads.opening = Some(opening);
        Ok(())
    }

    /// Starts a thread that passes on the names of signals.
    fn start_signals(&mut self, mut signals: SignalPipes) -> Result<Receiver<&'static str>> {
        let pulse = self.pulse_of("signals");
        let (sender, names) = crossbeam_channel::unbounded();
        spawn(&self.supervisor, "signals", &self.setup.stop, move || {
            // If nothing receives them, the broker is ending.
            signals.hand_on(&pulse, &sender)
        })?;
        Ok(names)
    }

    fn start_upkeep(&mut self) -> Result<()> {
        let pulse = self.pulse_of("upkeep");
        let (stop, stopped) = crossbeam_channel::bounded(0);
        let upkeep = Upkeep::new(
            self.config.upkeep.clone(),
            self.config.topics.clone(),
            Arc::clone(&self.topics),
            Arc::clone(&self.setup.shared),
        );
        let thread = spawn(&self.supervisor, "upkeep", &self.setup.stop, move || {
            upkeep.run(&pulse, &stopped);
            Ok(())
        })?;
        self.threads.upkeep = Some((stop, thread));
        Ok(())
    }

    fn start_workers(&mut self, workers: Vec<(Worker, WorkerHandle)>) -> Result<()> {
        for (number, (worker, handle)) in workers.into_iter().enumerate() {
            let name = format!("worker-{number}");
            let (supervisor, stop) = (&self.supervisor, &self.setup.stop);
            let thread = spawn_pinned(self.config, supervisor, (&name, number), stop, move || {
                worker.run()
            })?;
            self.liveness.watch(&name, handle.rounds(), Instant::now());
            self.threads.workers.push((thread, handle));
        }
        Ok(())
    }

    /// Starts the threads of the xdp path, if it is open.
    fn start_xdp(&mut self, workers: Vec<(xdp::Worker, xdp::WorkerHandle)>) -> Result<()> {
        if let Some(follower) = self.setup.xdp.as_mut().and_then(Xdp::follower) {
            // This thread waits for the kernel, and ends with the process.
            let pulse = self.pulse_of("addresses");
            spawn(&self.supervisor, "addresses", &self.setup.stop, move || {
                follower.run(&pulse)
            })?;
        }
        for (number, (worker, handle)) in workers.into_iter().enumerate() {
            let name = format!("xdp-{number}");
            let (supervisor, stop) = (&self.supervisor, &self.setup.stop_xdp);
            let thread = spawn_pinned(self.config, supervisor, (&name, number), stop, move || {
                worker.run()
            })?;
            self.liveness.watch(&name, handle.rounds(), Instant::now());
            self.threads.xdp_workers.push((thread, handle));
        }
        Ok(())
    }

    /// Starts the thread that serves remote subscribers, if any may come.
    fn start_serving(&mut self, serving: Option<Serving>) -> Result<()> {
        let Some((_, worker, handle)) = serving else {
            return Ok(());
        };
        let stop = Arc::clone(&self.setup.stop);
        let thread = spawn(&self.supervisor, "subscribers", &stop, move || worker.run())?;
        self.liveness
            .watch("subscribers", handle.rounds(), Instant::now());
        self.threads.serving = Some((thread, handle));
        Ok(())
    }

    /// Serves live figures, if the buffer directory can have a socket: some file systems do not support
    /// them, and a path may be too long for one.
    fn serve_figures(&mut self) {
        let pulse = self.pulse_of("figures");
        let sources = Sources {
            started: self.setup.started,
            listen: self.setup.address,
            topics: Arc::clone(&self.topics),
            shared: Arc::clone(&self.setup.shared),
            tcp: handles(&self.threads.workers),
            xdp: handles(&self.threads.xdp_workers),
            serving: self
                .threads
                .serving
                .as_ref()
                .map(|(_, handle)| handle.clone()),
        };
        let served = stats_socket::serve(
            &self.config.buffer_dir,
            self.config.log.access,
            sources,
            &self.supervisor,
            &self.setup.stop,
            &pulse,
        );
        match served {
            Ok(socket) => self.stats_socket = Some(socket),
            Err(error) => {
                warn!("penstock-lab diagnose cannot read live figures: {error:#}");
                self.liveness.forget("figures");
            }
        }
    }

    /// Announces readiness: on stdout, to the service manager, on `--ready-fd`.
    fn announce(&mut self) -> Result<()> {
        let address = self.setup.address;
        let line = format_args!("penstock-broker ready on {address}");
        output::print_line_within(READY_WAIT, line)?;
        let manager = &self.setup.manager;
        manager.ready(&format!("serving publishers on {address}"));
        // The receiver of the message has gone; publishers can connect all the same.
        if let Some(Err(error)) = self.setup.ready_fd.take().map(ReadyFd::ready) {
            warn!("{error:#}");
        }
        Ok(())
    }

    fn watch(&mut self, signals: Receiver<&'static str>) -> Result<End> {
        let (stop_xdp, xdp_workers) = (&self.setup.stop_xdp, &self.threads.xdp_workers);
        let close_path = |xdp: &Xdp| {
            xdp.close();
            stop_xdp.store(true, Ordering::Release);
            for (_, handle) in xdp_workers {
                // It checks the flag the next time it polls, within 50 ms.
                if let Err(error) = handle.wake() {
                    warn!("cannot wake a worker: {error}");
                }
            }
        };
        let threads = xdp_workers.iter().map(|(thread, _)| thread.name());
        Watch {
            supervisor: &self.supervisor,
            signals,
            manager: &self.setup.manager,
            keys: self.setup.keys.as_deref(),
            address: self.setup.address,
            xdp: self.setup.xdp.as_ref(),
            close_path: &close_path,
            xdp_threads: threads.collect(),
            liveness: &mut self.liveness,
        }
        .wait_for_end()
    }

    /// Ends all threads that were started, and writes the report.
    fn shut_down(mut self, end: &End) -> Result<()> {
        info!("ending: {end}");
        self.setup.manager.stopping();
        let mut failures = Failures::new(end);
        self.stop_threads(&mut failures);
        let deadline = Instant::now()
            + match end {
                End::ShortenedLog => JOIN_WAIT_SHORTENED,
                End::Signal(_) | End::Thread(_) | End::Failed(_) => JOIN_WAIT,
            };
        let joined = self.threads.join(deadline, &mut failures);
        let (mut stats, worker_count) = (joined.stats, joined.workers);
        let (xdp_stats, packets) = crate::xdp::sum(joined.xdp);
        stats.merge(&xdp_stats);
        let report = Report::new(
            self.setup.address,
            worker_count,
            self.setup.started.elapsed(),
            &stats,
            joined.served,
            self.setup.xdp.take().map(|xdp| xdp.report(packets)),
            self.topics.list(),
            &self.setup.shared,
            (end.to_string(), failures.list.clone()),
        );
        // Without a file for them, figures that cannot be computed are no failure.
        if let Some(to) = &mut self.setup.report_to {
            failures.of(report.and_then(|report| report.write(to)));
        }
        failures.into_result()
    }

    fn stop_threads(&self, failures: &mut Failures) {
        self.setup.stop.store(true, Ordering::Release);
        self.setup.stop_xdp.store(true, Ordering::Release);
        failures.of(self.waker.notify().context("cannot wake the accept loop"));
        for (_, handle) in &self.threads.workers {
            failures.of(handle.wake().context("cannot wake a worker"));
        }
        for (_, handle) in &self.threads.xdp_workers {
            failures.of(handle.wake().context("cannot wake a worker"));
        }
        if let Some((_, handle)) = &self.threads.serving {
            failures.of(handle.wake().context("cannot wake a worker"));
        }
    }
}

/// What the workers did.
struct Joined {
    workers: usize,
    stats: WorkerStats,
    xdp: Vec<(WorkerStats, XdpStats)>,
    served: Option<serve::ServeStats>,
}

impl Threads {
    /// Waits for all threads, until `deadline` at most.
    fn join(&mut self, deadline: Instant, failures: &mut Failures) -> Joined {
        let Self {
            accepting,
            opening,
            upkeep,
            workers,
            xdp_workers,
            serving,
        } = std::mem::take(self);
        if let Some((stop, thread)) = upkeep {
            drop(stop);
            failures.of_thread(thread, deadline);
        }
        let accepted =
            accepting.is_some_and(|thread| failures.of_thread(thread, deadline).is_some());
        // If no thread requests logs from it any more.
        if let Some(thread) = opening.filter(|_| accepted) {
            failures.of_thread(thread, deadline);
        }
        let mut joined = Joined {
            workers: workers.len() + xdp_workers.len(),
            stats: WorkerStats::default(),
            xdp: Vec::new(),
            served: None,
        };
        if let Some((thread, handle)) = serving {
            let did = failures.of_thread(thread, deadline);
            joined.served = Some(did.unwrap_or_else(|| handle.now()));
        }
        for (worker, handle) in workers {
            // A thread that does not report its result was already reported as hanging.
            let did = failures.of_thread(worker, deadline);
            joined
                .stats
                .merge(&did.unwrap_or_else(|| handle.now().stats));
        }
        for (worker, handle) in xdp_workers {
            let did = failures.of_thread(worker, deadline);
            let did = did.unwrap_or_else(|| (handle.now().stats, handle.now().xdp));
            joined.xdp.push(did);
        }
        joined
    }
}

fn handles<T, H: Clone>(workers: &[(T, H)]) -> Vec<H> {
    workers.iter().map(|(_, handle)| handle.clone()).collect()
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

fn make_server(config: &Config, setup: &Setup) -> Result<Option<Serving>> {
    let Some(subscribers) = config.subscribers else {
        return Ok(None);
    };
    let stop = Arc::clone(&setup.stop);
    let limits = serve::Config {
        start_timeout: config.limits.handshake_timeout,
        reader_timeout: config.upkeep.reader_timeout,
    };
    let (worker, handle) = serve::Worker::new(limits, Arc::clone(&setup.shared), stop)
        .context("cannot start the thread for subscribers")?;
    let service = SubscriberService {
        queue: worker.queue(),
        access: subscribers.access,
        anyone_may_register: subscribers.anyone_may_register,
        max: subscribers.max,
    };
    Ok(Some((service, worker, handle)))
}

fn make_workers(config: &Config, setup: &Setup) -> Result<Vec<(Worker, WorkerHandle)>> {
    let make = |_| {
        let (shared, stop) = (Arc::clone(&setup.shared), Arc::clone(&setup.stop));
        Worker::new(config.worker.clone(), shared, stop).context("cannot start a worker")
    };
    (0..config.tcp_workers).map(make).collect()
}
