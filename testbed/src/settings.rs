//! Settings that a run passes on to brokers and publishers, as flags of the lab's own command line.

use bytesize::ByteSize;
use clap::{Args, Parser, ValueEnum};
use penstock_flags::{MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, size};
use penstock_wire::handshake::{AckLevel, OrderLevel};
use serde::{Deserialize, Serialize};

/// Maximum number of bytes of a run.
pub const MAX_TOTAL: u64 = 1 << 60;

/// What the links of a testbed offload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "clap would show it as help")]
pub enum Profile {
    // None: every packet costs what it would on a wire.
    Wire,
    // Segmentation, by the kernel or a network card.
    Offload,
}

impl Profile {
    /// The requested one, or both.
    pub fn chosen(asked: Option<Self>) -> Vec<Self> {
        asked.map_or_else(|| vec![Self::Wire, Self::Offload], |profile| vec![profile])
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Offload => "offload",
        }
    }
}

/// Path that payload takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "clap would show it as help")]
pub enum Mode {
    // TCP.
    Tcp,
    // AF_XDP.
    Xdp,
    // AF_XDP, or TCP where that is impossible.
    Auto,
}

impl Mode {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
            Self::Auto => "auto",
        }
    }
}

/// How an interface runs the XDP program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "clap would show it as help")]
pub enum XdpMode {
    // In the driver.
    Native,
    // After the driver, on the kernel's packet buffers.
    Generic,
}

impl XdpMode {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Generic => "generic",
        }
    }
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
    /// Let workers drive the interface's queue, this many packets per call.
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

/// Settings of brokers behind links with faults: defaults, except for path, topic and ring. Native mode,
/// because faults need it also at an MTU for which `auto` would choose generic mode.
pub fn for_faulty_links(mode: Mode, topic: &str, ring: ByteSize) -> (Route, Workload) {
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
