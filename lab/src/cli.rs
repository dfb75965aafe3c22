//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use penstock_flags::{BareUnit, MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, duration, size};
use penstock_wire::handshake::{AckLevel, OrderLevel};
use serde::{Deserialize, Serialize};

use crate::chaos::FAULT_CATALOG;
use crate::delay::Delay;
use crate::faults::FaultPlan;

use crate::bench::flags;
use crate::diagnose::{self, Diagnose};
use crate::experiment::Experiment;
use crate::show::{self, Report};

/// Maximum number of bytes of a run.
const MAX_TOTAL: u64 = 1 << 60;

const EXAMPLES: &str = "\
Examples:
  # the standard workload: 10 GiB in 1 KiB messages to four brokers
  sudo penstock-lab throughput --total-size 10GiB

  # publish the lines of a file, read them back and compare
  sudo penstock-lab throughput --input access.log --verify

  # the same over the xdp path and a network that drops, reorders, corrupts
  # and duplicates packets
  sudo penstock-lab throughput --mode xdp --input access.log --verify \\
      --faults loss=1%,reorder=1%,corrupt=0.1%,duplicate=1%

  # find what limits throughput, remove it and run again
  sudo penstock-lab throughput --diagnose --fix

  # one broker against iperf3 on the same links
  sudo penstock-lab baseline --runs 5

  # xdp against tcp on the same workload, in under three minutes
  sudo penstock-lab compare --quick

  # the limits of this host, and whether it is ready for the xdp path
  sudo penstock-lab limits
  sudo penstock-lab doctor --iface eth1

The last line on stdout is the result folder. Exit codes: 0 everything was
acknowledged and is in the logs, 1 otherwise, 2 wrong usage, 130 interrupted.";

const COMPARE_EXAMPLES: &str = "\
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

const DOCTOR_EXAMPLES: &str = "\
Examples:
  # check this machine, and list the interfaces that could be used
  penstock-lab doctor

  # check an interface as well; with sudo it sees everything
  sudo penstock-lab doctor --iface eth1

Each check says ok, warn (slower, or with restrictions) or fail (--mode xdp
does not work), why it matters and what to do. Doctor changes nothing. Exit
codes: 0 no check fails, 1 a check fails or the interface does not exist,
2 wrong usage.";

const SOAK_EXAMPLES: &str = "\
Examples:
  # an hour
  sudo penstock-lab soak --minutes 60

  # half a minute, with the script of an earlier run
  sudo penstock-lab soak --minutes 0.5 --seed 42

The run succeeds if every acknowledged message is in the log once, in order
and whole; what a killed publisher left is a prefix of what it sent; brokers
and readers report the same counts; each broker's memory has not grown (median
of the last quarter of the run at most 2 % and 4 MiB above that of the second
quarter); and as many descriptors are open at the end as before the first
publisher. The last line on stdout is the result folder. Exit codes: 0
success, 1 a check failed, 2 wrong usage, 130 interrupted.";

const FAULTS_EXAMPLES: &str = "\
Examples:
  # every fault once on each path, about six minutes
  sudo penstock-lab faults

  # twelve runs with some of them
  sudo penstock-lab faults --schedules 12 \\
      --faults broker-killed,link-down,loss

  # repeat only the schedule that failed in a run with seed 42
  sudo penstock-lab faults --seed 42 --only 17

  # list the faults
  penstock-lab faults --list

In each run one to three publishers send numbered lines to a broker for about
three seconds, while the run's own fault happens up to three times and up to
three other faults happen as well. Afterwards the lab compares a reader's
lines with those acknowledged: no acknowledged line may be missing, duplicated,
torn or out of order within its stream. What a killed publisher left must be a
prefix of what it sent. The last line on stdout is the result folder. Exit
codes: 0 no problem, 1 a problem was found, 2 wrong usage, 130 interrupted.";

/// Runs Penstock workloads in network namespaces, measures them and writes reports.
#[derive(Debug, Parser)]
#[command(name = "penstock-lab", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publishes one workload to brokers, each in a namespace of its own, and reports the results.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Throughput(Throughput),
    /// Alternates Penstock and iperf3 on the same links and reports the ratio.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Baseline(Baseline),
    /// Alternates the xdp and tcp paths on the same workload and reports the ratios.
    #[command(after_help = COMPARE_EXAMPLES, args_override_self = true)]
    Compare(Compare),
    /// Measures everything that must hold, with peers on the same links, and says which targets are met.
    #[command(after_help = flags::EXAMPLES, args_override_self = true)]
    Bench(Box<flags::Bench>),
    /// Measures the limits of this host: bare AF_XDP, iperf3, and a copy in memory.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Limits(Limits),
    /// Shows a report.json again: in the terminal, or as an HTML page.
    #[command(after_help = show::EXAMPLES, args_override_self = true)]
    Report(Report),
    /// Answers a question about the kernel by measurement.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Observes a running TCP server for some seconds and reports what limits it.
    #[command(after_help = diagnose::EXAMPLES, args_override_self = true)]
    Diagnose(Diagnose),
    /// Checks whether this machine is ready for the xdp path, and says what to do.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(Doctor),
    /// Runs publishers and readers over bad links, stops and kills some of them, and checks that
    /// brokers lose nothing and leak nothing.
    #[command(after_help = SOAK_EXAMPLES)]
    Soak(Soak),
    /// Injects every kind of fault into publishers, brokers and readers on every path, and compares the
    /// logs with what publishers saw acknowledged.
    #[command(after_help = FAULTS_EXAMPLES)]
    Faults(Faults),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Run")]
pub struct Throughput {
    /// `wire`: segmentation offloads off on both ends, so that every packet costs what it would on a
    /// wire; `offload`: offloads on.
    #[arg(long, value_enum, default_value_t = Profile::Wire)]
    pub profile: Profile,
    /// MTU of every link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    /// Number of brokers, each in a namespace of its own.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub brokers: u32,
    /// Total bytes of messages to publish.
    #[arg(long, value_name = "SIZE", default_value = "10GiB", conflicts_with = "input",
        value_parser = size(1..=MAX_TOTAL))]
    pub total_size: ByteSize,
    /// Publish the lines of FILE (`-`: stdin) instead of synthetic messages.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Read every log and compare counts and SHA-256 of each stream with what the publisher sent. Reads
    /// afterwards if the rings can hold everything (they are sized to do so up to 4 GiB in total,
    /// unless --ring-size is given), else with registered readers during the run.
    #[arg(long)]
    pub verify: bool,
    /// Impair every link in both directions: a list of `loss`, `reorder` (1 to 16 packets or 2 ms
    /// late), `corrupt` (one bit), `duplicate`, `truncate`, each with `=SHARE` of the packets;
    /// `largest=BYTES`, the largest IP packet that passes; `protocol=udp|tcp|both` (default udp);
    /// `seed=N` to repeat a run.
    #[arg(long, value_name = "FAULTS")]
    pub faults: Option<FaultPlan>,
    /// Delay packets to the brokers, and so lengthen every round trip: 100us to 200ms; 10ms+5ms is a
    /// random delay of 10 to 15 ms that keeps the order.
    #[arg(long, value_name = "TIME")]
    pub delay: Option<Delay>,
    /// Diagnose the first broker during the run, for at most --diagnose-seconds: what limits
    /// throughput, with the evidence.
    #[arg(long)]
    pub diagnose: bool,
    /// Maximum length of the diagnosis, such as 5s; a number alone is seconds. It ends before the run
    /// does.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = parse_seconds, requires = "diagnose")]
    pub diagnose_seconds: f64,
    /// Run once more with the first-ranked cause removed, if the lab knows how.
    #[arg(long, requires = "diagnose")]
    pub fix: bool,
    /// First measure the limits of the link to the first broker, and show the percentage reached.
    #[arg(long, conflicts_with_all = ["faults", "delay"])]
    pub limits: bool,
    #[command(flatten)]
    pub route: Route,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Comparison")]
pub struct Baseline {
    /// Runs of each program per case.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Payload per run.
    #[arg(long, value_name = "SIZE", default_value = "2GiB", value_parser = size(1..=MAX_TOTAL))]
    pub size: ByteSize,
    /// MTU of the link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    /// Only this profile [default: both].
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// Numbers of connections to compare.
    #[arg(long, value_delimiter = ',', default_value = "1,4",
          value_parser = clap::value_parser!(u32).range(1..=128))]
    pub connections: Vec<u32>,
    #[command(flatten)]
    pub route: Route,
    #[command(flatten)]
    pub workload: Workload,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

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
    /// --quick 1s].
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

#[derive(Debug, Args)]
#[command(next_help_heading = "Measurement")]
pub struct Limits {
    /// Only this profile [default: both].
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// MTUs of the link, bytes.
    #[arg(long, value_delimiter = ',', default_value = "1500,9000",
          value_parser = clap::value_parser!(u32).range(576..=16384))]
    pub mtu: Vec<u32>,
    /// Runs of each measurement.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Length of a run, such as 2s; a number alone is seconds.
    #[arg(long, default_value = "2s", value_name = "DURATION", value_parser = parse_whole_seconds)]
    pub seconds: u32,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "What to check")]
pub struct Doctor {
    /// Interface to receive payload on; without it, only the machine is checked.
    #[arg(long, value_name = "NAME")]
    pub iface: Option<String>,
    /// Output format.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
    #[command(flatten)]
    pub programs: Programs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Run")]
pub struct Soak {
    /// Length of the run, such as 30m or 2h; a number alone is minutes.
    #[arg(long, default_value = "10m", value_name = "DURATION", value_parser = parse_minutes)]
    pub minutes: f64,
    /// Repeat the script of an earlier run by the seed in its report [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Runs")]
pub struct Faults {
    /// Number of fault runs [default: each fault once on each path].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub schedules: Option<u64>,
    /// Repeat the schedules of an earlier run by the seed in its report [default: random].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Only the schedule with this number.
    #[arg(
        long,
        value_name = "N",
        requires = "seed",
        conflicts_with = "schedules"
    )]
    pub only: Option<u64>,
    /// Paths; `fallback` is --mode auto while datagrams do not get through.
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "tcp,xdp,fallback"
    )]
    pub paths: Vec<FaultPath>,
    /// Only runs with these faults; --list shows them.
    #[arg(long, value_delimiter = ',', value_name = "FAULT", value_parser = fault_kind())]
    pub faults: Vec<String>,
    /// List the faults, and exit.
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

fn fault_kind() -> clap::builder::PossibleValuesParser {
    FAULT_CATALOG
        .iter()
        .map(|kind| kind.name)
        .collect::<Vec<_>>()
        .into()
}

/// Path that payload takes while there are faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FaultPath {
    Tcp,
    Xdp,
    Fallback,
}

impl FaultPath {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
            Self::Fallback => "fallback",
        }
    }
}

/// How brokers are started whose links have faults: all defaults, except path, topic and ring, and
/// native mode, which faults need also at an MTU for which `auto` would choose generic mode.
pub fn of_brokers(mode: Mode, topic: &str, ring: ByteSize) -> (Route, Workload) {
    /// The flags that subcommands pass on.
    #[derive(Parser)]
    struct Defaults {
        #[command(flatten)]
        route: Route,
        #[command(flatten)]
        workload: Workload,
    }
    let Defaults {
        mut route,
        mut workload,
    } = Defaults::parse_from(["defaults"]);
    route.mode = mode;
    route.xdp_mode = (mode != Mode::Tcp).then(|| "native".to_owned());
    topic.clone_into(&mut workload.topic);
    workload.ring_size = Some(ring);
    (route, workload)
}

/// The path of the payload, and how brokers receive it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Path")]
pub struct Route {
    /// Path of the payload.
    #[arg(long, value_enum, default_value_t = Mode::Tcp)]
    pub mode: Mode,
    /// How the publisher sends datagrams: `udp` or `af_xdp`.
    #[arg(long, value_parser = ["udp", "af_xdp"])]
    pub tx: Option<String>,
    /// How the brokers' interfaces run the XDP program: `auto`, `native` or `generic`.
    #[arg(long, value_parser = ["auto", "native", "generic"])]
    pub xdp_mode: Option<String>,
    /// What xdp workers do while no packet arrives: `busy` or `adaptive`.
    #[arg(long, value_parser = ["busy", "adaptive"])]
    pub poll: Option<String>,
}

/// Flags that subcommands pass on to publisher and brokers; those that are not given keep the programs'
/// own defaults.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub struct Workload {
    /// Let workers drive the interface's queue, this many packets a call.
    #[arg(long)]
    pub busy_poll: Option<u16>,
    /// Size of a synthetic message.
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = size(1..=MAX_TOTAL))]
    pub message_size: ByteSize,
    /// Acknowledgements: 0 none during the run; 1 once committed in the broker's shared buffer.
    #[arg(long, default_value = "1")]
    pub ack: AckLevel,
    /// Ordering: 0 per stream.
    #[arg(long, default_value = "0")]
    pub order: OrderLevel,
    /// Streams, each with a connection, that the publisher opens to each broker.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads_per_broker: u32,
    /// Payload bytes per batch.
    #[arg(long, value_name = "SIZE", value_parser = size(1..=1 << 30))]
    pub batch_size: Option<ByteSize>,
    /// Maximum number of unacknowledged batches of a stream.
    #[arg(long)]
    pub in_flight: Option<u32>,
    /// Worker threads per broker.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Payload bytes that each broker's ring holds.
    #[arg(long, value_name = "SIZE", value_parser = size(1..=1 << 46))]
    pub ring_size: Option<ByteSize>,
    /// What to do when a registered reader lags: `block` or `overwrite`.
    #[arg(long, value_parser = ["block", "overwrite"])]
    pub full: Option<String>,
    /// SO_RCVBUF that brokers request.
    #[arg(long, value_name = "SIZE", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub rcvbuf: Option<ByteSize>,
    /// SO_SNDBUF that brokers request.
    #[arg(long, value_name = "SIZE", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub sndbuf: Option<ByteSize>,
    /// Sockets on which brokers set it.
    #[arg(long, value_parser = ["none", "listener", "accepted", "both"])]
    pub rcvbuf_on: Option<String>,
    /// Use SO_RCVBUFFORCE, which net.core.rmem_max does not cap.
    #[arg(long)]
    pub rcvbuf_force: bool,
    /// Another flag for the brokers, such as --broker-option=--xdp-ring=2048; may be given several
    /// times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub broker_option: Vec<String>,
    /// Another flag for the publisher; may be given several times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub publisher_option: Vec<String>,
    /// Topic to publish to.
    #[arg(long, default_value = "penstock")]
    pub topic: String,
}

impl Default for Workload {
    /// The workload of a command line without flags.
    fn default() -> Self {
        #[derive(Parser)]
        struct Alone {
            #[command(flatten)]
            workload: Workload,
        }
        Alone::parse_from(["penstock-lab"]).workload
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Results")]
pub struct Output {
    /// Directory in which result folders are created.
    #[arg(long, value_name = "DIR", default_value = "results")]
    pub results: PathBuf,
    /// Output format; the path of the result folder follows as the last line.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Programs")]
pub struct Programs {
    /// Directory with penstock-broker and its companions [default: that of this program].
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
}

/// What the links of a testbed offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    Wire,
    Offload,
}

impl Profile {
    /// The requested one, or both.
    pub fn chosen(asked: Option<Self>) -> Vec<Self> {
        asked.map_or_else(|| vec![Self::Wire, Self::Offload], |profile| vec![profile])
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Offload => "offload",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// How an interface runs the XDP program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum XdpMode {
    Native,
    Generic,
}

impl XdpMode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
}

/// Paths whose processes are pinned to cores of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pin {
    Xdp,
    Both,
    None,
}

/// Path that payload takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    Tcp,
    Xdp,
    Auto,
}

impl Mode {
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
            Self::Auto => "auto",
        }
    }
}

fn parse_minutes(text: &str) -> Result<f64, String> {
    let range = Duration::from_secs(6)..=Duration::from_secs(100_000 * 60);
    let length = duration(BareUnit::Minutes, range)(text)?;
    Ok(length.as_secs_f64() / 60.0)
}

/// Seconds of a run.
pub fn parse_seconds(text: &str) -> Result<f64, String> {
    seconds_in(Duration::from_millis(100)..=Duration::from_secs(600))(text)
}

/// A parser for durations that are passed on as seconds.
pub fn seconds_in(
    range: RangeInclusive<Duration>,
) -> impl Fn(&str) -> Result<f64, String> + Clone + Send + Sync + 'static {
    let parse = duration(BareUnit::Seconds, range);
    move |text| parse(text).map(|length| length.as_secs_f64())
}

/// Whole seconds of a run.
fn parse_whole_seconds(text: &str) -> Result<u32, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(60);
    let length = duration(BareUnit::Seconds, range)(text)?;
    match length.subsec_nanos() {
        0 => Ok(length.as_secs() as u32),
        _ => Err("not a whole number of seconds".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn what_does_not_exist_is_refused_with_what_does() {
        for (option, value, supported) in [
            ("--mode", "udp", "tcp, xdp, auto"),
            ("--tx", "raw", "udp, af_xdp"),
            ("--poll", "often", "busy, adaptive"),
            ("--ack", "2", "supported: 0"),
            ("--order", "1", "supported: 0"),
            ("--mtu", "100", "576"),
            ("--faults", "noise=1%", "possible: loss"),
        ] {
            let error = Cli::try_parse_from(["penstock-lab", "throughput", option, value]);
            let text = error.unwrap_err().to_string();
            assert!(text.contains(supported), "{option} {value}: {text}");
        }
    }

    #[test]
    fn comparisons_and_limits_refuse_what_they_cannot_do() {
        for (line, words) in [
            (&["compare", "--runs", "0"][..], "1..=1000"),
            (&["compare", "--xdp-mode", "fast"], "native, generic"),
            (
                &["compare", "--mode", "xdp"],
                "unexpected argument '--mode'",
            ),
            (
                &["compare", "--latency-seconds", "0"],
                "from 100ms to 10m; the nearest is 100ms",
            ),
            (&["compare", "--mtu", "1500,65535"], "16384"),
            (
                &["compare", "--remote", "a:1", "--mtu", "1500"],
                "cannot be used with",
            ),
            (
                &["compare", "--remote", "a:1", "--brokers", "2"],
                "cannot be used with",
            ),
            (&["limits", "--seconds", "61"], "the nearest is 1m"),
            (&["limits", "--seconds", "1.5"], "whole number of seconds"),
            (
                &["throughput", "--rcvbuf", "4GiB"],
                "the nearest is 1073741823",
            ),
            (&["throughput", "--total-size", "5x"], "KiB, MiB, GiB"),
            (&["experiment", "rcvbuf", "--runs", "0"], "1..=1000"),
            (&["experiment", "rcvbuf", "--delay", "1s"], "such as 10ms"),
            (&["throughput", "--fix"], "--diagnose"),
            (&["report"], "FILE|DIR"),
            (&["report", "x", "--format", "pdf"], "text, html"),
            (&["experiment", "sndbuf"], "unrecognized subcommand"),
            (&["limits", "--profile", "best"], "wire, offload"),
        ] {
            let line = ["penstock-lab"].iter().chain(line);
            let text = Cli::try_parse_from(line).unwrap_err().to_string();
            assert!(text.contains(words), "{words}: {text}");
        }
    }
}
