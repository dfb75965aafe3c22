//! Experiments: what Linux does with `SO_RCVBUF`, and what being diagnosed costs.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use penstock_e2e::bed::Bed;
use penstock_e2e::cleanup::ChangedSetting;
use penstock_e2e::commands::{assert_says, read_json, text};
use penstock_e2e::lab::{LabRun, count, figure, rows};
use penstock_e2e::wait::becomes;
use penstock_e2e::{Case, cases, skip};
use serde_json::Value;

const RMEM_MAX: &str = "/proc/sys/net/core/rmem_max";
/// Values that the experiment gives it.
const LIMITS: [u64; 2] = [212_992, 33_554_432];
/// Where a buffer is set.
const CASES: [&str; 5] = ["none", "accepted", "listener", "both", "force"];
/// What a socket gets whose buffer nobody sets (tcp_rmem).
const DEFAULT: u64 = 131_072;
const PAIRS: usize = 6;

pub fn cases() -> impl IntoIterator<Item = Case> {
    // They change a limit of the machine.
    let runs = cases![
        inheritance_caps_window_scales_and_first_windows_are_as_linux_has_them,
        pairs_of_intervals_tell_what_a_diagnosis_costs,
        an_interrupt_puts_rmem_max_back,
        a_sigterm_puts_rmem_max_back,
        kill_9_puts_rmem_max_back,
        experiments_that_cannot_be_are_refused,
    ];
    runs.map(Case::long).map(Case::alone)
}

fn rmem_max() -> String {
    text(RMEM_MAX.as_ref()).trim().to_owned()
}

/// The limit as it is, which comes back however the test ends.
fn keep_rmem_max() -> Result<(ChangedSetting, String)> {
    let before = rmem_max();
    let kept = ChangedSetting::write(RMEM_MAX.as_ref(), &before);
    let kept = kept.map_err(|_| skip(&format!("{RMEM_MAX} cannot be set here")))?;
    Ok((kept, before))
}

fn rcvbuf(bed: &Bed, arguments: &[&str]) -> std::process::Command {
    bed.lab(&[&["experiment", "rcvbuf"], arguments].concat())
}

/// A table of cases and limits.
struct Table<'a>(&'a [Value]);

impl Table<'_> {
    #[track_caller]
    fn get(&self, case: &str, limit: u64, field: &str) -> u64 {
        let mut rows = self.0.iter();
        let row = rows.find(|row| row["case"] == case && row["rmem_max"] == limit);
        count(row.expect("the row"), field)
    }
}

/// An experiment prints its report, with the folder's name in it.
fn report_of(bed: &Bed, command: &mut std::process::Command) -> Result<(Value, PathBuf)> {
    let command = command
        .args(["--format", "json", "--results"])
        .arg(bed.file("results"));
    let report = bed.run("lab", command)?.success()?.json()?;
    let folder = report["folder"].as_str().context("no folder")?.into();
    Ok((report, folder))
}

fn inheritance_caps_window_scales_and_first_windows_are_as_linux_has_them(bed: &Bed) -> Result<()> {
    let (_kept, before) = keep_rmem_max()?;
    let mut command = rcvbuf(bed, &["--quick", "--seconds", "0.5"]);
    let (report, folder) = report_of(bed, &mut command)?;
    assert_eq!(rmem_max(), before, "afterwards");
    let all = rows(&report, "/rows");
    let found = all
        .iter()
        .map(|row| (row["case"].as_str(), row["rmem_max"].as_u64()));
    let wanted = LIMITS
        .iter()
        .flat_map(|limit| CASES.map(|case| (Some(case), Some(*limit))));
    assert!(found.eq(wanted), "{all:?}");
    for limit in LIMITS {
        assert_buffers(&Table(all), limit);
    }
    let scale = |case| Table(all).get(case, LIMITS[0], "/window_scale");
    // A small buffer on the listener lowers it.
    assert!(scale("listener") < scale("accepted"));
    for row in all {
        assert_whole(row);
    }
    let claims = rows(&report, "/claims").iter();
    let is_told = |value: &Value| value.as_str().is_some_and(|text| !text.is_empty());
    let told = claims.filter(|claim| is_told(&claim["claim"]) && is_told(&claim["evidence"]));
    assert_eq!(told.count(), 8);
    let markdown = fs::read_to_string(folder.join("report.md"))?;
    assert_says(&markdown, "does not hold");
    assert_eq!(
        read_json(&folder.join("report.json"))?["rows"],
        report["rows"]
    );
    Ok(())
}

/// Buffers, window scales and first windows with one limit.
#[track_caller]
fn assert_buffers(table: &Table, limit: u64) {
    let buffer = |case| table.get(case, limit, "/rcvbuf_effective");
    assert_eq!(
        buffer("listener"),
        2 * limit,
        "accepted inherits its listener's"
    );
    assert_eq!(buffer("accepted"), 2 * limit, "set after accept");
    assert_eq!(buffer("force"), 2 * LIMITS[1], "past rmem_max");
    assert_eq!(buffer("none"), DEFAULT, "that nobody set");
    let scale = |case| table.get(case, limit, "/window_scale");
    assert_eq!(
        scale("accepted"),
        scale("none"),
        "window scale, set after accept"
    );
    let first = |case| table.get(case, limit, "/rcv_ssthresh_first");
    assert!(
        first("listener") > first("accepted"),
        "first window of a listener's buffer"
    );
    assert_eq!(
        first("accepted"),
        first("none"),
        "first window, set after accept"
    );
}

/// A buffer that was set stays; it is capped where less was given; figures are whole.
#[track_caller]
fn assert_whole(row: &Value) {
    let case = row["case"].as_str().unwrap_or_default();
    assert!(
        case == "none" || row["rcvbuf_final"] == row["rcvbuf_effective"],
        "{row}"
    );
    let may_be_capped = ["accepted", "listener", "both"].contains(&case);
    let is_capped = may_be_capped && row["rmem_max"].as_u64() < row["rcvbuf_requested"].as_u64();
    assert_eq!(row["rcvbuf_capped"], is_capped, "{row}");
    assert!(figure(row, "/mb_per_s/median") > 0.0, "{row}");
    assert_eq!(rows(row, "/mb_per_s/runs").len(), 1, "{row}");
    assert!(figure(row, "/rwnd_limited_percent/median") >= 0.0, "{row}");
    assert!(count(row, "/rcv_ssthresh_final") > 0, "{row}");
    assert!(count(row, "/rcv_space_final") > 0, "{row}");
}

fn an_interrupt_puts_rmem_max_back(bed: &Bed) -> Result<()> {
    assert_eq!(put_back_after(bed, libc::SIGINT)?.code(), Some(130));
    Ok(())
}

fn a_sigterm_puts_rmem_max_back(bed: &Bed) -> Result<()> {
    assert_eq!(put_back_after(bed, libc::SIGTERM)?.code(), Some(130));
    Ok(())
}

fn kill_9_puts_rmem_max_back(bed: &Bed) -> Result<()> {
    assert_eq!(
        put_back_after(bed, libc::SIGKILL)?.signal(),
        Some(libc::SIGKILL)
    );
    // The next lab takes away what a killed one left.
    let mut next = bed.lab(&["throughput", "--brokers", "1", "--total-size", "1MiB"]);
    LabRun::of(bed, &mut next)?;
    Ok(())
}

/// The lab gets the signal while the limit is not what it was; returns how it ended.
fn put_back_after(bed: &Bed, signal: i32) -> Result<std::process::ExitStatus> {
    let (_kept, before) = keep_rmem_max()?;
    let mut lab = bed.start_lab(&["experiment", "rcvbuf", "--rmem-max", "208KiB"])?;
    lab.until("another limit", |_| rmem_max() != before);
    let ended = lab.end(signal)?;
    // What puts it back outlives the lab.
    becomes("rmem_max", before, rmem_max);
    Ok(ended.status)
}

/// Figures are whole and add up.
fn pairs_of_intervals_tell_what_a_diagnosis_costs(bed: &Bed) -> Result<()> {
    let pairs = PAIRS.to_string();
    let mut command = bed.lab(&[
        "experiment",
        "diagnose",
        "--seconds",
        "0.5",
        "--pairs",
        &pairs,
    ]);
    let (report, folder) = report_of(bed, &mut command)?;
    let pairs = rows(&report, "/pairs");
    assert_eq!(pairs.len(), PAIRS);
    let ratios = rows(&report, "/ratio/runs");
    assert_eq!(ratios.len(), PAIRS);
    for (pair, ratio) in pairs.iter().zip(ratios) {
        let (alone, observed) = (
            figure(pair, "/alone_mb_per_s"),
            figure(pair, "/observed_mb_per_s"),
        );
        assert!(alone > 0.0 && observed > 0.0, "{pair}");
        assert!(figure(pair, "/observer_cores") > 0.0, "{pair}");
        let ratio = figure(ratio, "");
        assert!((ratio - observed / alone).abs() < 1e-9, "{pair}: {ratio}");
    }
    let median = figure(&report, "/ratio/median");
    assert!(figure(&report, "/ratio_low") <= median);
    assert!(median <= figure(&report, "/ratio_high"));
    let diagnoses = fs::read_dir(&folder)?.flatten().map(|entry| entry.path());
    let is_diagnosis = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("diagnosis-") && name.ends_with(".json")
    };
    let mut saw_the_broker = 0;
    for path in diagnoses.filter(is_diagnosis) {
        let workers = read_json(&path)?["sample"]["broker"]["workers"].take();
        saw_the_broker += usize::from(
            workers
                .as_array()
                .is_some_and(|workers| !workers.is_empty()),
        );
    }
    assert_eq!(saw_the_broker, PAIRS);
    let shown = bed.lab_report(&folder, &[])?;
    assert_says(&shown, "Throughput observed / alone: median");
    Ok(())
}

fn experiments_that_cannot_be_are_refused(bed: &Bed) -> Result<()> {
    let results = bed.file("results").display().to_string();
    let refuses = |message: &str, arguments: &[&str]| {
        bed.refuses(message, bed.lab(&["experiment"]).args(arguments));
    };
    refuses(
        "not from 4KiB to",
        &["rcvbuf", "--rmem-max", "1KiB", "--results", &results],
    );
    refuses(
        "the nearest is 1073741823",
        &["rcvbuf", "--rcvbuf", "2GiB", "--results", &results],
    );
    refuses("such as 10ms", &["rcvbuf", "--delay", "10"]);
    refuses("rcvbuf", &[]);
    let file = File::open(Path::new(RMEM_MAX))?;
    let _held = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| error)
        .context("another experiment is running here")?;
    refuses(
        "another experiment",
        &["rcvbuf", "--quick", "--results", &results],
    );
    Ok(())
}
