//! Command line of the broker.

mod config;

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use clap::{Parser, ValueEnum};
use nix::unistd::geteuid;
use penstock_auth::TopicPattern;
use penstock_flags::{BareUnit, MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, duration, size};
use penstock_ingest::session::buffers::RcvbufOn;
use penstock_ingest::session::shares;
use penstock_runtime::address;

pub use self::config::Config;
use crate::buffer_dir;
use crate::topic_policy::Creators;
use crate::xdp_settings::XdpMode;

const EXAMPLES: &str = "\
Examples:
  # Serve publishers on port 1214, logs in /dev/shm/penstock:
  penstock-broker

  # Receive payload from interface eth1, bypassing the kernel's network stack:
  sudo penstock-broker --mode xdp --iface eth1

  # The same, but drop root privileges after startup; logs belong to the user
  # penstock:
  sudo penstock-broker --mode xdp --iface eth1 --user penstock

  # Use receive queue 3 only, and apply the NIC settings that this needs while
  # the broker runs:
  sudo penstock-broker --mode xdp --iface eth1 --queues 3 --configure-nic

  # Two workers on cores 0 and 1, a 1 GiB ring, receive buffers above rmem_max:
  sudo penstock-broker --workers 2 --cpus 0,1 --ring-size 1GiB --rcvbuf-force

  # Require a key; create one and add it to the file of accepted keys:
  penstock-broker --keygen eu.key
  cat eu.key >>keys && chmod 600 keys && penstock-broker --auth-keys keys

  # Set SO_RCVBUF on the listener too, which raises the window scale, and write
  # a report at the end:
  penstock-broker --rcvbuf-on both --report broker.json

  # Let publishers on any host create topics that begin with trades., at most
  # 64:
  penstock-broker --create-topics any --topics 'trades.*' --max-topics 64

A topic's log is <buffer-dir>/<topic>.log; read it in place with
penstock-subscriber --path, or from another host with --brokers (see
--remote-subscribers). Logs go to stderr (RUST_LOG sets the level).
SIGINT and SIGTERM end the broker; its logs stay.
SIGHUP reloads --auth-keys. Under systemd: Type=notify, WatchdogSec=.
Exit codes: 0 ended by a signal, 1 failed (also when a thread ends
unexpectedly), 2 wrong usage.";

const PATH: &str = "Kernel bypass (xdp)";
const LISTEN: &str = "Connections";
const LOGS: &str = "Topics and logs";
const PROCESS: &str = "Process";
const SECURITY: &str = "Security";

/// Accepted range of timeouts.
const TIMEOUTS: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(86_400);
/// Accepted segment sizes, bytes; both bounds are powers of two.
const SEGMENTS: RangeInclusive<u64> = 4096..=1 << 31;
/// Maximum of --max-connections and of --max-handshakes: the kernel gives a process about as many
/// descriptors (`fs.nr_open`).
const MAX_SOCKETS: i64 = 1 << 20;
/// Maximum of --max-subscribers: one thread serves all of them.
const MAX_SUBSCRIBERS: i64 = 16_384;
/// Maximum of --max-topics.
const MAX_TOPICS: i64 = 65_536;
/// Largest ring, bytes.
const MAX_RING: u64 = 1 << 46;

/// Takes batches from publishers into shared buffers that other processes read in place.
#[derive(Debug, Parser)]
#[command(name = "penstock-broker", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Paths that payload may take. With xdp, the broker also serves publishers that ask for tcp; auto
    /// uses xdp where it is available.
    #[arg(long, value_enum, default_value_t = Mode::Tcp, help_heading = PATH)]
    mode: Mode,
    /// Interface that the xdp path receives on.
    #[arg(long, value_name = "NAME", help_heading = PATH)]
    iface: Option<String>,
    /// Receive queues of the interface, such as 0,2-3 [default: all].
    #[arg(long, value_name = "LIST", help_heading = PATH)]
    queues: Option<String>,
    /// How the interface runs the XDP program.
    #[arg(long, value_enum, default_value_t = XdpMode::Auto, help_heading = PATH)]
    xdp_mode: XdpMode,
    /// Use copy mode, even if the driver supports zero-copy.
    #[arg(long, help_heading = PATH)]
    xdp_copy: bool,
    /// Replace another XDP program on the interface.
    #[arg(long, help_heading = PATH)]
    force: bool,
    /// Size of a receive queue's rings, packets: a power of two. It limits the packets in flight from
    /// all publishers together. Small rings stay in the CPU's cache.
    #[arg(long, default_value_t = 1024, help_heading = PATH)]
    xdp_ring: u32,
    /// What xdp workers do while no packet arrives: busy polls without a pause and needs a core of its
    /// own, adaptive sleeps after a short time.
    #[arg(long, value_enum, default_value_t = Poll::Adaptive, help_heading = PATH)]
    poll: Poll,
    /// Let the worker drive the interface's queue, this many packets per call (SO_PREFER_BUSY_POLL).
    #[arg(long, value_name = "PACKETS", help_heading = PATH,
        value_parser = clap::value_parser!(u16).range(1..=1024))]
    busy_poll: Option<u16>,
    /// Change the interface's settings (queues, receive hashing, offloads) where the xdp path needs it,
    /// and revert them at the end. Without this flag, the broker only prints the commands.
    #[arg(long, help_heading = PATH)]
    configure_nic: bool,
    /// Revert the changes that a broker made to an interface, if both the broker and its helper process
    /// were killed; then exit.
    #[arg(long, value_name = "NAME", help_heading = PATH)]
    restore_nic: Option<String>,
    /// For --restore-nic: wait until the broker is gone.
    #[arg(long, hide = true, requires = "restore_nic")]
    when_gone: bool,
    /// Address and port to listen on: 10.0.0.1:1214, [fe80::1%eth0]:1214, localhost:1214, or :1214 for
    /// all addresses, IPv4 and IPv6.
    #[arg(long, default_value = "0.0.0.0:1214", value_parser = address::listen, help_heading = LISTEN)]
    listen: SocketAddr,
    /// Directory of the logs, by default on tmpfs. No user except root and the broker's own may be able
    /// to write to it or to replace it.
    #[arg(long, default_value_os_t = default_directory(), help_heading = LOGS)]
    buffer_dir: PathBuf,
    /// Accept a buffer directory that other users can write to, such as a Kubernetes emptyDir. The
    /// broker follows no link and opens no file of theirs, but they can delete its files.
    #[arg(long, help_heading = LOGS)]
    shared_buffer_dir: bool,
    /// Mode of the logs, in octal: 640 lets the group read them and register readers, 644 lets everyone
    /// read them, 600 only the broker's user.
    #[arg(long, default_value = "640", value_name = "MODE", help_heading = LOGS)]
    buffer_mode: String,
    /// Group of the logs [default: that of the broker's user].
    #[arg(long, value_name = "NAME", help_heading = LOGS)]
    buffer_group: Option<String>,
    /// Payload bytes that a topic's ring holds: a multiple of --segment-size.
    #[arg(long, value_name = "SIZE", default_value = "256MiB", help_heading = LOGS,
        value_parser = size(0..=MAX_RING))]
    ring_size: ByteSize,
    /// Size of a segment, a power of two from 4KiB; a batch is at most half of one.
    #[arg(long, value_name = "SIZE", default_value = "16MiB", help_heading = LOGS,
        value_parser = size(0..=*SEGMENTS.end()))]
    segment_size: ByteSize,
    /// Batches that a topic's index holds: a power of two.
    #[arg(long, default_value_t = 65536, help_heading = LOGS)]
    index_slots: u64,
    /// What to do when a registered reader lags: wait for it, or overwrite.
    #[arg(long, value_enum, default_value_t = FullPolicy::Block, help_heading = LOGS)]
    full: FullPolicy,
    /// Report a registered reader that is alive but has read nothing for this long and blocks its log,
    /// such as 30s; a number alone is seconds. The broker never waits for a reader that died.
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = LOGS,
        value_parser = duration(BareUnit::Seconds, TIMEOUTS))]
    reader_timeout: Duration,
    /// What else to do with such a reader under --full block: only report it, so that nothing is lost,
    /// or evict it. An evicted reader learns of it at its next read. With evict, readers copy what they
    /// read.
    #[arg(long, value_enum, default_value_t = ReaderTimeoutAction::Report, help_heading = LOGS)]
    reader_timeout_action: ReaderTimeoutAction,
    /// What to do when a topic's log is deleted, replaced or truncated under the broker: end its
    /// streams with an error, or recreate the log and continue them in it. The old contents are lost
    /// either way.
    #[arg(long, value_enum, default_value_t = OnDeletedLog::End, help_heading = LOGS)]
    on_deleted_log: OnDeletedLog,
    /// Topic to create at startup; may be given several times.
    #[arg(long = "topic", value_name = "NAME", help_heading = LOGS)]
    topics: Vec<String>,
    /// Who may create other topics by publishing to them [default: keyed with --auth-keys, else local].
    /// A log that already exists in the directory is always a topic.
    #[arg(
        long,
        value_enum,
        value_name = "never|local|keyed|any",
        hide_possible_values = true,
        overrides_with = "create_topics",
        help_heading = LOGS
    )]
    create_topics: Option<Creators>,
    /// Topics that publishers may create: names, or prefixes followed by *, such as trades.* [default:
    /// all].
    #[arg(long = "topics", value_name = "PATTERN,...", value_delimiter = ',', help_heading = LOGS)]
    topic_patterns: Vec<TopicPattern>,
    /// Maximum number of topics; each uses the memory of one ring.
    #[arg(long, value_name = "N", default_value_t = 16, help_heading = LOGS,
        value_parser = clap::value_parser!(u32).range(1..=MAX_TOPICS))]
    max_topics: u32,
    /// Maximum number of remote subscribers at once.
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = LISTEN,
        value_parser = clap::value_parser!(u32).range(1..=MAX_SUBSCRIBERS))]
    max_subscribers: u32,
    /// Maximum number of open streams.
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = LISTEN,
        value_parser = clap::value_parser!(u32).range(1..=MAX_SOCKETS))]
    max_connections: u32,
    /// Maximum share of streams, sessions and topics, in percent of what others leave free, that one
    /// host (IPv6: /64), or one key on a host, may hold. All hosts that share a key, or an
    /// IPv6 /48, may together also hold half of the rest.
    #[arg(long, value_name = "PERCENT", overrides_with = "max_share", help_heading = LISTEN,
        default_value_t = shares::DEFAULT_PERCENT,
        value_parser = clap::value_parser!(u8).range(1..=100))]
    max_share: u8,
    /// Maximum number of connections with an unfinished handshake. Beyond it, the broker closes the
    /// oldest of the host that has most.
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = LISTEN,
        value_parser = clap::value_parser!(u32).range(1..=MAX_SOCKETS))]
    max_handshakes: u32,
    /// Time limit for a handshake, such as 5s or 500ms; a number alone is seconds.
    #[arg(long, value_name = "DURATION", default_value = "5s", help_heading = LISTEN,
        value_parser = duration(BareUnit::Seconds, TIMEOUTS))]
    handshake_timeout: Duration,
    /// How long a publisher may stall inside a batch (tcp) or stay silent (xdp, where a live publisher
    /// sends something every second); a number alone is seconds.
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = LISTEN,
        value_parser = duration(BareUnit::Seconds, TIMEOUTS))]
    stall_timeout: Duration,
    /// SO_RCVBUF of payload sockets; the kernel caps it at net.core.rmem_max, then doubles it.
    #[arg(long, value_name = "SIZE", default_value = "32MiB", help_heading = LISTEN,
        value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    rcvbuf: ByteSize,
    /// SO_SNDBUF of payload sockets; capped at net.core.wmem_max.
    #[arg(long, value_name = "SIZE", default_value = "32MiB", help_heading = LISTEN,
        value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    sndbuf: ByteSize,
    /// Sockets that get --rcvbuf. none leaves the kernel's autotuning on; setting it on the listener
    /// also raises the window scale and the initial window.
    #[arg(
        long,
        default_value = "accepted",
        value_name = "none|listener|accepted|both",
        help_heading = LISTEN
    )]
    rcvbuf_on: RcvbufOn,
    /// Use SO_RCVBUFFORCE, which is not capped; needs CAP_NET_ADMIN.
    #[arg(long, help_heading = LISTEN)]
    rcvbuf_force: bool,
    /// Worker threads.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = PROCESS,
        value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Cores that workers are pinned to, in turn, such as 0,2-3.
    #[arg(long, value_name = "LIST", help_heading = PROCESS)]
    cpus: Option<String>,
    /// User to switch to once everything is open, when started as root. The broker drops its
    /// capabilities in any case.
    #[arg(long, value_name = "NAME", help_heading = PROCESS)]
    user: Option<String>,
    /// File with the keys of publishers and subscribers, one per line: a name, a secret of 64 hexadecimal
    /// digits, and topics. trades.* permits publishing to all that begin with trades., read:trades.*
    /// permits reading them, and register:trades.* also registering (see --remote-registration). Without
    /// this flag, anyone may publish.
    #[arg(long, value_name = "FILE", help_heading = SECURITY)]
    auth_keys: Option<PathBuf>,
    /// Who may read topics over the network: holders of a key with read:TOPIC or register:TOPIC (keyed),
    /// anyone who can reach the broker (any, only without --auth-keys), or nobody (never). --buffer-mode
    /// says who may read the logs in place.
    #[arg(long, value_enum, default_value_t = RemoteSubscribers::Keyed, value_name = "keyed|any|never",
        hide_possible_values = true, help_heading = SECURITY)]
    remote_subscribers: RemoteSubscribers,
    /// Which remote subscribers may register, so that publishers to a log with --full block wait for
    /// them: holders of a key with register:TOPIC (keyed), or anyone (any, only with
    /// --remote-subscribers any). The broker disconnects one that makes no progress for --reader-timeout
    /// while publishers wait for it.
    #[arg(long, value_enum, default_value_t = RemoteRegistration::Keyed, value_name = "keyed|any",
        hide_possible_values = true, help_heading = SECURITY)]
    remote_registration: RemoteRegistration,
    /// Accept only authenticated payload: each packet over xdp, and each batch over tcp, carries a tag
    /// that only a holder of the stream's key can make. Without this flag, publishers may ask for it.
    #[arg(long, requires = "auth_keys", help_heading = SECURITY)]
    packet_auth: bool,
    /// Create a key, write it to a new file that only its owner can read, and exit. Give the file to
    /// the publisher's --auth-key, and add its line to the file of --auth-keys.
    #[arg(long, value_name = "FILE", help_heading = SECURITY)]
    keygen: Option<PathBuf>,
    /// Check each batch against its CRC32C before committing it (readers can always do so).
    #[arg(long, help_heading = LOGS)]
    verify_on_receive: bool,
    /// Write a JSON report to this file at the end.
    #[arg(long, value_name = "FILE", help_heading = PROCESS)]
    report: Option<PathBuf>,
    /// Write the line READY=1 to this descriptor, 3 or higher, once publishers can connect. For scripts
    /// that start a broker with the descriptor open, as in --ready-fd 3 3>FILE.
    #[arg(long, value_name = "FD", help_heading = PROCESS)]
    ready_fd: Option<i32>,
}

/// Paths that payload may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Accepted sockets.
    Tcp,
    /// AF_XDP sockets.
    Xdp,
    /// AF_XDP sockets if available, and accepted sockets in any case.
    Auto,
}

/// Which remote subscribers are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RemoteSubscribers {
    /// Those with a key that permits reading the topic.
    Keyed,
    /// All, on a broker without keys.
    Any,
    /// None.
    Never,
}

/// Which remote subscribers may register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum RemoteRegistration {
    /// Those with a key that permits it.
    Keyed,
    /// All, on a broker without keys.
    Any,
}

/// What workers do while no packet comes.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Poll {
    /// Poll again at once.
    Busy,
    /// Sleep after a short time.
    Adaptive,
}

/// What happens to a registered reader that is alive but does not read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ReaderTimeoutAction {
    /// A log line and counters.
    Report,
    /// The broker stops waiting for it.
    Evict,
}

/// What happens to streams whose log is deleted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnDeletedLog {
    /// They end with an error.
    End,
    /// They go on in a new log.
    Recreate,
}

/// Policy when a registered reader lags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum FullPolicy {
    /// Wait: nothing is lost, and publishers are blocked.
    Block,
    /// Overwrite: the reader learns how much it lost.
    Overwrite,
}

impl Cli {
    /// The file to write a new key to, if the program is to create one instead of running a broker.
    pub fn keygen(&self) -> Option<&Path> {
        self.keygen.as_deref()
    }

    /// The interface whose settings to restore instead of running a broker, and whether to wait until
    /// the broker that changed them has ended.
    pub fn restore(&self) -> Option<(&str, bool)> {
        let interface = self.restore_nic.as_deref()?;
        Some((interface, self.when_gone))
    }
}

/// Root and services use the shared memory that every Linux host has. A user gets the directory that
/// the system made for that user alone, if there is one.
fn default_directory() -> PathBuf {
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match own.filter(|own| own.is_absolute() && !geteuid().is_root()) {
        Some(own) => own.join("penstock"),
        None => PathBuf::from(buffer_dir::DEFAULT),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(flags: &[&str]) -> anyhow::Result<Config> {
        let words = ["penstock-broker"].iter().chain(flags);
        Cli::try_parse_from(words)?.check()
    }

    #[test]
    fn defaults_are_valid() {
        let config = check(&[]).unwrap();
        assert_eq!(config.listen, "0.0.0.0:1214".parse().unwrap());
        let config = check(&["--listen", ":7"]).unwrap();
        assert!(config.listen.ip().is_unspecified() && config.listen.port() == 7);
        assert_eq!(config.buffers.rcvbuf, 32 << 20);
    }

    #[test]
    fn examples_are_valid_and_fit_in_80_columns() {
        assert_eq!(EXAMPLES.lines().find(|line| line.len() > 79), None);
        let examples = penstock_flags::examples(EXAMPLES, "penstock-broker");
        assert!(examples.len() > 7);
        for words in examples {
            let cli = Cli::try_parse_from(&words).unwrap();
            if cli.keygen().is_none() {
                cli.check().unwrap();
            }
        }
    }

    #[test]
    fn durations_take_units() {
        let config = check(&["--stall-timeout", "1m", "--handshake-timeout", "250ms"]).unwrap();
        assert_eq!(config.worker.stall_timeout, Duration::from_secs(60));
        assert_eq!(config.limits.handshake_timeout, Duration::from_millis(250));
        let config = check(&["--stall-timeout", "2"]).unwrap();
        assert_eq!(config.worker.stall_timeout, Duration::from_secs(2));
    }

    #[test]
    fn wrong_flags_say_what_to_do() {
        for (flags, words) in [
            (&["--mode", "xdp"][..], "--iface"),
            (&["--mode", "udp"], "possible values: tcp, xdp, auto"),
            (&["--iface", "eth1"], "--mode xdp or auto"),
            (&["--configure-nic"], "--configure-nic needs"),
            (&["--when-gone"], "--restore-nic"),
            (
                &["--mode", "xdp", "--iface", "eth1", "--xdp-ring", "1000"],
                "--xdp-ring",
            ),
            (
                &["--mode", "xdp", "--iface", "eth1", "--queues", "a"],
                "--queues",
            ),
            (&["--listen", "10.0.0.1"], "no port; give 10.0.0.1:1214"),
            (&["--listen", "[fe80::1]:1"], "link-local address"),
            (&["--ring-size", "17MiB"], "the nearest is 32MiB"),
            (&["--ring-size", "0"], "the nearest is 32MiB"),
            (&["--ring-size", "9000TiB"], "the nearest is 64TiB"),
            (&["--ring-size", "16EiB"], "the nearest is 64TiB"),
            (&["--segment-size", "8EiB"], "the nearest is 2GiB"),
            (&["--ring-size", "17x"], "KiB, MiB, GiB"),
            (&["--segment-size", "3MiB"], "the nearest is 4MiB"),
            (&["--segment-size", "1"], "the nearest is 4KiB"),
            (&["--workers", "0"], "0 is not in 1..=256"),
            (&["--workers", "257"], "257 is not in 1..=256"),
            (&["--max-connections", "0"], "0 is not in 1..=1048576"),
            (&["--max-connections", "2000000"], "1..=1048576"),
            (&["--max-handshakes", "0"], "0 is not in 1..=1048576"),
            (&["--max-topics", "0"], "0 is not in 1..=65536"),
            (&["--index-slots", "0"], "power of two"),
            (&["--index-slots", "18446744073709551615"], "power of two"),
            (&["--xdp-ring", "0"], "--xdp-ring 0 is not a power of two"),
            (&["--rcvbuf", "1"], "the nearest is 4KiB"),
            (&["--busy-poll", "0"], "1..=1024"),
            (&["--reader-timeout", "0"], "the nearest is 1ms"),
            (&["--topic", "../etc"], "is not allowed"),
            (&["--topics", "a,b*c"], "nor a prefix followed by *"),
            (&["--create-topics", "keyed"], "--auth-keys"),
            (&["--create-topics", "all"], "never, local, keyed, any"),
            (&["--max-share", "0"], "1..=100"),
            (&["--rcvbuf", "8GiB"], "the nearest is 1073741823"),
            (&["--sndbuf", "0"], "the nearest is 4KiB"),
            (&["--handshake-timeout", "0"], "the nearest is 1ms"),
            (&["--stall-timeout", "5x"], "such as 5s"),
            (&["--rcvbuf-on", "some"], "none, listener, accepted, both"),
            (&["--buffer-mode", "660"], "mode 660 is none of"),
            (&["--buffer-mode", "rw"], "not a file mode such as 640"),
            (&["--buffer-group", "no-such-group"], "getent group"),
            (&["--packet-auth"], "--auth-keys"),
            (&["--cpus", "1-x"], "1-x"),
            (&["--index-slots", "64"], "--index-slots of at least 8192"),
            (&["--stall-timeout=-1"], "not a duration"),
        ] {
            let error = format!("{:#}", check(flags).unwrap_err());
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }
}
