//! What interfaces carried and dropped over an interval, in the namespace of a process.

#![allow(
    missing_docs,
    reason = "fields have the names of the kernel's counters"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::namespaces;

/// Counters of a namespace's interfaces and of its TCP at one moment.
#[derive(Debug, Clone, Default)]
pub struct InterfacesSnapshot {
    devices: BTreeMap<String, [u64; 16]>,
    /// Packets by receive queue, and offloads that are on, of interfaces that could be asked.
    drivers: BTreeMap<String, (BTreeMap<u32, u64>, Vec<String>)>,
    tcp: BTreeMap<String, u64>,
}

/// What an interface did in the interval.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Interface {
    pub name: String,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    /// Dropped because the interface's ring was full.
    pub rx_fifo: u64,
    pub tx_packets: u64,
    pub tx_dropped: u64,
    /// Packets by receive queue, where the driver counts them.
    pub queues: BTreeMap<u32, u64>,
    /// What it joins and splits by itself, as `ethtool -k` and the kernel name it.
    pub offloads: Vec<String>,
}

/// Events of TCP that lose or throw away data, of all the namespace's connections (`TcpExt` of
/// /proc/net/netstat).
const TCP_EVENTS: [&str; 7] = [
    "ListenDrops",
    "ListenOverflows",
    "PruneCalled",
    "RcvPruned",
    "TCPBacklogDrop",
    "TCPRcvQDrop",
    "TCPTimeouts",
];

impl InterfacesSnapshot {
    /// Reads `/proc/PID/net`; everybody may, for any process. Without one, this program's.
    pub fn now(pid: Option<u32>) -> Self {
        let process = pid.map_or("self".to_owned(), |pid| pid.to_string());
        let read = |file| fs::read_to_string(format!("/proc/{process}/net/{file}"));
        Self {
            devices: read("dev")
                .map(|text| devices_in(&text))
                .unwrap_or_default(),
            tcp: read("netstat")
                .map(|text| tcp_in(&text))
                .unwrap_or_default(),
            drivers: BTreeMap::new(),
        }
    }

    /// Asks drivers as well, inside the namespace of the handle.
    pub fn with_drivers(mut self, namespace: &Path) -> Result<Self> {
        let names = self.devices.keys();
        self.drivers = namespaces::inside(namespace, || {
            let ask = |name: &String| {
                let offloads = penstock_nic::offloads(name).unwrap_or_default();
                (
                    name.clone(),
                    (penstock_nic::packets_by_queue(name), offloads),
                )
            };
            Ok(names.map(ask).collect())
        })?;
        Ok(self)
    }

    /// What those did that carried something since `start`.
    pub fn since(&self, start_of_all: &Self) -> Vec<Interface> {
        let did = self.devices.iter().filter_map(|(name, end)| {
            let start = start_of_all.devices.get(name)?;
            let count = |column: usize| end[column].saturating_sub(start[column]);
            let interface = Interface {
                name: name.clone(),
                rx_bytes: count(0),
                rx_packets: count(1),
                rx_errors: count(2),
                rx_dropped: count(3),
                rx_fifo: count(4),
                tx_packets: count(9),
                tx_dropped: count(11),
                queues: self.queues_since(start_of_all, name),
                offloads: self
                    .drivers
                    .get(name)
                    .map_or(Vec::new(), |(_, on)| on.clone()),
            };
            (count(1) + count(9) + count(2) + count(3) > 0).then_some(interface)
        });
        did.collect()
    }

    fn queues_since(&self, start: &Self, name: &str) -> BTreeMap<u32, u64> {
        let (Some((end, _)), Some((start, _))) = (self.drivers.get(name), start.drivers.get(name))
        else {
            return BTreeMap::new();
        };
        let count = |(queue, end): (&u32, &u64)| {
            (
                *queue,
                end.saturating_sub(start.get(queue).copied().unwrap_or(0)),
            )
        };
        end.iter().map(count).collect()
    }

    /// TCP events since `start`, those that happened.
    pub fn tcp_events_since(&self, start: &Self) -> BTreeMap<String, u64> {
        let events = self.tcp.iter().map(|(name, end)| {
            let start = start.tcp.get(name).copied().unwrap_or(0);
            (name.clone(), end.saturating_sub(start))
        });
        events.filter(|(_, count)| *count > 0).collect()
    }
}

fn devices_in(text: &str) -> BTreeMap<String, [u64; 16]> {
    let lines = text.lines().filter_map(|line| {
        let (name, counts) = line.split_once(':')?;
        let counts = counts.split_whitespace().map(|count| count.parse().ok());
        let counts = counts.collect::<Option<Vec<u64>>>()?;
        Some((name.trim().to_owned(), counts.try_into().ok()?))
    });
    lines.collect()
}

/// Names and values come in pairs of lines with the same first word.
fn tcp_in(text: &str) -> BTreeMap<String, u64> {
    let mut lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("TcpExt: "));
    let (Some(names), Some(values)) = (lines.next(), lines.next()) else {
        return BTreeMap::new();
    };
    let pairs = names.split(' ').zip(values.split(' '));
    pairs
        .filter(|(name, _)| TCP_EVENTS.contains(name))
        .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEV: &str = "Inter-|   Receive
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop
    lo:  100       2    0    1    0     0          0         0      100       2    0    3    0     0       0          0
";

    #[test]
    fn counters_are_read_by_column() {
        let start = InterfacesSnapshot::default();
        let end = InterfacesSnapshot {
            devices: devices_in(DEV),
            tcp: tcp_in("TcpExt: A RcvPruned\nTcpExt: 5 6\nIpExt: B\nIpExt: 1\n"),
            drivers: [(
                "lo".to_owned(),
                ([(0, 9), (1, 4)].into(), vec!["rx-gro".to_owned()]),
            )]
            .into(),
        };
        assert!(end.since(&start).is_empty(), "an interface that is new");
        let zero = InterfacesSnapshot {
            devices: [("lo".to_owned(), [0; 16])].into(),
            drivers: [("lo".to_owned(), ([(0, 2)].into(), Vec::new()))].into(),
            ..start
        };
        let did = &end.since(&zero)[0];
        assert_eq!((did.rx_packets, did.rx_dropped, did.tx_dropped), (2, 1, 3));
        assert_eq!(did.queues, [(0, 7), (1, 4)].into());
        assert_eq!(did.offloads, ["rx-gro"]);
        let events = end.tcp_events_since(&zero);
        assert_eq!(events, [("RcvPruned".to_owned(), 6)].into());
        assert!(end.since(&end).is_empty(), "nothing happened");
    }

    #[test]
    fn this_namespace_is_read() {
        let now = InterfacesSnapshot::now(None)
            .with_drivers(Path::new(namespaces::OWN))
            .unwrap();
        assert!(now.devices.contains_key("lo") && now.drivers.contains_key("lo"));
    }
}
