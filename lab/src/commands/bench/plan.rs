//! What is measured: cases, each with contenders that alternate on the same links.

use super::flags::{Extent, Group};
use penstock_testbed::settings::{Profile, XdpMode};

/// Bytes of a message where a row does not say otherwise.
const MESSAGE: u64 = 1024;
/// Batches per second at the low rate.
const LOW_RATE: u32 = 1000;
/// What a run takes beyond its own length: programs start, rings are touched, counters are read.
const RUN_OVERHEAD: f64 = 0.9;
/// What a case takes beyond its runs: namespaces, and a run that only tells how fast this machine is.
const CASE_OVERHEAD: f64 = 3.0;

/// Who moves the payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Tcp,
    /// None is the mode that was better at full speed, or the broker's choice.
    Xdp(Option<XdpMode>),
    RawAfXdp(XdpMode),
    Iperf3,
    Nats,
    Aeron,
}

impl Kind {
    /// In reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp(_) => "xdp",
            Self::RawAfXdp(_) => "raw_af_xdp",
            Self::Iperf3 => "iperf3",
            Self::Nats => "nats",
            Self::Aeron => "aeron",
        }
    }

    pub fn mode(self) -> Option<XdpMode> {
        match self {
            Self::Xdp(mode) => mode,
            Self::RawAfXdp(mode) => Some(mode),
            _ => None,
        }
    }
}

/// One side of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Contender {
    pub kind: Kind,
    /// Streams to each broker.
    pub streams: u32,
    pub brokers: u32,
}

impl Contender {
    /// One stream to one broker.
    pub fn of(kind: Kind) -> Self {
        Self {
            kind,
            streams: 1,
            brokers: 1,
        }
    }

    fn streams(self, streams: u32) -> Self {
        Self { streams, ..self }
    }

    fn brokers(self, brokers: u32) -> Self {
        Self { brokers, ..self }
    }
}

/// What a case does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Work {
    /// As fast as it goes.
    FullSpeed,
    /// Batches per second, each with one message.
    Rate(u32),
    /// Full batches, half as many as the slower path moves at full speed.
    HalfLoad,
    /// Streams are open and nothing is sent.
    Idle,
    /// As fast as it goes, while the kernel's work is attributed to hosts.
    Hosts,
}

/// Contenders that alternate.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    pub group: Group,
    pub id: String,
    pub profile: Profile,
    pub mtu: u32,
    pub message_size: u64,
    pub work: Work,
    pub contenders: Vec<Contender>,
}

impl Case {
    fn new(group: Group, id: &str, mtu: u32, contenders: &[Contender]) -> Self {
        Self {
            group,
            id: format!("{id}-{mtu}"),
            profile: Profile::Wire,
            mtu,
            message_size: MESSAGE,
            work: Work::FullSpeed,
            contenders: contenders.to_vec(),
        }
    }

    /// Brokers that the links lead to.
    pub fn brokers(&self) -> u32 {
        let brokers = self.contenders.iter().map(|contender| contender.brokers);
        brokers.max().unwrap_or(1)
    }
}

/// All cases of these groups.
pub fn cases(groups: &[Group]) -> Vec<Case> {
    groups.iter().flat_map(|group| of_group(*group)).collect()
}

fn of_group(group: Group) -> Vec<Case> {
    let (tcp, xdp) = (Contender::of(Kind::Tcp), Contender::of(Kind::Xdp(None)));
    let iperf3 = Contender::of(Kind::Iperf3);
    let case = |id, mtu, contenders: &[Contender]| Case::new(group, id, mtu, contenders);
    let both_mtus = |of: &dyn Fn(u32) -> Case| vec![of(1500), of(9000)];
    match group {
        Group::Throughput => {
            let modes = [XdpMode::Native, XdpMode::Generic];
            let ours = modes.map(|mode| Contender::of(Kind::Xdp(Some(mode))));
            let raw = modes.map(|mode| Contender::of(Kind::RawAfXdp(mode)));
            let all = [&ours[..], &[tcp], &raw[..], &[iperf3]].concat();
            both_mtus(&|mtu| case("full-speed", mtu, &all))
        }
        Group::Brokers => {
            let four = both_mtus(&|mtu| case("brokers-4", mtu, &[xdp.brokers(4), tcp.brokers(4)]));
            let eight = [xdp, tcp, xdp.brokers(8), tcp.brokers(8)];
            [four, vec![case("brokers-8", 1500, &eight)]].concat()
        }
        Group::Latency => {
            let at = |work, id: &'static str| {
                both_mtus(&move |mtu| Case {
                    work,
                    ..case(id, mtu, &[xdp, tcp])
                })
            };
            [
                at(Work::Rate(LOW_RATE), "low-rate"),
                at(Work::HalfLoad, "half-load"),
            ]
            .concat()
        }
        Group::Cpu => both_mtus(&|mtu| Case {
            work: Work::Hosts,
            ..case("hosts", mtu, &[xdp, tcp])
        }),
        Group::Iperf3 => {
            let with = |profile: Profile, streams: u32| Case {
                profile,
                id: format!("iperf3-{}-{streams}-1500", profile.name()),
                ..case("", 1500, &[tcp.streams(streams), iperf3.streams(streams)])
            };
            vec![
                with(Profile::Wire, 4),
                with(Profile::Offload, 1),
                with(Profile::Offload, 4),
            ]
        }
        Group::Streams => {
            let all = [xdp, tcp, xdp.streams(64), tcp.streams(64)];
            vec![case("streams-64", 1500, &all)]
        }
        Group::Messages => both_mtus(&|mtu| Case {
            message_size: 64,
            ..case("messages-64", mtu, &[xdp, tcp])
        }),
        Group::Memory => vec![Case {
            work: Work::Idle,
            ..case("idle", 1500, &[xdp, tcp])
        }],
        Group::Peers => {
            let peers = [Kind::Nats, Kind::Aeron].map(Contender::of);
            vec![case("peers", 1500, &[&[xdp, tcp], &peers[..]].concat())]
        }
    }
}

/// How long it takes, seconds.
pub fn estimate(cases: &[Case], extent: &Extent) -> f64 {
    let round = |case: &Case| {
        // A run of this kind has two windows.
        let windows = if case.work == Work::Hosts { 2.0 } else { 1.0 };
        case.contenders.len() as f64 * (windows * extent.seconds + RUN_OVERHEAD)
    };
    let rounds: f64 = cases.iter().map(round).sum();
    rounds * f64::from(extent.runs) + cases.len() as f64 * CASE_OVERHEAD
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_case_has_a_name_of_its_own_and_somebody_to_compare() {
        let cases = cases(&Group::ALL);
        let names: BTreeSet<_> = cases.iter().map(|case| &case.id).collect();
        assert_eq!(names.len(), cases.len());
        assert!(cases.iter().all(|case| case.contenders.len() >= 2));
        let brokers: BTreeSet<_> = cases.iter().map(Case::brokers).collect();
        assert_eq!(brokers, [1, 4, 8].into());
    }

    #[test]
    fn defaults_take_less_than_25_minutes_and_quick_about_three() {
        let minutes = |groups: &[Group], runs, seconds| {
            let extent = Extent {
                groups: groups.to_vec(),
                runs,
                seconds,
            };
            estimate(&cases(groups), &extent) / 60.0
        };
        assert!(minutes(&Group::ALL, 7, 2.0) < 25.0);
        assert!(minutes(&Group::QUICK, 3, 0.7) < 3.5);
    }
}
