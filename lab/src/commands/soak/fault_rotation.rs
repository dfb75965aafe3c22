//! Changes the faults of all links from time to time. Each change interrupts the links for a moment.

use std::collections::BTreeMap;

use anyhow::Result;
use fastrand::Rng;

use super::script;
use penstock_testbed::link_emulation::{Forwarders, Plan};
use penstock_testbed::netns::{LinkEmulation, Net};
use penstock_testbed::settings::Profile;

/// Faults of all links.
#[derive(Debug)]
pub struct FaultRotation {
    forwarders: Option<Forwarders>,
    changes: u64,
    /// Number of packets by outcome.
    counts: BTreeMap<String, u64>,
}

/// How to set up the links.
pub fn link_emulation() -> LinkEmulation {
    let any = plan(&script::fault_rotation(&mut Rng::with_seed(0)), 0);
    any.link_emulation(Profile::Wire)
        .expect("faults need link emulation")
}

fn plan(faults: &str, seed: u64) -> Plan {
    Plan {
        faults: Some(faults.parse().expect("the script's faults can be had")),
        delay: None,
        seed,
    }
}

impl FaultRotation {
    pub fn new() -> Self {
        Self {
            forwarders: None,
            changes: 0,
            counts: BTreeMap::new(),
        }
    }

    /// Draws and applies new faults.
    pub fn change(&mut self, net: &Net, brokers: usize, rng: &mut Rng) -> Result<()> {
        self.end()?;
        let plan = plan(&script::fault_rotation(rng), rng.u64(..));
        self.forwarders = Some(Forwarders::start(net, brokers, plan)?);
        self.changes += 1;
        Ok(())
    }

    /// Stops forwarding.
    pub fn end(&mut self) -> Result<()> {
        let Some(forwarders) = self.forwarders.take() else {
            return Ok(());
        };
        let (faults, _) = forwarders.finish()?;
        for link in faults.iter().flat_map(|report| &report.links) {
            for (what, count) in &link.counts {
                *self.counts.entry(what.clone()).or_default() += count;
            }
        }
        Ok(())
    }

    pub fn changes(&self) -> u64 {
        self.changes
    }

    pub fn counts(&self) -> &BTreeMap<String, u64> {
        &self.counts
    }
}
