//! The JSON of a diagnosis, byte for byte.
//!
//! `UPDATE_GOLDEN=1 cargo test -p penstock-diagnose golden` writes it anew.

use std::path::Path;
use std::{env, fs};

use crate::broker_stats::{Broker, Topic, Worker, Xdp};
use crate::cpu::{Core, Process, Thread};
use crate::interfaces::Interface;
use crate::other_processes::{Other, Others};
use crate::sample::{Connection, End, Listener, Sample, Unavailable};
use crate::settings::{Pressure, Settings};
use crate::syscalls::Syscall;
use crate::verdict::Diagnosis;

fn end(pid: u32) -> End {
    End {
        pid: Some(pid),
        process: Some("python3".to_owned()),
        recv_q: 111.5,
        receive_buffer: 131_072,
        receive_buffer_set: Some(true),
        rwnd_limited: 0.44,
        busy: 0.99,
        rtt_us: 30_552.0,
        congestion_control: Some("cubic".to_owned()),
        bytes_received: 5_000_000,
        ..End::default()
    }
}

fn broker() -> Broker {
    let xdp = Xdp {
        packets: 9,
        dropped: [("fill ring empty", 2)].into(),
        ..Xdp::default()
    };
    let worker = Worker {
        thread: "worker-0".to_owned(),
        batches_per_second: 1.0,
        bytes_per_second: 61_440.0,
        stages: [("Commit".to_owned(), 0.25)].into(),
        xdp: Some(xdp),
    };
    let topic = Topic {
        topic: "trades".to_owned(),
        ring_bytes: 1 << 28,
        readers: 1,
        unread: 0.5,
        bytes_per_second: 61_440.0,
    };
    Broker {
        blocked: 0.04,
        workers: vec![worker],
        topics: vec![topic],
        counters: [("accepted".to_owned(), 1)].into(),
    }
}

fn process() -> Process {
    let thread = Thread {
        tid: 8,
        name: "worker-0".to_owned(),
        run: 0.5,
        wait: 0.125,
        system: 0.75,
        voluntary_switches: 10.0,
        involuntary_switches: 1.0,
    };
    Process {
        pid: 7,
        name: "penstock-broker".to_owned(),
        threads: vec![thread],
        run: 0.5,
        wait: 0.125,
        throttled: Some(0.0),
        stopped: false,
    }
}

fn sample() -> Sample {
    let connection = Connection {
        local: "10.0.0.2:1214".parse().unwrap(),
        remote: "10.0.0.1:33330".parse().unwrap(),
        receives: true,
        end: end(7),
        peer: Some(end(9)),
    };
    let listener = Listener {
        local: "0.0.0.0:1214".parse().unwrap(),
        waiting: 0.0,
        backlog: 4096,
        full: 0.0,
        window_clamp: None,
    };
    let call = Syscall {
        tid: 8,
        thread: "worker-0".to_owned(),
        name: "recvmsg".to_owned(),
        per_second: 1000.0,
        mean_us: 2.5,
        time: 0.0025,
        failed_per_second: 0.0,
        bytes_per_call: Some(4096.0),
    };
    let other = Other {
        pid: 11,
        name: "cc1plus".to_owned(),
        processes: 2,
        cores: 0.75,
    };
    Sample {
        seconds: 5.0,
        looks: 26,
        pid: Some(7),
        name: "penstock-broker".to_owned(),
        ports: vec![1214],
        connections: vec![connection],
        processes: vec![process()],
        cores: vec![Core::default()],
        others: Others {
            cores: 0.75,
            busiest: vec![other],
        },
        listeners: vec![listener],
        syscalls: Some(vec![call]),
        traced_pid: Some(7),
        interfaces: vec![Interface::default()],
        tcp_events: [("ListenOverflows".to_owned(), 0)].into(),
        settings: Settings::default(),
        pressure: Some(Pressure::default()),
        broker: Some(broker()),
        broker_silent: false,
    }
}

#[test]
fn a_golden_diagnosis_is_written_byte_for_byte() {
    let missing = Unavailable {
        what: "pressure stall information (PSI)".to_owned(),
        why: "this kernel does not keep it".to_owned(),
        how: "boot with psi=1".to_owned(),
    };
    let mut diagnosis = Diagnosis::of(sample(), vec![missing]);
    // The texts of verdicts may be reworded; their keys may not.
    diagnosis.verdicts.truncate(1);
    for verdict in &mut diagnosis.verdicts {
        verdict.evidence_for = vec!["evidence".to_owned()];
        verdict.evidence_against = vec!["evidence".to_owned()];
        (verdict.title, verdict.confidence) = ("title", 0.5);
        verdict.next_command = "command".to_owned();
        verdict.reason = Some("reason".to_owned());
    }
    let now = serde_json::to_string_pretty(&diagnosis).unwrap() + "\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/diagnosis.json");
    if env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, &now).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap();
    assert_eq!(now, golden, "{} has changed", path.display());
}
