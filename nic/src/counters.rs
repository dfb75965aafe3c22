//! What an interface joins and splits by itself, and how packets are spread over its receive queues.

use std::collections::BTreeMap;
use std::io;

use crate::ethtool::Ethtool;

/// Features by which one packet of the kernel's is several on the wire, in either direction.
const OFFLOADS: [&str; 7] = [
    "rx-gro",
    "rx-gro-hw",
    "rx-lro",
    "tx-generic-segmentation",
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
];

/// Words of the name of a counter of packets that a receive queue got: one of the first, "rx", and any of
/// the others.
const PACKETS: [&str; 3] = ["packets", "pkts", "cnt"];
const WORDS: [&str; 3] = ["queue", "q", "ring"];

/// Features that are on, of those that join or split packets, as `ethtool -k` and the kernel name them.
///
/// # Errors
/// If the kernel does not report it.
pub fn offloads(interface: &str) -> io::Result<Vec<String>> {
    let features = Ethtool::of(interface)?.features()?;
    let on = features.into_iter().filter(|(_, on, _)| *on);
    Ok(on
        .map(|(name, ..)| name)
        .filter(|name| OFFLOADS.contains(&name.as_str()))
        .collect())
}

/// Packets that each receive queue got so far, as the driver counts them (`ethtool -S`). Empty where it
/// does not, or under a name that says nothing here: there is no common one.
#[must_use]
pub fn packets_by_queue(interface: &str) -> BTreeMap<u32, u64> {
    let counters = Ethtool::of(interface).and_then(|driver| driver.counters());
    by_queue(&counters.unwrap_or_default())
}

fn by_queue(counters: &[(String, u64)]) -> BTreeMap<u32, u64> {
    let of = |also: &[&str]| -> BTreeMap<u32, u64> {
        let queues = counters.iter();
        queues
            .filter_map(|(name, count)| Some((queue_of(name, also)?, *count)))
            .collect()
    };
    match of(&[]) {
        // veth has counters of its own queues for what goes through them to XDP or GRO only.
        none if none.is_empty() => of(&["xdp"]),
        queues => queues,
    }
}

/// The queue that a counter of packets is of; it may have these words in its name as well.
fn queue_of(name: &str, also: &[&str]) -> Option<u32> {
    let name = name.to_ascii_lowercase();
    let kind = |byte: &u8| (byte.is_ascii_digit(), byte.is_ascii_alphanumeric());
    let parts = name.as_bytes().chunk_by(|a, b| kind(a) == kind(b));
    let (mut number, mut packets, mut receives) = (None, false, false);
    for part in parts.filter_map(|part| str::from_utf8(part).ok()) {
        match kind(&part.as_bytes()[0]) {
            (_, false) => {}
            (true, _) if number.is_some() => return None,
            (true, _) => number = Some(part.parse().ok()?),
            _ if PACKETS.contains(&part) => packets = true,
            _ if part == "rx" => receives = true,
            _ if WORDS.contains(&part) || also.contains(&part) => {}
            _ => return None,
        }
    }
    number.filter(|_| packets && receives)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names as drivers of Linux 6.12 have them.
    #[test]
    fn queues_are_told_from_the_names_of_counters() {
        for (name, queue) in [
            ("rx_queue_3_packets", Some(3)),
            ("rx-12.packets", Some(12)),
            ("rx0_packets", Some(0)),
            ("queue_1_rx_cnt", Some(1)),
            ("rx_queue_3_bytes", None),
            ("tx_queue_3_packets", None),
            ("rx_packets", None),
            ("rx_queue_3_drops", None),
            ("rx_queue_0_xdp_packets", None),
            ("rx_64_to_127_packets", None),
            ("rx_prio3_packets", None),
            ("rx_queue_99999999999_packets", None),
            ("", None),
        ] {
            assert_eq!(queue_of(name, &[]), queue, "{name}");
        }
    }

    #[test]
    fn packets_that_two_counters_know_are_counted_once() {
        let counters = |names: &[(&str, u64)]| {
            let counters = names
                .iter()
                .map(|(name, count)| ((*name).to_owned(), *count));
            by_queue(&counters.collect::<Vec<_>>())
        };
        let both = counters(&[("rx_queue_0_packets", 5), ("rx_queue_0_xdp_packets", 3)]);
        assert_eq!(both, [(0, 5)].into());
        let veth = counters(&[("rx_queue_0_xdp_packets", 3), ("rx_queue_1_xdp_packets", 4)]);
        assert_eq!(veth, [(0, 3), (1, 4)].into());
    }

    #[test]
    fn loopback_splits_packets_and_has_no_queues() {
        assert!(
            offloads("lo")
                .unwrap()
                .contains(&"tx-tcp-segmentation".to_owned())
        );
        assert!(packets_by_queue("lo").is_empty());
    }
}
