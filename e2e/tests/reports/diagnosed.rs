//! A run that is diagnosed, run again without its cause, and shown: as report, page, and in the terminal.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result};
use penstock_e2e::bed::{Bed, root};
use penstock_e2e::commands::{assert_says, command, read_json};
use penstock_e2e::lab::{LabRun, count, figure, rows};
use penstock_e2e::{Case, cases};
use regex::Regex;
use serde_json::{Value, json};

const CAUSE: &str = "receive-window-limited";
/// A receive buffer of the fix.
const FIXED: u64 = 64 << 20;

pub fn cases() -> impl IntoIterator<Item = Case> {
    let runs = cases![
        a_run_is_diagnosed_fixed_reported_and_shown,
        hostile_names_stay_text_on_the_page,
        what_cannot_be_fixed_is_told,
        what_is_too_short_to_diagnose_is_told,
        limits_are_shown,
    ];
    let usage = cases![
        what_is_no_report_is_refused,
        the_diagnosing_script_refuses_other_workloads,
    ];
    let runs = runs.map(Case::long).map(Case::alone);
    runs.into_iter().chain(usage)
}

fn throughput(bed: &Bed, arguments: &[&str]) -> Result<LabRun> {
    let first = ["throughput", "--brokers", "1"];
    LabRun::of(bed, &mut bed.lab(&[&first, arguments].concat()))
}

/// A window far too small for a line of 10 ms: about 5 MB/s, whatever else the host does.
fn a_run_is_diagnosed_fixed_reported_and_shown(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = throughput(bed, &[
        "--rcvbuf", "32KiB", "--rcvbuf-on", "both", "--delay", "10ms", "--total-size", "24MB",
        "--diagnose", "--diagnose-seconds", "1", "--fix"])?;
    let report = &lab.report;
    let verdict = &report["diagnosis"]["verdicts"][0];
    assert_eq!(verdict["cause"], CAUSE);
    assert!(!rows(verdict, "/evidence_for").is_empty());
    assert_eq!(report["rerun"]["cause"], CAUSE);
    let fix = "brokers with --rcvbuf 67108864 --rcvbuf-on both --rcvbuf-force";
    assert_eq!(report["rerun"]["fix"], fix);
    assert_eq!(report["problems"], json!([]));
    assert_eq!(report["rerun"]["problems"], json!([]));
    let second = read_json(&lab.folder.join("after-fix/report.json"))?;
    let buffer = count(&second, "/brokers/0/connections/0/rcvbuf_effective");
    assert_eq!(buffer, 2 * FIXED);
    let rate = &report["rerun"]["bandwidth_mb_per_s"];
    assert!(rate.is_f64());
    assert_eq!(second["bandwidth_mb_per_s"], *rate);
    assert_lines_in_order(
        &lab.text("report.md")?,
        &[
            "## Phase 1-2: what was measured",
            "## Phase 3: interpretation",
            "## Root cause",
            "## Re-run after the fix",
            "## Next steps",
            "# The run in full",
        ],
    );
    assert_says(&lab.text("diagnosis.txt")?, &format!("(?m)^1. {CAUSE}"));
    assert_timeline(report);
    assert_whole_page(&lab.text("report.html")?, 6);
    assert_whole_page(&lab.text("after-fix/report.html")?, 2);
    shown_again(bed, &lab)
}

/// These lines, one behind the other, and each once.
#[track_caller]
fn assert_lines_in_order(text: &str, wanted: &[&str]) {
    let found: Vec<_> = text.lines().filter(|line| wanted.contains(line)).collect();
    assert_eq!(found, wanted);
}

/// What the report tells over time adds up to what was published.
#[track_caller]
fn assert_timeline(report: &Value) {
    let points = rows(report, "/timeline/points");
    let (mut before, mut megabytes, mut windows) = (0.0, 0.0, 0);
    for (index, point) in points.iter().enumerate() {
        let rates = rows(point, "/mb_per_s");
        assert_eq!(rates.len(), 1, "{point}");
        assert!(figure(point, "/publisher_cores") >= 0.0, "{point}");
        assert!(figure(point, "/broker_cores") >= 0.0, "{point}");
        let host = point["host"].as_object().expect("shares of the host");
        let mut shares: Vec<_> = host.keys().map(String::as_str).collect();
        shares.sort_unstable();
        assert_eq!(shares, ["idle", "softirq", "steal", "system", "user"]);
        let seconds = figure(point, "/seconds");
        assert!(index == 0 || seconds > before, "time goes on: {point}");
        megabytes += (seconds - before) * figure(&rates[0], "");
        before = seconds;
        let offers = |connection: &&Value| {
            let window = count(connection, "/rcv_wnd");
            connection["broker"] == 0
                && (1..=65_536).contains(&window)
                && count(connection, "/cwnd_bytes") > 0
        };
        windows += rows(point, "/connections").iter().filter(offers).count();
    }
    let published = figure(report, "/payload_bytes") / 1e6;
    let is_all = megabytes > 0.5 * published && megabytes < 1.01 * published;
    assert!(is_all, "{megabytes} MB over time, {published} published");
    assert!(windows > 0, "no windows were offered");
}

/// Self-contained, its pictures drawn.
#[track_caller]
fn assert_whole_page(page: &str, pictures: usize) {
    assert!(page.contains("</html>"), "not a whole page");
    let loads = Regex::new(r#"(src|href)="[^"]*"|<script|@import|url\("#).expect("a regex");
    let loads: Vec<_> = loads.find_iter(page).map(|found| found.as_str()).collect();
    assert_eq!(loads, [r#"href="data:,""#], "what it would load");
    assert!(page.matches("<svg").count() >= pictures, "pictures");
}

/// The same again from the file, with nothing else at hand and nobody's rights.
fn shown_again(bed: &Bed, lab: &LabRun) -> Result<()> {
    bed.open_to_others()?;
    let copy = bed.file("copy.json");
    fs::copy(lab.folder.join("report.json"), &copy)?;
    fs::set_permissions(&copy, Permissions::from_mode(0o644))?;
    let as_nobody = |arguments: &[&str]| {
        let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups"];
        let mut command = command("setpriv", &user);
        command.arg(penstock_e2e::bed::program("lab")).arg("report");
        bed.run("report", command.arg(&copy).args(arguments))?
            .success()
    };
    let text = as_nobody(&[])?.stdout;
    assert_says(&text, CAUSE);
    assert!(
        text.contains(|c| "▁▂▃▄▅▆▇█".contains(c)),
        "no curve: {text}"
    );
    let page = as_nobody(&["--format", "html", "--output", "-"])?.stdout;
    let path = lab.folder.join("report.html");
    assert!(
        page == fs::read_to_string(&path)?,
        "the page is another one"
    );
    fs::remove_file(&path)?;
    let said = bed.lab_report(&lab.folder, &["--format", "html"])?;
    assert_eq!(said.trim_end(), path.to_str().context("a plain path")?);
    assert!(
        page == fs::read_to_string(&path)?,
        "the folder's is another one"
    );
    Ok(())
}

/// Names come from people: they must not become part of the page.
fn hostile_names_stay_text_on_the_page(bed: &Bed) -> Result<()> {
    let file = bed.file("<script>alert(1)<script>.txt");
    let lines: String = (1..=1000).map(|number| format!("{number}\n")).collect();
    fs::write(&file, lines)?;
    let lab = throughput(bed, &["--input", file.to_str().context("a plain path")?])?;
    let page = lab.text("report.html")?;
    assert!(
        page.contains("&lt;script&gt;"),
        "the file's name is not on it"
    );
    assert_whole_page(&page, 1);
    Ok(())
}

fn what_cannot_be_fixed_is_told(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = throughput(bed, &[
        "--total-size", "60MB", "--publisher-option=--rate=15MB", "--diagnose",
        "--diagnose-seconds", "1", "--fix"])?;
    let rerun = &lab.report["rerun"];
    assert_eq!(rerun.get("fix"), Some(&Value::Null));
    assert!(rerun["why_not"].as_str().is_some_and(|why| !why.is_empty()));
    assert!(
        !lab.folder.join("after-fix").exists(),
        "there was a second run"
    );
    assert_says(&lab.text("report.md")?, "(?m)^None: the lab has no fix");
    Ok(())
}

fn what_is_too_short_to_diagnose_is_told(bed: &Bed) -> Result<()> {
    let lab = throughput(bed, &["--total-size", "1MiB", "--diagnose", "--fix"])?;
    assert_eq!(lab.report.get("diagnosis"), Some(&Value::Null));
    assert_eq!(lab.report.get("rerun"), Some(&Value::Null));
    let told = "Not diagnosed: the run was too short";
    assert_says(&lab.text("report.md")?, told);
    Ok(())
}

fn limits_are_shown(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let lab = LabRun::of(bed, &mut bed.lab(&[
        "limits", "--runs", "1", "--seconds", "1", "--profile", "wire", "--mtu", "1500"]))?;
    let shown = bed.lab_report(&lab.folder, &[])?;
    assert_says(&shown, "raw_af_xdp_native");
    bed.lab_report(&lab.folder, &["--format", "html"])?;
    assert_says(&lab.text("report.html")?, "raw_af_xdp_native");
    Ok(())
}

fn what_is_no_report_is_refused(bed: &Bed) -> Result<()> {
    for (name, content) in [
        ("else.json", r#"{"kind": "else"}"#),
        ("old.json", r#"{"kind": "throughput"}"#),
        ("text.json", "text"),
    ] {
        fs::write(bed.file(name), content)?;
    }
    let refuses = |message: &str, name: &str, arguments: &[&str]| {
        let mut command = bed.lab(&["report"]);
        bed.refuses(message, command.arg(bed.file(name)).args(arguments));
    };
    refuses("give a result folder", "nothing", &[]);
    refuses("give a result folder", "", &[]);
    refuses("is not JSON", "text.json", &[]);
    refuses("not a report of penstock-lab", "else.json", &[]);
    refuses("another version", "old.json", &[]);
    refuses("text, html", "old.json", &["--format", "pdf"]);
    bed.refuses("--diagnose", &mut bed.lab(&["throughput", "--fix"]));
    Ok(())
}

fn the_diagnosing_script_refuses_other_workloads(bed: &Bed) -> Result<()> {
    let script = root().join("scripts/run_throughput_with_diagnostics.sh");
    bed.refuses("TEST_TYPE", command(&script, &[]).env("TEST_TYPE", "4"));
    let help = bed.run("help", &mut command(&script, &["--help"]))?;
    assert_says(&help.success()?.stdout, "after-fix");
    Ok(())
}
