//! Machines and interfaces that are made up, each different in one respect from one that is fine.

use std::path::PathBuf;

use penstock_ebpf::{Attached, Features, Mode};
use penstock_nic::{Channels, Facts, Feature, Link, Master, Ring};
use penstock_process::memory::Limit;

use super::check::{Check, Level};
use super::facts::{BrokerFile, Capabilities, Host, HugePages, Interface, Kernel, Node, Seen};
use super::{host, interface, judge, text};
use crate::measure::host_load::HostLoad;
use crate::report::terminal::Screen;

const ALL: Capabilities = Capabilities(u64::MAX);
const NONE: Capabilities = Capabilities(0);
const ON: Option<Feature> = Some(Feature {
    on: true,
    changeable: true,
});
const OFF: Option<Feature> = Some(Feature {
    on: false,
    changeable: true,
});

/// Root on a machine where everything is well.
fn machine() -> Host {
    Host {
        kernel: Some(Kernel {
            release: "6.12.9-amd64".to_owned(),
            version: (6, 12),
        }),
        af_xdp: Some(true),
        btf: true,
        jit: Some(1),
        busy_poll: Some(0),
        busy_read: Some(0),
        rmem_max: Some(64 << 20),
        wmem_max: Some(64 << 20),
        root: true,
        capabilities: ALL,
        broker: Some(broker(NONE)),
        memlock: u64::MAX,
        huge_pages: Some(HugePages {
            total: 64,
            free: 64,
            size: 2 << 20,
        }),
        shared_memory: Some(1 << 30),
        memory: Some(limit(1 << 30)),
        ethtool: true,
        cpus: vec![0, 1, 2, 3],
        load: Some(HostLoad {
            cpus: 4,
            others_cores: 0.1,
            steal: 0.0,
            load_average: Some(0.5),
        }),
        nodes: vec![Node {
            number: 0,
            cpus: vec![0, 1, 2, 3],
        }],
    }
}

fn limit(free: u64) -> Limit {
    Limit {
        name: "/sys/fs/cgroup/x/memory.max".to_owned(),
        bytes: 2 << 30,
        free,
    }
}

fn broker(capabilities: Capabilities) -> BrokerFile {
    BrokerFile {
        path: PathBuf::from("/opt/penstock-broker"),
        capabilities,
        nosuid: false,
    }
}

/// An ordinary user on it.
fn user() -> Host {
    Host {
        root: false,
        capabilities: NONE,
        memlock: 8 << 20,
        ..machine()
    }
}

/// A NIC with everything.
fn nic() -> Interface {
    Interface {
        nic: Facts {
            interface: "eth1".to_owned(),
            index: 2,
            address: "02:00:00:00:00:01".to_owned(),
            kind: None,
            link_type: 1,
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
            ring: Some(Ring {
                rx: 1024,
                max_rx: 4096,
            }),
            indirection: Some((0..128).map(|at| at % 4).collect()),
            udp_hash: [Some(0xf0); 2],
            rules: Some(Vec::new()),
            ntuple: OFF,
            lro: OFF,
            gro_hw: None,
            vlan_strip: ON,
            defer_hard_irqs: Some(0),
            gro_flush_timeout: Some(0),
            xdp: Some(Features {
                native: true,
                zero_copy: true,
                multi_buffer: true,
            }),
        },
        addresses: vec!["10.0.0.1".parse().unwrap()],
        program: None,
        node: Some(0),
    }
}

/// The interface after a change.
fn changed(change: impl FnOnce(&mut Interface)) -> Interface {
    let mut interface = nic();
    change(&mut interface);
    interface
}

/// What is not ok: names, levels and what to do.
fn complaints(checks: Vec<Check>) -> Vec<(&'static str, Level, String)> {
    let checks = checks.into_iter().filter(|check| check.level != Level::Ok);
    checks
        .map(|check| {
            let fix = check.fix.expect("every finding says what to do");
            (check.name, check.level, fix)
        })
        .collect()
}

/// The machine has one complaint: this one, whose remedy has these words.
fn complains(host: &Host, name: &str, level: Level, words: &str) {
    assert_one(
        complaints(host::checks(host, Some(&nic()))),
        name,
        level,
        words,
    );
}

fn objects_to(interface: &Interface, name: &str, level: Level, words: &str) {
    assert_one(
        complaints(interface::checks(&machine(), interface)),
        name,
        level,
        words,
    );
}

fn assert_one(found: Vec<(&'static str, Level, String)>, name: &str, level: Level, words: &str) {
    let [(found_name, found_level, fix)] = &found[..] else {
        panic!("wanted one complaint about {name}: {found:?}");
    };
    assert_eq!((*found_name, *found_level), (name, level));
    assert!(fix.contains(words), "{fix}");
}

#[test]
fn nothing_is_wrong_with_what_is_well() {
    assert_eq!(complaints(host::checks(&machine(), Some(&nic()))), []);
    assert_eq!(complaints(host::checks(&machine(), None)), []);
    assert_eq!(complaints(interface::checks(&machine(), &nic())), []);
}

#[test]
fn old_kernels() {
    for (version, level, words) in [
        ((5, 4), Level::Fail, "5.18 or newer"),
        ((5, 17), Level::Fail, "5.18 or newer"),
        ((6, 1), Level::Warn, "6.6 or newer"),
        ((6, 5), Level::Warn, "6.6 or newer"),
    ] {
        let kernel = Some(Kernel {
            release: format!("{}.{}.0", version.0, version.1),
            version,
        });
        let host = Host {
            kernel,
            ..machine()
        };
        complains(&host, "kernel", level, words);
    }
}

#[test]
fn what_the_kernel_was_built_without() {
    let without = |change: fn(&mut Host)| {
        let mut host = machine();
        change(&mut host);
        host
    };
    let host = without(|host| host.af_xdp = Some(false));
    complains(&host, "af_xdp", Level::Fail, "CONFIG_XDP_SOCKETS");
    let host = without(|host| host.btf = false);
    complains(&host, "btf", Level::Warn, "CONFIG_DEBUG_INFO_BTF");
    let host = without(|host| host.jit = Some(0));
    complains(
        &host,
        "bpf_jit",
        Level::Warn,
        "sysctl -w net.core.bpf_jit_enable=1",
    );
}

#[test]
fn who_may_start_the_broker() {
    let check = |host: &Host| complaints(host::checks(host, None));
    // Root in a container, whom sudo cannot help.
    let contained = Host {
        capabilities: Capabilities::NET_ADMIN | Capabilities::IPC_LOCK,
        ..machine()
    };
    complains(&contained, "capabilities", Level::Fail, "user namespace");
    assert_one(
        check(&user()),
        "capabilities",
        Level::Warn,
        "sudo setcap cap_bpf,",
    );
    // A file that gives them, but not where it lies.
    let with_file = |nosuid| Host {
        broker: Some(BrokerFile {
            nosuid,
            ..broker(Capabilities::for_xdp() | Capabilities::IPC_LOCK)
        }),
        ..user()
    };
    assert_eq!(check(&with_file(false)), []);
    assert_one(
        check(&with_file(true)),
        "capabilities",
        Level::Warn,
        "without nosuid",
    );
    // CAP_SYS_ADMIN stands in for CAP_BPF.
    let older = Capabilities::SYS_ADMIN | Capabilities::NET_ADMIN | Capabilities::NET_RAW;
    assert!(older.has(Capabilities::for_xdp()));
    assert_eq!(NONE.missing(Capabilities::for_xdp()).len(), 3);
}

#[test]
fn locked_memory_counts_for_whoever_starts_the_broker() {
    // Four queues of 1,280 frames, 4 KiB each.
    let limited = |capabilities, root, file| Host {
        memlock: 64 << 10,
        capabilities,
        root,
        broker: Some(broker(file)),
        ..machine()
    };
    let xdp = Capabilities::for_xdp();
    complains(
        &limited(xdp, true, NONE),
        "memlock",
        Level::Fail,
        "ulimit -l 20480",
    );
    let locking = limited(xdp | Capabilities::IPC_LOCK, true, NONE);
    assert_eq!(complaints(host::checks(&locking, Some(&nic()))), []);
    complains(
        &limited(NONE, false, xdp),
        "memlock",
        Level::Fail,
        "cap_ipc_lock",
    );
    let locking = limited(NONE, false, xdp | Capabilities::IPC_LOCK);
    assert_eq!(complaints(host::checks(&locking, Some(&nic()))), []);
    // Whoever cannot start it anyway.
    let found = complaints(host::checks(&limited(NONE, false, NONE), Some(&nic())));
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!((found[1].0, found[1].1), ("memlock", Level::Warn));
    // Frames are larger with a larger MTU, and where the driver may do without a copy.
    let enough = Host {
        memlock: 11 << 20,
        capabilities: xdp,
        huge_pages: None,
        ..machine()
    };
    let copying = |mtu| {
        changed(|interface| {
            interface.nic.mtu = mtu;
            interface.nic.xdp = Some(Features {
                native: true,
                zero_copy: false,
                multi_buffer: true,
            });
        })
    };
    assert_eq!(complaints(host::checks(&enough, Some(&copying(1500)))), []);
    for needs_more in [copying(9000), nic()] {
        let found = complaints(host::checks(&enough, Some(&needs_more)));
        assert_one(found, "memlock", Level::Fail, "ulimit -l 20480");
    }
}

#[test]
fn memory_and_limits_of_the_machine() {
    let pages = |free| HugePages {
        total: 10,
        free,
        size: 2 << 20,
    };
    // Three a queue, of which 3 are there.
    let host = Host {
        huge_pages: Some(pages(3)),
        ..machine()
    };
    complains(&host, "huge_pages", Level::Warn, "vm.nr_hugepages=19");
    let host = Host {
        shared_memory: Some(64 << 20),
        ..machine()
    };
    complains(&host, "shared_memory", Level::Fail, "/dev/shm");
    let host = Host {
        memory: Some(limit(290 << 20)),
        ..machine()
    };
    complains(&host, "memory", Level::Fail, "MemoryMax=");
    let host = Host {
        rmem_max: Some(212_992),
        ..machine()
    };
    complains(
        &host,
        "socket_buffers",
        Level::Warn,
        "sysctl -w net.core.rmem_max=33554432",
    );
    let host = Host {
        busy_read: Some(50),
        ..machine()
    };
    complains(
        &host,
        "busy_poll",
        Level::Warn,
        "sysctl -w net.core.busy_read=0",
    );
    let host = Host {
        ethtool: false,
        ..machine()
    };
    complains(&host, "ethtool", Level::Warn, "apt-get install ethtool");
}

#[test]
fn what_is_not_seen_is_not_judged() {
    let blind = Host {
        kernel: None,
        af_xdp: None,
        jit: None,
        busy_poll: None,
        rmem_max: None,
        huge_pages: None,
        shared_memory: None,
        memory: None,
        load: None,
        ..machine()
    };
    let names: Vec<_> = host::checks(&blind, None)
        .iter()
        .map(|check| check.name)
        .collect();
    assert_eq!(names, ["btf", "capabilities", "memlock", "ethtool"]);
}

#[test]
fn links_and_addresses() {
    let down = changed(|interface| interface.nic.link = Link::Down);
    objects_to(&down, "link", Level::Fail, "ip link set dev eth1 up");
    let dark = changed(|interface| interface.nic.link = Link::NoCarrier);
    objects_to(&dark, "link", Level::Warn, "other end");
    // A link-local address is none that publishers use.
    let nameless = changed(|interface| interface.addresses = vec!["fe80::1".parse().unwrap()]);
    objects_to(&nameless, "addresses", Level::Fail, "ip addr add");
}

#[test]
fn other_programs() {
    let with = |name: &str| {
        changed(|interface| {
            interface.program = Some(Attached {
                id: 7,
                name: name.to_owned(),
                mode: Mode::Native,
            });
        })
    };
    objects_to(
        &with("somebody"),
        "xdp_program",
        Level::Fail,
        "ip link set dev eth1 xdpdrv off",
    );
    objects_to(
        &with("penstock_steer"),
        "xdp_program",
        Level::Warn,
        "stop that broker",
    );
    let hidden = interface::checks(&user(), &with(""));
    let said = hidden
        .iter()
        .find(|check| check.name == "xdp_program")
        .unwrap();
    assert!(said.found.contains("only root"), "{}", said.found);
}

#[test]
fn drivers() {
    let with = |features| changed(|interface| interface.nic.xdp = features);
    let generic = with(None);
    objects_to(&generic, "native_xdp", Level::Warn, "another driver");
    let copying = with(Some(Features {
        native: true,
        zero_copy: false,
        multi_buffer: true,
    }));
    objects_to(&copying, "zero_copy", Level::Warn, "another driver");
    // An old kernel does not tell.
    let old = Host {
        kernel: Some(Kernel {
            release: "6.1.0".to_owned(),
            version: (6, 1),
        }),
        ..machine()
    };
    let found = complaints(interface::checks(&old, &generic));
    assert_one(
        found,
        "native_xdp",
        Level::Warn,
        "--xdp-mode native fails if the driver cannot",
    );
}

#[test]
fn interfaces_whose_packets_others_take() {
    let bond = changed(|interface| interface.nic.kind = Some("bond".to_owned()));
    objects_to(&bond, "device", Level::Warn, "generic mode on its own");
    let port = changed(|interface| {
        interface.nic.master = Some(Master {
            name: "br 0".to_owned(),
            kind: Some("bridge".to_owned()),
        });
    });
    objects_to(&port, "device", Level::Fail, "--iface 'br 0'");
    let tun = changed(|interface| interface.nic.link_type = 65534);
    objects_to(&tun, "device", Level::Fail, "--mode tcp");
    let lo = changed(|interface| interface.nic.link_type = 772);
    objects_to(&lo, "device", Level::Warn, "use tcp");
    let vrf = changed(|interface| interface.nic.kind = Some("vrf".to_owned()));
    objects_to(&vrf, "device", Level::Fail, "ip link show vrf eth1");
}

#[test]
fn large_mtus() {
    let with = |mtu, multi_buffer| {
        changed(|interface| {
            interface.nic.mtu = mtu;
            interface.nic.xdp = Some(Features {
                native: true,
                zero_copy: true,
                multi_buffer,
            });
        })
    };
    assert_eq!(
        complaints(interface::checks(&machine(), &with(9000, true))),
        []
    );
    assert_eq!(
        complaints(interface::checks(&machine(), &with(3498, false))),
        []
    );
    objects_to(
        &with(9000, false),
        "mtu",
        Level::Warn,
        "ip link set dev eth1 mtu 3498",
    );
    let chosen = |interface: &Interface| {
        let checks = interface::checks(&machine(), interface);
        let mode = checks.into_iter().find(|check| check.name == "xdp_mode");
        mode.unwrap().found
    };
    assert!(chosen(&with(9000, true)).starts_with("native: "));
    assert!(chosen(&with(9000, false)).starts_with("generic: "));
    let old = Host {
        kernel: Some(Kernel {
            release: "6.5.0".to_owned(),
            version: (6, 5),
        }),
        ..machine()
    };
    let found = complaints(interface::checks(&old, &with(9000, true)));
    assert_one(found, "mtu", Level::Fail, "ip link set dev eth1 mtu 3818");
}

#[test]
fn queues_and_settings() {
    let lopsided = changed(|interface| interface.nic.indirection = Some(vec![1; 128]));
    objects_to(
        &lopsided,
        "queues",
        Level::Warn,
        "ethtool -X eth1 default, or penstock-broker --queues 1",
    );
    let unsteered = changed(|interface| {
        interface.nic.rules = None;
        interface.nic.ntuple = None;
        interface.nic.indirection = None;
    });
    objects_to(&unsteered, "steering", Level::Warn, "ethtool -L eth1");
    let joining = changed(|interface| interface.nic.lro = ON);
    objects_to(&joining, "settings", Level::Warn, "ethtool -K eth1 lro off");
    let narrow = changed(|interface| interface.nic.udp_hash = [Some(0x30); 2]);
    objects_to(
        &narrow,
        "settings",
        Level::Warn,
        "ethtool -N eth1 rx-flow-hash udp4 sdfn",
    );
    let odd = changed(|interface| {
        interface.nic.ring = Some(Ring {
            rx: 1000,
            max_rx: 4096,
        });
    });
    objects_to(&odd, "settings", Level::Warn, "ethtool -G eth1 rx 1024");
}

#[test]
fn deferred_interrupts() {
    let with = |defer, flush| {
        changed(|interface| {
            interface.nic.defer_hard_irqs = Some(defer);
            interface.nic.gro_flush_timeout = Some(flush);
        })
    };
    objects_to(
        &with(2, 0),
        "interrupts",
        Level::Warn,
        "echo 0 > /sys/class/net/eth1/gro_flush_timeout",
    );
    objects_to(&with(2, 200_000), "interrupts", Level::Warn, "--busy-poll");
}

#[test]
fn nodes_of_memory() {
    let node = |number, cpus: &[usize]| Node {
        number,
        cpus: cpus.to_vec(),
    };
    let two = |cpus: &[usize]| Host {
        cpus: cpus.to_vec(),
        nodes: vec![node(0, &[0, 1, 2, 3]), node(1, &[4, 5, 6, 7])],
        ..machine()
    };
    let on_second = changed(|interface| interface.node = Some(1));
    let found = |host| complaints(interface::checks(&host, &on_second));
    assert_eq!(found(two(&[4, 5])), []);
    assert_one(
        found(two(&[0, 1, 4, 5, 6])),
        "numa",
        Level::Warn,
        "--cpus 4-6",
    );
    assert_one(found(two(&[0, 1])), "numa", Level::Warn, "cores 4-7");
}

#[test]
fn a_busy_or_small_host_is_told() {
    let loaded = |cpus, others_cores, steal| Host {
        load: Some(HostLoad {
            cpus,
            others_cores,
            steal,
            load_average: None,
        }),
        ..machine()
    };
    complains(&loaded(8, 2.0, 0.0), "cpu", Level::Warn, "top");
    complains(&loaded(8, 0.0, 0.1), "cpu", Level::Warn, "share its cores");
    complains(&loaded(2, 0.0, 0.0), "cpu", Level::Warn, "four cores");
}

#[test]
fn reports_count_and_explain() {
    let seen = |interface| Seen {
        host: user(),
        interface,
        candidates: vec![nic()],
        unseen: vec!["a thing: run this with sudo".to_owned()],
    };
    let report = judge(seen(Some(changed(|interface| {
        interface.nic.link = Link::Down
    }))));
    assert_eq!((report.warn, report.fail), (2, 1));
    let plain = text(&report, Screen::PLAIN);
    for words in [
        "fail link            eth1 is down",
        "do:  ip link set dev eth1 up",
        "why: an interface that is down",
        "a thing: run this with sudo",
        "eth1            fine, up, MTU 1500, 4 queues, native XDP, zero-copy,",
        "2 warnings, 1 failed",
    ] {
        assert!(plain.contains(words), "{words}\n{plain}");
    }
    assert!(
        plain.lines().all(|line| line.chars().count() <= 80),
        "{plain}"
    );
    assert!(
        !plain.contains('\x1b')
            && text(
                &report,
                Screen {
                    colours: true,
                    ..Screen::PLAIN
                }
            )
            .contains("\x1b[31mfail")
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["interface"]["checks"][0]["level"], "fail");
    assert_eq!(json["fail"], 1);
    assert!(json["host"][0]["fix"].is_null());
}
