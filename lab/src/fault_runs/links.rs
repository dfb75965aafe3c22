//! The link of a fault run, and what can be done to it while it is in use.

use std::collections::BTreeMap;

use anyhow::Result;
use penstock_ebpf::{Faults, Protocol};

use crate::cli::Profile;
use crate::middle::{Carriers, Plan};
use crate::netns::{Middle, Net, Place};

/// The only link.
const LINK: usize = 0;
const BOTH: &str = "protocol=both";

/// The link, on which packets are carried from when it is made until it ends.
#[derive(Debug)]
pub struct Links<'a> {
    net: &'a Net,
    carriers: Option<Carriers>,
    seed: u64,
    faults: Faults,
    /// No datagram gets through.
    silent: bool,
    /// Packets by what became of them.
    counts: BTreeMap<String, u64>,
}

/// How the link is to be set up for it.
pub fn middle() -> Middle {
    let delayed = plan(Some("1ms"), 0);
    delayed.middle(Profile::Wire).expect("there is a middle")
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
    /// A good link.
    pub fn open(net: &'a Net, seed: u64) -> Result<Self> {
        let mut links = Self {
            net,
            carriers: None,
            seed,
            faults: Faults::NONE,
            silent: false,
            counts: BTreeMap::new(),
        };
        links.carry(None)?;
        Ok(links)
    }

    /// Changes what packets meet.
    pub fn treat(&mut self, change: impl FnOnce(&mut Faults)) -> Result<()> {
        change(&mut self.faults);
        self.apply()
    }

    /// Whether datagrams get through at all; segments do.
    pub fn silence(&mut self, silent: bool) -> Result<()> {
        self.silent = silent;
        self.apply()
    }

    /// Packets to the broker take longer.
    pub fn delay(&mut self, delay: &str) -> Result<()> {
        self.carry(Some(delay))
    }

    pub fn no_delay(&mut self) -> Result<()> {
        self.carry(None)
    }

    /// Changes one interface.
    pub fn change(&self, place: Place, change: &[&str]) -> Result<()> {
        self.net.change(LINK, place, change)
    }

    /// Changes all of them.
    pub fn everywhere(&self, change: &[&str]) -> Result<()> {
        let mut places = Place::ALL.into_iter();
        places.try_for_each(|place| self.change(place, change))
    }

    /// As it was at first, for the next run; returns what became of packets.
    pub fn end(mut self) -> Result<BTreeMap<String, u64>> {
        self.stop()?;
        self.everywhere(&["mtu", "1500", "up"])?;
        self.net.wait_for_carriers()?;
        Ok(std::mem::take(&mut self.counts))
    }

    /// Packets are carried anew: for a moment none is.
    fn carry(&mut self, delay: Option<&str>) -> Result<()> {
        self.stop()?;
        self.seed += 1;
        let plan = plan(delay, self.seed);
        self.carriers = Some(Carriers::start(self.net, 1, plan)?);
        self.apply()
    }

    fn apply(&self) -> Result<()> {
        let udp = Faults {
            loss: if self.silent { 1.0 } else { self.faults.loss },
            ..self.faults
        };
        let Some(carriers) = &self.carriers else {
            return Ok(());
        };
        carriers.set(Protocol::Udp, &udp)?;
        carriers.set(Protocol::Tcp, &self.faults)
    }

    fn stop(&mut self) -> Result<()> {
        let Some(carriers) = self.carriers.take() else {
            return Ok(());
        };
        let (faults, delay) = carriers.finish()?;
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
