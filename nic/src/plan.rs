//! What an interface needs for what is wanted of it: a pure function from facts to steps.

use std::collections::BTreeSet;

use crate::change::{Attribute, Change};
use crate::error::Unfit;
use crate::facts::{Channels, Facts};
use crate::netlink::Link;
use crate::quote;

/// Bits of a flow's hash: IP addresses, and ports (`RXH_`, linux/ethtool.h).
const HASH_ADDRESSES: u64 = 1 << 4 | 1 << 5;
const HASH_PORTS: u64 = 1 << 6 | 1 << 7;
/// Letters of ethtool for the bits of a hash, from bit 1 on.
const HASH_LETTERS: &str = "mvtsdfn";
/// What the authors of preferred busy polling use (Linux, commit 7fd3253a7de6).
const DEFER_HARD_IRQS: u64 = 2;
const GRO_FLUSH_TIMEOUT: u64 = 200_000;
/// Largest MTU whose packets fit into one buffer of a driver: what a page of 4 KiB has room for beside
/// headroom, tail and two VLAN tags.
pub const ONE_BUFFER: u32 = 3498;

/// What is wanted of an interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Receive queues that get sockets; none is all of them.
    pub queues: Option<Vec<u32>>,
    /// Workers.
    pub workers: u32,
    /// UDP port of the payload.
    pub port: u16,
    /// Whether payload comes over IPv4, and over IPv6.
    pub families: [bool; 2],
    /// The program may run in the driver.
    pub native: bool,
    /// The driver may receive into the sockets' memory.
    pub zero_copy: bool,
    /// Workers drive the queues.
    pub busy_poll: bool,
}

/// How much depends on a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing works without.
    Required,
    /// Payload may be lost to the kernel, or speed, without.
    Advised,
    /// Part of busy polling.
    BusyPoll,
}

/// What takes a step back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reverse {
    /// This change.
    Change(Change),
    /// Removing the rule whose number ethtool prints.
    Rule,
}

/// One change, with its reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Why it is needed.
    pub why: String,
    /// How much depends on it.
    pub kind: Kind,
    /// The change.
    pub change: Change,
    /// What takes it back.
    pub reverse: Reverse,
}

/// All that an interface needs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Changes, in their order.
    pub steps: Vec<Step>,
    /// What no command can change.
    pub notes: Vec<String>,
}

/// Works out what the interface needs. Nothing, if all is well.
///
/// # Errors
/// [`Unfit`] if it cannot do what is wanted.
pub fn plan(facts: &Facts, wanted: &Wanted) -> Result<Plan, Unfit> {
    if facts.link == Link::Down {
        return Err(Unfit::Down {
            interface: facts.interface.clone(),
        });
    }
    let mut planner = Planner {
        facts,
        wanted,
        plan: Plan::default(),
    };
    let queues = planner.have_queues()?;
    planner.native();
    match &wanted.queues {
        Some(asked) => {
            planner.steer_to(asked, queues);
            planner.spread(asked.len());
        }
        None => planner.spread(queues as usize),
    }
    planner.busy_poll();
    Ok(planner.plan)
}

struct Planner<'a> {
    facts: &'a Facts,
    wanted: &'a Wanted,
    plan: Plan,
}

impl Planner<'_> {
    fn step(&mut self, kind: Kind, why: impl Into<String>, change: Change, reverse: Change) {
        self.plan.steps.push(Step {
            why: why.into(),
            kind,
            change,
            reverse: Reverse::Change(reverse),
        });
    }

    /// As many receive queues as are needed; returns how many there will be.
    fn have_queues(&mut self) -> Result<u32, Unfit> {
        let (facts, wanted) = (self.facts, self.wanted);
        let last = wanted.queues.iter().flatten().max();
        if let Some(&queue) = last.filter(|queue| **queue >= facts.queues) {
            let Some((change, reverse)) = channels(facts, queue + 1) else {
                return Err(Unfit::NoQueue {
                    interface: facts.interface.clone(),
                    queue,
                    queues: facts.queues,
                    most: facts.max_queues(),
                });
            };
            let why = format!("there is no receive queue {queue} yet");
            self.step(Kind::Required, why, change, reverse);
            return Ok(queue + 1);
        }
        // Workers can share a queue; more help only where the interface spreads packets over them.
        let more = wanted.workers.min(facts.max_queues());
        if wanted.queues.is_none()
            && more > facts.queues
            && facts.indirection.is_some()
            && let Some((change, reverse)) = channels(facts, more)
        {
            let why = format!(
                "{} workers share {} receive queues",
                wanted.workers, facts.queues
            );
            self.step(Kind::Advised, why, change, reverse);
            return Ok(more);
        }
        Ok(facts.queues)
    }

    /// What a program in the driver asks for.
    fn native(&mut self) {
        if !self.wanted.native {
            return;
        }
        let facts = self.facts;
        let joins = [("lro", facts.lro), ("rx-gro-hw", facts.gro_hw)];
        for (name, feature) in joins {
            let why = "the driver joins packets, which native XDP does not take";
            // Where it is on and fixed, as on virtual devices, the driver copes.
            if feature.is_some_and(|feature| feature.on && feature.changeable) {
                self.switch(name, false, why);
            }
        }
        let Some(xdp) = facts.xdp else {
            return;
        };
        if !xdp.multi_buffer && facts.mtu > ONE_BUFFER {
            self.plan.notes.push(format!(
                "the driver ({}) takes no packet in several buffers, and those of MTU {} do not fit into one; ip link set dev {} mtu {ONE_BUFFER}, or --xdp-mode generic",
                facts.driver_name(), facts.mtu, quote(&facts.interface)
            ));
        }
        if let Some(ring) = facts.ring
            && xdp.zero_copy
            && self.wanted.zero_copy
            && !ring.rx.is_power_of_two()
            && ring.rx.next_power_of_two() <= ring.max_rx
        {
            let change = self.ethtool(&format!("-G {{}} rx {}", ring.rx.next_power_of_two()));
            let reverse = self.ethtool(&format!("-G {{}} rx {}", ring.rx));
            let why = "some drivers support zero-copy only if the ring's size is a power of two";
            self.step(Kind::Advised, why, change, reverse);
        }
    }

    /// All packets to queues that have a socket.
    fn steer_to(&mut self, asked: &[u32], queues: u32) {
        let facts = self.facts;
        let asked: BTreeSet<u32> = asked.iter().copied().collect();
        let table = facts.indirection.as_ref();
        // More queues come with a new table.
        let used: BTreeSet<u32> = match table.filter(|_| queues == facts.queues) {
            Some(table) => table.iter().copied().collect(),
            None => (0..queues).collect(),
        };
        if used.is_subset(&asked) || self.has_rules_to(&asked) {
            return;
        }
        let list: Vec<_> = asked.iter().map(u32::to_string).collect();
        let why = format!(
            "packets may arrive on other queues than {}, which have no socket",
            list.join(", ")
        );
        let first = asked.first().copied().unwrap_or_default();
        if asked.len() == 1 && self.can_have_rules() {
            return self.rules(first, &why);
        }
        let front = asked.iter().copied().eq(0..asked.len() as u32);
        if let Some(table) = table {
            let Some(reverse) = same_table(table, facts.queues) else {
                self.plan.notes.push(format!(
                    "{why}; the indirection table has been set by hand (ethtool -x {}), and is left to you",
                    quote(&facts.interface)
                ));
                return;
            };
            let change = match front {
                true => format!("-X {{}} equal {}", asked.len()),
                false => format!("-X {{}} weight {}", weights(&asked)),
            };
            let (change, reverse) = (self.ethtool(&change), self.ethtool(&reverse));
            return self.step(Kind::Advised, why, change, reverse);
        }
        match channels(facts, asked.len() as u32).filter(|_| front) {
            Some((change, reverse)) => self.step(Kind::Advised, why, change, reverse),
            None => self.plan.notes.push(format!(
                "{why}, and the driver ({}) steers nothing; leave --queues out to serve all",
                facts.driver_name()
            )),
        }
    }

    /// Whether it is set already.
    fn has_rules_to(&self, asked: &BTreeSet<u32>) -> bool {
        let rules = self.facts.rules.as_deref().unwrap_or_default();
        let families = [false, true].into_iter().zip(self.wanted.families);
        let mut used = families.filter(|(_, is_used)| *is_used);
        used.all(|(v6, _)| {
            let mut ours = rules
                .iter()
                .filter(|rule| (rule.v6, rule.port) == (v6, self.wanted.port));
            ours.any(|rule| asked.contains(&rule.queue))
        })
    }

    fn can_have_rules(&self) -> bool {
        let ntuple = self.facts.ntuple;
        self.facts.rules.is_some() && ntuple.is_none_or(|feature| feature.on || feature.changeable)
    }

    /// Payload to one queue; everything else as before.
    fn rules(&mut self, queue: u32, why: &str) {
        if self.facts.ntuple.is_some_and(|feature| !feature.on) {
            self.switch("ntuple", true, "rules are switched off");
        }
        let families = ["udp4", "udp6"].into_iter().zip(self.wanted.families);
        for (family, _) in families.filter(|(_, is_used)| *is_used) {
            let change = self.ethtool(&format!(
                "-N {{}} flow-type {family} dst-port {} action {queue}",
                self.wanted.port
            ));
            self.plan.steps.push(Step {
                why: why.to_owned(),
                kind: Kind::Advised,
                change,
                reverse: Reverse::Rule,
            });
        }
    }

    /// Streams to all queues, also those of one publisher.
    fn spread(&mut self, queues: usize) {
        if queues < 2 || self.wanted.workers < 2 {
            return;
        }
        let hashes = ["udp4", "udp6"].into_iter().zip(self.facts.udp_hash);
        let used = hashes.zip(self.wanted.families);
        for ((family, hash), _) in used.filter(|(_, is_used)| *is_used) {
            let Some(hash) = hash else {
                continue;
            };
            if hash & HASH_ADDRESSES != 0 && hash & HASH_PORTS == 0 {
                let why = "all streams of a publisher arrive on one queue";
                let change = self.ethtool(&format!("-N {{}} rx-flow-hash {family} sdfn"));
                let reverse =
                    self.ethtool(&format!("-N {{}} rx-flow-hash {family} {}", letters(hash)));
                self.step(Kind::Advised, why, change, reverse);
            }
        }
    }

    /// Interrupts stay off while a worker polls.
    fn busy_poll(&mut self) {
        if !self.wanted.busy_poll {
            return;
        }
        let settings = [
            (
                Attribute::NapiDeferHardIrqs,
                self.facts.defer_hard_irqs,
                DEFER_HARD_IRQS,
            ),
            (
                Attribute::GroFlushTimeout,
                self.facts.gro_flush_timeout,
                GRO_FLUSH_TIMEOUT,
            ),
        ];
        if settings.iter().all(|(_, present, _)| present.is_none()) {
            self.plan.notes.push(
                "cannot read in /sys whether interrupts are deferred, so busy polling runs with interrupts enabled".to_owned(),
            );
        }
        for (attribute, present, value) in settings {
            // A value other than 0 was set by the administrator.
            if present == Some(0) {
                let set = |value| Change::Set {
                    interface: self.facts.interface.clone(),
                    attribute,
                    value,
                };
                let why = "interrupts disturb busy polling";
                let (change, reverse) = (set(value), set(0));
                self.step(Kind::BusyPoll, why, change, reverse);
            }
        }
    }

    fn switch(&mut self, feature: &str, on: bool, why: &str) {
        let word = |on| if on { "on" } else { "off" };
        let change = self.ethtool(&format!("-K {{}} {feature} {}", word(on)));
        let reverse = self.ethtool(&format!("-K {{}} {feature} {}", word(!on)));
        self.step(Kind::Advised, why, change, reverse);
    }

    /// ethtool with arguments in a line, `{}` being the interface.
    fn ethtool(&self, line: &str) -> Change {
        Change::ethtool(&line.replace("{}", &self.facts.interface))
    }
}

/// A change to this number of receive queues, and back, if the driver supports it.
fn channels(facts: &Facts, queues: u32) -> Option<(Change, Change)> {
    let Channels {
        rx,
        max_rx,
        combined,
        max_combined,
    } = facts.channels?;
    let (kind, wanted, present, most) = match max_combined {
        0 => ("rx", queues, rx, max_rx),
        _ => (
            "combined",
            queues.saturating_sub(rx),
            combined,
            max_combined,
        ),
    };
    let change = |count| Change::ethtool(&format!("-L {} {kind} {count}", facts.interface));
    (1..=most)
        .contains(&wanted)
        .then(|| (change(wanted), change(present)))
}

/// What sets the table as it is; none if only its owner knows.
fn same_table(table: &[u32], queues: u32) -> Option<String> {
    let spreads_over = |count: u32| (0u32..).zip(table).all(|(at, queue)| *queue == at % count);
    if spreads_over(queues) {
        return Some("-X {} default".to_owned());
    }
    let count = table.iter().max()? + 1;
    spreads_over(count).then(|| format!("-X {{}} equal {count}"))
}

/// 1 for each queue that is asked for, 0 for those below and between.
fn weights(asked: &BTreeSet<u32>) -> String {
    let last = asked.last().copied().unwrap_or_default();
    let weights = (0..=last).map(|queue| u32::from(asked.contains(&queue)).to_string());
    weights.collect::<Vec<_>>().join(" ")
}

fn letters(hash: u64) -> String {
    let bits = (1..).zip(HASH_LETTERS.chars());
    bits.filter(|(bit, _)| hash >> bit & 1 == 1)
        .map(|(_, letter)| letter)
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use penstock_ebpf::Features;

    use super::*;
    use crate::facts::Feature;

    /// A NIC with everything, as it comes.
    pub(crate) fn nic() -> Facts {
        Facts {
            interface: "eth1".to_owned(),
            index: 2,
            address: "02:00:00:00:00:01".to_owned(),
            kind: None,
            link_type: crate::netlink::ETHERNET,
            master: None,
            has_ports: false,
            driver: Some("fine".to_owned()),
            mtu: 1500,
            link: Link::Up,
            queues: 4,
            channels: Some(Channels {
                rx: 0,
                max_rx: 0,
                combined: 4,
                max_combined: 8,
            }),
            ring: Some(crate::Ring {
                rx: 1024,
                max_rx: 4096,
            }),
            indirection: Some((0..128).map(|at| at % 4).collect()),
            udp_hash: [Some(HASH_ADDRESSES | HASH_PORTS); 2],
            rules: Some(Vec::new()),
            ntuple: Some(OFF),
            lro: Some(OFF),
            gro_hw: None,
            vlan_strip: Some(ON),
            defer_hard_irqs: Some(0),
            gro_flush_timeout: Some(0),
            xdp: Some(Features {
                native: true,
                zero_copy: true,
                multi_buffer: true,
            }),
        }
    }

    const ON: Feature = Feature {
        on: true,
        changeable: true,
    };
    const OFF: Feature = Feature {
        on: false,
        changeable: true,
    };

    /// A veth, with as many queues as it was made for.
    fn veth(queues: u32, most: u32) -> Facts {
        Facts {
            driver: Some("veth".to_owned()),
            queues,
            channels: Some(Channels {
                rx: queues,
                max_rx: most,
                combined: 0,
                max_combined: 0,
            }),
            ring: None,
            indirection: None,
            udp_hash: [None; 2],
            rules: None,
            ntuple: None,
            lro: None,
            ..nic()
        }
    }

    fn wanted() -> Wanted {
        Wanted {
            queues: None,
            workers: 1,
            port: 1214,
            families: [true, false],
            native: true,
            zero_copy: true,
            busy_poll: false,
        }
    }

    fn of(queues: &[u32]) -> Wanted {
        Wanted {
            queues: Some(queues.to_vec()),
            ..wanted()
        }
    }

    /// Commands, each with what takes it back.
    fn commands(facts: &Facts, wanted: &Wanted) -> Vec<(String, String)> {
        let plan = plan(facts, wanted).unwrap();
        assert_eq!(plan.notes, Vec::<String>::new());
        let shown = plan.steps.iter().map(|step| {
            let reverse = match &step.reverse {
                Reverse::Change(change) => change.to_string(),
                Reverse::Rule => "the rule".to_owned(),
            };
            (step.change.to_string(), reverse)
        });
        shown.collect()
    }

    fn assert_commands(facts: &Facts, wanted: &Wanted, expected: &[(&str, &str)]) {
        let expected: Vec<_> = expected
            .iter()
            .map(|(change, reverse)| ((*change).to_owned(), (*reverse).to_owned()))
            .collect();
        assert_eq!(commands(facts, wanted), expected);
    }

    #[test]
    fn nothing_is_said_when_all_is_well() {
        for facts in [nic(), veth(1, 1), veth(4, 4)] {
            assert_commands(&facts, &wanted(), &[]);
            let all: Vec<_> = (0..facts.queues).collect();
            assert_commands(&facts, &of(&all), &[]);
        }
        // A part of the queues is enough where no packet comes in on the rest.
        let mut narrow = nic();
        narrow.indirection = Some(vec![0, 1, 0, 1]);
        assert_commands(&narrow, &of(&[0, 1]), &[]);
    }

    #[test]
    fn one_queue_gets_the_payload_by_a_rule() {
        let rule = "ethtool -N eth1 flow-type udp4 dst-port 1214 action 2";
        let switch = ("ethtool -K eth1 ntuple on", "ethtool -K eth1 ntuple off");
        assert_commands(&nic(), &of(&[2]), &[switch, (rule, "the rule")]);
        let mut on = nic();
        on.ntuple = Some(ON);
        let both = Wanted {
            families: [true, true],
            ..of(&[2])
        };
        let rule6 = "ethtool -N eth1 flow-type udp6 dst-port 1214 action 2";
        assert_commands(&on, &both, &[(rule, "the rule"), (rule6, "the rule")]);
        // They may be there already.
        let rule = |v6, port| crate::Rule { v6, port, queue: 2 };
        on.rules = Some(vec![rule(false, 1214), rule(true, 1214)]);
        assert_commands(&on, &both, &[]);
        on.rules = Some(vec![rule(false, 1214), rule(true, 1215)]);
        assert_eq!(commands(&on, &both).len(), 2);
    }

    #[test]
    fn several_queues_get_the_payload_by_the_table() {
        let back = "ethtool -X eth1 default";
        assert_commands(&nic(), &of(&[0, 1]), &[("ethtool -X eth1 equal 2", back)]);
        assert_commands(
            &nic(),
            &of(&[1, 3]),
            &[("ethtool -X eth1 weight 0 1 0 1", back)],
        );
        // One queue as well, where the driver has no rules.
        let mut facts = nic();
        facts.rules = None;
        assert_commands(&facts, &of(&[2]), &[("ethtool -X eth1 weight 0 0 1", back)]);
        facts.indirection = Some((0..128).map(|at| at % 3).collect());
        assert_commands(
            &facts,
            &of(&[0]),
            &[("ethtool -X eth1 equal 1", "ethtool -X eth1 equal 3")],
        );
    }

    #[test]
    fn a_table_that_somebody_set_is_left_alone() {
        let mut facts = nic();
        facts.indirection = Some(vec![0, 0, 3, 1]);
        let plan = plan(&facts, &of(&[0, 1])).unwrap();
        assert_eq!(plan.steps, []);
        assert!(
            plan.notes[0].contains("ethtool -x eth1"),
            "{:?}",
            plan.notes
        );
    }

    #[test]
    fn fewer_channels_where_nothing_steers() {
        assert_commands(
            &veth(4, 4),
            &of(&[0, 1]),
            &[("ethtool -L eth1 rx 2", "ethtool -L eth1 rx 4")],
        );
        // Channels only go from the end.
        let plan = plan(&veth(4, 4), &of(&[2])).unwrap();
        assert_eq!(plan.steps, []);
        assert!(plan.notes[0].contains("veth"), "{:?}", plan.notes);
        assert!(
            plan.notes[0].contains("leave --queues out"),
            "{:?}",
            plan.notes
        );
    }

    #[test]
    fn queues_that_are_not_there_are_made_or_refused() {
        let plan = plan(&nic(), &of(&[0, 1, 2, 3, 4, 5])).unwrap();
        assert_eq!(plan.steps.len(), 1);
        assert_eq!(plan.steps[0].kind, Kind::Required);
        assert_eq!(
            plan.steps[0].change.to_string(),
            "ethtool -L eth1 combined 6"
        );
        // A table of its own comes with them.
        assert_commands(
            &nic(),
            &of(&[4, 5]),
            &[
                ("ethtool -L eth1 combined 6", "ethtool -L eth1 combined 4"),
                (
                    "ethtool -X eth1 weight 0 0 0 0 1 1",
                    "ethtool -X eth1 default",
                ),
            ],
        );
        let said = super::plan(&nic(), &of(&[8])).unwrap_err().to_string();
        assert!(said.contains("no receive queue 8"), "{said}");
        assert!(
            said.contains("has 4") && said.contains("can have 8"),
            "{said}"
        );
        // What the driver does not tell about cannot be changed.
        let mut dumb = veth(1, 1);
        dumb.channels = None;
        assert!(super::plan(&dumb, &of(&[1])).is_err());
    }

    #[test]
    fn workers_without_a_queue_of_their_own() {
        let wanted = |workers| Wanted {
            workers,
            ..wanted()
        };
        let back = "ethtool -L eth1 combined 4";
        assert_commands(&nic(), &wanted(6), &[("ethtool -L eth1 combined 6", back)]);
        assert_commands(&nic(), &wanted(16), &[("ethtool -L eth1 combined 8", back)]);
        assert_commands(&veth(1, 4), &wanted(4), &[]);
        // Queues for receiving alone stay.
        let mut split = nic();
        split.channels = Some(Channels {
            rx: 2,
            max_rx: 4,
            combined: 2,
            max_combined: 6,
        });
        assert_commands(
            &split,
            &wanted(6),
            &[("ethtool -L eth1 combined 4", "ethtool -L eth1 combined 2")],
        );
    }

    #[test]
    fn streams_of_a_publisher_are_spread() {
        let mut facts = nic();
        facts.udp_hash = [Some(HASH_ADDRESSES), Some(0)];
        let both = |workers| Wanted {
            workers,
            families: [true, true],
            ..wanted()
        };
        assert_commands(
            &facts,
            &both(4),
            &[(
                "ethtool -N eth1 rx-flow-hash udp4 sdfn",
                "ethtool -N eth1 rx-flow-hash udp4 sd",
            )],
        );
        let some = Wanted {
            queues: Some(vec![0, 1, 2, 3]),
            ..both(2)
        };
        assert_eq!(commands(&facts, &some).len(), 1);
        // One worker has all queues anyhow.
        assert_commands(&facts, &both(1), &[]);
    }

    #[test]
    fn joined_packets_are_for_generic_mode_only() {
        let mut facts = nic();
        facts.lro = Some(ON);
        facts.gro_hw = Some(ON);
        assert_commands(
            &facts,
            &wanted(),
            &[
                ("ethtool -K eth1 lro off", "ethtool -K eth1 lro on"),
                (
                    "ethtool -K eth1 rx-gro-hw off",
                    "ethtool -K eth1 rx-gro-hw on",
                ),
            ],
        );
        let generic = Wanted {
            native: false,
            ..wanted()
        };
        assert_commands(&facts, &generic, &[]);
    }

    #[test]
    fn rings_for_zero_copy() {
        let mut facts = nic();
        facts.ring = Some(crate::Ring {
            rx: 2040,
            max_rx: 4096,
        });
        let step = ("ethtool -G eth1 rx 2048", "ethtool -G eth1 rx 2040");
        assert_commands(&facts, &wanted(), &[step]);
        let copy = Wanted {
            zero_copy: false,
            ..wanted()
        };
        assert_commands(&facts, &copy, &[]);
        facts.ring = Some(crate::Ring {
            rx: 2040,
            max_rx: 2040,
        });
        assert_commands(&facts, &wanted(), &[]);
    }

    #[test]
    fn a_packet_that_needs_several_buffers() {
        let mut facts = nic();
        facts.mtu = 9000;
        assert_commands(&facts, &wanted(), &[]);
        facts.xdp = facts.xdp.map(|xdp| Features {
            multi_buffer: false,
            ..xdp
        });
        let notes = plan(&facts, &wanted()).unwrap().notes;
        assert!(notes[0].contains("mtu 3498"), "{notes:?}");
    }

    #[test]
    fn busy_polling_defers_interrupts_unless_somebody_chose() {
        let busy = Wanted {
            busy_poll: true,
            ..wanted()
        };
        let folder = "/sys/class/net/eth1";
        let defer = (
            &*format!("echo 2 > {folder}/napi_defer_hard_irqs"),
            &*format!("echo 0 > {folder}/napi_defer_hard_irqs"),
        );
        let flush = (
            &*format!("echo 200000 > {folder}/gro_flush_timeout"),
            &*format!("echo 0 > {folder}/gro_flush_timeout"),
        );
        let mut facts = nic();
        assert_commands(&facts, &busy, &[defer, flush]);
        facts.defer_hard_irqs = Some(10);
        assert_commands(&facts, &busy, &[flush]);
        facts.gro_flush_timeout = None;
        assert_commands(&facts, &busy, &[]);
    }

    #[test]
    fn an_interface_that_is_down_is_refused() {
        let mut facts = nic();
        facts.link = Link::NoCarrier;
        assert_commands(&facts, &wanted(), &[]);
        facts.link = Link::Down;
        let said = plan(&facts, &wanted()).unwrap_err().to_string();
        assert_eq!(said, "eth1 is down; ip link set dev eth1 up");
    }

    #[test]
    fn hashes_are_spelt_as_ethtool_does() {
        assert_eq!(letters(HASH_ADDRESSES | HASH_PORTS), "sdfn");
        assert_eq!(letters(1 << 1 | 1 << 2 | 1 << 3), "mvt");
    }
}
