//! Links whose faults change from time to time. While they do, nothing is carried: a link that is
//! interrupted for a moment.

use std::collections::BTreeMap;

use anyhow::Result;
use fastrand::Rng;

use super::script;
use crate::cli::Profile;
use crate::middle::{Carriers, Plan};
use crate::netns::{Middle, Net};

/// Faults of all links.
#[derive(Debug)]
pub struct Weather {
    carriers: Option<Carriers>,
    changes: u64,
    /// Packets by what became of them.
    counts: BTreeMap<String, u64>,
}

/// How links are to be set up for it.
pub fn middle() -> Middle {
    let any = plan(&script::weather(&mut Rng::with_seed(0)), 0);
    any.middle(Profile::Wire).expect("faults are in the middle")
}

fn plan(faults: &str, seed: u64) -> Plan {
    Plan {
        faults: Some(faults.parse().expect("the script's faults can be had")),
        delay: None,
        seed,
    }
}

impl Weather {
    pub fn new() -> Self {
        Self {
            carriers: None,
            changes: 0,
            counts: BTreeMap::new(),
        }
    }

    /// Other faults than before.
    pub fn change(&mut self, net: &Net, brokers: usize, rng: &mut Rng) -> Result<()> {
        self.end()?;
        let plan = plan(&script::weather(rng), rng.u64(..));
        self.carriers = Some(Carriers::start(net, brokers, plan)?);
        self.changes += 1;
        Ok(())
    }

    /// Nothing is carried any more.
    pub fn end(&mut self) -> Result<()> {
        let Some(carriers) = self.carriers.take() else {
            return Ok(());
        };
        let (faults, _) = carriers.finish()?;
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
