//! Keeps the XDP program's addresses in step with those of the xdp path's interface, such as a virtual
//! address that moves here or one that DHCP or a router advertisement brings. The program accepts
//! packets to all of them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use penstock_ebpf::{Addresses, MAX_ADDRESSES};
use penstock_nic::{Seen, Watch, quote};
use tracing::{info, warn};

use crate::liveness::{IDLE_ROUND_MS, Pulse};

/// Pause after a change, because changes often come in groups.
const SETTLING: Duration = Duration::from_millis(10);
/// Pause after the kernel failed to answer.
const PAUSE: Duration = Duration::from_secs(1);

/// Keeps the program's addresses equal to the interface's. It needs no privilege.
pub struct Follower {
    watch: Watch,
    index: u32,
    listen: SocketAddr,
    seen: Seen,
    program: Option<Addresses>,
}

impl Follower {
    /// Starts to follow an interface. No change from now on is missed.
    pub fn open(index: u32, listen: SocketAddr) -> Result<Self> {
        let mut watch = Watch::new(index).context("cannot watch the interface's addresses")?;
        let seen = watch
            .look()
            .context("cannot list the interface's addresses")?;
        Ok(Self {
            watch,
            index,
            listen,
            seen,
            program: None,
        })
    }

    /// Addresses that publishers can send payload to; an error if there can never be one.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        let listen = self.listen.ip().to_canonical();
        let name = &self.seen.name;
        let addresses = served(listen, &self.seen);
        if listen.is_unspecified() {
            if addresses.is_empty() {
                warn!(
                    "{name} has no address, so the xdp path receives nothing until it gets one (ip addr show dev {})",
                    quote(name)
                );
            }
            return Ok(addresses);
        }
        let of_another = |scope| scope != 0 && scope != self.index;
        let in_scope = match self.listen {
            SocketAddr::V6(v6) => !of_another(v6.scope_id()),
            SocketAddr::V4(_) => true,
        };
        let mut there = self.seen.addresses.iter().chain(&self.seen.of_loopback);
        if in_scope && there.any(|address| address.ip == listen) {
            return Ok(addresses);
        }
        if listen.is_loopback() {
            bail!(
                "--listen {listen} accepts publishers on this host only, and their packets do not arrive on {name}; use --mode tcp"
            );
        }
        match owner(listen, self.index) {
            Some(owner) => bail!(
                "--listen {listen} is an address of {owner}, not of {name}: use --iface {}",
                quote(&owner)
            ),
            None if in_scope => warn!(
                "--listen {listen} is not an address of {name}, so the xdp path receives nothing until it becomes one (ip addr shows each interface's addresses)"
            ),
            None => bail!(
                "the interface in --listen differs from --iface {}",
                quote(name)
            ),
        }
        Ok(addresses)
    }

    /// Sets the program that gets the addresses.
    pub fn update_from_now_on(&mut self, program: Addresses) {
        self.program = Some(program);
    }

    /// Follows the interface until the process ends; returns if the kernel reports no more changes.
    pub fn run(mut self, pulse: &Pulse) -> io::Result<()> {
        let idle = Duration::from_millis(IDLE_ROUND_MS.into());
        // The addresses may have changed since `open`.
        loop {
            self.update(pulse);
            while !self.watch.wait_for(idle)? {
                pulse.count();
            }
            thread::sleep(SETTLING);
        }
    }

    fn update(&mut self, pulse: &Pulse) {
        let seen = loop {
            pulse.count();
            match self.watch.look() {
                Ok(seen) => break seen,
                Err(error) => warn!("cannot list the interface's addresses: {error}"),
            }
            thread::sleep(PAUSE);
        };
        if seen == self.seen {
            return;
        }
        let before = served(self.listen.ip(), &self.seen);
        let now = served(self.listen.ip(), &seen);
        if !seen.name.is_empty() && seen.name != self.seen.name {
            info!("{} was renamed to {}", self.seen.name, seen.name);
        }
        self.seen = seen;
        if now == before {
            return;
        }
        let room = self
            .program
            .as_ref()
            .is_none_or(|program| program.set(&now));
        let difference = |from: &[IpAddr], to: &[IpAddr]| -> Vec<IpAddr> {
            let missing = from.iter().filter(|address| !to.contains(address));
            missing.copied().collect()
        };
        info!(
            added = ?difference(&now, &before),
            removed = ?difference(&before, &now),
            "addresses of {} changed",
            self.seen.name
        );
        if !room {
            warn!(
                "{} has {} addresses, and the xdp path serves only {MAX_ADDRESSES} of them; choose one with --listen",
                self.seen.name,
                now.len()
            );
        }
    }
}

/// The addresses of an interface to which publishers of a listener on `listen` can send payload.
/// Routers may also deliver packets for an address of the loopback interface here.
pub fn served(listen: IpAddr, seen: &Seen) -> Vec<IpAddr> {
    let listen = listen.to_canonical();
    if !listen.is_unspecified() {
        return vec![listen];
    }
    let addresses = seen.addresses.iter().chain(&seen.of_loopback);
    let ips = addresses.map(|address| address.ip);
    let mut served: Vec<_> = ips.filter(|ip| listen.is_ipv6() || ip.is_ipv4()).collect();
    served.sort_unstable();
    served.dedup();
    served
}

/// The name of another interface that has this address.
fn owner(address: IpAddr, but: u32) -> Option<String> {
    let all = penstock_nic::interfaces().ok()?.into_iter();
    let mut others = all.filter(|interface| interface.index != but);
    let found = others.find(|interface| {
        let addresses = penstock_nic::addresses(interface.index).unwrap_or_default();
        addresses.iter().any(|found| found.ip == address)
    });
    found.map(|interface| interface.name)
}

#[cfg(test)]
mod tests {
    use penstock_nic::Address;

    use super::*;

    fn seen(of_interface: &[&str], of_loopback: &[&str]) -> Seen {
        let list = |addresses: &[&str]| {
            let addresses = addresses.iter().map(|address| Address {
                ip: address.parse().unwrap(),
                beyond_host: true,
            });
            addresses.collect()
        };
        Seen {
            name: "eth1".to_owned(),
            addresses: list(of_interface),
            of_loopback: list(of_loopback),
        }
    }

    fn of(listen: &str, seen: &Seen) -> Vec<String> {
        let served = served(listen.parse().unwrap(), seen);
        served.iter().map(IpAddr::to_string).collect()
    }

    #[test]
    fn a_wildcard_serves_what_the_listener_hears() {
        let seen = seen(
            &["10.0.0.2", "fd00::2", "fe80::2"],
            &["10.9.9.9", "10.0.0.2"],
        );
        assert_eq!(of("0.0.0.0", &seen), ["10.0.0.2", "10.9.9.9"]);
        let both = ["10.0.0.2", "10.9.9.9", "fd00::2", "fe80::2"];
        assert_eq!(of("::", &seen), both);
        assert!(of("::", &Seen::default()).is_empty());
    }

    #[test]
    fn one_address_is_served_wherever_it_is_at_present() {
        assert_eq!(of("10.0.0.9", &Seen::default()), ["10.0.0.9"]);
        assert_eq!(of("::ffff:10.0.0.9", &Seen::default()), ["10.0.0.9"]);
    }
}
