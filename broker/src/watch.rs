//! The main thread while the broker serves.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use crossbeam_channel::Receiver;
use penstock_auth::Keys;
use penstock_nic::Link;
use penstock_process::notify::ServiceManager;
use penstock_process::supervisor::Supervisor;
use tracing::{info, warn};

use crate::end::End;
use crate::keys;
use crate::liveness::{CHECK_EVERY, Liveness};
use crate::signals::SHORTENED_LOG;
use crate::xdp::Xdp;

/// Time between two checks of the link of the xdp path's interface.
const LINK_CHECK: Duration = Duration::from_millis(500);

/// What the main thread watches while the broker serves.
pub struct Watch<'a> {
    pub supervisor: &'a Supervisor,
    pub signals: Receiver<&'static str>,
    pub manager: &'a ServiceManager,
    pub keys: Option<&'a Keys>,
    pub address: SocketAddr,
    pub xdp: Option<&'a Xdp>,
    /// Closes the xdp path when its interface is gone.
    pub close_path: &'a dyn Fn(&Xdp),
    pub xdp_threads: Vec<&'a str>,
    pub liveness: &'a mut Liveness,
}

impl Watch<'_> {
    /// Returns what ended the broker. Until then it reloads keys on request, watches the link of the
    /// xdp path, and reports the threads' progress to the service manager.
    pub fn wait_for_end(&mut self) -> Result<End> {
        let every = self.manager.watchdog().map_or(CHECK_EVERY, |watchdog| {
            (watchdog / 4).clamp(Duration::from_millis(20), CHECK_EVERY)
        });
        let ticks = crossbeam_channel::tick(every);
        let link_checks = match self.xdp {
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
                    // The thread has ended: the supervisor is about to report why.
                    Err(_) => self.signals = crossbeam_channel::never(),
                },
                recv(ticks) -> now => if self.liveness.check(now?) {
                    self.manager.alive();
                },
                recv(link_checks) -> _ => link = self.check_link(link),
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

    fn check_link(&mut self, link: Link) -> Link {
        let Some(xdp) = self.xdp.filter(|_| link != Link::Gone) else {
            return link;
        };
        // Without a free descriptor the link cannot be checked for now.
        let now = penstock_nic::link(xdp.facts().index).unwrap_or(link);
        xdp.check_queues();
        if now != link {
            log_link(&xdp.name(), now);
            if now == Link::Gone {
                (self.close_path)(xdp);
                for thread in &self.xdp_threads {
                    self.liveness.forget(thread);
                }
            }
        }
        now
    }
}

fn log_link(name: &str, link: Link) {
    match link {
        Link::Up => info!("{name} is up"),
        Link::NoCarrier => warn!("{name} has no carrier: the xdp path receives nothing"),
        Link::Down => warn!("{name} is down: the xdp path receives nothing until it is up again"),
        Link::Gone => {
            warn!("{name} is gone: the broker serves over tcp only until it is restarted");
        }
    }
}
