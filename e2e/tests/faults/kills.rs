//! kill -9 of the broker at random moments, also of its start: it recovers, nothing that was acknowledged is
//! lost, and nothing of it stays but its log.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::{assert_no_crash, paths};
use penstock_e2e::lab::count;
use penstock_e2e::numbered::Numbered;
use penstock_e2e::{Broker, Case, cases, eventually, say};
use penstock_testbed::command::run;
use serde_json::Value;

use crate::{seed, setting};

/// Kills over each path; `PENSTOCK_KILLS` sets another number.
const KILLS: u64 = 100;
/// Milliseconds that a broker lives at most from when it is ready; one of three only so long from its start,
/// which meets starting and recovering.
const LIFE_MS: u64 = 300;
const START_MS: u64 = 60;
/// The log is read after every tenth kill, before a broker recovers it.
const LOOK_EVERY: u64 = 10;
/// A ring and an index that hold all of the longest run.
const LARGE: [&str; 6] = [
    "--topic",
    "penstock",
    "--ring-size",
    "128MiB",
    "--index-slots",
    "131072",
];
const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];
/// What a killed broker may leave among its logs.
const KEPT: [&str; 4] = [
    "penstock.log",
    "penstock.readers",
    "penstock.lock",
    "penstock.writer",
];

pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        nothing_acked_is_lost_by_kill_9_over_tcp,
        nothing_acked_is_lost_by_kill_9_over_xdp_and_tcp,
    ];
    all.map(Case::long).map(Case::alone)
}

fn nothing_acked_is_lost_by_kill_9_over_tcp(bed: &Bed) -> Result<()> {
    killed_often(bed, &["tcp"], &[])
}

fn nothing_acked_is_lost_by_kill_9_over_xdp_and_tcp(bed: &Bed) -> Result<()> {
    killed_often(bed, &["xdp", "tcp"], &XDP)
}

fn killed_often(bed: &Bed, modes: &[&str], options: &[&str]) -> Result<()> {
    let kills = setting("PENSTOCK_KILLS", KILLS)?;
    let mut rng = fastrand::Rng::with_seed(seed(bed)?);
    let setup = bed.broker(&[&LARGE, options].concat());
    let mut broker = setup.start()?;
    assert_something_is_seen(bed, &broker, !options.is_empty())?;
    let mut publishers = Vec::new();
    for mode in modes {
        #[rustfmt::skip]
        publishers.push(bed.start_numbered(&[
            "--brokers", BROKER, "--mode", mode, "--rate", "500kB", "--batch-size", "2KiB"])?);
    }
    eventually("a session of each publisher", || {
        sessions(bed).is_ok_and(|sessions| sessions.len() == modes.len())
    });
    let sessions = sessions(bed)?;
    let mut ready = 0;
    for kill in 1..=kills {
        let limit = if kill % 3 == 0 {
            START_MS
        } else {
            broker.wait_until_ready()?;
            LIFE_MS
        };
        // The moment is what the test is about.
        thread::sleep(Duration::from_millis(rng.u64(..limit)));
        ready += u64::from(broker.is_ready());
        kill_9(broker)?;
        assert_nothing_stays(bed)?;
        if kill % LOOK_EVERY == 0 {
            for session in &sessions {
                lines_in_order(bed, session)?;
            }
        }
        broker = setup.spawn()?;
    }
    kill_9(broker)?;
    let broker = setup.start()?;
    let lines = ended(bed, modes, publishers)?;
    broker.stop()?;
    say(&format!(
        "{}: {kills} kills, {ready} of them once the broker was ready; {lines} lines",
        bed.test()
    ));
    Ok(())
}

/// What [`assert_nothing_stays`] looks for is there while a broker runs.
fn assert_something_is_seen(bed: &Bed, broker: &Broker, is_xdp: bool) -> Result<()> {
    let seen = Seen::now(bed)?;
    assert_eq!(seen.programs, usize::from(is_xdp), "programs attached");
    assert_eq!(seen.sockets > 0, is_xdp, "AF_XDP sockets");
    assert_eq!(seen.processes, [broker.pid_text()]);
    assert!(seen.listeners > 0, "listeners");
    Ok(())
}

fn assert_nothing_stays(bed: &Bed) -> Result<()> {
    let seen = Seen::now(bed)?;
    assert_eq!(seen.programs, 0, "programs attached");
    assert_eq!(seen.sockets, 0, "AF_XDP sockets");
    assert_eq!(seen.processes, Vec::<String>::new());
    assert_eq!(seen.listeners, 0, "listeners");
    let mut files = Vec::new();
    list_files(&bed.buffer_dir(), &mut files)?;
    files.retain(|name| !KEPT.contains(&name.as_str()));
    assert_eq!(files, Vec::<String>::new(), "other files");
    Ok(())
}

/// What there is of a broker in its namespace.
struct Seen {
    programs: usize,
    sockets: usize,
    processes: Vec<String>,
    listeners: usize,
}

impl Seen {
    fn now(bed: &Bed) -> Result<Self> {
        let namespace = bed.broker_ns();
        let link = bed.broker_ip(&["-d", "link", "show", "eth0"])?;
        let processes = run(&["ip", "netns", "pids", namespace])?;
        let lines = |text: String| text.lines().count();
        Ok(Self {
            programs: link.matches("prog/xdp").count(),
            sockets: xdp_sockets(namespace)?,
            processes: processes.split_whitespace().map(str::to_owned).collect(),
            listeners: lines(run(&["ss", "-N", namespace, "-Hltn"])?),
        })
    }
}

/// AF_XDP sockets of a namespace; ss(8) sees none where the kernel is without XDP_SOCKETS_DIAG.
fn xdp_sockets(namespace: &str) -> Result<usize> {
    let protocols = run(&[
        "ip",
        "netns",
        "exec",
        namespace,
        "cat",
        "/proc/net/protocols",
    ])?;
    let mut rows = protocols.lines().map(|line| line.split_whitespace());
    let count = rows.find_map(|mut row| (row.next() == Some("XDP")).then(|| row.nth(1))?);
    let count = count.context("this kernel has no AF_XDP")?;
    Ok(count.parse()?)
}

/// Names of the regular files below a directory.
fn list_files(dir: &Path, names: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            list_files(&entry.path(), names)?;
        } else if kind.is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    Ok(())
}

/// It must have run until then, and not have crashed.
fn kill_9(mut broker: Broker) -> Result<()> {
    broker.signal(libc::SIGKILL);
    let status = broker.wait()?;
    let log = broker.log();
    assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}: {log}");
    assert_no_crash(&log);
    Ok(())
}

/// Sessions in the log.
fn sessions(bed: &Bed) -> Result<Vec<String>> {
    let mut command = bed.subscriber(&["--stat", "--format", "json", "--path"]);
    let output = command.arg(bed.log_of("penstock")).output()?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let streams = report["streams"].as_array().context("no streams")?;
    let sessions = streams
        .iter()
        .filter_map(|stream| stream["session"].as_str());
    Ok(sessions.map(str::to_owned).collect())
}

/// Checks that a reader gets a session's lines in order from the first one, verified, and none twice; returns their
/// number.
fn lines_in_order(bed: &Bed, session: &str) -> Result<u64> {
    let mut command = bed.subscriber(&["--verify", "--output", "lines", "--session", session]);
    let read = bed.run(
        "subscriber",
        command.arg("--path").arg(bed.log_of("penstock")),
    )?;
    let mut lines = 0;
    for line in read.success()?.stdout.lines() {
        lines += 1;
        assert!(
            line.parse() == Ok(lines),
            "session {session}: line {lines} is '{line}': lost, doubled or out of order"
        );
    }
    Ok(lines)
}

/// Interrupts the publishers: all that each sent is acknowledged and in the log. Returns the number of lines.
fn ended(bed: &Bed, modes: &[&str], publishers: Vec<Numbered>) -> Result<u64> {
    for publisher in &publishers {
        publisher.publisher().signal(libc::SIGTERM);
    }
    let mut total = 0;
    for (mode, publisher) in modes.iter().zip(publishers) {
        let ended = publisher.ends()?;
        assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
        let report = ended.json()?;
        assert_eq!(paths(&report), *mode);
        let acked = count(&report, "/messages_acked");
        assert_eq!(acked, count(&report, "/messages_sent"), "over {mode}");
        assert!(count(&report, "/brokers/0/streams/0/moves") > 0, "{report}");
        let session = report["brokers"][0]["session"].as_str();
        let lines = lines_in_order(bed, session.context("a session")?)?;
        assert_eq!(lines, acked, "lines in the log over {mode}");
        total += lines;
    }
    Ok(total)
}
