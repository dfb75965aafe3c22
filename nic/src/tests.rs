//! Facts and changes of real interfaces: pairs of virtual ones in namespaces of their own.
//!
//! All of it needs root; `scripts/test.sh` runs it where it may.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::plan::tests::nic;
use crate::{
    Attribute, Change, Error, Facts, Feature, Fitness, Link, Sysfs, Taken, Undo, Unfit, Wanted,
    Watch, addresses, fitness, link, name_of, plan, quote, rx_queues,
};

fn ip(line: &str) {
    let done = Command::new("ip").args(line.split(' ')).status();
    assert!(done.unwrap().success(), "ip {line}");
}

/// Runs in a network namespace with a0, which can have four queues, and a1; it goes with the thread.
fn with_pair(test: impl FnOnce() + Send + 'static) {
    let inside = move || {
        // SAFETY: takes a number only; concerns this thread alone.
        let code = unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS) };
        assert_eq!(code, 0);
        // /sys is of the namespace that it was mounted in.
        for line in ["--make-rprivate /", "-t sysfs sysfs /sys"] {
            let done = Command::new("mount").args(line.split(' ')).status();
            assert!(done.unwrap().success(), "mount {line}");
        }
        ip("link add a0 numrxqueues 4 numtxqueues 4 type veth peer name a1");
        ip("link set a0 up");
        test();
    };
    thread::spawn(inside).join().unwrap();
}

#[test]
#[ignore = "needs root"]
fn facts_are_what_ip_and_ethtool_say() {
    with_pair(|| {
        ip("link set a0 mtu 9000");
        let facts = Facts::read("a0").unwrap();
        assert_eq!(facts.driver_name(), "veth");
        assert_eq!((facts.mtu, facts.queues, facts.max_queues()), (9000, 4, 4));
        let channels = facts.channels.unwrap();
        assert_eq!((channels.rx, channels.max_rx), (4, 4));
        assert_eq!((channels.combined, channels.max_combined), (0, 0));
        let vlan = |on| {
            Some(Feature {
                on,
                changeable: true,
            })
        };
        assert_eq!(facts.vlan_strip, vlan(true));
        Change::ethtool("-K a0 rxvlan off").apply(None).unwrap();
        assert_eq!(Facts::read("a0").unwrap().vlan_strip, vlan(false));
        let xdp = facts.xdp.expect("the kernel is new enough");
        assert!(xdp.native && xdp.multi_buffer && !xdp.zero_copy);
        assert_eq!(Facts::read("lo").unwrap().xdp, None);
        assert!(facts.rules.is_none() && facts.indirection.is_none());
        assert!(matches!(Facts::read("a7"), Err(Error::NoInterface(_))));
        assert!(matches!(
            Facts::read("a-name-that-is-too-long"),
            Err(Error::NoInterface(_))
        ));
    });
}

#[test]
#[ignore = "needs root"]
fn links_go_up_down_and_away() {
    with_pair(|| {
        let index = Facts::read("a0").unwrap().index;
        // The kernel tells of carriers a moment later.
        let becomes = |wanted| {
            let deadline = Instant::now() + Duration::from_secs(20);
            while link(index).unwrap() != wanted {
                assert!(
                    Instant::now() < deadline,
                    "{:?}, not {wanted:?}",
                    link(index)
                );
                thread::sleep(Duration::from_millis(10));
            }
        };
        becomes(Link::NoCarrier);
        assert_eq!(rx_queues(index), Some(4));
        Change::ethtool("-L a0 rx 2").apply(None).unwrap();
        assert_eq!(rx_queues(index), Some(2));
        ip("link set a1 up");
        becomes(Link::Up);
        // By its number, whatever its name.
        ip("link set a0 down");
        ip("link set a0 name b0");
        becomes(Link::Down);
        assert_eq!(name_of(index).unwrap().as_deref(), Some("b0"));
        ip("link del b0");
        becomes(Link::Gone);
        assert_eq!(name_of(index).unwrap(), None);
        assert_eq!(rx_queues(index), None);
    });
}

/// The same name with the same index, in the namespace of /sys and in the thread's own.
#[test]
#[ignore = "needs root"]
fn an_interface_is_that_of_the_own_namespace_whatever_sys_shows() {
    with_pair(|| {
        let outside = Facts::read("a0").unwrap();
        assert_eq!((outside.queues, outside.mtu), (4, 1500));
        let elsewhere = move || {
            // SAFETY: as in `with_pair`.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            ip("link add a0 type veth peer name a1");
            ip(&format!("link set a0 mtu 1400 address {}", outside.address));
            let inside = Facts::read("a0").unwrap();
            assert_eq!(
                (inside.index, &inside.address),
                (outside.index, &outside.address)
            );
            assert_eq!((inside.queues, inside.mtu), (1, 1400));
            let set = Change::Set {
                interface: "a0".to_owned(),
                attribute: Attribute::NapiDeferHardIrqs,
                value: 3,
            };
            set.apply(Some(&Sysfs::open().unwrap())).unwrap();
            assert_eq!(Facts::read("a0").unwrap().defer_hard_irqs, Some(3));
        };
        thread::spawn(elsewhere).join().unwrap();
        // The interface in /sys was not touched.
        let shown = fs::read_to_string("/sys/class/net/a0/napi_defer_hard_irqs").unwrap();
        assert_eq!(shown.trim(), "0");
    });
}

#[test]
#[ignore = "needs root"]
fn interfaces_have_several_names() {
    with_pair(|| {
        ip("link property add dev a0 altname enp7s0");
        ip("link property add dev a0 altname payload-network-of-rack-12");
        let facts = Facts::read("a0").unwrap();
        for name in ["enp7s0", "payload-network-of-rack-12"] {
            assert_eq!(Facts::read(name).unwrap(), facts);
        }
        ip("link set a0 down");
        ip("link set a0 name b0");
        assert_eq!(Facts::by_index(facts.index).unwrap().interface, "b0");
        assert!(matches!(Facts::read("a0"), Err(Error::NoInterface(_))));
    });
}

#[test]
#[ignore = "needs root"]
fn what_an_interface_is_and_who_takes_its_packets() {
    with_pair(|| {
        let of = |name: &str| fitness(&Facts::read(name).unwrap());
        assert_eq!(of("a0"), Ok(Fitness::Any));
        ip("link add br0 type bridge");
        ip("link set a0 master br0");
        assert!(matches!(of("br0"), Ok(Fitness::GenericOnly { .. })));
        assert!(matches!(of("a0"), Err(Unfit::Port { master, .. }) if master == "br0"));
        ip("link set a0 nomaster");
        ip("tuntap add mode tun tun0");
        assert!(matches!(of("tun0"), Err(Unfit::NotEthernet { .. })));
        ip("tuntap add mode tap tap0");
        assert_eq!(of("tap0"), Ok(Fitness::Any));
    });
}

#[test]
#[ignore = "needs root"]
fn names_and_addresses_are_followed() {
    with_pair(|| {
        let facts = Facts::read("a0").unwrap();
        ip("addr add 10.9.0.1/24 dev a0 label a0:1");
        ip("addr add 10.9.0.2 peer 10.9.0.3 dev a0");
        let list = |index| -> Vec<String> {
            let found = addresses(index).unwrap().into_iter();
            found.map(|address| address.ip.to_string()).collect()
        };
        let of_a0 = |seen: &crate::Seen| -> Vec<String> {
            let ips = seen.addresses.iter().map(|address| address.ip);
            ips.filter(|ip| ip.is_ipv4() || ip.to_string().starts_with("fd"))
                .map(|ip| ip.to_string())
                .collect()
        };
        let v4: Vec<_> = list(facts.index);
        assert!(
            v4.starts_with(&["10.9.0.1".to_owned(), "10.9.0.2".to_owned()]),
            "{v4:?}"
        );
        let mut watch = Watch::new(facts.index).unwrap();
        let mut until = |wanted: &dyn Fn(&crate::Seen) -> bool| {
            loop {
                let seen = watch.look().unwrap();
                if wanted(&seen) {
                    return;
                }
                watch.wait().unwrap();
            }
        };
        until(&|seen| of_a0(seen) == ["10.9.0.1", "10.9.0.2"]);
        ip("addr add fd09::1/64 dev a0");
        until(&|seen| of_a0(seen) == ["10.9.0.1", "10.9.0.2", "fd09::1"]);
        ip("addr del 10.9.0.2 peer 10.9.0.3 dev a0");
        until(&|seen| of_a0(seen) == ["10.9.0.1", "fd09::1"]);
        ip("link set lo up");
        ip("addr add 10.9.9.9/32 dev lo");
        until(&|seen| {
            let ips: Vec<_> = seen.of_loopback.iter().map(|address| address.ip).collect();
            ips == ["10.9.9.9".parse::<std::net::IpAddr>().unwrap()]
        });
        ip("link set a0 down");
        ip("link set a0 name b0");
        until(&|seen| seen.name == "b0");
        ip("link del b0");
        until(&|seen| *seen == crate::Seen::default());
    });
}

/// More events than the socket can hold: lost events also end the wait.
#[test]
#[ignore = "needs root"]
fn events_that_are_lost_are_noticed() {
    with_pair(|| {
        let facts = Facts::read("a0").unwrap();
        let mut watch = Watch::new(facts.index).unwrap();
        let mut batch = String::new();
        for number in 0..4000 {
            let (a, b) = (number / 250, number % 250);
            batch.push_str(&format!("addr add 10.20.{a}.{b}/32 dev a0\n"));
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("batch"), batch).unwrap();
        ip(&format!("-batch {}", dir.path().join("batch").display()));
        watch.wait().unwrap();
        assert_eq!(watch.look().unwrap().addresses.len(), 4000);
        // No stale event remains that would end the next wait.
        ip("addr del 10.20.0.0/32 dev a0");
        watch.wait().unwrap();
        assert_eq!(watch.look().unwrap().addresses.len(), 3999);
    });
}

#[test]
#[ignore = "needs root"]
fn commands_for_odd_names_can_be_typed() {
    with_pair(|| {
        for name in [
            "v;id",
            "v$(id)",
            "v&w",
            "v'1",
            "v\"1",
            "v*",
            "a{}b",
            "#v",
            "v\\n",
            "v\u{1b}[2J",
        ] {
            let made = Command::new("ip")
                .args(["link", "add", name, "type", "veth", "peer", "name", "q0"])
                .status();
            assert!(made.unwrap().success(), "{name}");
            let unfit = plan(&Facts::read(name).unwrap(), &wanted_by_default()).unwrap_err();
            let told = unfit.to_string();
            let command = told.rsplit("; ").next().unwrap();
            assert!(command.starts_with("ip link set dev "), "{told}");
            let command = format!("ip link set dev {} up", quote(name));
            assert!(told.ends_with(&command), "{told}");
            let typed = Command::new("sh").args(["-c", &command]).status();
            assert!(typed.unwrap().success(), "{command}");
            assert_ne!(Facts::read(name).unwrap().link, Link::Down);
            let deleted = Command::new("ip")
                .args(["link", "del", "dev", name])
                .status();
            assert!(deleted.unwrap().success(), "{name}");
        }
    });
}

fn wanted_by_default() -> Wanted {
    Wanted {
        queues: None,
        workers: 1,
        port: 1214,
        families: [true, true],
        native: true,
        zero_copy: true,
        busy_poll: false,
    }
}

#[test]
#[ignore = "needs root"]
fn changes_are_made_and_taken_back() {
    with_pair(|| {
        let before = Facts::read("a0").unwrap();
        let wanted = Wanted {
            queues: Some(vec![0, 1]),
            workers: 2,
            port: 1214,
            families: [true, true],
            native: true,
            zero_copy: true,
            busy_poll: true,
        };
        let dir = tempfile::tempdir().unwrap();
        let Taken::Ours(mut undo) = Undo::take(dir.path(), "a0").unwrap() else {
            panic!("nobody else has it");
        };
        let sysfs = Sysfs::open().ok();
        for step in plan(&before, &wanted).unwrap().steps {
            let crate::Reverse::Change(reverse) = step.reverse else {
                panic!("veth has no rules");
            };
            undo.remember(&before, reverse).unwrap();
            step.change.apply(sysfs.as_ref()).unwrap();
        }
        let during = Facts::read("a0").unwrap();
        assert_eq!(during.queues, 2);
        assert_eq!(during.defer_hard_irqs, Some(2));
        assert_eq!(during.gro_flush_timeout, Some(200_000));
        // All is well now.
        assert_eq!(plan(&during, &wanted).unwrap().steps, []);
        // The one who made them is gone.
        drop(undo);
        // Other tests' programs may hold its lock between fork and exec.
        let Taken::Ours(mut undo) = Undo::take(dir.path(), "a0").unwrap() else {
            panic!("nobody has it any more");
        };
        let done = undo.restore(Some(&during), sysfs.as_ref()).unwrap();
        assert!(
            done.iter().all(|(_, failure)| failure.is_none()),
            "{done:?}"
        );
        let after = Facts {
            link: before.link,
            ..Facts::read("a0").unwrap()
        };
        assert_eq!(after, before);
    });
}

/// There is no NIC here that could do these, but ethtool tells wrong grammar from that.
#[test]
#[ignore = "needs root"]
fn ethtool_understands_every_command() {
    let mut facts = nic();
    facts.interface = "a0".to_owned();
    facts.lro = facts.vlan_strip;
    facts.gro_hw = facts.vlan_strip;
    facts.udp_hash = [Some(1 << 4 | 1 << 5); 2];
    facts.ring = Some(crate::Ring {
        rx: 1000,
        max_rx: 4096,
    });
    let wanted = |queues: &[u32], workers| Wanted {
        queues: (!queues.is_empty()).then(|| queues.to_vec()),
        workers,
        port: 1214,
        families: [true, true],
        native: true,
        zero_copy: true,
        busy_poll: false,
    };
    with_pair(move || {
        let mut kinds = std::collections::BTreeSet::new();
        let all = [
            wanted(&[1], 1),
            wanted(&[0, 1], 2),
            wanted(&[1, 3], 1),
            wanted(&[], 8),
        ];
        for step in all
            .iter()
            .flat_map(|wanted| plan(&facts, wanted).unwrap().steps)
        {
            let reverse = match step.reverse {
                crate::Reverse::Change(change) => change,
                crate::Reverse::Rule => Change::ethtool("-N a0 delete 7"),
            };
            for change in [step.change, reverse] {
                if let Err(error) = change.apply(None) {
                    assert!(!is_about_grammar(&error), "{error}");
                }
                let Change::Ethtool(words) = change else {
                    panic!("{change:?}");
                };
                kinds.insert(words[0].clone());
            }
        }
        assert_eq!(Vec::from_iter(kinds), ["-G", "-K", "-L", "-N", "-X"]);
        for wrong in [
            "-L a0 combinde 4",
            "-X a0 eqal 2",
            "-N a0 rx-flow-hash udp4 x",
        ] {
            let error = Change::ethtool(wrong).apply(None).unwrap_err();
            assert!(is_about_grammar(&error), "{error}");
        }
    });
}

fn is_about_grammar(error: &Error) -> bool {
    let said = error.to_string();
    let ways = [
        "bad command line",
        "unknown parameter",
        "unrecognized option",
    ];
    ways.iter().any(|way| said.contains(way))
}

#[test]
#[ignore = "needs root"]
fn a_refusal_says_what_was_tried_and_why() {
    with_pair(|| {
        let said = Change::ethtool("-L a0 rx 9").apply(None).unwrap_err();
        assert!(
            said.to_string().starts_with("ethtool -L a0 rx 9: "),
            "{said}"
        );
        let set = Change::Set {
            interface: "a7".to_owned(),
            attribute: Attribute::GroFlushTimeout,
            value: 1,
        };
        let said = set
            .apply(Sysfs::open().ok().as_ref())
            .unwrap_err()
            .to_string();
        assert!(
            said.starts_with("echo 1 > /sys/class/net/a7/gro_flush_timeout: No such file"),
            "{said}"
        );
        assert!(fs::metadata("/sys/class/net/a0").is_ok());
    });
}

#[test]
fn an_interface_that_is_gone_has_no_name() {
    assert_eq!(name_of(i32::MAX.cast_unsigned()).unwrap(), None);
    assert_eq!(name_of(1).unwrap().as_deref(), Some("lo"));
}
