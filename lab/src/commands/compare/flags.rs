//! The command line of `penstock-lab compare`.

use bytesize::ByteSize;
use clap::Args;
use penstock_flags::size;

use crate::settings::{Output, Pin, Programs, parse_seconds};
use penstock_testbed::settings::{MAX_TOTAL, Profile, Workload, XdpMode};

pub const EXAMPLES: &str = "\
Examples:
  # both profiles, MTU 1500 and 9000, in under three minutes
  sudo penstock-lab compare --quick

  # one case, more runs, native mode only
  sudo penstock-lab compare --profile wire --mtu 9000 --runs 15 \\
      --xdp-mode native

  # two hosts: the broker runs on the other one, with --mode xdp
  # (docs/operations.md)
  penstock-lab compare --remote 10.0.0.2:1214

The last line on stdout is the result folder. Exit codes: 0 measured, 1
failed (also when a run fell back to tcp or was not fully acknowledged),
2 wrong usage, 130 interrupted.";

/// Flags of `compare`.
#[derive(Debug, Args)]
#[command(next_help_heading = "Comparison")]
pub struct Compare {
    /// Fewer and smaller runs: everything in under three minutes.
    #[arg(long)]
    pub quick: bool,
    /// Only this profile [default: both].
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// MTUs of the links, bytes.
    #[arg(long, value_delimiter = ',', default_value = "1500,9000",
          value_parser = clap::value_parser!(u32).range(576..=16384))]
    pub mtu: Vec<u32>,
    /// Only this mode of the XDP program [default: both, and the better one counts].
    #[arg(long, value_enum)]
    pub xdp_mode: Option<XdpMode>,
    /// Number of brokers, each in a namespace of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub brokers: u32,
    /// Runs of each path per figure [default: 5, with --quick 3].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: Option<u32>,
    /// Payload of a run at full speed [default: 2GiB, with --quick 512MiB].
    #[arg(long, value_name = "SIZE", value_parser = size(1..=MAX_TOTAL))]
    pub size: Option<ByteSize>,
    /// Length of a run at a fixed rate, such as 3s; a number alone is seconds [default: 3s, with
    /// --quick 0.5s].
    #[arg(long, value_name = "DURATION", value_parser = parse_seconds)]
    pub latency_seconds: Option<f64>,
    /// Batches per second at the low rate, each with one message. The high rate is half of the slower
    /// path's full speed, in full batches.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub low_rate: u32,
    /// Paths whose processes are pinned to cores of their own while latency is measured (workers on the
    /// last cores, the publisher on the others): `xdp` (its workers then never sleep), `both` or
    /// `none`.
    #[arg(long, value_enum, default_value_t = Pin::Xdp)]
    pub pin: Pin,
    /// Compare against brokers on another host, host:port, started with --mode xdp: only the publisher
    /// runs here, and no namespace is created.
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT",
          conflicts_with_all = ["brokers", "profile", "mtu", "xdp_mode"])]
    pub remote: Vec<String>,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}
