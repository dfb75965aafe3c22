//! What carries packets through the middle of links that are not to be plain cables: injectors of
//! faults both ways, and on the way to the broker a line that takes its time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use penstock_ebpf::{Faults, OVERDUE, Protocol};
use tracing::warn;

use crate::cli::Profile;
use crate::delay::{Delay, DelayReport, Line, LineCount};
use crate::faults::{Direction, FaultPlan, FaultReport, Way};
use crate::netns::{self, Net, detour, towards_broker, towards_publisher};

/// What the links are to be like.
#[derive(Debug, Clone)]
pub struct Plan {
    pub faults: Option<FaultPlan>,
    pub delay: Option<Delay>,
    /// Seed of the faults.
    pub seed: u64,
}

impl Plan {
    /// How the links are to be set up for it; `None` if plain ones do.
    pub fn middle(&self, profile: Profile) -> Option<netns::Middle> {
        if self.faults.is_none() && self.delay.is_none() {
            return None;
        }
        Some(netns::Middle {
            // A line need not carry packets one by one: they are cut apart behind it. Faults must
            // meet them one by one.
            publisher_side: match self.faults {
                None => Profile::Offload,
                Some(_) => profile,
            },
            broker_side: profile,
            // TCP notices damage by the checksum only, so it must be worked out before.
            checksums: self.faults.as_ref().is_some_and(FaultPlan::treats_tcp),
            detour: self.delay.is_some(),
        })
    }
}

/// Carries packets until it is dropped.
#[derive(Debug)]
pub struct Carriers {
    plan: Plan,
    ways: Arc<Vec<Way>>,
    lines: Vec<JoinHandle<Result<LineCount>>>,
    clock: Option<JoinHandle<Result<()>>>,
    stop: Arc<AtomicBool>,
}

impl Carriers {
    /// Starts them in the middle of `net`.
    pub fn start(net: &Net, brokers: usize, plan: Plan) -> Result<Self> {
        let open = plan.clone();
        let opened = net.in_the_middle(move || open_all(brokers, &open));
        let (ways, lines) = joined(opened)?;
        let (ways, stop) = (Arc::new(ways), Arc::new(AtomicBool::new(false)));
        let start = |line: Line| {
            let stop = Arc::clone(&stop);
            thread::spawn(move || line.run(&stop))
        };
        let lines = lines.into_iter().map(start).collect();
        let (late, stopped) = (Arc::clone(&ways), Arc::clone(&stop));
        let clock = net.in_the_middle(move || {
            while !stopped.load(Ordering::Relaxed) {
                thread::sleep(OVERDUE / 2);
                late.iter().try_for_each(Way::let_out_overdue)?;
            }
            Ok(())
        });
        Ok(Self {
            plan,
            ways,
            lines,
            clock: Some(clock),
            stop,
        })
    }

    /// Changes what packets of a protocol meet from now on, on all links both ways.
    pub fn set(&self, protocol: Protocol, faults: &Faults) -> Result<()> {
        self.ways
            .iter()
            .try_for_each(|way| way.set(protocol, faults))
    }

    /// Ends them; tells what became of packets, as far as faults and delays were asked for.
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
                links: self.ways.iter().map(Way::faults).collect::<Result<_>>()?,
            }),
        };
        let delay = self.plan.delay.map(|delay| DelayReport {
            delay_us: delay.micros(),
            links: lines,
        });
        Ok((faults, delay))
    }
}

impl Drop for Carriers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let lines = self.lines.drain(..).map(|line| joined(line).map(|_| ()));
        // A run that failed may have failed for this.
        for error in lines
            .chain(self.clock.take().map(joined))
            .filter_map(Result::err)
        {
            warn!("a link carried nothing any more: {error:#}");
        }
    }
}

/// Ways and lines of all links; runs in the middle.
fn open_all(brokers: usize, plan: &Plan) -> Result<(Vec<Way>, Vec<Line>)> {
    let faults = plan.faults.clone().unwrap_or_else(FaultPlan::none);
    let (mut ways, mut lines) = (Vec::new(), Vec::new());
    for broker in 0..brokers {
        let (publisher_side, broker_side) = (towards_publisher(broker), towards_broker(broker));
        let [detour_in, detour_out] = detour(broker);
        let mut output = &broker_side;
        if let Some(delay) = plan.delay {
            output = &detour_in;
            let line = Line::to(broker, &detour_out, &broker_side, delay);
            lines.push(line.context("--delay")?);
        }
        for (direction, interfaces) in [
            (Direction::ToBroker, [&publisher_side, output]),
            (Direction::ToPublisher, [&broker_side, &publisher_side]),
        ] {
            let interfaces = interfaces.map(String::as_str);
            ways.push(Way::open(
                &faults, plan.seed, broker, direction, interfaces,
            )?);
        }
    }
    Ok((ways, lines))
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
        assert!(plan(None, None).middle(Profile::Wire).is_none());
        let faulty = plan(Some("loss=1%"), None).middle(Profile::Wire).unwrap();
        assert_eq!(faulty.publisher_side, Profile::Wire);
        assert!(!faulty.checksums && !faulty.detour);
        let tcp = plan(Some("loss=1%,protocol=both"), Some("1ms"));
        let tcp = tcp.middle(Profile::Wire).unwrap();
        assert!(tcp.checksums && tcp.detour);
        // Packets are cut apart behind the line, where nothing meets them one by one.
        let slow = plan(None, Some("1ms")).middle(Profile::Wire).unwrap();
        assert_eq!(slow.publisher_side, Profile::Offload);
        assert_eq!(slow.broker_side, Profile::Wire);
    }
}
