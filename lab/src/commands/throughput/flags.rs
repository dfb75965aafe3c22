//! The command line of `penstock-lab throughput`.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::Args;
use penstock_flags::size;

use crate::settings::{Output, Programs, parse_seconds};
use penstock_testbed::delay::Delay;
use penstock_testbed::faults::FaultPlan;
use penstock_testbed::settings::{MAX_TOTAL, Profile, Route, Workload};

/// Flags of `throughput`.
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
