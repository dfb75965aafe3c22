//! A short soak: publishers and readers come, go and die over bad links; nothing is lost, nothing kept.

use std::path::PathBuf;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::assert_says;
use penstock_e2e::lab::{LabRun, buffers_of, count, left_by, namespaces_of, rows};
use penstock_e2e::{Case, cases};
use penstock_testbed::command::run;
use penstock_testbed::netns::file_names;
use serde_json::{Value, json};

/// Namespaces of a soak: the publishers', two brokers', and one that emulates the links.
const NAMESPACES: usize = 4;
/// Processes of a soak that is at work.
const PROCESSES: usize = 6;

pub fn cases() -> impl IntoIterator<Item = Case> {
    let runs = cases![
        half_a_minute_of_everything,
        an_interrupt_takes_down_a_soak,
        a_sigterm_takes_down_a_soak,
    ];
    let usage = cases![wrong_usage_of_soak_is_refused];
    let runs = runs.map(Case::long).map(Case::alone);
    runs.into_iter().chain(usage)
}

fn half_a_minute_of_everything(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = LabRun::of(bed, &mut bed.lab(&[
        "soak", "--minutes", "0.4", "--seed", "5", "--format", "json"]))?;
    let report = &lab.report;
    assert_eq!(report["problems"], json!([]));
    let brokers = rows(report, "/brokers");
    assert_eq!(brokers.len(), 2);
    for broker in brokers {
        assert!(count(broker, "/messages_in_log") > 10_000, "{broker}");
    }
    let paths = report["streams"].as_object().expect("streams");
    assert!(paths.keys().eq(["tcp", "xdp"]), "{paths:?}");
    for event in [
        "/publishers_killed",
        "/publishers_stopped",
        "/readers_killed",
        "/messages_read",
        "/faults/lost",
    ] {
        assert!(count(report, event) > 0, "there was nothing of {event}");
    }
    let shown = bed.lab_report(&lab.folder.join("report.json"), &[])?;
    assert_says(&shown, "(?m)^- broker 1: ");
    assert_says(&lab.text("report.md")?, "(?m)^- broker 1: ");
    Ok(())
}

/// Logs of the brokers of a lab.
fn logs_of(lab: u32) -> impl Iterator<Item = PathBuf> {
    let buffers = buffers_of(lab).into_iter();
    let files = |dir: &PathBuf| {
        let names = file_names(dir).unwrap_or_default().into_iter();
        let paths: Vec<_> = names.map(|name| dir.join(name)).collect();
        paths
    };
    let files =
        buffers.flat_map(move |dir| files(&dir).into_iter().flat_map(move |dir| files(&dir)));
    files.filter(|path| path.extension().is_some_and(|kind| kind == "log"))
}

/// Whether a log has messages.
fn has_messages(bed: &Bed, log: PathBuf) -> bool {
    let mut command = bed.subscriber(&["--from", "end", "--stat", "--format", "json"]);
    let output = command.arg("--path").arg(log).output();
    let report: Option<Value> = output
        .ok()
        .and_then(|output| serde_json::from_slice(&output.stdout).ok());
    report.is_some_and(|report| report["log"]["messages"].as_u64() > Some(0))
}

fn an_interrupt_takes_down_a_soak(bed: &Bed) -> Result<()> {
    taken_down_by(bed, libc::SIGINT)
}

fn a_sigterm_takes_down_a_soak(bed: &Bed) -> Result<()> {
    taken_down_by(bed, libc::SIGTERM)
}

/// Everything, also processes that are stopped.
fn taken_down_by(bed: &Bed, signal: i32) -> Result<()> {
    let mut lab = bed.start_lab(&["soak", "--minutes", "5", "--seed", "1"])?;
    lab.until("processes", |lab| {
        let children = run(&["pgrep", "-P", &lab.pid().to_string()]).unwrap_or_default();
        children.lines().count() >= PROCESSES
    });
    let pid = lab.pid();
    assert_eq!(namespaces_of(pid).len(), NAMESPACES);
    lab.until("messages", |lab| {
        logs_of(lab.pid()).any(|log| has_messages(bed, log))
    });
    let ended = lab.end(signal)?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    assert_says(&ended.said(), "interrupted");
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}

fn wrong_usage_of_soak_is_refused(bed: &Bed) -> Result<()> {
    let soak = |arguments: &[&str]| {
        let mut command = bed.lab(&["soak"]);
        command.args(arguments);
        command
    };
    bed.refuses("the nearest is 6s", &mut soak(&["--minutes", "0"]));
    bed.refuses("invalid digit", &mut soak(&["--seed", "x"]));
    Ok(())
}
