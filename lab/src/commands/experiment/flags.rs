//! The command line of `penstock-lab experiment`.

use bytesize::ByteSize;
use clap::{Args, Subcommand};
use penstock_flags::{MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, size};

use crate::commands::diagnose;
use crate::settings::{Output, Programs, parse_seconds};
use penstock_testbed::delay::Delay;
use penstock_testbed::settings::{Profile, Route, Workload};

const EXAMPLES: &str = "\
Examples:
  # every place to set SO_RCVBUF, with small and large net.core.rmem_max, on a
  # link of 10 ms
  sudo penstock-lab experiment rcvbuf

  # in half a minute; on a link with more delay, as JSON
  sudo penstock-lab experiment rcvbuf --quick
  sudo penstock-lab experiment rcvbuf --delay 50ms --runs 7 --format json

net.core.rmem_max is one value for the whole host. Each run changes it while
its connection is set up, and restores it, however the lab ends. With
--format json, stdout is JSON only; otherwise the last line is the result
folder. Exit codes: 0 measured, 1 failed, 2 wrong usage, 130
interrupted.";

const OBSERVER_EXAMPLES: &str = "\
Examples:
  # three and a half minutes over tcp; over xdp
  sudo penstock-lab experiment diagnose
  sudo penstock-lab experiment diagnose --mode xdp

With --format json, stdout is JSON only; otherwise the last line is the result
folder. Exit codes: 0 measured, 1 failed, 2 wrong usage, 130 interrupted.";

#[derive(Debug, Subcommand)]
pub enum Experiment {
    /// The effect of SO_RCVBUF, by where it is set and by net.core.rmem_max: window scale, first and
    /// final window, throughput, and how long the sender waited for the window.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Rcvbuf(Rcvbuf),
    /// The cost of a diagnosis for a broker: its throughput in alternating intervals with and without a
    /// diagnosis, while one publisher sends.
    #[command(after_help = OBSERVER_EXAMPLES, args_override_self = true)]
    Diagnose(Box<Observer>),
}

#[derive(Debug, Args)]
pub struct Observer {
    #[command(flatten)]
    pub route: Route,
    #[command(flatten)]
    pub workload: Workload,
    /// Pairs of intervals; 95 % confidence needs at least six.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub pairs: u32,
    /// Length of an interval, such as 5s, and --duration of its diagnosis.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = diagnose::seconds)]
    pub seconds: f64,
    /// Segmentation offloads of the broker's link.
    #[arg(long, value_enum, default_value_t = Profile::Wire)]
    pub profile: Profile,
    /// MTU of the link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub struct Rcvbuf {
    /// Runs of each case.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: Option<u32>,
    /// Length of a run, such as 3s; a number alone is seconds.
    #[arg(long, value_name = "DURATION", value_parser = parse_seconds)]
    pub seconds: Option<f64>,
    /// One run of each case, one second long.
    #[arg(long)]
    pub quick: bool,
    /// Additional round-trip time: 100us to 200ms.
    #[arg(long, value_name = "TIME", default_value = "10ms")]
    pub delay: Delay,
    /// SO_RCVBUF to request.
    #[arg(long, value_name = "SIZE", default_value = "32MiB", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub rcvbuf: ByteSize,
    /// Values of net.core.rmem_max to compare, bytes.
    #[arg(long, value_delimiter = ',', default_value = "208KiB,32MiB",
        value_name = "SIZE", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub rmem_max: Vec<ByteSize>,
    /// Maximum buffer of autotuning (third value of net.ipv4.tcp_rmem), in the broker's namespace only;
    /// the default is that of Linux.
    #[arg(long, value_name = "SIZE", default_value = "6MiB", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub tcp_rmem_max: ByteSize,
    /// Segmentation offloads of the broker's link.
    #[arg(long, value_enum, default_value_t = Profile::Wire)]
    pub profile: Profile,
    /// MTU of the link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}
