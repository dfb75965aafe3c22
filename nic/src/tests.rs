//! Facts and changes of real interfaces: pairs of virtual ones in namespaces of their own.
//!
//! All of it needs root; `scripts/test.sh` runs it where it may.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::plan::tests::nic;
use crate::{Attribute, Change, Error, Facts, Feature, Link, Taken, Undo, Wanted, link, plan};

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
        Change::ethtool("-K a0 rxvlan off").apply().unwrap();
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
        ip("link set a1 up");
        becomes(Link::Up);
        // By its number, whatever its name.
        ip("link set a0 down");
        ip("link set a0 name b0");
        becomes(Link::Down);
        ip("link del b0");
        becomes(Link::Gone);
    });
}

#[test]
#[ignore = "needs root"]
fn sysfs_of_another_namespace_is_not_believed() {
    with_pair(|| {
        // SAFETY: as in `with_pair`.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
        for name in ["c0", "c1", "c2"] {
            ip(&format!("link add {name} type veth peer name {name}p"));
        }
        ip("link set c2 name a0");
        assert!(matches!(Facts::read("c0"), Err(Error::OtherNamespace(_))));
        assert!(matches!(Facts::read("a0"), Err(Error::OtherNamespace(_))));
    });
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
        for step in plan(&before, &wanted).unwrap().steps {
            let crate::Reverse::Change(reverse) = step.reverse else {
                panic!("veth has no rules");
            };
            undo.remember(&before, reverse).unwrap();
            step.change.apply().unwrap();
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
        let done = undo.restore(Some(&during)).unwrap();
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
                if let Err(error) = change.apply() {
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
            let error = Change::ethtool(wrong).apply().unwrap_err();
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
        let said = Change::ethtool("-L a0 rx 9").apply().unwrap_err();
        assert!(
            said.to_string().starts_with("ethtool -L a0 rx 9: "),
            "{said}"
        );
        let set = Change::Set {
            interface: "a7".to_owned(),
            attribute: Attribute::GroFlushTimeout,
            value: 1,
        };
        let said = set.apply().unwrap_err().to_string();
        assert!(
            said.starts_with("echo 1 > /sys/class/net/a7/gro_flush_timeout: No such file"),
            "{said}"
        );
        assert!(fs::metadata("/sys/class/net/a0").is_ok());
    });
}
