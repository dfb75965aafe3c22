//! Against a broker that was started by hand, as on another host.

use std::fs;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::{Case, cases};

use crate::lab_report::{LabReport, SMALL};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_broker_that_runs_elsewhere,
        no_tcp_run_is_taken_for_one_over_xdp,
    ]
}

fn compare(bed: &Bed) -> std::process::Command {
    let arguments = [&["compare"], &SMALL[..], &["--remote", BROKER]].concat();
    bed.in_publisher_ns(program("lab"), &arguments)
}

fn a_broker_that_runs_elsewhere(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&["--mode", "xdp", "--iface", "eth0"])?;
    let report = LabReport::of(bed, &mut compare(bed))?;
    let is_remote = |row: &serde_json::Value| {
        row["profile"] == "remote" && row["mtu"] == 1500 && row["xdp_mode"].is_null()
    };
    assert_eq!(report.count(is_remote), 11);
    assert_eq!(report.json["limits"].as_array().map(Vec::len), Some(0));
    assert_eq!(report.json["remote"], BROKER);
    report.assert_every_run()?;
    broker.stop()?;
    Ok(())
}

/// The broker is without the xdp path.
fn no_tcp_run_is_taken_for_one_over_xdp(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let results = bed.file("results");
    bed.refuses("tcp only|xdp", compare(bed).arg("--results").arg(&results));
    let folders = fs::read_dir(&results)?.flatten();
    let reports = folders.filter(|folder| folder.path().join("report.json").exists());
    assert_eq!(reports.count(), 0, "there is a report");
    broker.stop()?;
    Ok(())
}
