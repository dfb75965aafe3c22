//! What the cases share: loads, links with delay, and what the diagnosis named.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use penstock_e2e::bed::{BROKER, BROKER_ADDRESS, Bed};
use penstock_e2e::commands::{Background, text};
use penstock_e2e::loads::{Load, Send, Serve};
use penstock_e2e::{cleanup, eventually, say, skip};
use serde_json::Value;

/// Where the servers of the cases listen.
pub const PORT: u16 = 5300;

/// Truth, what was named first, and the first verdicts with their confidences, by case.
static MATRIX: Mutex<BTreeMap<String, Vec<Named>>> = Mutex::new(BTreeMap::new());

#[derive(Debug, Clone)]
struct Named {
    truth: String,
    first: String,
    verdicts: String,
}

/// The namespaces of a link.
#[derive(Debug, Clone)]
pub struct Ends {
    pub publisher: String,
    pub broker: String,
}

impl Ends {
    /// Those of the test's bed.
    pub fn of(bed: &Bed) -> Self {
        Self {
            publisher: bed.publisher_ns().to_owned(),
            broker: bed.broker_ns().to_owned(),
        }
    }

    /// Starts a server and waits until it listens.
    pub fn serve(&self, bed: &Bed, serve: Serve) -> Result<Background> {
        let serve = Serve {
            port: PORT,
            ..serve
        };
        let mut command = Load::Serve(serve).command(&self.broker, BROKER_ADDRESS)?;
        let server = bed.background("server", &mut command)?;
        self.until_listening(bed);
        Ok(server)
    }

    /// Starts a client of that server.
    pub fn send(&self, bed: &Bed, send: Send) -> Result<Background> {
        let send = Send { port: PORT, ..send };
        let mut command = Load::Send(send).command(&self.publisher, BROKER_ADDRESS)?;
        bed.background("client", &mut command)
    }

    pub fn until_listening(&self, bed: &Bed) {
        let filter = format!("sport = :{PORT}");
        eventually("the server listens", || {
            !ss(bed, &["-Hltn", "-N", &self.broker, &filter]).is_empty()
        });
    }

    /// Waits until a port of the broker's end has at least this number of connections, accepted or not.
    pub fn until_connected(&self, bed: &Bed, port: u16, count: usize) {
        let filter = format!("sport = :{port}");
        let words = ["-Htn", "-N", &self.broker, "state", "established", &filter];
        eventually("connections", || ss(bed, &words).lines().count() >= count);
    }

    /// Whether the receiver's window already holds up a sender (TCP_INFO).
    pub fn is_window_limited(&self, bed: &Bed) -> bool {
        let filter = format!("dport = :{PORT}");
        ss(bed, &["-Htin", "-N", &self.publisher, &filter]).contains("rwnd_limited")
    }
}

/// ss(8); fails softly, because it is called again and again.
pub fn ss(_: &Bed, arguments: &[&str]) -> String {
    let words = [&["ss"], arguments].concat();
    penstock_testbed::command::run(&words).unwrap_or_default()
}

/// A publisher that does not end before the test does.
pub fn publish(bed: &Bed, arguments: &[&str]) -> Result<Background> {
    let mut command = bed.publisher(&["--brokers", BROKER, "--total-size", "1TB"]);
    bed.background("publisher", command.args(arguments))
}

/// Lets what was started come to its steady state; nothing that is asserted depends on how long.
pub fn settle() {
    thread::sleep(Duration::from_secs(1));
}

/// A lab with one broker and a publisher that does not end, over a link of its own; removed when dropped.
#[derive(Debug)]
pub struct LabLink {
    lab: Background,
    pub ends: Ends,
}

impl LabLink {
    pub fn start(bed: &Bed, arguments: &[&str]) -> Result<Self> {
        let mut command = bed.lab(&["throughput", "--brokers", "1", "--total-size", "1TB"]);
        command.arg("--results").arg(bed.file("results"));
        let lab = bed.background("lab", command.args(arguments))?;
        let name = format!("penstock-{}", lab.pid());
        cleanup::note_lab(lab.pid());
        let link = Self {
            lab,
            ends: Ends {
                publisher: format!("{name}-pub"),
                broker: format!("{name}-b0"),
            },
        };
        let to_broker = format!("dst {BROKER_ADDRESS}");
        let words = [
            "-Htn",
            "-N",
            &link.ends.publisher,
            "state",
            "established",
            &to_broker,
        ];
        eventually("the lab's publisher", || !ss(bed, &words).is_empty());
        Ok(link)
    }

    /// A link whose round trip takes so long; the lab's own publisher hardly sends there.
    pub fn with_delay(bed: &Bed, delay: &str) -> Result<Self> {
        let rate = "--publisher-option=--rate=100KB";
        Self::start(bed, &["--profile", "offload", "--delay", delay, rate])
    }

    /// The broker's process.
    pub fn broker(&self) -> Result<String> {
        let pids = penstock_testbed::command::run(&["ip", "netns", "pids", &self.ends.broker])?;
        let first = pids.lines().next().unwrap_or_default();
        Ok(first.trim().to_owned())
    }
}

impl Drop for LabLink {
    fn drop(&mut self) {
        // It removes its namespaces.
        self.lab.signal(libc::SIGINT);
        for _ in 0..1000 {
            if !self.lab.is_running() {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
        cleanup::forget_lab(self.lab.pid());
    }
}

/// A control group that gives a process a part of a core; the process leaves it when this is dropped.
#[derive(Debug)]
pub struct Quota {
    group: PathBuf,
    pid: u32,
}

impl Quota {
    /// Limits the process to this percentage of a core.
    pub fn set(bed: &Bed, percent: u32, pid: u32) -> Result<Self> {
        let (v1, v2) = ("/sys/fs/cgroup/cpu", "/sys/fs/cgroup");
        let controllers = text(format!("{v2}/cgroup.subtree_control").as_ref());
        let is_v1 = fs::exists(format!("{v1}/cgroup.procs")).unwrap_or(false);
        let has_cpu = controllers.split_whitespace().any(|name| name == "cpu");
        if !is_v1 && !has_cpu {
            return Err(skip("no control group for CPU can be made here"));
        }
        let parent = if is_v1 { v1 } else { v2 };
        let group = PathBuf::from(format!("{parent}/{}", bed.name()));
        fs::create_dir(&group)?;
        let quota = Self { group, pid };
        let share = percent * 1000;
        if is_v1 {
            fs::write(quota.group.join("cpu.cfs_quota_us"), share.to_string())?;
        } else {
            fs::write(quota.group.join("cpu.max"), format!("{share} 100000"))?;
        }
        fs::write(quota.group.join("cgroup.procs"), pid.to_string())?;
        Ok(quota)
    }
}

impl Drop for Quota {
    fn drop(&mut self) {
        // It may have ended.
        let parent = self.group.parent().expect("the root of all groups");
        let _ = fs::write(parent.join("cgroup.procs"), self.pid.to_string());
        if let Err(error) = fs::remove_dir(&self.group) {
            say(&format!("cannot remove {}: {error}", self.group.display()));
        }
    }
}

/// SIGSTOP for any process of the test.
pub fn stop(process: &Background) -> Result<()> {
    Ok(kill(
        Pid::from_raw(process.pid().cast_signed()),
        Signal::SIGSTOP,
    )?)
}

/// Runs the diagnosis with these options.
pub fn diagnose(bed: &Bed, seconds: &str, arguments: &[&str]) -> Result<Value> {
    let mut command = bed.lab(&["diagnose", "--format", "json", "--duration", seconds]);
    let ended = bed.run("diagnose", command.args(arguments))?;
    ended.success()?.json()
}

/// As [`diagnose`], as text.
pub fn diagnose_as_text(bed: &Bed, arguments: &[&str]) -> Result<String> {
    let mut command = bed.lab(&["diagnose", "--duration", "1"]);
    let ended = bed.run("diagnose", command.args(arguments))?;
    Ok(ended.success()?.stdout)
}

/// Diagnoses, notes what was named, and demands that this cause is first. Returns the diagnosis.
#[track_caller]
pub fn names(bed: &Bed, truth: &str, arguments: &[&str]) -> Value {
    let seconds = std::env::var("PENSTOCK_DIAGNOSE_SECONDS").unwrap_or_else(|_| "2".to_owned());
    let diagnosis = diagnose(bed, &seconds, arguments).expect("a diagnosis");
    let verdicts = diagnosis["verdicts"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let cause = |verdict: &Value| verdict["cause"].as_str().unwrap_or("none").to_owned();
    let first = verdicts.first().map_or_else(|| "none".to_owned(), cause);
    let named = Named {
        truth: truth.to_owned(),
        first: first.clone(),
        verdicts: verdicts
            .iter()
            .take(3)
            .map(|verdict| format!("{} {}", cause(verdict), verdict["confidence"]))
            .collect::<Vec<_>>()
            .join(", "),
    };
    let mut matrix = MATRIX
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    matrix.entry(bed.test().to_owned()).or_default().push(named);
    drop(matrix);
    let sample = &diagnosis["sample"];
    assert!(
        first == truth,
        "named {first}, the truth is {truth}: {:?} {} {} {}",
        verdicts.iter().take(2).collect::<Vec<_>>(),
        sample["connections"][0],
        sample["processes"],
        sample["broker"]
    );
    diagnosis
}

/// The reason of the first verdict contains these words.
#[track_caller]
pub fn because(diagnosis: &Value, words: &str) {
    let verdict = &diagnosis["verdicts"][0];
    let reason = verdict["reason"].as_str().unwrap_or_default();
    let connection = &diagnosis["sample"]["connections"][0];
    assert!(
        reason.contains(words),
        "the reason says nothing of '{words}': {verdict} {connection}"
    );
}

/// How often each cause was named first, by truth, and how often each case was right.
pub fn print_matrix() {
    let matrix = MATRIX
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if matrix.is_empty() {
        return;
    }
    let mut by_truth: BTreeMap<&str, BTreeMap<&str, usize>> = BTreeMap::new();
    for named in matrix.values().flatten() {
        *by_truth
            .entry(&named.truth)
            .or_default()
            .entry(&named.first)
            .or_default() += 1;
    }
    say("confusion matrix: truth, then what was named first");
    for (truth, firsts) in by_truth {
        let firsts: Vec<_> = firsts
            .iter()
            .map(|(first, count)| format!("{first} {count}"))
            .collect();
        say(&format!("{truth}: {}", firsts.join(" ")));
    }
    say("case: right of all, the last with confidences");
    for (case, all) in matrix.iter() {
        let right = all
            .iter()
            .filter(|named| named.truth == named.first)
            .count();
        let last = &all[all.len() - 1].verdicts;
        say(&format!("  {case}: {right} of {}, {last}", all.len()));
    }
}
