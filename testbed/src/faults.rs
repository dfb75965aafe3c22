//! `--faults`: the requested packet faults, and the links that apply them.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::Result;
use penstock_ebpf::{Faults, Injector, Protocol, Treated};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::cluster::PORT;

/// Keys of a plan, for error messages.
const POSSIBLE: &str =
    "possible: loss, reorder, corrupt, duplicate, truncate, largest, protocol, seed";

/// Why a plan is invalid.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PlanError {
    /// A part is not of the form key=value.
    #[error("'{0}' is not of the form key=value; {POSSIBLE}")]
    Form(String),
    /// A key is unknown.
    #[error("unknown fault '{0}'; {POSSIBLE}")]
    Key(String),
    /// A key is given twice.
    #[error("'{0}' is given twice")]
    Twice(String),
    /// A value is not a share of packets.
    #[error("{key}={value}: not a share of packets from 0% to 100%, such as 0.1%")]
    Share {
        /// The fault.
        key: String,
        /// What was given.
        value: String,
    },
    /// A value is not a number of bytes.
    #[error("largest={0}: not a number of bytes, such as 1400")]
    Bytes(String),
    /// A value is not a protocol.
    #[error("protocol={0}: possible are udp, tcp and both")]
    Protocol(String),
    /// A value is not a seed.
    #[error("seed={0}: not a number from 0 to 2^64 - 1")]
    Seed(String),
}

/// A parsed `--faults`.
#[derive(Debug, Clone, PartialEq)]
pub struct FaultPlan {
    /// The text of the flag.
    text: String,
    faults: Faults,
    treated: Treated,
    seed: Option<u64>,
}

impl FaultPlan {
    /// A plan without faults.
    pub fn none() -> Self {
        Self {
            text: String::new(),
            faults: Faults::NONE,
            treated: Treated {
                port: PORT,
                udp: false,
                tcp: false,
            },
            seed: None,
        }
    }

    /// The text of the flag.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The seed, if one was given.
    pub fn seed(&self) -> Option<u64> {
        self.seed
    }

    /// Whether faults apply to TCP segments too.
    pub fn treats_tcp(&self) -> bool {
        self.treated.tcp
    }
}

impl FromStr for FaultPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Self {
            text: text.to_owned(),
            ..Self::none()
        };
        plan.treated.udp = true;
        let mut seen = Vec::new();
        for part in text.split(',') {
            let (key, value) = part
                .split_once('=')
                .ok_or_else(|| PlanError::Form(part.to_owned()))?;
            if seen.contains(&key) {
                return Err(PlanError::Twice(key.to_owned()));
            }
            seen.push(key);
            let faults = &mut plan.faults;
            match key {
                "loss" => faults.loss = share(key, value)?,
                "reorder" => faults.reorder = share(key, value)?,
                "corrupt" => faults.corrupt = share(key, value)?,
                "duplicate" => faults.duplicate = share(key, value)?,
                "truncate" => faults.truncate = share(key, value)?,
                "largest" => {
                    let bytes = value.parse();
                    faults.largest = bytes.map_err(|_| PlanError::Bytes(value.to_owned()))?;
                }
                "protocol" => {
                    let treated = &mut plan.treated;
                    (treated.udp, treated.tcp) = match value {
                        "udp" => (true, false),
                        "tcp" => (false, true),
                        "both" => (true, true),
                        _ => return Err(PlanError::Protocol(value.to_owned())),
                    };
                }
                "seed" => {
                    let seed = value.parse();
                    plan.seed = Some(seed.map_err(|_| PlanError::Seed(value.to_owned()))?);
                }
                _ => return Err(PlanError::Key(key.to_owned())),
            }
        }
        Ok(plan)
    }
}

/// Parses a share of packets, from 0 to 1.
fn share(key: &str, value: &str) -> Result<f64, PlanError> {
    let percent = value.strip_suffix('%').and_then(|n| n.parse::<f64>().ok());
    percent
        .filter(|percent| (0.0..=100.0).contains(percent))
        .map(|percent| percent / 100.0)
        .ok_or_else(|| PlanError::Share {
            key: key.to_owned(),
            value: value.to_owned(),
        })
}

/// Direction of a packet on a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the publisher to the broker.
    ToBroker,
    /// From the broker to the publisher.
    ToPublisher,
}

impl Direction {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::ToBroker => "to broker",
            Self::ToPublisher => "to publisher",
        }
    }
}

/// Report of the impaired links.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FaultReport {
    /// The text of the flag.
    pub asked: String,
    /// Seed that reproduces the run if packets arrive in the same order.
    pub seed: u64,
    /// One for each direction of each link.
    pub links: Vec<LinkFaults>,
}

/// One direction of one link.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LinkFaults {
    /// The broker that the link leads to.
    pub broker: usize,
    /// The direction of the packets.
    pub direction: Direction,
    /// Number of packets by outcome.
    #[serde(flatten)]
    pub counts: BTreeMap<String, u64>,
}

/// Forwards packets in one direction of one link, with faults.
#[derive(Debug)]
pub struct ImpairedLink {
    broker: usize,
    direction: Direction,
    injector: Injector,
}

impl ImpairedLink {
    /// Opens it between two interfaces of this thread's namespace, with a seed of its own.
    pub fn open(
        plan: &FaultPlan,
        seed: u64,
        broker: usize,
        direction: Direction,
        [input, output]: [&str; 2],
    ) -> Result<Self> {
        let own = seed.wrapping_add(2 * broker as u64 + direction as u64);
        let mut injector = Injector::load(&plan.treated, &plan.faults, own, output)?;
        injector.attach(input)?;
        Ok(Self {
            broker,
            direction,
            injector,
        })
    }

    /// Changes the faults of a protocol.
    pub fn set(&self, protocol: Protocol, faults: &Faults) -> Result<()> {
        Ok(self.injector.set(protocol, faults)?)
    }

    /// To be called once a millisecond, from a thread in the same namespace.
    pub fn let_out_overdue(&self) -> Result<()> {
        Ok(self.injector.let_out_overdue()?)
    }

    /// Number of packets by outcome.
    pub fn faults(&self) -> Result<LinkFaults> {
        let events = self.injector.events()?.named();
        Ok(LinkFaults {
            broker: self.broker,
            direction: self.direction,
            counts: events.map(|(name, n)| (name.to_owned(), n)).into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(text: &str) -> Result<FaultPlan, String> {
        text.parse().map_err(|error: PlanError| error.to_string())
    }

    #[test]
    fn a_plan_says_what_links_do() {
        let plan = plan("loss=1%,reorder=2.5%,corrupt=0.1%,duplicate=100%,truncate=0%,seed=7");
        let plan = plan.unwrap();
        let wanted = Faults {
            loss: 0.01,
            reorder: 0.025,
            corrupt: 0.001,
            duplicate: 1.0,
            ..Faults::NONE
        };
        assert_eq!((plan.faults, plan.seed), (wanted, Some(7)));
        assert!(plan.treated.udp && !plan.treats_tcp());
        let other: FaultPlan = "largest=1200,protocol=both".parse().unwrap();
        assert_eq!((other.faults.largest, other.seed), (1200, None));
        assert!(other.treated.udp && other.treats_tcp());
    }

    #[test]
    fn what_cannot_be_is_refused_with_what_can() {
        for (text, wanted) in [
            ("", "possible: loss"),
            ("loss", "key=value"),
            ("lost=1%", "possible: loss"),
            ("loss=1", "such as 0.1%"),
            ("loss=101%", "0% to 100%"),
            ("loss=-1%", "0% to 100%"),
            ("loss=NaN%", "0% to 100%"),
            ("loss=1%,loss=2%", "twice"),
            ("largest=big", "bytes"),
            ("protocol=sctp", "udp, tcp and both"),
            ("seed=-1", "seed"),
            ("loss=1%,", "key=value"),
        ] {
            let error = plan(text).unwrap_err();
            assert!(error.contains(wanted), "{text}: {error}");
        }
    }
}
