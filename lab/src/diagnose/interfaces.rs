//! What interfaces carried and dropped over an interval, in the namespace of a process.

use std::collections::BTreeMap;
use std::fs;

use serde::Serialize;

/// Counters of a namespace's interfaces and of its TCP at one moment.
#[derive(Debug, Clone, Default)]
pub struct InterfacesAt {
    devices: BTreeMap<String, [u64; 16]>,
    tcp: BTreeMap<String, u64>,
}

/// What an interface did in the interval.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
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
}

/// Events of TCP that lose or throw away data, of all the namespace's connections (`TcpExt` of
/// /proc/net/netstat).
const TCP_EVENTS: [&str; 6] = [
    "ListenOverflows",
    "PruneCalled",
    "RcvPruned",
    "TCPBacklogDrop",
    "TCPRcvQDrop",
    "TCPTimeouts",
];

impl InterfacesAt {
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
        }
    }

    /// What those did that carried something since `start`.
    pub fn since(&self, start: &Self) -> Vec<Interface> {
        let did = self.devices.iter().filter_map(|(name, end)| {
            let start = start.devices.get(name)?;
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
            };
            (count(1) + count(9) + count(2) + count(3) > 0).then_some(interface)
        });
        did.collect()
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
        let start = InterfacesAt::default();
        let end = InterfacesAt {
            devices: devices_in(DEV),
            tcp: tcp_in("TcpExt: A RcvPruned\nTcpExt: 5 6\nIpExt: B\nIpExt: 1\n"),
        };
        assert!(end.since(&start).is_empty(), "an interface that is new");
        let zero = InterfacesAt {
            devices: [("lo".to_owned(), [0; 16])].into(),
            ..start
        };
        let did = &end.since(&zero)[0];
        assert_eq!((did.rx_packets, did.rx_dropped, did.tx_dropped), (2, 1, 3));
        let events = end.tcp_events_since(&zero);
        assert_eq!(events, [("RcvPruned".to_owned(), 6)].into());
        assert!(end.since(&end).is_empty(), "nothing happened");
    }

    #[test]
    fn this_namespace_is_read() {
        assert!(InterfacesAt::now(None).devices.contains_key("lo"));
    }
}
