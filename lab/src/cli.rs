//! The command line.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand, ValueEnum};
use penstock_dataplane::wire::handshake::{AckLevel, OrderLevel};
use penstock_flags::{BareUnit, MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, duration, size};
use serde::{Deserialize, Serialize};

use crate::delay::Delay;
use crate::fault_runs::KINDS;
use crate::faults::FaultPlan;

use crate::diagnose::{self, Diagnose};
use crate::experiment::Experiment;
use crate::show::{self, Report};

/// Most bytes that a run can be asked for.
const MAX_TOTAL: u64 = 1 << 60;

const EXAMPLES: &str = "\
Examples:
  # the standard workload: 10 GiB in 1 KiB messages to four brokers
  sudo penstock-lab throughput --total-size 10GiB

  # a real file by lines, read back and compared with what was sent
  sudo penstock-lab throughput --input access.log --verify

  # the same over the xdp path and a network that loses, reorders, damages
  # and doubles packets
  sudo penstock-lab throughput --mode xdp --input access.log --verify \\
      --faults loss=1%,reorder=1%,corrupt=0.1%,duplicate=1%

  # what limits it, and what comes of removing that
  sudo penstock-lab throughput --diagnose --fix

  # one broker against iperf3 on the same links
  sudo penstock-lab baseline --runs 5

  # xdp against tcp on the same work, in under three minutes
  sudo penstock-lab compare --quick

  # what this host can do at best, and whether it is ready for the xdp path
  sudo penstock-lab limits
  sudo penstock-lab doctor --iface eth1

The last line on stdout is the result folder. Exit codes: 0 all acked and in
the logs, 1 not so, 2 wrong usage, 130 interrupted.";

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
failed, which a run is that fell back to tcp or was not acked whole, 2 wrong
usage, 130 interrupted.";

const DOCTOR_EXAMPLES: &str = "\
Examples:
  # is this machine ready, and which interfaces could be used
  penstock-lab doctor

  # an interface as well; with sudo it sees everything
  sudo penstock-lab doctor --iface eth1

Each check says ok, warn (slower, or not for everything) or fail (--mode xdp
does not work), why it matters and what to do. Nothing is changed. Exit codes:
0 nothing fails, 1 something does or there is no such interface, 2 wrong
usage.";

const SOAK_EXAMPLES: &str = "\
Examples:
  # an hour
  sudo penstock-lab soak --minutes 60

  # half a minute, the script of an earlier run
  sudo penstock-lab soak --minutes 0.5 --seed 42

All is well when every message that a publisher was told is acked is in the
log once, in order and whole, what killed publishers left is the beginning of
what they sent, brokers and readers count the same, each broker's memory has
not grown (median of the last quarter of the run at most 2 % and 4 MiB above
that of the second), and as many descriptors are open at the end as before the
first publisher. The last line on stdout is the result folder. Exit codes: 0
all is well, 1 not so, 2 wrong usage, 130 interrupted.";

const FAULTS_EXAMPLES: &str = "\
Examples:
  # every fault once on each path, some six minutes
  sudo penstock-lab faults

  # twelve runs of some of them
  sudo penstock-lab faults --schedules 12 \\
      --faults broker-killed,link-down,loss

  # what was a problem in a run with seed 42, alone
  sudo penstock-lab faults --seed 42 --only 17

  # what there is
  penstock-lab faults --list

In each run one to three publishers send numbered lines to a broker for some
three seconds, while the fault that the run is about happens up to three
times, and up to three others. Afterwards a reader's lines are compared with
what publishers were told: no acked line may be missing, none there twice,
torn, or before one that its stream had before. What a killed publisher left
must be the beginning of what it sent. The last line on stdout is the result
folder. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage, 130
interrupted.";

/// Runs Penstock workloads in network namespaces, measures them and writes reports.
#[derive(Debug, Parser)]
#[command(name = "penstock-lab", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publishes one workload to brokers in namespaces of their own and reports what happened.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Throughput(Throughput),
    /// Alternates Penstock with iperf3 on the same links and reports the ratio.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Baseline(Baseline),
    /// Alternates the xdp and the tcp path on the same work and reports the ratios.
    #[command(after_help = COMPARE_EXAMPLES, args_override_self = true)]
    Compare(Compare),
    /// Measures what this host can do at best: AF_XDP and nothing else, iperf3, a copy in memory.
    #[command(after_help = EXAMPLES, args_override_self = true)]
    Limits(Limits),
    /// Shows a report.json again: in the terminal, or as a page for a browser.
    #[command(after_help = show::EXAMPLES, args_override_self = true)]
    Report(Report),
    /// Settles a question about the kernel by measurement.
    #[command(subcommand)]
    Experiment(Experiment),
    /// Observes a running TCP server for some seconds and says what limits it.
    #[command(after_help = diagnose::EXAMPLES, args_override_self = true)]
    Diagnose(Diagnose),
    /// Looks whether this machine is ready for the xdp path, and says what to do.
    #[command(after_help = DOCTOR_EXAMPLES)]
    Doctor(Doctor),
    /// Lets publishers and readers come and go over bad links, stops and kills some, and looks whether
    /// brokers lose or keep anything.
    #[command(after_help = SOAK_EXAMPLES)]
    Soak(Soak),
    /// Lets every kind of fault befall publishers, brokers and readers, on every path, and compares logs
    /// with what publishers were told.
    #[command(after_help = FAULTS_EXAMPLES)]
    Faults(Faults),
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Run")]
pub struct Throughput {
    /// `wire`: segmentation offloads off on both ends, every packet costs what it would on a wire;
    /// `offload`: left on.
    #[arg(long, value_enum, default_value_t = Profile::Wire)]
    pub profile: Profile,
    /// MTU of every link, bytes.
    #[arg(long, default_value_t = 1500, value_parser = clap::value_parser!(u32).range(576..=65535))]
    pub mtu: u32,
    /// Brokers, each in a namespace of its own.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub brokers: u32,
    /// Bytes of messages to publish in all.
    #[arg(long, value_name = "SIZE", default_value = "10GiB", conflicts_with = "input",
        value_parser = size(1..=MAX_TOTAL))]
    pub total_size: ByteSize,
    /// Publish the lines of FILE (`-`: stdin) instead of synthetic messages.
    #[arg(long, value_name = "FILE")]
    pub input: Option<PathBuf>,
    /// Read every log and compare counts and SHA-256 of each stream with what the publisher sent:
    /// afterwards if the rings hold it all (they are sized so up to 4 GiB together, unless
    /// --ring-size is given), else by registered readers that follow while it runs.
    #[arg(long)]
    pub verify: bool,
    /// Make every link a bad one, both ways: a list of `loss`, `reorder` (1 to 16 packets or 2 ms late),
    /// `corrupt` (one bit), `duplicate`, `truncate`, each `=SHARE` of the packets; `largest=BYTES` of
    /// an IP packet that gets through; `protocol=udp|tcp|both` (default udp); `seed=N` to repeat a run.
    #[arg(long, value_name = "FAULTS")]
    pub faults: Option<FaultPlan>,
    /// Make packets to the brokers wait on their way, and so every round trip longer: 100us to 200ms;
    /// 10ms+5ms is 10 to 15 ms by chance, in order.
    #[arg(long, value_name = "TIME")]
    pub delay: Option<Delay>,
    /// Diagnose the first broker while it runs, for at most --diagnose-seconds: what limits the
    /// throughput, with the evidence.
    #[arg(long)]
    pub diagnose: bool,
    /// Longest diagnosis, such as 5s; a number alone is seconds. It ends before the run does.
    #[arg(long, default_value = "5s", value_name = "DURATION", value_parser = parse_seconds, requires = "diagnose")]
    pub diagnose_seconds: f64,
    /// Run once more with the cause that is named first removed, if the lab can do that.
    #[arg(long, requires = "diagnose")]
    pub fix: bool,
    /// Measure before what the link to the first broker can do at best, and show the percentage.
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
    /// Only this profile; default both.
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// Connection counts to compare.
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
    /// Fewer and smaller runs: all of it in under three minutes.
    #[arg(long)]
    pub quick: bool,
    /// Only this profile; default both.
    #[arg(long, value_enum)]
    pub profile: Option<Profile>,
    /// MTUs of the links, bytes.
    #[arg(long, value_delimiter = ',', default_value = "1500,9000",
          value_parser = clap::value_parser!(u32).range(576..=16384))]
    pub mtu: Vec<u32>,
    /// Only this mode of the XDP program; default both, and the better one counts.
    #[arg(long, value_enum)]
    pub xdp_mode: Option<XdpMode>,
    /// Brokers, each in a namespace of its own.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub brokers: u32,
    /// Runs of each path per figure; default 5, with --quick 3.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: Option<u32>,
    /// Payload of a run at full speed; default 2GiB, with --quick 512MiB.
    #[arg(long, value_name = "SIZE", value_parser = size(1..=MAX_TOTAL))]
    pub size: Option<ByteSize>,
    /// Length of a run at a rate, such as 3s; a number alone is seconds; default 3s, with --quick 1s.
    #[arg(long, value_name = "DURATION", value_parser = parse_seconds)]
    pub latency_seconds: Option<f64>,
    /// Batches a second at the low rate, one message in each. The high rate is half of what the
    /// slower path moves at full speed, in full batches.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub low_rate: u32,
    /// Which path's processes stay on cores of their own while latency is measured, the workers on
    /// the last cores, the publisher on the others: `xdp` (its workers never sleep then), `both`
    /// or `none`.
    #[arg(long, value_enum, default_value_t = Pin::Xdp)]
    pub pin: Pin,
    /// Compare against brokers that run elsewhere, host:port, started with --mode xdp: only the
    /// publisher runs here, and no namespace is made.
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
    /// Only this profile; default both.
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
#[command(next_help_heading = "What is looked at")]
pub struct Doctor {
    /// Interface that payload is to come in on; without, the machine only.
    #[arg(long, value_name = "NAME")]
    pub iface: Option<String>,
    /// How the result is printed.
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
    /// Repeats the script of an earlier run, as its report tells it; another each time if not given.
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
    /// Fault runs; default: each fault once on each path.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub schedules: Option<u64>,
    /// Repeats the schedules of an earlier run, as its report tells it; others each time if not given.
    #[arg(long)]
    pub seed: Option<u64>,
    /// Only this schedule of them.
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
    /// Only runs that are about these faults; --list tells them.
    #[arg(long, value_delimiter = ',', value_name = "FAULT", value_parser = fault_kind())]
    pub faults: Vec<String>,
    /// Tell what faults there are, and end.
    #[arg(long)]
    pub list: bool,
    #[command(flatten)]
    pub programs: Programs,
    #[command(flatten)]
    pub output: Output,
}

fn fault_kind() -> clap::builder::PossibleValuesParser {
    KINDS
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

/// What brokers are started with: the defaults of everything but path, topic and ring.
pub fn of_brokers(mode: Mode, topic: &str, ring: ByteSize) -> (Route, Workload) {
    /// The flags that subcommands hand on.
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
    topic.clone_into(&mut workload.topic);
    workload.ring_size = Some(ring);
    (route, workload)
}

/// The path of the payload, and how brokers take it.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Path")]
pub struct Route {
    /// Path of the payload.
    #[arg(long, value_enum, default_value_t = Mode::Tcp)]
    pub mode: Mode,
    /// How the publisher's datagrams leave: `udp` or `af_xdp`.
    #[arg(long, value_parser = ["udp", "af_xdp"])]
    pub tx: Option<String>,
    /// How the brokers' interfaces run the XDP program: `auto`, `native` or `generic`.
    #[arg(long, value_parser = ["auto", "native", "generic"])]
    pub xdp_mode: Option<String>,
    /// What xdp workers do while no packet comes: `busy` or `adaptive`.
    #[arg(long, value_parser = ["busy", "adaptive"])]
    pub poll: Option<String>,
}

/// What subcommands hand on to publisher and brokers; what is not given is left to their own
/// defaults.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workload")]
pub struct Workload {
    /// Packets a call that workers drive the interface's queue by.
    #[arg(long)]
    pub busy_poll: Option<u16>,
    /// Bytes per synthetic message.
    #[arg(long, value_name = "SIZE", default_value = "1KiB", value_parser = size(1..=MAX_TOTAL))]
    pub message_size: ByteSize,
    /// 0: none while running; 1: once committed in the broker's shared buffer.
    #[arg(long, default_value = "1")]
    pub ack: AckLevel,
    /// 0: per stream.
    #[arg(long, default_value = "0")]
    pub order: OrderLevel,
    /// Streams, each with a connection, that the publisher opens to each broker.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads_per_broker: u32,
    /// Payload per batch.
    #[arg(long, value_name = "SIZE", value_parser = size(1..=1 << 30))]
    pub batch_size: Option<ByteSize>,
    /// Batches of a stream that may be unacknowledged.
    #[arg(long)]
    pub in_flight: Option<u32>,
    /// Threads that receive, per broker.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub workers: Option<u32>,
    /// Payload ring of each broker's log.
    #[arg(long, value_name = "SIZE", value_parser = size(1..=1 << 46))]
    pub ring_size: Option<ByteSize>,
    /// When a registered reader lags: `block` or `overwrite`.
    #[arg(long, value_parser = ["block", "overwrite"])]
    pub full: Option<String>,
    /// SO_RCVBUF that brokers ask for.
    #[arg(long, value_name = "SIZE", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub rcvbuf: Option<ByteSize>,
    /// SO_SNDBUF that brokers ask for.
    #[arg(long, value_name = "SIZE", value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    pub sndbuf: Option<ByteSize>,
    /// Where brokers set it.
    #[arg(long, value_parser = ["none", "listener", "accepted", "both"])]
    pub rcvbuf_on: Option<String>,
    /// Use SO_RCVBUFFORCE, which net.core.rmem_max does not cap.
    #[arg(long)]
    pub rcvbuf_force: bool,
    /// Further flag of the brokers, such as --broker-option=--xdp-ring=2048; may be given several
    /// times.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub broker_option: Vec<String>,
    /// Further flag of the publisher, likewise.
    #[arg(long, value_name = "FLAG", allow_hyphen_values = true)]
    pub publisher_option: Vec<String>,
    /// Topic to publish to.
    #[arg(long, default_value = "penstock")]
    pub topic: String,
}

impl Default for Workload {
    /// That of a command line on which nothing is given.
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
    /// Where result folders are created.
    #[arg(long, value_name = "DIR", default_value = "results")]
    pub results: PathBuf,
    /// How the result is printed, before the line with the folder.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    pub format: Format,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Programs")]
pub struct Programs {
    /// Where penstock-broker and its companions are; default: beside this program.
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
    /// The one that was asked for, or both.
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

/// Paths whose processes are kept on cores of their own.
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

/// A parser of durations that are handed on as seconds.
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
