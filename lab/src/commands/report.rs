//! `penstock-lab report`: shows a `report.json` again, in the terminal or as a page.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde::de::DeserializeOwned;
use serde_json::Value;

use penstock_process::output as stdout;

use crate::commands::baseline;
use crate::commands::bench::BENCH;
use crate::commands::chaos::{self, FAULTS};
use crate::commands::compare;
use crate::commands::soak::{self, SOAK};
use crate::report::html;
use crate::report::model::{
    Baseline, Bench, Compare, Limits, OBSERVER, ObserverExperiment, RCVBUF, RcvbufExperiment,
    Throughput,
};
use crate::report::result_folder;
use crate::report::terminal::{self, Screen};
use crate::report::text;
use penstock_process::foreign_json;

pub const EXAMPLES: &str = "\
Examples:
  # in the terminal
  penstock-lab report results/2026-01-02T03-04-05Z

  # as one self-contained page; the last line on stdout is its path
  penstock-lab report results/2026-01-02T03-04-05Z --format html
  penstock-lab report report.json --format html --output - > page.html

Exit codes: 0 shown, 1 failed, 2 wrong usage.";

/// Flags of `report`.
#[derive(Debug, Args)]
pub struct Report {
    /// A report.json, or a result folder with one in it.
    #[arg(value_name = "FILE|DIR")]
    path: PathBuf,
    /// Output format.
    #[arg(long, value_enum, default_value_t = View::Text)]
    format: View,
    /// Where to write it, `-` for stdout [default: stdout for text, report.html beside the report.json
    /// for html].
    #[arg(long, value_name = "FILE|-")]
    output: Option<PathBuf>,
}

/// Output format of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum View {
    Text,
    Html,
}

/// Any report that the lab writes.
pub enum Shown {
    Throughput(Box<Throughput>),
    Baseline(Baseline),
    Compare(Compare),
    Bench(Box<Bench>),
    Limits(Limits),
    Rcvbuf(RcvbufExperiment),
    Observer(ObserverExperiment),
    Soak(soak::Report),
    Faults(chaos::Report),
}

/// Runs the command.
pub fn run(options: &Report) -> Result<bool> {
    let path = match options.path.is_dir() {
        true => options.path.join(result_folder::REPORT),
        false => options.path.clone(),
    };
    let shown = read(&path)?;
    let text = match options.format {
        View::Text => {
            // Another file than stdout is no terminal.
            let screen = match options.output {
                None => Screen::stdout(),
                Some(_) => Screen::PLAIN,
            };
            terminal::markdown(&shown.text(), screen) + "\n"
        }
        View::Html => shown.html()?,
    };
    match output(options, &path) {
        None => stdout::print(text)?,
        Some(file) => {
            result_folder::write_file(&file, &text)?;
            stdout::print_line(file.display())?;
        }
    }
    Ok(true)
}

/// The output file; `None` means stdout.
fn output(options: &Report, report: &Path) -> Option<PathBuf> {
    match (&options.output, options.format) {
        (Some(path), _) if path.as_os_str() == "-" => None,
        (Some(path), _) => Some(path.clone()),
        (None, View::Text) => None,
        (None, View::Html) => Some(report.with_file_name(result_folder::PAGE)),
    }
}

fn read(path: &Path) -> Result<Shown> {
    let name = path.display();
    let text = foreign_json::read_file(path).with_context(|| {
        format!("cannot read {name}; give a result folder, or the report.json in it")
    })?;
    Shown::of(&text).with_context(|| format!("cannot show {name}"))
}

fn parsed<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value).context("it is damaged, or from another version of penstock-lab")
}

impl Shown {
    /// The report in a text.
    pub fn of(text: &str) -> Result<Self> {
        let value = foreign_json::from_report(text)
            .context("it is not JSON, and so no report of penstock-lab")?;
        let kind = value.get("kind").and_then(Value::as_str).unwrap_or("");
        match kind {
            "throughput" => Ok(Self::Throughput(parsed(value)?)),
            "baseline" => Ok(Self::Baseline(parsed(value)?)),
            "compare" => Ok(Self::Compare(parsed(value)?)),
            BENCH => Ok(Self::Bench(Box::new(parsed(value)?))),
            "limits" => Ok(Self::Limits(parsed(value)?)),
            RCVBUF => Ok(Self::Rcvbuf(parsed(value)?)),
            OBSERVER => Ok(Self::Observer(parsed(value)?)),
            SOAK => Ok(Self::Soak(parsed(value)?)),
            FAULTS => Ok(Self::Faults(parsed(value)?)),
            _ => bail!(
                "it is not a report of penstock-lab: its kind is {kind:?}, not throughput, baseline, compare, {BENCH}, limits, {RCVBUF}, {OBSERVER}, {SOAK} or {FAULTS}"
            ),
        }
    }

    /// For people, in Markdown.
    pub fn text(&self) -> String {
        match self {
            Self::Throughput(report) => text::throughput_summary(report),
            Self::Baseline(report) => text::baseline_summary(report),
            Self::Compare(report) => text::compare_summary(report),
            Self::Bench(report) => text::bench(report),
            Self::Limits(report) => text::limits_table(&report.limits),
            Self::Rcvbuf(report) => text::rcvbuf_summary(report),
            Self::Observer(report) => text::observer_summary(report),
            Self::Soak(report) => report.summary(),
            Self::Faults(report) => report.summary(),
        }
    }

    /// The whole report, in Markdown.
    fn report(&self) -> String {
        match self {
            Self::Throughput(report) => text::throughput(report),
            Self::Baseline(report) => text::baseline(report),
            Self::Compare(report) => text::compare(report),
            Self::Bench(report) => text::bench(report),
            Self::Limits(report) => text::limits(report),
            Self::Rcvbuf(report) => text::rcvbuf(report),
            Self::Observer(report) => text::observer(report),
            Self::Soak(report) => report.markdown(),
            Self::Faults(report) => report.markdown(),
        }
    }

    /// As a page.
    pub fn html(&self) -> Result<String> {
        let (title, pictures) = match self {
            Self::Throughput(report) => return html::throughput(report),
            Self::Baseline(report) => ("Penstock against iperf3", baseline::figures(report)?),
            Self::Compare(report) => ("xdp and tcp compared", compare::figures(report)?),
            Self::Bench(_) => ("Benchmark", Vec::new()),
            Self::Limits(_) => ("Limits of this host", Vec::new()),
            Self::Rcvbuf(_) => ("Where SO_RCVBUF is set, and its effect", Vec::new()),
            Self::Observer(_) => ("The cost of a diagnosis for a broker", Vec::new()),
            Self::Soak(_) => ("Soak", Vec::new()),
            Self::Faults(_) => ("Fault runs", Vec::new()),
        };
        Ok(html::plain(title, &pictures, &self.report()))
    }
}

#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::text::tests::example;
    use std::fs;

    fn shown(text: &str) -> Result<Shown> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("report.json");
        fs::write(&path, text)?;
        read(&path)
    }

    #[test]
    fn a_report_is_shown_as_it_was_written() {
        let report = serde_json::to_string(&example()).unwrap();
        let shown = shown(&report).unwrap();
        assert!(shown.text().contains("884.5 MB/s"));
        assert!(shown.html().unwrap().contains("884.5 MB/s"));
    }

    #[test]
    fn what_is_no_report_is_refused_with_what_would_be() {
        for (text, words) in [
            ("", "is not JSON"),
            ("[1, 2]", "not a report of penstock-lab"),
            (r#"{"kind": "else"}"#, "\"else\""),
            (r#"{"kind": "throughput"}"#, "another version"),
        ] {
            let error = shown(text).err().unwrap();
            assert!(format!("{error:#}").contains(words), "{error:#}");
        }
        let error = read(Path::new("/dev/zero")).err().unwrap();
        assert!(format!("{error:#}").contains("a device"), "{error:#}");
        let dir = tempfile::tempdir().unwrap();
        let huge = dir.path().join("huge.json");
        let file = fs::File::create(&huge).unwrap();
        file.set_len(foreign_json::MAX_JSON + 1).unwrap();
        let error = read(&huge).err().unwrap();
        assert!(format!("{error:#}").contains("is larger than"), "{error:#}");
        let error = read(Path::new("/nowhere/report.json")).err().unwrap();
        assert!(format!("{error:#}").contains("/nowhere/report.json"));
    }
}
