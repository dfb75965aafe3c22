//! The folder of one run under the results directory.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use jiff::Timestamp;
use penstock_files::{Dir, NewDir, Trusted};
use penstock_process::output;
use serde::Serialize;

use crate::report::terminal::{self, Screen};
use crate::settings::Format;

/// Creates `<results>/<UTC time>`; runs that start in the same second get a number behind it.
///
/// Only root, this user and those who control the lab anyway ([`Trusted::with_those_in_control`]) can
/// change the path to it or its contents, so files in it can be opened by name.
pub fn create_folder(results: &Path, now: Timestamp) -> Result<PathBuf> {
    let trusted = Trusted::with_those_in_control();
    let (_, results) = Dir::make_for(results, &RESULTS, &trusted).with_context(|| {
        let name = results.display();
        format!("cannot use {name} for results; choose another directory with --results")
    })?;
    let time = now.strftime("%Y-%m-%dT%H-%M-%SZ").to_string();
    for number in 1u32.. {
        let name = if number == 1 {
            time.clone()
        } else {
            format!("{time}-{number}")
        };
        let folder = results.join(name);
        match fs::create_dir(&folder) {
            Ok(()) => return Ok(folder),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => {
                return Err(error).with_context(|| format!("cannot create {}", folder.display()));
            }
        }
    }
    unreachable!("some number is free")
}

/// The results directory, if it is missing.
const RESULTS: NewDir = NewDir {
    mode: 0o755,
    owner: None,
    group: None,
};

/// The report for programs, and the page for a browser.
pub const REPORT: &str = "report.json";
pub const PAGE: &str = "report.html";

/// Writes `report.json` and `report.md`.
pub fn write(folder: &Path, report: &impl Serialize, markdown: &str) -> Result<()> {
    let json = serde_json::to_string_pretty(report).context("cannot serialise the report")?;
    write_file(&folder.join(REPORT), &json)?;
    write_file(&folder.join("report.md"), markdown)
}

/// Prints a report in the requested format; `summary` is for people, in Markdown.
pub fn print(
    format: Format,
    report: &impl Serialize,
    summary: impl FnOnce() -> String,
) -> Result<()> {
    output::print_line(match format {
        Format::Text => terminal::markdown(&summary(), Screen::stdout()),
        Format::Json => serde_json::to_string_pretty(report)?,
    })
}

/// Prints where the results of a run are, even if it failed.
pub fn print_path(folder: &Path, outcome: Result<bool>) -> Result<bool> {
    let printed = output::print_line(folder.display());
    let good = outcome?;
    printed.map(|()| good)
}

/// Writes a file in one step, and never to a file that another user put in its place.
pub fn write_file(path: &Path, text: &str) -> Result<()> {
    let write = || {
        let mut file = penstock_files::open_to_write(path, 0o644)?;
        file.set_len(0)?;
        file.write_all(text.as_bytes())
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_in_the_place_of_a_file_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (victim, page) = (dir.path().join("victim"), dir.path().join(PAGE));
        fs::write(&victim, "precious").unwrap();
        std::os::unix::fs::symlink(&victim, &page).unwrap();
        write_file(&page, "page").unwrap_err();
        fs::remove_file(&page).unwrap();
        fs::hard_link(&victim, &page).unwrap();
        write_file(&page, "page").unwrap_err();
        assert_eq!(fs::read_to_string(&victim).unwrap(), "precious");
        fs::remove_file(&page).unwrap();
        write_file(&page, "a long page").unwrap();
        write_file(&page, "page").unwrap();
        assert_eq!(fs::read_to_string(&page).unwrap(), "page");
    }

    #[test]
    fn two_runs_in_one_second_do_not_share_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        let time = Timestamp::UNIX_EPOCH;
        let first = create_folder(&results, time).unwrap();
        let second = create_folder(&results, time).unwrap();
        assert!(first.ends_with("1970-01-01T00-00-00Z"));
        assert!(second.ends_with("1970-01-01T00-00-00Z-2"));
    }
}
