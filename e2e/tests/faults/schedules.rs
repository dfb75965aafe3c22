//! Fault runs of the lab over every path: nothing that was acknowledged is lost, doubled, torn or out of
//! order, and nothing of the lab stays.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::assert_says;
use penstock_e2e::lab::{LabRun, RunningLab, buffers_of, count, left_by, rows, total};
use penstock_e2e::{Case, cases};
use serde_json::Value;

use crate::seed;

/// Runs with faults of each time's own.
const RUNS: usize = 4;
/// Kinds of faults.
const KINDS: usize = 18;

pub fn cases() -> impl IntoIterator<Item = Case> {
    // A path that gets no CPU time falls back to tcp, and a lab removes what killed ones left.
    let runs = cases![
        nothing_acked_is_lost_whatever_the_fault,
        what_a_run_is_about_happens,
        an_interrupt_takes_down_a_full_directory,
        a_sigterm_takes_down_a_full_directory,
        the_next_lab_takes_down_what_a_killed_one_left,
        a_fault_as_json,
    ];
    let usage = cases![wrong_usage_is_refused, kinds_are_listed];
    let runs = runs.map(Case::long).map(Case::alone);
    runs.into_iter().chain(usage)
}

/// A failure names the command that repeats it.
fn faults(bed: &Bed, arguments: &[&str]) -> Result<LabRun> {
    LabRun::of(bed, bed.lab(&["faults"]).args(arguments))
}

fn nothing_acked_is_lost_whatever_the_fault(bed: &Bed) -> Result<()> {
    let (runs, seed) = (RUNS.to_string(), seed(bed)?.to_string());
    let lab = faults(bed, &["--schedules", &runs, "--seed", &seed])?;
    assert_eq!(lab.report["problems"], 0);
    let runs = rows(&lab.report, "/runs");
    assert_eq!(runs.len(), RUNS);
    for run in runs {
        let wrong = run["wrong"].as_object().context("wrong lines")?;
        assert!(
            !wrong.is_empty() && wrong.values().all(|count| count == 0),
            "{run}"
        );
        let acked = count(run, "/lines_acked");
        assert!(acked >= 1000, "only {acked} lines were published: {run}");
        let accounted_for = acked + count(run, "/lines_of_killed");
        assert_eq!(count(run, "/lines_in_log"), accounted_for, "{run}");
    }
    Ok(())
}

/// What makes a run about a fault, and over a path.
fn what_a_run_is_about_happens(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = faults(bed, &[
        "--schedules", "4", "--faults", "broker-killed,loss", "--paths", "xdp,fallback", "--seed", "3"])?;
    let cells = rows(&lab.report, "/cells").iter();
    assert_eq!(cells.filter(|cell| count(cell, "/happened") > 0).count(), 4);
    let runs = rows(&lab.report, "/runs");
    assert!(
        total(runs, "/moves") > 0,
        "no stream moved to another connection"
    );
    let fell_back = runs
        .iter()
        .filter_map(|run| run["counts"]["fell_back"].as_u64());
    assert!(fell_back.sum::<u64>() > 0, "no stream fell back to tcp");
    let over_xdp: Vec<_> = runs.iter().filter(|run| run["path"] == "xdp").collect();
    assert!(!over_xdp.is_empty());
    for run in over_xdp {
        let paths = run["streams"].as_object().context("streams")?;
        assert!(paths.keys().eq(["xdp"]), "{run}");
    }
    let shown = bed.lab_report(&lab.folder.join("report.json"), &[])?;
    assert_says(&shown, "(?m)^ *broker-killed ");
    assert_says(&lab.text("report.md")?, r"(?m)^\| broker-killed ");
    Ok(())
}

fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    targets.any(|target| Path::new(target) == path)
}

/// The directory of its broker's logs, which it fills up.
fn directory_of(lab: u32) -> Option<PathBuf> {
    Some(buffers_of(lab).first()?.join("b0"))
}

/// A lab that has a file system of its own mounted, with this file in it.
fn with_a_mount(bed: &Bed, file: &str) -> Result<RunningLab> {
    let mut lab = bed.start_lab(&["faults", "--faults", "directory-full", "--seed", "1"])?;
    lab.until("a file system of its own", |lab| {
        directory_of(lab.pid()).is_some_and(|dir| is_mounted(&dir) && dir.join(file).exists())
    });
    Ok(lab)
}

fn an_interrupt_takes_down_a_full_directory(bed: &Bed) -> Result<()> {
    taken_down_by(bed, libc::SIGINT)
}

fn a_sigterm_takes_down_a_full_directory(bed: &Bed) -> Result<()> {
    taken_down_by(bed, libc::SIGTERM)
}

fn taken_down_by(bed: &Bed, signal: i32) -> Result<()> {
    let lab = with_a_mount(bed, "filler")?;
    let pid = lab.pid();
    let ended = lab.end(signal)?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    assert_says(&ended.said(), "interrupted");
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}

fn the_next_lab_takes_down_what_a_killed_one_left(bed: &Bed) -> Result<()> {
    let lab = with_a_mount(bed, "")?;
    let pid = lab.pid();
    lab.end(libc::SIGKILL)?;
    assert!(left_by(pid).len() >= 3, "{:?}", left_by(pid));
    faults(
        bed,
        &[
            "--schedules",
            "1",
            "--faults",
            "directory-full",
            "--paths",
            "tcp",
        ],
    )?;
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}

fn a_fault_as_json(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = faults(bed, &[
        "--schedules", "1", "--faults", "mtu", "--paths", "tcp", "--format", "json"])?;
    let printed: Value = serde_json::from_str(lab.printed())?;
    assert_eq!(printed["runs"][0]["fault"], "mtu");
    Ok(())
}

fn wrong_usage_is_refused(bed: &Bed) -> Result<()> {
    let wrong: [(&str, &[&str]); 4] = [
        ("possible values: loss, reorder", &["--faults", "noise"]),
        ("tcp, xdp, fallback", &["--paths", "udp"]),
        ("1..=100000", &["--schedules", "0"]),
        ("--seed", &["--only", "3"]),
    ];
    for (message, arguments) in wrong {
        bed.refuses(message, bed.lab(&["faults"]).args(arguments));
    }
    Ok(())
}

fn kinds_are_listed(bed: &Bed) -> Result<()> {
    let listed = bed.run("list", &mut bed.lab(&["faults", "--list"]))?;
    assert_eq!(listed.success()?.stdout.lines().count(), KINDS);
    Ok(())
}
