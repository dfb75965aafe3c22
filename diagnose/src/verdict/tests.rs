//! The decision table, rule by rule.

use std::collections::BTreeSet;

use super::*;
use crate::cpu::{Core, Process, Thread};
use crate::facts::Figure;
use crate::other_processes::{Other, Others};
use crate::sample::{Connection, Listener};

fn first(figures: &[(Figure, f64)]) -> &'static str {
    let verdicts = judge(&Facts::from(figures));
    verdicts.first().map_or("none", |verdict| verdict.cause)
}

/// A connection at full speed with nothing wrong, which each test bends at one place.
const FULL_SPEED: &[(Figure, f64)] = &[
    (Figure::Rate, 8e8),
    (Figure::Queued, 1e6),
    (Figure::SenderBusy, 0.99),
    (Figure::RwndLimited, 0.02),
    (Figure::SndbufLimited, 0.01),
    (Figure::PathLimited, 0.96),
    (Figure::AppLimited, 0.0),
    (Figure::CwndFull, 0.1),
    (Figure::Retransmitted, 0.0),
    (Figure::RttGrowth, 2.0),
    (Figure::SendQueue, 0.3),
    (Figure::ReceiveQueue, 0.02),
    (Figure::ReadDelay, 0.2),
    (Figure::SenderCore, 0.6),
    (Figure::ReceiverCore, 0.6),
    (Figure::ReceiveCalls, 15_000.0),
    (Figure::BytesPerReceive, 60_000.0),
    (Figure::Dropped, 0.0),
];

fn bent(changes: &[(Figure, f64)]) -> &'static str {
    first(&[FULL_SPEED, changes].concat())
}

#[test]
fn shared_buffer_full() {
    let stuck = [
        (Figure::Rate, 0.0),
        (Figure::RwndLimited, 1.0),
        (Figure::PathLimited, 0.0),
        (Figure::ReceiveQueue, 0.9),
        (Figure::ReceiverCore, 0.01),
        (Figure::SenderCore, 0.01),
    ];
    let broker = [(Figure::Blocked, 1.0), (Figure::Unread, 1.0)];
    assert_eq!(bent(&[&stuck[..], &broker].concat()), "shared-buffer-full");
    // Without the broker's own figures it looks like any receiver that does not read.
    assert_eq!(bent(&stuck), "receiver-application-limited");
}

#[test]
fn syscall_overhead() {
    let tiny = [
        (Figure::BytesPerReceive, 64.0),
        (Figure::ReceiveCalls, 900_000.0),
        (Figure::ReceiverCore, 1.0),
        (Figure::ReceiveQueue, 0.8),
        (Figure::RwndLimited, 0.9),
        (Figure::PathLimited, 0.05),
    ];
    assert_eq!(bent(&tiny), "syscall-overhead");
    let few = [(Figure::ReceiveCalls, 2_000.0)];
    assert_ne!(bent(&[&tiny[..], &few].concat()), "syscall-overhead");
}

#[test]
fn receiver_cpu() {
    let busy = [
        (Figure::ReceiverCore, 0.97),
        (Figure::ReceiveQueue, 0.6),
        (Figure::ReadDelay, 20.0),
        (Figure::RwndLimited, 0.5),
        (Figure::PathLimited, 0.4),
    ];
    assert_eq!(bent(&busy), "receiver-cpu");
    let starved = [(Figure::ReceiverThrottled, 0.8)];
    assert_eq!(bent(&[&busy[..], &starved].concat()), "receiver-cpu");
    // It runs seldom, so round trips last, as they do over a slow network.
    let seldom = [
        (Figure::ReceiverThrottled, 0.4),
        (Figure::ReadDelay, 6.0),
        (Figure::CwndFull, 0.6),
        (Figure::RttGrowth, 138.0),
        (Figure::SenderCore, 0.4),
    ];
    assert_eq!(bent(&seldom), "receiver-cpu");
    // Little of a large buffer, for the publisher may have no more unacked; as measured.
    let large_buffer = [
        (Figure::SenderBusy, 0.43),
        (Figure::PathLimited, 0.43),
        (Figure::AppLimited, 0.58),
        (Figure::ReceiveQueue, 0.009),
        (Figure::ReadDelay, 5.7),
        (Figure::ReceiverThrottled, 0.27),
    ];
    assert_eq!(bent(&large_buffer), "receiver-cpu");
}

#[test]
fn receiver_application_limited() {
    let slow = [
        (Figure::ReceiveQueue, 0.8),
        (Figure::RwndLimited, 0.95),
        (Figure::PathLimited, 0.03),
        (Figure::ReceiverCore, 0.1),
    ];
    assert_eq!(bent(&slow), "receiver-application-limited");
}

#[test]
fn nic_drops() {
    let lossy = [(Figure::Dropped, 0.02), (Figure::Retransmitted, 0.02)];
    assert_eq!(bent(&lossy), "nic-drops");
    assert_ne!(bent(&[(Figure::Dropped, 0.0005)]), "nic-drops");
}

/// Over xdp the connections carry control only: nothing is known of senders' sockets, but they tell
/// why they paused.
const OVER_XDP: &[(Figure, f64)] = &[
    (Figure::Rate, 8e8),
    (Figure::Queued, 0.0),
    (Figure::SenderCore, 0.6),
    (Figure::SenderThrottled, 0.0),
    (Figure::ReceiverCore, 0.5),
    (Figure::ReceiverThrottled, 0.0),
    (Figure::Dropped, 0.0),
    (Figure::Blocked, 0.0),
    (Figure::Missing, 0.0),
    (Figure::FullLooks, 0.3),
    (Figure::IdlePauses, 0.05),
    (Figure::CreditPauses, 0.04),
    (Figure::CongestionPauses, 0.0),
];

fn over_xdp(changes: &[(Figure, f64)]) -> &'static str {
    first(&[OVER_XDP, changes].concat())
}

#[test]
fn credit_limited() {
    let small = [(Figure::CreditPauses, 0.7)];
    assert_eq!(over_xdp(&small), "credit-limited");
    let full = [(Figure::Blocked, 0.9)];
    assert_eq!(
        over_xdp(&[&small[..], &full].concat()),
        "shared-buffer-full"
    );
}

#[test]
fn other_causes_over_xdp() {
    for (changes, cause) in [
        (
            &[(Figure::Rate, 5e7), (Figure::IdlePauses, 0.6)][..],
            "sender-application-limited",
        ),
        (
            &[(Figure::CongestionPauses, 0.8), (Figure::Missing, 0.02)],
            "congestion-limited",
        ),
        // Losses in the host's own rings are not the network's.
        (
            &[
                (Figure::CongestionPauses, 0.9),
                (Figure::Missing, 0.1),
                (Figure::Dropped, 0.1),
            ],
            "nic-drops",
        ),
        (
            &[
                (Figure::ReceiverThrottled, 0.15),
                (Figure::CreditPauses, 0.3),
                (Figure::IdlePauses, 0.2),
            ],
            "receiver-cpu",
        ),
        (
            &[(Figure::SenderCore, 0.95), (Figure::SenderThrottled, 0.8)],
            "sender-cpu",
        ),
    ] {
        assert_eq!(over_xdp(changes), cause);
    }
}

#[test]
fn receive_window_limited() {
    let small = [(Figure::RwndLimited, 0.9), (Figure::PathLimited, 0.09)];
    assert_eq!(bent(&small), "receive-window-limited");
    // From the receiver's end alone, with less confidence.
    let half = [
        (Figure::Rate, 5e7),
        (Figure::ReceiveQueue, 0.02),
        (Figure::WindowUse, 0.95),
    ];
    let verdicts = judge(&Facts::from(&half));
    assert_eq!(verdicts[0].cause, "receive-window-limited");
    assert!(verdicts[0].confidence <= 0.5);
    for verdict in verdicts {
        let lines: BTreeSet<_> = verdict.evidence_for.iter().collect();
        assert_eq!(lines.len(), verdict.evidence_for.len(), "each once");
    }
}

/// However busy the receiver is, 64 KiB per round trip is the maximum.
#[test]
fn a_window_that_is_bounded_is_named_beside_what_else_there_is() {
    let bounded = [
        (Figure::RwndLimited, 0.7),
        (Figure::PathLimited, 0.2),
        (Figure::WindowBounded, 1.0),
        (Figure::ReceiverCore, 0.99),
    ];
    assert_eq!(bent(&bounded), "receive-window-limited");
    let busy = [(Figure::ReceiverDisplaced, 0.5)];
    let verdicts = judge(&Facts::from(&[FULL_SPEED, &bounded, &busy].concat()));
    let named: Vec<_> = verdicts.iter().map(|verdict| verdict.cause).collect();
    assert!(named.contains(&"receive-window-limited"), "{named:?}");
}

#[test]
fn commands_name_the_process_that_has_the_connection() {
    let end = |pid| End {
        pid: Some(pid),
        ..End::default()
    };
    let connection = |receives| Connection {
        local: "10.0.0.2:5310".parse().unwrap(),
        remote: "10.0.0.1:5".parse().unwrap(),
        receives,
        end: end(11),
        peer: Some(end(22)),
    };
    let interface = Interface {
        name: "eth0;reboot".to_owned(),
        ..Interface::default()
    };
    let sample = |receives| Sample {
        // Its parent, which only listens.
        pid: Some(10),
        connections: vec![connection(receives)],
        interfaces: vec![interface.clone()],
        ..Sample::default()
    };
    let filled = |receives| fill_in("PID PEER IFACE", &sample(receives));
    assert_eq!(filled(true), "11 22 'eth0;reboot'");
    assert_eq!(filled(false), "22 11 'eth0;reboot'");
    let idle = Sample {
        pid: Some(10),
        ..Sample::default()
    };
    assert_eq!(fill_in("PID PEER IFACE", &idle), "10 PEER IFACE");
}

#[test]
fn send_buffer_limited() {
    let small = [
        (Figure::SndbufLimited, 0.8),
        (Figure::PathLimited, 0.15),
        (Figure::SendQueue, 0.9),
    ];
    assert_eq!(bent(&small), "send-buffer-limited");
}

#[test]
fn sender_cpu() {
    assert_eq!(bent(&[(Figure::SenderCore, 0.98)]), "sender-cpu");
    let starved = [
        (Figure::SenderCore, 0.95),
        (Figure::SenderThrottled, 0.8),
        (Figure::SenderBusy, 0.3),
        (Figure::PathLimited, 0.29),
        (Figure::AppLimited, 1.0),
    ];
    assert_eq!(bent(&starved), "sender-cpu");
    // Its threads sleep between their turns, so none of them seems busy.
    let seldom = [&starved[..], &[(Figure::SenderCore, 0.5)]].concat();
    assert_eq!(bent(&seldom), "sender-cpu");
}

#[test]
fn congestion_limited() {
    let queue = [
        (Figure::CwndFull, 0.9),
        (Figure::RttGrowth, 40.0),
        (Figure::SenderCore, 0.1),
    ];
    assert_eq!(bent(&queue), "congestion-limited");
}

#[test]
fn sender_application_limited() {
    let throttled = [
        (Figure::Rate, 5e7),
        (Figure::SenderBusy, 0.1),
        (Figure::PathLimited, 0.1),
        (Figure::AppLimited, 1.0),
        (Figure::SenderCore, 0.06),
        (Figure::ReceiverCore, 0.06),
    ];
    assert_eq!(bent(&throttled), "sender-application-limited");
}

#[test]
fn idle() {
    let idle = [
        (Figure::Rate, 0.0),
        (Figure::Queued, 0.0),
        (Figure::SenderBusy, 0.0),
        (Figure::PathLimited, 0.0),
        (Figure::AppLimited, 1.0),
        (Figure::ReceiveQueue, 0.0),
        (Figure::SenderCore, 0.0),
        (Figure::ReceiverCore, 0.0),
    ];
    assert_eq!(bent(&idle), "idle-or-offered-slower-than-capacity");
    // Small windows over a long path carry as little, and are not idle.
    let slow = [
        (Figure::Rate, 4e5),
        (Figure::Queued, 4e4),
        (Figure::SenderBusy, 1.0),
        (Figure::RwndLimited, 0.9),
        (Figure::PathLimited, 0.1),
    ];
    assert_eq!(bent(&slow), "receive-window-limited");
}

#[test]
fn an_idle_connection_s_first_values_say_nothing() {
    for rcv_space in [43_690, 65_483] {
        let end = End {
            rcv_space,
            rcv_ssthresh: 65_483,
            receive_buffer: 131_072,
            ..End::default()
        };
        let sample = Sample {
            seconds: 5.0,
            connections: vec![Connection {
                local: "10.0.0.2:1214".parse().unwrap(),
                remote: "10.0.0.1:5".parse().unwrap(),
                receives: true,
                end: end.clone(),
                peer: Some(end),
            }],
            ..Sample::default()
        };
        let verdicts = verdicts(&sample);
        assert_eq!(verdicts[0].cause, "idle-or-offered-slower-than-capacity");
        let window = |v: &Verdict| v.cause == "receive-window-limited";
        assert!(!verdicts.iter().any(window));
    }
}

#[test]
fn every_figure_that_decided_is_named_with_its_threshold() {
    let busy = [(Figure::RwndLimited, 0.9), (Figure::ReceiverCore, 0.9)];
    let verdicts = judge(&Facts::from(&[FULL_SPEED, &busy].concat()));
    let mut window = verdicts
        .iter()
        .filter(|v| v.cause == "receive-window-limited");
    let window = window.next().unwrap();
    let start = "the sender waited for the receiver's window (rwnd_limited) 90 % of the time (at least 20 %: ";
    assert!(window.evidence_for[0].starts_with(start), "{window:?}");
    assert!(window.evidence_against[0].contains("90 % of the time"));
    let falls = |pair: &[Verdict]| pair[0].confidence >= pair[1].confidence;
    assert!(verdicts.windows(2).all(falls));
}

/// So little quota that nothing moves while one looks.
#[test]
fn who_may_not_run_is_not_idle() {
    let nothing = [(Figure::Rate, 0.0), (Figure::Queued, 0.0)];
    assert_eq!(first(&nothing), "idle-or-offered-slower-than-capacity");
    for (figure, cause) in [
        (Figure::ReceiverThrottled, "receiver-cpu"),
        (Figure::SenderThrottled, "sender-cpu"),
    ] {
        assert_eq!(first(&[&nothing[..], &[(figure, 1.0)]].concat()), cause);
    }
}

#[test]
fn the_reason_of_a_small_window_is_told_apart() {
    let settings = Settings {
        rmem_max: Some(4_194_304),
        tcp_rmem: Some([4096, 131_072, 33_554_432]),
        tcp_moderate_rcvbuf: Some(1),
        ..Settings::default()
    };
    let end = |receive_buffer, rcv_wscale, rcv_ssthresh, set| End {
        receive_buffer,
        rcv_wscale,
        rcv_ssthresh,
        receive_buffer_set: Some(set),
        ..End::default()
    };
    for (end, words) in [
        (end(8_388_608, 5, 65_483, true), "set too late"),
        (end(8_388_608, 10, 4_000_000, true), "rmem_max caps"),
        (end(8_388_608, 10, 65_483, true), "still grows"),
        (end(65_536, 10, 32_000, true), "switches autotuning off"),
        (
            end(33_554_432, 10, 16_000_000, false),
            "tcp_rmem allows 33554432",
        ),
        (end(131_072, 10, 65_483, false), "may raise it yet"),
    ] {
        let reason = window_reason(&end, &settings, None).text;
        assert!(reason.contains(words), "{words}: {reason}");
    }
    let off = Settings {
        tcp_moderate_rcvbuf: Some(0),
        ..settings
    };
    assert!(
        window_reason(&end(131_072, 10, 65_483, false), &off, None)
            .text
            .contains("=0")
    );
}

#[test]
fn a_window_that_is_bounded_elsewhere_is_not_blamed_on_the_buffer() {
    let settings = |tcp_window_scaling| Settings {
        tcp_window_scaling: Some(tcp_window_scaling),
        tcp_moderate_rcvbuf: Some(1),
        ..Settings::default()
    };
    // As measured: autotuning still raises the buffer.
    let tuned = End {
        receive_buffer: 8_594_937,
        rcv_ssthresh: 7_685_662,
        window_scaling: Some(false),
        ..End::default()
    };
    let here = window_reason(&tuned, &settings(0), None);
    assert!(
        here.text.contains("tcp_window_scaling is 0 here"),
        "{here:?}"
    );
    let there = window_reason(&tuned, &settings(1), None);
    assert!(
        there.text.contains("the other end") && there.text.contains("middlebox"),
        "{there:?}"
    );
    assert!(
        there
            .next
            .unwrap()
            .starts_with("sysctl net.ipv4.tcp_window_scaling")
    );
    let scaled = End {
        window_scaling: Some(true),
        rcv_ssthresh: 16_384,
        ..tuned
    };
    // The route's limit fixes the scale as well.
    let routed = End {
        route_window: Some(16_384),
        ..scaled.clone()
    };
    let routed = window_reason(&routed, &settings(1), None);
    assert!(
        routed.text.contains("route") && routed.text.contains("16384"),
        "{routed:?}"
    );
    assert!(routed.next.unwrap().starts_with("ip route"));
    let clamped = End {
        rcv_wscale: 7,
        window_clamp: Some(16_384),
        ..scaled.clone()
    };
    let late = End {
        receive_buffer_set: Some(true),
        ..clamped.clone()
    };
    let clamped = window_reason(&clamped, &settings(1), None);
    assert!(
        clamped.text.contains("bounds the window of this"),
        "{clamped:?}"
    );
    let late = window_reason(&late, &settings(1), None);
    assert!(late.text.contains("set too late"), "{late:?}");
    // The buffer outgrows what was set on the listener; the scale does not.
    let listener = window_reason(&scaled, &settings(1), Some(32_768));
    assert!(
        listener.text.contains("listener's connections at 32768"),
        "{listener:?}"
    );
    // In other cases the limit follows the buffer.
    let free = End {
        window_clamp: Some(8_000_000),
        ..scaled
    };
    assert!(
        window_reason(&free, &settings(1), None)
            .text
            .contains("set too late")
    );
}

#[test]
fn cpu_taken_by_others() {
    let displaced = [
        (Figure::SenderDisplaced, 0.5),
        (Figure::SenderCore, 0.95),
        (Figure::SenderBusy, 0.4),
        (Figure::PathLimited, 0.4),
        (Figure::AppLimited, 0.8),
    ];
    assert_eq!(bent(&displaced), "cpu-taken-by-others");
    let receiver = [
        (Figure::ReceiverDisplaced, 0.4),
        (Figure::ReceiverCore, 0.7),
        (Figure::ReceiveQueue, 0.7),
        (Figure::RwndLimited, 0.8),
        (Figure::PathLimited, 0.1),
    ];
    assert_eq!(bent(&receiver), "cpu-taken-by-others");
    let stolen = [(Figure::Stolen, 0.3), (Figure::SenderCore, 0.95)];
    assert_eq!(bent(&stolen), "cpu-taken-by-others");
    // A tenth is mentioned, but a thread that fills what is left of its core is slow by itself.
    let tenth = [
        (Figure::Stolen, 0.13),
        (Figure::ReceiverCore, 0.96),
        (Figure::ReceiveQueue, 0.81),
        (Figure::RwndLimited, 0.76),
        (Figure::PathLimited, 0.2),
    ];
    assert_eq!(bent(&tenth), "receiver-cpu");
    let tenth = [(Figure::Stolen, 0.13), (Figure::SenderCore, 0.95)];
    assert_eq!(bent(&tenth), "sender-cpu");
    // Neither its own quota nor a thread that hardly wants to run counts as other processes' doing.
    let quota = [(Figure::SenderThrottled, 0.6), (Figure::SenderCore, 0.95)];
    assert_eq!(bent(&quota), "sender-cpu");
    let throttled = [
        (Figure::SenderDisplaced, 0.05),
        (Figure::SenderBusy, 0.1),
        (Figure::PathLimited, 0.1),
        (Figure::SenderCore, 0.1),
    ];
    assert_eq!(bent(&throttled), "sender-application-limited");
}

#[test]
fn who_took_the_cpu_is_named() {
    let sample = Sample {
        others: Others {
            cores: 1.5,
            busiest: vec![Other {
                pid: 9,
                name: "cc1plus".to_owned(),
                processes: 1,
                cores: 0.97,
            }],
        },
        cores: vec![
            Core {
                steal: 0.2,
                ..Core::default()
            };
            2
        ],
        ..Sample::default()
    };
    let reason = others_reason(&sample);
    for words in [
        "1.50 of 2 cores",
        "cc1plus (9) 0.97",
        "hypervisor took 0.40",
    ] {
        assert!(reason.contains(words), "{words}: {reason}");
    }
}

#[test]
fn accept_queue_full() {
    let waiting = [
        (Figure::Rate, 0.0),
        (Figure::Queued, 9e5),
        (Figure::SenderBusy, 0.0),
        (Figure::RwndLimited, 0.0),
        (Figure::PathLimited, 0.0),
        (Figure::ReceiveQueue, 0.78),
        (Figure::ReceiverCore, 0.0),
        (Figure::AcceptQueueFull, 1.0),
        (Figure::AcceptQueueOverflows, 4.0),
    ];
    assert_eq!(bent(&waiting), "accept-queue-full");
    let sample = Sample {
        listeners: vec![Listener {
            local: "0.0.0.0:5301".parse().unwrap(),
            waiting: 9.0,
            backlog: 8,
            full: 1.0,
            window_clamp: None,
        }],
        tcp_events: [("ListenOverflows".to_owned(), 12)].into(),
        ..Sample::default()
    };
    let reason = accept_reason(&sample).unwrap();
    assert!(
        reason.contains("9 connections") && reason.contains("room for 8"),
        "{reason}"
    );
    assert!(reason.contains("12 found it full"), "{reason}");
}

#[test]
fn a_stopped_process_is_said_to_be_stopped() {
    let stopped = |pid, stopped| Process {
        pid,
        stopped,
        ..Process::default()
    };
    let sample = Sample {
        processes: vec![stopped(7, true), stopped(8, false)],
        ..Sample::default()
    };
    let reason = stopped_reason(&sample, Some(7)).unwrap();
    assert!(reason.text.contains("process 7 is stopped"));
    assert!(reason.next.unwrap().starts_with("kill -CONT 7"));
    assert_eq!(stopped_reason(&sample, Some(8)), None);
}

#[test]
fn the_reason_of_an_end_without_cpu_is_its_quota_or_work_that_moves() {
    let thread = |run| Thread {
        name: "nats-server".to_owned(),
        run,
        ..Thread::default()
    };
    let sample = |throttled| Sample {
        connections: vec![Connection {
            local: "10.0.0.2:4222".parse().unwrap(),
            remote: "10.0.0.1:5".parse().unwrap(),
            receives: true,
            end: End {
                pid: Some(7),
                bytes_received: 1_000_000,
                ..End::default()
            },
            peer: None,
        }],
        processes: vec![Process {
            pid: 7,
            run: 1.02,
            threads: vec![thread(0.51), thread(0.51)],
            throttled,
            ..Process::default()
        }],
        ..Sample::default()
    };
    let moves = cpu_reason(&sample(None), 7).unwrap().text;
    assert!(
        moves.contains("102 % of a core") && moves.contains("51 %"),
        "{moves}"
    );
    let quota = cpu_reason(&sample(Some(0.4)), 7).unwrap();
    assert!(quota.text.contains("quota 40 %") && quota.next.unwrap().contains("cpu.max"));
}

#[test]
fn the_reason_of_drops_is_where_most_were() {
    let core = Core {
        core: 0,
        user: 0.0,
        system: 0.0,
        softirq: 0.0,
        irq: 0.0,
        idle: 1.0,
        steal: 0.0,
        packets: 100,
        backlog_dropped: 7,
    };
    let interface = |rx_fifo, rx_errors| Interface {
        name: "eth0".to_owned(),
        rx_packets: 100,
        rx_bytes: 1000,
        rx_errors,
        rx_dropped: 20,
        rx_fifo,
        tx_packets: 0,
        tx_dropped: 0,
        queues: [].into(),
        offloads: Vec::new(),
    };
    for (cores, fifo, errors, words) in [
        (
            vec![core.clone()],
            5,
            0,
            "7 packets dropped at the full queue of a core",
        ),
        (
            vec![core],
            8,
            0,
            "8 packets dropped at the interface's full ring",
        ),
        (vec![], 0, 1, "1 packet received damaged"),
    ] {
        let sample = Sample {
            cores,
            interfaces: vec![interface(fifo, errors)],
            ..Sample::default()
        };
        let reason = drops_reason(&sample).unwrap();
        assert!(reason.contains(words), "{words}: {reason}");
    }
    // Dropped somewhere that nobody counts apart.
    let sample = Sample {
        interfaces: vec![interface(0, 0)],
        ..Sample::default()
    };
    assert_eq!(drops_reason(&sample), None);
}

#[test]
fn commands_name_what_was_observed() {
    let sample = Sample {
        pid: Some(42),
        ports: vec![1214],
        ..Sample::default()
    };
    let filled = fill_in("perf top -p PID  # :PORT /proc/PID/x PEER", &sample);
    assert_eq!(filled, "perf top -p 42  # :1214 /proc/42/x PEER");
}
