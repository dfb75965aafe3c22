//! Link emulation: a namespace between publisher and brokers that forwards packets, with fault injection in
//! both directions and a delay towards the broker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use penstock_ebpf::{Faults, OVERDUE, Protocol};
use tracing::warn;

use crate::delay::{Delay, DelayLine, DelayLineCount, DelayReport};
use crate::faults::{Direction, FaultPlan, FaultReport, ImpairedLink};
use crate::netns::{self, Net, detour, towards_broker, towards_publisher};
use crate::settings::Profile;

/// Faults and delay of the links.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Faults of packets.
    pub faults: Option<FaultPlan>,
    /// Delay towards the broker.
    pub delay: Option<Delay>,
    /// Seed of the faults.
    pub seed: u64,
}

impl Plan {
    /// How to set up the links; `None` if plain ones will do.
    pub fn link_emulation(&self, profile: Profile) -> Option<netns::LinkEmulation> {
        if self.faults.is_none() && self.delay.is_none() {
            return None;
        }
        Some(netns::LinkEmulation {
            // A delay line may carry unsegmented packets, which are segmented behind it. Faults apply to
            // single packets.
            publisher_side: match self.faults {
                None => Profile::Offload,
                Some(_) => profile,
            },
            broker_side: profile,
            // TCP detects corruption by the checksum only, so it must be computed before.
            checksums: self.faults.as_ref().is_some_and(FaultPlan::treats_tcp),
            detour: self.delay.is_some(),
        })
    }
}

/// Forwards packets until it is dropped.
#[derive(Debug)]
pub struct Forwarders {
    plan: Plan,
    impaired_links: Arc<Vec<ImpairedLink>>,
    lines: Vec<JoinHandle<Result<DelayLineCount>>>,
    clock: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
}

impl Forwarders {
    /// Starts them in the emulation namespace of `net`.
    pub fn start(net: &Net, brokers: usize, plan: Plan) -> Result<Self> {
        let open = plan.clone();
        let opened = net.in_emulation_namespace(move || open_all(brokers, &open));
        let (impaired_links, lines) = joined(opened)?;
        let (impaired_links, stop) = (Arc::new(impaired_links), Arc::new(AtomicBool::new(false)));
        let start = |line: DelayLine| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || line.run(&stop))
        };
        let lines = lines.into_iter().map(start).collect();
        let (late, stopped) = (Arc::clone(&impaired_links), Arc::clone(&stop));
        let clock = net.in_emulation_namespace(move || {
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(OVERDUE / 2);
                late.iter().try_for_each(ImpairedLink::let_out_overdue)?;
            }
            Ok(())
        });
        Ok(Self {
            plan,
            impaired_links,
            lines,
            clock: Some(clock),
            stop,
        })
    }

    /// Changes the faults of a protocol on all links, in both directions.
    pub fn set(&self, protocol: Protocol, faults: &Faults) -> Result<()> {
        self.impaired_links
            .iter()
            .try_for_each(|impaired_link| impaired_link.set(protocol, faults))
    }

    /// Stops forwarding, and reports packets by outcome where faults or a delay were requested.
    pub fn finish(mut self) -> Result<(Option<FaultReport>, Option<DelayReport>)> {
        self.stop.store(true, Ordering::Relaxed);
        self.clock.take().map_or(Ok(()), joined)?;
        let lines = std::mem::take(&mut self.lines);
        let lines = lines.into_iter().map(joined).collect::<Result<Vec<_>>>()?;
        let faults = match &self.plan.faults {
            None => None,
            Some(plan) => Some(FaultReport {
                asked: plan.text().to_owned(),
                seed: self.plan.seed,
                links: self
                    .impaired_links
                    .iter()
                    .map(ImpairedLink::faults)
                    .collect::<Result<_>>()?,
            }),
        };
        let delay = self.plan.delay.map(|delay| DelayReport {
            delay_us: delay.micros(),
            links: lines,
        });
        Ok((faults, delay))
    }
}

impl Drop for Forwarders {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let lines = self.lines.drain(..).map(|line| joined(line).map(|_| ()));
        // This may be why a run failed.
        for error in lines
            .chain(self.clock.take().map(joined))
            .filter_map(Result::err)
        {
            warn!("a link carried nothing any more: {error:#}");
        }
    }
}

/// Opens the impaired links and delay lines of all brokers; runs in the emulation namespace.
fn open_all(brokers: usize, plan: &Plan) -> Result<(Vec<ImpairedLink>, Vec<DelayLine>)> {
    let faults = plan.faults.clone().unwrap_or_else(FaultPlan::none);
    let (mut impaired_links, mut lines) = (Vec::new(), Vec::new());
    for broker in 0..brokers {
        let (publisher_side, broker_side) = (towards_publisher(broker), towards_broker(broker));
        let [detour_in, detour_out] = detour(broker);
        let mut output = &broker_side;
        if let Some(delay) = plan.delay {
            output = &detour_in;
            let line = DelayLine::open(broker, &detour_out, &broker_side, delay);
            lines.push(line.context("--delay")?);
        }
        for (direction, interfaces) in [
            (Direction::ToBroker, [&publisher_side, output]),
            (Direction::ToPublisher, [&broker_side, &publisher_side]),
        ] {
            let interfaces = interfaces.map(String::as_str);
            impaired_links.push(ImpairedLink::open(
                &faults, plan.seed, broker, direction, interfaces,
            )?);
        }
    }
    Ok((impaired_links, lines))
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    let outcome = thread.join();
    outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(faults: Option<&str>, delay: Option<&str>) -> Plan {
        Plan {
            faults: faults.map(|text| text.parse().unwrap()),
            delay: delay.map(|text| text.parse().unwrap()),
            seed: 1,
        }
    }

    #[test]
    fn links_have_a_middle_only_where_something_is_to_happen() {
        assert!(plan(None, None).link_emulation(Profile::Wire).is_none());
        let faulty = plan(Some("loss=1%"), None)
            .link_emulation(Profile::Wire)
            .unwrap();
        assert_eq!(faulty.publisher_side, Profile::Wire);
        assert!(!faulty.checksums && !faulty.detour);
        let tcp = plan(Some("loss=1%,protocol=both"), Some("1ms"));
        let tcp = tcp.link_emulation(Profile::Wire).unwrap();
        assert!(tcp.checksums && tcp.detour);
        // Packets are segmented behind the delay line, because no fault applies to single ones.
        let slow = plan(None, Some("1ms"))
            .link_emulation(Profile::Wire)
            .unwrap();
        assert_eq!(slow.publisher_side, Profile::Offload);
        assert_eq!(slow.broker_side, Profile::Wire);
    }
}
