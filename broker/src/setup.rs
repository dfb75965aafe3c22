//! Set-up: what the broker opens while it has its privileges, before it starts any thread.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use penstock_auth::Keys;
use penstock_ingest::session::buffers::RcvbufOn;
use penstock_ingest::session::{Shared, listen};
use penstock_ingest::xdp::{Worker, WorkerHandle};
use penstock_log::report_shortened_logs;
use penstock_process::notify::{ReadyFd, ServiceManager};
use tracing::{info, warn};

use crate::cli::Config;
use crate::report::Target;
use crate::signals::SignalPipes;
use crate::xdp::Xdp;
use crate::{buffer_dir, keys, machine, nic, privileges};

/// What is open once set-up is complete.
pub struct Setup {
    pub started: Instant,
    pub ready_fd: Option<ReadyFd>,
    pub manager: ServiceManager,
    pub keys: Option<Arc<Keys>>,
    pub report_to: Option<Target>,
    pub address: SocketAddr,
    pub shared: Arc<Shared>,
    /// Tells all threads but those of the xdp path to end.
    pub stop: Arc<AtomicBool>,
    /// The xdp path may end before the broker does.
    pub stop_xdp: Arc<AtomicBool>,
    pub xdp: Option<Xdp>,
}

/// What is open for a thread to own.
pub struct ForThreads {
    pub listener: TcpListener,
    pub signals: SignalPipes,
    pub xdp_workers: XdpWorkers,
}

type XdpWorkers = Vec<(Worker, WorkerHandle)>;

impl Setup {
    /// Opens everything, and then drops all privileges but the one that accepting needs.
    pub fn complete(config: &Config) -> Result<(Self, ForThreads)> {
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
        let report_to = config.report.as_deref().map(Target::open).transpose()?;
        buffer_dir::make(&config.buffer_dir, user.as_ref(), config.log.access)?;
        let listener = open_listener(config)?;
        let address = listener
            .local_addr()
            .context("cannot read the listener's address")?;
        if keys.is_none() {
            keys::warn_without(address);
        }
        let shared = Arc::new(Shared::default());
        let stop_xdp = Arc::new(AtomicBool::new(false));
        let (xdp, xdp_workers) = open_xdp(config, address, &shared, &stop_xdp)?.unzip();
        let kept: &[_] = match config.buffers.force {
            true => privileges::FORCE_BUFFERS,
            false => &[],
        };
        if privileges::drop_privileges(user.as_ref(), kept)? {
            let kept = (!kept.is_empty()).then(|| privileges::names(kept));
            info!(user = config.user, kept, "privileges dropped");
        }
        let setup = Self {
            started,
            ready_fd,
            manager,
            keys,
            report_to,
            address,
            shared,
            stop: Arc::default(),
            stop_xdp,
            xdp,
        };
        let for_threads = ForThreads {
            listener,
            signals,
            xdp_workers: xdp_workers.unwrap_or_default(),
        };
        Ok((setup, for_threads))
    }
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
    let subscribers = config.subscribers.map_or(0, |subscribers| subscribers.max);
    let wanted =
        (config.limits.max_connections + config.limits.max_handshakes + subscribers) as u64 + 64;
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
        let prepared = nic::prepare(wanted, address)?;
        let most = config.limits.max_connections;
        Xdp::open(wanted, prepared, address, most, shared, stop)
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
