//! Other projects' programs that Penstock is compared with.

use std::collections::BTreeMap;

use anyhow::Result;

use super::aeron::Aeron;
use super::flags::{self, Extent, Group};
use super::nats;
use super::plan::Kind;
use crate::measure::iperf;

/// Which of them are installed.
pub struct Peers {
    pub aeron: Result<Aeron, String>,
    pub nats: Result<String, String>,
    /// Versions, or why a peer is absent.
    pub known: BTreeMap<String, String>,
}

impl Peers {
    pub fn find(options: &flags::Bench, extent: &Extent) -> Result<Self> {
        let mut known = BTreeMap::new();
        if [Group::Throughput, Group::Iperf3]
            .iter()
            .any(|group| extent.groups.contains(group))
        {
            known.insert("iperf3".to_owned(), iperf::version()?);
        }
        let aeron = Aeron::find(options);
        let nats = nats::version().map_err(|error| format!("absent: {error:#}"));
        if extent.groups.contains(&Group::Peers) {
            let text = |found: Result<&str, &String>| match found {
                Ok(text) => text.to_owned(),
                Err(why) => why.clone(),
            };
            known.insert("nats-server".to_owned(), text(nats.as_deref()));
            let found = aeron.as_ref().map(|_| "found");
            known.insert("aeron".to_owned(), text(found));
        }
        Ok(Self { aeron, nats, known })
    }

    /// Why a contender cannot run.
    pub fn absence(&self, kind: Kind) -> Option<String> {
        match kind {
            Kind::Aeron => self.aeron.as_ref().err().cloned(),
            Kind::Nats => self.nats.as_ref().err().cloned(),
            _ => None,
        }
    }
}
