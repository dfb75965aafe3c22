//! The JSON of every kind of report, byte for byte: `golden/` has one of each.
//!
//! `UPDATE_GOLDEN=1 cargo test -p penstock-lab golden` writes them anew. A change shows in the diff, and readers of
//! earlier reports need a default for each new field.

use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use super::Shown;
use crate::report::text::tests::{diagnosed, example};
use crate::report::text::{bench_example, compare_example};

fn file(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("golden");
    folder.join(name).with_extension("json")
}

fn json(report: &impl Serialize) -> String {
    serde_json::to_string_pretty(report).unwrap() + "\n"
}

/// The report in a text, written again. Not for `bench`: its ratios have 16 digits, of which serde_json reads the last
/// only approximately.
fn again(text: &str) -> String {
    match Shown::of(text).unwrap() {
        Shown::Throughput(report) => json(&report),
        Shown::Baseline(report) => json(&report),
        Shown::Compare(report) => json(&report),
        Shown::Bench(report) => json(&report),
        Shown::Limits(report) => json(&report),
        Shown::Rcvbuf(report) => json(&report),
        Shown::Observer(report) => json(&report),
        Shown::Soak(report) => json(&report),
        Shown::Faults(report) => json(&report),
    }
}

fn check(name: &str, now: &str) {
    let path = file(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, now).unwrap();
    }
    let golden = fs::read_to_string(&path).unwrap();
    assert_eq!(now, golden, "{} has changed", path.display());
}

#[test]
fn golden_reports_are_written_as_before() {
    check("throughput", &json(&example()));
    check("throughput-diagnosed", &json(&diagnosed()));
    check("compare", &json(&compare_example()));
    check("bench", &json(&bench_example()));
}

#[test]
fn golden_reports_of_every_kind_are_read_and_written_byte_for_byte() {
    for name in [
        "throughput",
        "throughput-diagnosed",
        "baseline",
        "compare",
        "limits",
        "experiment-rcvbuf",
        "experiment-diagnose",
        "soak",
        "faults",
    ] {
        let text = fs::read_to_string(file(name)).unwrap();
        check(name, &again(&text));
    }
}
