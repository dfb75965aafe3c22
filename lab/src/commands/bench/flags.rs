//! The command line of `penstock-lab bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::settings::{Programs, parse_seconds};

pub const EXAMPLES: &str = "\
Examples:
  # every row, in less than 25 minutes; the machine should do nothing else
  sudo penstock-lab bench

  # the first impression, in about three minutes
  sudo penstock-lab bench --quick

  # only these rows, with more runs
  sudo penstock-lab bench --rows throughput,latency --runs 15

  # with Aeron's C programs, and the tables for a README
  sudo penstock-lab bench --aeron aeron/build/binaries --format markdown

Every contender of a row runs once a round, and rounds alternate the order.
The last line on stdout is the result folder, with report.json and report.md.
Exit codes: 0 measured, also if rows miss their targets, 1 failed, 2 wrong
usage, 130 interrupted.";

/// Flags of `bench`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Benchmark")]
pub struct Bench {
    /// Fewer and shorter runs, and only the rows throughput, latency, messages and memory [default
    /// rows: all].
    #[arg(long)]
    pub quick: bool,
    /// Rows to measure.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ROWS")]
    pub rows: Vec<Group>,
    /// Runs of each contender of a row [default: 7, with --quick 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: Option<u32>,
    /// Approximate length of a run, such as 2s; a number alone is seconds [default: 2s, with --quick
    /// 700ms].
    #[arg(long, value_name = "DURATION", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
    /// Directory with Aeron's C programs aeronmd, rate_subscriber and streaming_publisher.
    #[arg(long, value_name = "DIR")]
    pub aeron: Option<PathBuf>,
    /// Aeron's media driver [default: aeronmd in --aeron].
    #[arg(long, value_name = "FILE")]
    pub aeron_driver: Option<PathBuf>,
    /// Aeron's subscriber [default: rate_subscriber in --aeron].
    #[arg(long, value_name = "FILE")]
    pub aeron_subscriber: Option<PathBuf>,
    /// Aeron's publisher [default: streaming_publisher in --aeron].
    #[arg(long, value_name = "FILE")]
    pub aeron_publisher: Option<PathBuf>,
    #[command(flatten)]
    pub programs: Programs,
    /// Directory in which result folders are created.
    #[arg(
        long,
        value_name = "DIR",
        default_value = "results",
        help_heading = "Results"
    )]
    pub results: PathBuf,
    /// Output format; the path of the result folder follows as the last line.
    #[arg(long, value_enum, default_value_t = View::Text, help_heading = "Results")]
    pub format: View,
}

/// Output format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum View {
    /// For a terminal.
    Text,
    /// The whole report, with every run.
    Json,
    /// The tables alone, for a README.
    Markdown,
}

/// Rows that are measured together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Group {
    /// One broker at full speed: xdp, tcp, raw AF_XDP and iperf3.
    Throughput,
    /// Four brokers, and the cost of eight.
    Brokers,
    /// Ack latency at 1,000 batches per second and at half load.
    Latency,
    /// CPU time of each host, and without the conversion of skbs.
    Cpu,
    /// tcp against iperf3 with 1 and 4 streams, with and without offloads.
    Iperf3,
    /// 64 streams to one broker: cost and bytes in flight.
    Streams,
    /// Messages of 64 bytes.
    Messages,
    /// Memory of idle streams at the broker.
    Memory,
    /// nats-server and Aeron.
    Peers,
}

impl Group {
    /// Measured without `--rows` and `--quick`.
    pub const ALL: [Self; 9] = [
        Self::Throughput,
        Self::Brokers,
        Self::Latency,
        Self::Cpu,
        Self::Iperf3,
        Self::Streams,
        Self::Messages,
        Self::Memory,
        Self::Peers,
    ];
    /// Measured with `--quick`.
    pub const QUICK: [Self; 4] = [
        Self::Throughput,
        Self::Latency,
        Self::Messages,
        Self::Memory,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Throughput => "throughput",
            Self::Brokers => "brokers",
            Self::Latency => "latency",
            Self::Cpu => "cpu",
            Self::Iperf3 => "iperf3",
            Self::Streams => "streams",
            Self::Messages => "messages",
            Self::Memory => "memory",
            Self::Peers => "peers",
        }
    }
}

/// How much is measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Extent {
    pub groups: Vec<Group>,
    pub runs: u32,
    pub seconds: f64,
}

impl Extent {
    pub fn of(options: &Bench) -> Self {
        let (runs, seconds, groups) = match options.quick {
            true => (3, 0.7, &Group::QUICK[..]),
            false => (7, 2.0, &Group::ALL[..]),
        };
        let mut groups = match options.rows.is_empty() {
            true => groups.to_vec(),
            false => options.rows.clone(),
        };
        // In the order in which later ones use what earlier ones found.
        groups.sort();
        groups.dedup();
        Self {
            groups,
            runs: options.runs.unwrap_or(runs),
            seconds: options.seconds.unwrap_or(seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn extent(flags: &[&str]) -> Extent {
        let line = ["penstock-lab", "bench"].iter().chain(flags);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Bench(options) => Extent::of(&options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn defaults_measure_every_row_and_quick_measures_some() {
        let all = extent(&[]);
        assert_eq!((all.runs, all.seconds), (7, 2.0));
        assert_eq!(all.groups, Group::ALL);
        let quick = extent(&["--quick", "--runs", "1"]);
        assert_eq!((quick.runs, quick.seconds), (1, 0.7));
        assert_eq!(quick.groups, Group::QUICK);
    }

    #[test]
    fn rows_can_be_chosen_in_any_order() {
        let chosen = extent(&["--quick", "--rows", "peers,throughput", "--rows", "peers"]);
        assert_eq!(chosen.groups, [Group::Throughput, Group::Peers]);
        let error = Cli::try_parse_from(["penstock-lab", "bench", "--rows", "kafka"]).unwrap_err();
        let text = error.to_string();
        assert!(
            Group::ALL.iter().all(|group| text.contains(group.name())),
            "{text}"
        );
    }
}
