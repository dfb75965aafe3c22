//! `penstock-lab faults`: injects every kind of fault into publishers, brokers, readers and their link, on
//! every path, and checks that the logs hold everything that was acknowledged.

mod broker_slot;
mod checker;
mod fault_catalog;
pub mod flags;
mod links;
mod path;
mod report;
mod schedule;
mod trial;

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use jiff::Timestamp;
use penstock_process::{output, progress};

use crate::report::result_folder;
use fault_catalog::FAULT_CATALOG;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::netns::Net;
use penstock_testbed::processes::RunContext;
use penstock_testbed::programs::Binaries;
pub use report::{FAULTS, Report};
use schedule::Schedule;
use trial::Trial;

const MTU: u32 = 1500;
const TOPIC: &str = "faults";

/// Runs the command; true when it found no problem.
pub fn run(options: &flags::Faults, interrupt: &Interrupt) -> Result<bool> {
    if options.list {
        let kinds = FAULT_CATALOG
            .iter()
            .map(|kind| format!("{:<20} {}\n", kind.name, kind.what));
        return output::print(kinds.collect::<String>()).map(|()| true);
    }
    let started = Timestamp::now();
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let seed = options.seed.unwrap_or(started.as_millisecond() as u64);
    let outcome = fault_runs(options, seed, &binaries, &folder, interrupt);
    let printed = outcome.and_then(|report| {
        result_folder::write(&folder, &report, &report.markdown())?;
        result_folder::print(options.output.format, &report, || report.summary())?;
        Ok(report.problems == 0)
    });
    result_folder::print_path(&folder, printed)
}

fn fault_runs(
    options: &flags::Faults,
    seed: u64,
    binaries: &Binaries,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<Report> {
    let asked = |name: &str| options.faults.is_empty() || options.faults.iter().any(|f| f == name);
    let kinds: Vec<_> = FAULT_CATALOG
        .iter()
        .filter(|kind| asked(kind.name))
        .collect();
    let cells = schedule::cells(seed, &kinds, &options.paths);
    let numbers = match options.only {
        Some(number) => number..number + 1,
        None => 0..options.schedules.unwrap_or(cells.len() as u64),
    };
    let net = Net::create_with_emulation(1, MTU, &links::link_emulation())?;
    let buffers = BufferDir::create()?;
    let bar = bar_over(numbers.end - numbers.start);
    let mut report = Report::new(seed, selection(options));
    for number in numbers {
        let schedule = Schedule::draw(seed, number, &cells);
        bar.set_message(format!(
            "{} over {}",
            schedule.kind.name,
            schedule.path.name()
        ));
        let own = folder.join(format!("run-{number}"));
        fs::create_dir(&own).with_context(|| format!("cannot create {}", own.display()))?;
        let context = RunContext {
            net: &net,
            binaries,
            topic: TOPIC,
            folder: &own,
        };
        let trial = Trial::prepare(context, &buffers, &schedule, interrupt)?;
        let run = trial.run()?;
        for problem in &run.problems {
            bar.suspend(|| penstock_process::say(&run.title(), problem));
        }
        report.add(run);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(report)
}

/// Options that a command to repeat a run needs beside seed and number.
fn selection(options: &flags::Faults) -> String {
    let mut selection = String::new();
    let paths: Vec<_> = options.paths.iter().map(|path| path.name()).collect();
    if paths != ["tcp", "xdp", "fallback"] {
        selection += &format!(" --paths {}", paths.join(","));
    }
    if !options.faults.is_empty() {
        selection += &format!(" --faults {}", options.faults.join(","));
    }
    selection
}

fn bar_over(schedules: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:40} {pos} of {len} runs, {elapsed}, {msg}");
    let target = progress::target();
    ProgressBar::with_draw_target(Some(schedules), target)
        .with_style(style.expect("the template is valid"))
}
