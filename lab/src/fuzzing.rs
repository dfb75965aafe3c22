//! The command line and the readers of reports, driven by arbitrary text: by libFuzzer in `fuzz/`, and
//! by a test over its corpus.

use clap::Parser;
use serde::de::DeserializeOwned;

use crate::cli::Cli;
use crate::diagnose::penstock::Figures;
use crate::report::{
    self, Baseline, Compare, Limits, ObserverExperiment, RcvbufExperiment, Throughput,
};
use crate::{baseline, compare, iperf, outputs, page, render};

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| any_text(data));

/// Text as flags, one a line, and as what other programs and earlier runs wrote.
fn any_text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let words = ["penstock-lab"].into_iter().chain(text.lines());
    if let Err(error) = Cli::try_parse_from(words) {
        assert!(!error.to_string().is_empty());
    }
    of_programs(&text);
    of_runs(&text);
}

fn of_programs(text: &str) {
    if let Some(publisher) = read::<outputs::Publisher>(text) {
        let _ = (publisher.path(), publisher.transport_sum("lost"));
        report::Publisher::from_output(publisher);
    }
    if let Some(broker) = read::<outputs::Broker>(text) {
        let _ = (broker.xdp_mode(), broker.xdp_counter("corrupt"));
        report::Broker::from_output(0, String::new(), "penstock", broker);
    }
    read::<outputs::Subscriber>(text);
    read::<Figures>(text);
    let _ = iperf::received_mb_per_s(text);
}

fn of_runs(text: &str) {
    if let Some(throughput) = read::<Throughput>(text) {
        assert!(!render::throughput(&throughput).is_empty());
        assert!(!render::throughput_summary(&throughput).is_empty());
        let _ = page::throughput(&throughput);
    }
    if let Some(report) = read::<Baseline>(text) {
        assert!(!render::baseline(&report).is_empty());
        let _ = baseline::picture(&report);
    }
    if let Some(report) = read::<Compare>(text) {
        assert!(!render::compare(&report).is_empty());
        let _ = compare::picture(&report);
    }
    if let Some(limits) = read::<Limits>(text) {
        assert!(!render::limits(&limits).is_empty());
    }
    if let Some(rcvbuf) = read::<RcvbufExperiment>(text) {
        assert!(!render::rcvbuf(&rcvbuf).is_empty());
    }
    if let Some(observer) = read::<ObserverExperiment>(text) {
        assert!(!render::observer(&observer).is_empty());
    }
}

fn read<T: DeserializeOwned>(text: &str) -> Option<T> {
    outputs::parse("a program", text).ok()
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
