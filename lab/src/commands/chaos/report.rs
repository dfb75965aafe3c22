//! Report of the fault runs: JSON and Markdown.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::{Deserialize, Serialize};

use super::checker::Wrong;
use super::fault_catalog::FAULT_CATALOG;
use super::path::FaultPath;
use super::schedule::{Schedule, ScheduledFaultReport};

/// Kind of the report.
pub const FAULTS: &str = "faults";

/// One fault run.
#[derive(Debug, Serialize, Deserialize)]
pub struct RunReport {
    /// Number of its schedule.
    pub number: u64,
    pub path: FaultPath,
    /// The fault that it tests.
    pub fault: String,
    pub strikes: Vec<ScheduledFaultReport>,
    pub seconds: f64,
    /// Lines that publishers saw acknowledged.
    pub lines_acked: u64,
    pub lines_in_log: u64,
    /// Lines of killed publishers in the log.
    pub lines_of_killed: u64,
    /// Streams that ended with everything acknowledged, by their last path.
    pub streams: BTreeMap<String, u64>,
    /// Number of times that a stream continued over another connection.
    pub moves: u64,
    /// Counters by name: packets by outcome, and all other events.
    pub counts: BTreeMap<String, u64>,
    pub wrong: Wrong,
    /// Empty if the run found no problem.
    pub problems: Vec<String>,
}

/// All fault runs; `report.json` has this shape.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    pub kind: String,
    /// Seed that reproduces the schedules.
    pub seed: u64,
    /// Options for the chosen paths and faults.
    pub selection: String,
    pub problems: usize,
    pub cells: Vec<Cell>,
    pub runs: Vec<RunReport>,
}

/// All runs that test one fault on one path.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cell {
    pub fault: String,
    pub path: FaultPath,
    pub runs: u64,
    pub lines_acked: u64,
    /// How often the fault happened: packets or events.
    pub happened: u64,
    pub wrong: Wrong,
    pub problems: usize,
}

impl RunReport {
    /// Report of a run that has not begun.
    pub fn of(schedule: &Schedule) -> Self {
        Self {
            number: schedule.number,
            path: schedule.path,
            fault: schedule.kind.name.to_owned(),
            strikes: schedule.faults.iter().map(|fault| fault.report()).collect(),
            seconds: 0.0,
            lines_acked: 0,
            lines_in_log: 0,
            lines_of_killed: 0,
            streams: BTreeMap::new(),
            moves: 0,
            counts: BTreeMap::new(),
            wrong: Wrong::default(),
            problems: Vec::new(),
        }
    }

    pub fn title(&self) -> String {
        format!(
            "run {}, {} over {}",
            self.number,
            self.fault,
            self.path.name()
        )
    }
}

impl Report {
    pub fn new(seed: u64, selection: String) -> Self {
        Self {
            kind: FAULTS.to_owned(),
            seed,
            selection,
            problems: 0,
            cells: Vec::new(),
            runs: Vec::new(),
        }
    }

    pub fn add(&mut self, run: RunReport) {
        let is_cell = |cell: &&mut Cell| cell.fault == run.fault && cell.path == run.path;
        let cell = match self.cells.iter_mut().find(is_cell) {
            Some(cell) => cell,
            None => {
                self.cells.push(Cell::of(&run));
                self.cells.last_mut().expect("there is one")
            }
        };
        let counted = FAULT_CATALOG.iter().find(|kind| kind.name == run.fault);
        let happened = counted.and_then(|kind| run.counts.get(kind.counted));
        cell.runs += 1;
        cell.lines_acked += run.lines_acked;
        cell.happened += happened.copied().unwrap_or_default();
        cell.wrong += run.wrong;
        cell.problems += run.problems.len();
        self.problems += run.problems.len();
        self.runs.push(run);
    }

    /// The report in Markdown.
    pub fn summary(&self) -> String {
        let mut out = self.table();
        let mut part = |text: String| write!(out, "\n\n{text}").expect("a string takes all");
        for run in &self.runs {
            for problem in &run.problems {
                part(format!("PROBLEM {}: {problem}. Repeat it:", run.title()));
                part(format!(
                    "```sh\npenstock-lab faults --seed {} --only {}{}\n```",
                    self.seed, run.number, self.selection
                ));
            }
        }
        part(self.in_words());
        out
    }

    fn in_words(&self) -> String {
        let sum = |figure: fn(&RunReport) -> u64| self.runs.iter().map(figure).sum::<u64>();
        let mut wrong = Wrong::default();
        self.runs.iter().for_each(|run| wrong += run.wrong);
        format!(
            "{} fault runs, seed {}: {} lines acked, {} in the logs, {} of them of killed publishers; \
             {} moves; {} lost, {} doubled, {} torn, {} out of order, {} problems",
            self.runs.len(),
            self.seed,
            sum(|run| run.lines_acked),
            sum(|run| run.lines_in_log),
            sum(|run| run.lines_of_killed),
            sum(|run| run.moves),
            wrong.lost,
            wrong.doubled,
            wrong.torn,
            wrong.out_of_order,
            self.problems,
        )
    }

    /// Table of faults by path: how often each happened, and how many lines were acknowledged.
    fn table(&self) -> String {
        let paths: Vec<_> = {
            let mut paths: Vec<_> = self.cells.iter().map(|cell| cell.path).collect();
            paths.sort_unstable();
            paths.dedup();
            paths
        };
        let mut out = format!("| {:<17} |", "fault");
        let mut rule = format!("|{:-<19}|", "");
        for path in &paths {
            write!(
                out,
                " {:>31} |",
                format!("{}: times / acked / wrong", path.name())
            )
            .expect("a string takes all");
            write!(rule, "{:->32}:|", "").expect("a string takes all");
        }
        out = format!("{out}\n{rule}");
        for kind in FAULT_CATALOG {
            let of_kind = |path| {
                let mut cells = self.cells.iter();
                cells.find(|cell| cell.fault == kind.name && cell.path == path)
            };
            if paths.iter().all(|path| of_kind(*path).is_none()) {
                continue;
            }
            write!(out, "\n| {:<17} |", kind.name).expect("a string takes all");
            for path in &paths {
                let text = of_kind(*path).map_or_else(String::new, Cell::text);
                write!(out, " {text:>31} |").expect("a string takes all");
            }
        }
        out
    }

    pub fn markdown(&self) -> String {
        let mut out = format!("# Fault runs\n\n{}\n\n{}\n", self.in_words(), self.table());
        for run in self.runs.iter().filter(|run| !run.problems.is_empty()) {
            write!(out, "\n- {}: {}", run.title(), run.problems.join("; "))
                .expect("a string takes all");
        }
        out
    }
}

impl Cell {
    fn of(run: &RunReport) -> Self {
        Self {
            fault: run.fault.clone(),
            path: run.path,
            runs: 0,
            lines_acked: 0,
            happened: 0,
            wrong: Wrong::default(),
            problems: 0,
        }
    }

    fn text(&self) -> String {
        let wrong = self.wrong.sum().max(self.problems as u64);
        format!("{} / {} / {wrong}", self.happened, self.lines_acked)
    }
}

#[cfg(test)]
mod tests {
    use super::super::schedule::cells;
    use super::*;

    fn run(number: u64, happened: u64, problems: &[&str]) -> RunReport {
        let kind = &FAULT_CATALOG[0];
        let cells = cells(1, &[kind], &[FaultPath::Xdp]);
        let mut run = RunReport::of(&Schedule::draw(1, number, &cells));
        run.lines_acked = 10;
        run.counts.insert(kind.counted.to_owned(), happened);
        run.counts.insert("others".to_owned(), 1000);
        run.problems = problems.iter().map(|&what| what.to_owned()).collect();
        run
    }

    #[test]
    fn runs_about_one_fault_on_one_path_are_summed_up() {
        let mut report = Report::new(7, String::new());
        report.add(run(0, 3, &[]));
        report.add(run(1, 4, &[]));
        assert_eq!((report.cells.len(), report.problems), (1, 0));
        let summary = report.summary();
        assert!(summary.contains(" 7 / 20 / 0 |"), "{summary}");
        assert!(
            summary.contains("2 fault runs, seed 7: 20 lines acked"),
            "{summary}"
        );
        assert!(report.markdown().contains(&report.table()));
    }

    #[test]
    fn a_problem_is_told_with_what_repeats_it() {
        let mut report = Report::new(7, " --paths xdp".to_owned());
        report.add(run(4, 1, &["line 3 is lost"]));
        let summary = report.summary();
        for words in [
            "PROBLEM run 4, loss over xdp: line 3 is lost",
            "penstock-lab faults --seed 7 --only 4 --paths xdp",
            "1 / 10 / 1 |",
            ", 1 problems",
        ] {
            assert!(summary.contains(words), "{words}: {summary}");
        }
        assert!(
            report
                .markdown()
                .contains("- run 4, loss over xdp: line 3 is lost")
        );
    }
}
