//! The link of a fault run, and changes to it while it is in use.

use std::collections::BTreeMap;

use anyhow::Result;
use penstock_ebpf::{Faults, Protocol};

use penstock_testbed::link_emulation::{Forwarders, Plan};
use penstock_testbed::netns::{LinkEmulation, Net, Place};
use penstock_testbed::settings::Profile;

/// The only link.
const LINK: usize = 0;
const BOTH: &str = "protocol=both";

/// The link. It forwards packets from its creation to its end.
#[derive(Debug)]
pub struct Links<'a> {
    net: &'a Net,
    forwarders: Option<Forwarders>,
    seed: u64,
    faults: Faults,
    /// Whether it drops every datagram.
    silent: bool,
    /// Number of packets by outcome.
    counts: BTreeMap<String, u64>,
}

/// How to set up the link.
pub fn link_emulation() -> LinkEmulation {
    let delayed = plan(Some("1ms"), 0);
    delayed
        .link_emulation(Profile::Wire)
        .expect("links have an emulation namespace")
}

fn plan(delay: Option<&str>, seed: u64) -> Plan {
    Plan {
        faults: Some(BOTH.parse().expect("it is a plan")),
        delay: delay.map(|delay| {
            delay
                .parse()
                .expect("a kind of fault asks for a possible delay")
        }),
        seed,
    }
}

impl<'a> Links<'a> {
    /// A link without faults.
    pub fn open(net: &'a Net, seed: u64) -> Result<Self> {
        let mut links = Self {
            net,
            forwarders: None,
            seed,
            faults: Faults::NONE,
            silent: false,
            counts: BTreeMap::new(),
        };
        links.restart_forwarders(None)?;
        Ok(links)
    }

    /// Changes the packet faults.
    pub fn set_faults(&mut self, change: impl FnOnce(&mut Faults)) -> Result<()> {
        change(&mut self.faults);
        self.apply()
    }

    /// Drops every datagram, or no longer; TCP segments pass.
    pub fn silence(&mut self, silent: bool) -> Result<()> {
        self.silent = silent;
        self.apply()
    }

    /// Delays packets to the broker.
    pub fn delay(&mut self, delay: &str) -> Result<()> {
        self.restart_forwarders(Some(delay))
    }

    pub fn remove_delay(&mut self) -> Result<()> {
        self.restart_forwarders(None)
    }

    /// Changes one interface.
    pub fn change(&self, place: Place, change: &[&str]) -> Result<()> {
        self.net.change(LINK, place, change)
    }

    /// Changes all of them.
    pub fn change_all(&self, change: &[&str]) -> Result<()> {
        let mut places = Place::ALL.into_iter();
        places.try_for_each(|place| self.change(place, change))
    }

    /// Restores the link for the next run, and returns the number of packets by outcome.
    pub fn end(mut self) -> Result<BTreeMap<String, u64>> {
        self.stop()?;
        self.change_all(&["mtu", "1500", "up"])?;
        self.net.wait_for_carriers()?;
        Ok(std::mem::take(&mut self.counts))
    }

    /// Restarts the forwarders; for a moment no packet passes.
    fn restart_forwarders(&mut self, delay: Option<&str>) -> Result<()> {
        self.stop()?;
        self.seed += 1;
        let plan = plan(delay, self.seed);
        self.forwarders = Some(Forwarders::start(self.net, 1, plan)?);
        self.apply()
    }

    fn apply(&self) -> Result<()> {
        let udp = Faults {
            loss: if self.silent { 1.0 } else { self.faults.loss },
            ..self.faults
        };
        let Some(forwarders) = &self.forwarders else {
            return Ok(());
        };
        forwarders.set(Protocol::Udp, &udp)?;
        forwarders.set(Protocol::Tcp, &self.faults)
    }

    fn stop(&mut self) -> Result<()> {
        let Some(forwarders) = self.forwarders.take() else {
            return Ok(());
        };
        let (faults, delay) = forwarders.finish()?;
        for link in faults.iter().flat_map(|report| &report.links) {
            for (what, count) in &link.counts {
                *self.counts.entry(what.clone()).or_default() += count;
            }
        }
        let delayed = delay.iter().flat_map(|report| &report.links);
        let delayed: u64 = delayed.map(|line| line.packets).sum();
        *self.counts.entry("delayed".to_owned()).or_default() += delayed;
        Ok(())
    }
}
