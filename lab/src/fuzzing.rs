//! The command line and the readers of reports, driven by arbitrary text: by libFuzzer in `fuzz/`, and
//! by a test over its corpus.

use clap::Parser;
use serde::de::DeserializeOwned;

use crate::cli::Cli;
use crate::commands::report::Shown;
use crate::measure::iperf;
use crate::report::model;
use crate::report::text;
use penstock_diagnose::broker_stats::BrokerSnapshot;
use penstock_testbed::program_reports;

/// Text as flags, one a line, and as what other programs and earlier runs wrote.
pub fn any_text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["penstock-lab"].into_iter().chain(text.lines());
    if let Err(error) = Cli::try_parse_from(words) {
        assert!(!error.to_string().is_empty());
    }
    of_programs(&text);
    of_runs(&text);
}

fn of_programs(text: &str) {
    if let Some(publisher) = read::<program_reports::Publisher>(text) {
        let _ = (publisher.path(), publisher.transport_sum("lost"));
        model::Publisher::from_output(publisher);
    }
    if let Some(broker) = read::<program_reports::Broker>(text) {
        let _ = (broker.xdp_mode(), broker.xdp_counter("corrupt"));
        model::Broker::from_output(0, String::new(), "penstock", broker);
    }
    read::<program_reports::Subscriber>(text);
    read::<BrokerSnapshot>(text);
    let _ = iperf::received_mb_per_s(text);
}

fn of_runs(text: &str) {
    if let Ok(shown) = Shown::of(text) {
        assert!(!shown.text().is_empty());
        assert!(!markdown(&shown).is_empty());
        // Figures that no picture can be made of are an error.
        let _ = shown.html();
    }
}

/// What a run writes beside its report.
fn markdown(shown: &Shown) -> String {
    match shown {
        Shown::Throughput(report) => text::throughput(report),
        Shown::Baseline(report) => text::baseline(report),
        Shown::Compare(report) => text::compare(report),
        Shown::Bench(report) => text::bench(report),
        Shown::Limits(report) => text::limits(report),
        Shown::Rcvbuf(report) => text::rcvbuf(report),
        Shown::Observer(report) => text::observer(report),
        Shown::Soak(report) => report.markdown(),
        Shown::Faults(report) => report.markdown(),
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Option<T> {
    program_reports::parse("a program", text).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn kept_texts_whole_and_cut_short() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus/lab");
        for file in fs::read_dir(corpus).unwrap() {
            let input = fs::read(file.unwrap().path()).unwrap();
            any_text(&input);
            for part in 0..20 {
                any_text(&input[..input.len() * part / 20]);
            }
        }
    }
}
