//! Command line of the publisher, and what it means.

use std::path::PathBuf;
use std::time::Duration;

use crate::{Config, Mode, OnBrokerLoss, Transmit};
use anyhow::{Result, bail};
use bytesize::ByteSize;
use clap::{Parser, ValueEnum};
use penstock_flags::{BareUnit, MAX_SOCKET_BUFFER, MIN_SOCKET_BUFFER, duration, size, size_text};
use penstock_runtime::address::{AddressError, check_broker};
use penstock_wire::handshake::{AckLevel, MAX_STREAMS, OrderLevel, check_topic};

const EXAMPLES: &str = "\
Examples:
  # Publish each line that another program prints:
  journalctl -f | penstock-publisher --brokers 10.0.0.1:1214

  # Publish each line of a file:
  penstock-publisher --brokers 10.0.0.1:1214 --input app.log

  # 1 GB of synthetic messages of 1 KiB to two brokers:
  penstock-publisher --brokers 10.0.0.1:1214,10.0.0.2:1214 --synthetic \\
      --total-size 1GB --message-size 1KiB

  # Bypass the kernel's network stack, through a transmit queue of its own:
  sudo penstock-publisher --brokers 10.0.0.1:1214 --synthetic --mode xdp \\
      --tx af_xdp --tx-queue 3

  # To brokers that only accept publishers with a key:
  penstock-publisher --brokers 10.0.0.1:1214 --auth-key eu.key --input app.log

  # 100 MB/s in four streams, summary as JSON:
  penstock-publisher --brokers 10.0.0.1:1214 --synthetic --rate 100MB \\
      --threads-per-broker 4 --format json

  # 1,000 batches a second, each with one message of 1 KiB (plus 4 bytes):
  penstock-publisher --brokers 10.0.0.1:1214 --synthetic --rate 1024000 \\
      --message-size 1024 --batch-size 1028 --total-size 10MB

Ctrl-C stops reading, waits up to 2 s for acks and prints the summary.
Exit codes: 0 every message acknowledged, 1 failed, 2 wrong usage,
130 interrupted.";

const TARGET: &str = "Brokers and topic";
const MESSAGES: &str = "Messages";
const DELIVERY: &str = "Delivery";
const PATH: &str = "Path";
const SECURITY: &str = "Security";
const RESULT: &str = "Result";

const DAY: Duration = Duration::from_secs(86_400);
const SECOND: Duration = Duration::from_secs(1);
const MILLISECOND: Duration = Duration::from_millis(1);
/// Largest batch and largest message, bytes.
const MAX_BATCH: u64 = 1 << 30;
/// Maximum total size and rate: more than any run needs.
const MAX_TOTAL: u64 = 1 << 60;
/// Default size of synthetic messages.
const MESSAGE_SIZE: ByteSize = ByteSize::kib(1);
const TOTAL_SIZE: ByteSize = ByteSize::gib(1);

/// Publishes messages to brokers and counts those that were acknowledged.
///
/// Messages come from --input, from a pipe on standard input, or are generated with --synthetic.
#[derive(Debug, Parser)]
#[command(name = "penstock-publisher", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Brokers, separated by commas, each host:port. If a name has several addresses, the first to
    /// answer is used. A link-local address needs its interface: [fe80::1%eth0]:1214.
    #[arg(
        long,
        value_delimiter = ',',
        required = true,
        value_parser = parse_broker,
        help_heading = TARGET
    )]
    brokers: Vec<String>,
    /// Topic; each broker keeps its own log of it.
    #[arg(long, default_value = "penstock", help_heading = TARGET)]
    topic: String,
    /// Time limit for opening each connection, and for a broker to make progress, even if it is alive
    /// and waits for room in its log (at least 4s over xdp); such as 30s or 2m; a number alone is
    /// seconds.
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = TARGET,
        value_parser = duration(BareUnit::Seconds, SECOND..=DAY))]
    timeout: Duration,
    /// How long to retry while nothing listens at a broker's address, because the broker may be
    /// starting; at most --timeout. 0 gives up at once.
    #[arg(long, value_name = "DURATION", default_value = "5s", help_heading = TARGET,
        value_parser = duration(BareUnit::Seconds, Duration::ZERO..=DAY))]
    connect_timeout: Duration,
    /// File with messages; - is standard input, which is also the default if it is a pipe or a file.
    #[arg(long, value_name = "FILE|-", help_heading = MESSAGES)]
    input: Option<PathBuf>,
    /// What a message is in the input: a line without its newline, or the bytes after a 4-byte
    /// little-endian length [default: lines].
    #[arg(long, value_enum, help_heading = MESSAGES,
        conflicts_with_all = ["synthetic", "total_size", "message_size"])]
    split: Option<Split>,
    /// Publish generated messages, for measurements; standard input is not read.
    #[arg(long, help_heading = MESSAGES, conflicts_with = "input")]
    synthetic: bool,
    /// Total bytes of synthetic messages; implies --synthetic [default: 1GiB].
    #[arg(long, value_name = "SIZE", help_heading = MESSAGES, conflicts_with = "input",
        value_parser = size(1..=MAX_TOTAL))]
    total_size: Option<ByteSize>,
    /// Size of a synthetic message [default: 1KiB].
    #[arg(long, value_name = "SIZE", help_heading = MESSAGES, conflicts_with = "input",
        value_parser = size(1..=MAX_BATCH))]
    message_size: Option<ByteSize>,
    /// Message bytes per second, such as 100MB [default: as fast as the brokers accept them]. Messages
    /// at least 100 µs apart are sent one by one on time, others a few in a row.
    #[arg(long, value_name = "SIZE", help_heading = MESSAGES, value_parser = size(0..=MAX_TOTAL))]
    rate: Option<ByteSize>,
    /// Acknowledgements: 0 at the end of the stream only, 1 once committed in the broker's buffer.
    #[arg(long, default_value_t = AckLevel::Committed, help_heading = DELIVERY)]
    ack: AckLevel,
    /// Ordering: 0 per stream.
    #[arg(long, default_value_t = OrderLevel::PerStream, help_heading = DELIVERY)]
    order: OrderLevel,
    /// Streams to each broker, each a connection.
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = DELIVERY,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    threads_per_broker: u32,
    /// Threads that drive the streams, 1 to 64, and never more than there are streams. Another thread
    /// reads messages and fills batches. [default: as many as brokers, but no more than cores]
    #[arg(long, value_name = "N", help_heading = DELIVERY,
        value_parser = clap::value_parser!(u32).range(1..=i64::from(Config::MAX_IO_THREADS)))]
    io_threads: Option<u32>,
    /// Size at which a batch is sent; a larger message is sent in a batch of its own. 60KiB plus packet
    /// headers is what one call can send over xdp.
    #[arg(long, value_name = "SIZE", default_value = "60KiB", help_heading = DELIVERY,
        value_parser = size(64..=MAX_BATCH))]
    batch_size: ByteSize,
    /// Maximum time before a batch that is not full is sent, such as 5ms; a number alone is
    /// milliseconds.
    #[arg(long, value_name = "DURATION", default_value = "5ms", help_heading = DELIVERY,
        value_parser = duration(BareUnit::Milliseconds, MILLISECOND..=60 * SECOND))]
    linger: Duration,
    /// Maximum number of unacknowledged batches of a stream, 1 to 65536. Over xdp, a stream keeps fewer
    /// in flight if its path needs fewer.
    #[arg(long, value_name = "N", default_value_t = 32, help_heading = DELIVERY,
        value_parser = clap::value_parser!(u32).range(1..=65_536))]
    in_flight: u32,
    /// What happens to the streams of a broker that is lost. With reroute, two brokers may have the same
    /// batch, and one log may lack some: read all brokers with penstock-subscriber --brokers, which
    /// delivers each batch once. [default: reroute with several brokers, wait with one]
    #[arg(long, value_enum, value_name = "ACTION", help_heading = DELIVERY)]
    on_broker_loss: Option<BrokerLoss>,
    /// SO_SNDBUF [default: tuned by the kernel].
    #[arg(long, value_name = "SIZE", help_heading = DELIVERY,
        value_parser = size(MIN_SOCKET_BUFFER..=MAX_SOCKET_BUFFER))]
    sndbuf: Option<ByteSize>,
    /// Path that payload takes.
    #[arg(long, value_enum, default_value_t = PathMode::Tcp, help_heading = PATH)]
    mode: PathMode,
    /// How datagrams are sent with --mode xdp or auto.
    #[arg(long, value_enum, default_value_t = Tx::Udp, help_heading = PATH)]
    tx: Tx,
    /// Interface that --tx af_xdp sends through [default: that of the route to each broker].
    #[arg(long, value_name = "NAME", help_heading = PATH)]
    tx_iface: Option<String>,
    /// Transmit queues for --tx af_xdp, such as 0,2-3: one for each stream on an interface [default:
    /// 0].
    #[arg(long, value_name = "LIST", value_parser = parse_queues, help_heading = PATH)]
    tx_queue: Option<Queues>,
    /// File with this publisher's key (penstock-broker --keygen creates one); only its owner may have
    /// access to it.
    #[arg(long, value_name = "FILE", help_heading = SECURITY)]
    auth_key: Option<PathBuf>,
    /// Require authenticated payload, so that nobody on the path can change, add or remove messages:
    /// each packet over xdp, and each batch over tcp, carries a tag.
    #[arg(long, requires = "auth_key", help_heading = SECURITY)]
    packet_auth: bool,
    /// Compute the SHA-256 of each stream: over every message followed by a newline.
    #[arg(long, help_heading = RESULT)]
    digest: bool,
    /// Format of the summary.
    #[arg(long, value_enum, default_value_t = Format::Text, help_heading = RESULT)]
    format: Format,
}

/// Path that payload takes.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PathMode {
    /// The connections themselves.
    Tcp,
    /// Datagrams to brokers with --mode xdp; no privilege needed.
    Xdp,
    /// Datagrams if they are answered within a second, otherwise tcp.
    Auto,
}

/// What happens to the streams of a broker that is lost.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum BrokerLoss {
    /// They wait for the broker, at most --timeout.
    Wait,
    /// They continue at the other brokers, and return once the broker is back.
    Reroute,
    /// The publisher fails at once.
    Fail,
}

/// How datagrams are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tx {
    /// Through UDP sockets.
    Udp,
    /// Through AF_XDP sockets with queues of their own, bypassing the kernel's network stack; needs
    /// CAP_NET_RAW.
    #[value(name = Transmit::AF_XDP)]
    AfXdp,
}

/// A list of queues; clap would take a plain vector for a flag that may be given several times.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Queues(Vec<u32>);

/// Format of the summary.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Format {
    Text,
    Json,
}

/// What a message is in an input.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Split {
    Lines,
    LengthPrefixed,
}

/// What to publish.
#[derive(Debug)]
pub enum Job {
    Synthetic { message_size: usize, messages: u64 },
    Input { source: PathBuf, split: Split },
}

/// The name that stands for standard input.
pub const STDIN: &str = "-";

/// A checked command line.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
    /// File with the key, which is loaded into the settings.
    pub key: Option<PathBuf>,
    pub job: Job,
    /// Message bytes per second.
    pub rate: Option<u64>,
    pub format: Format,
}

impl Plan {
    /// Total bytes to be published, as far as known.
    pub fn total_bytes(&self) -> Option<u64> {
        match &self.job {
            Job::Synthetic {
                message_size,
                messages,
            } => Some(*message_size as u64 * messages),
            Job::Input { source, .. } => std::fs::metadata(source)
                .ok()
                .filter(|m| m.is_file())
                .map(|m| m.len()),
        }
    }
}

/// More queues than any interface has.
const MAX_QUEUE: u32 = 4095;

impl Cli {
    fn transmit(&self) -> Result<Transmit> {
        if self.tx == Tx::Udp {
            if self.tx_iface.is_some() || self.tx_queue.is_some() {
                bail!("--tx-iface and --tx-queue need --tx af_xdp");
            }
            return Ok(Transmit::Udp);
        }
        if matches!(self.mode, PathMode::Tcp) {
            bail!("--tx af_xdp sends datagrams: it needs --mode xdp or auto");
        }
        let queues = self.tx_queue.as_ref();
        Ok(Transmit::AfXdp {
            interface: self.tx_iface.clone(),
            queues: queues.map_or_else(|| vec![0], |queues| queues.0.clone()),
        })
    }

    /// What to publish; `piped` says whether standard input is a pipe or a file.
    fn job(&self, piped: bool) -> Result<Job> {
        let input = |source: PathBuf| Job::Input {
            source,
            split: self.split.unwrap_or(Split::Lines),
        };
        match &self.input {
            Some(source) => Ok(input(source.clone())),
            None if self.synthetic || self.total_size.is_some() => {
                synthetic(self.message_size, self.total_size)
            }
            None if self.message_size.is_some() => bail!(
                "--message-size is for synthetic messages; add --synthetic or \
                 --total-size, or leave it out to publish what standard input holds"
            ),
            None if piped => Ok(input(PathBuf::from(STDIN))),
            None => bail!(
                "nothing to publish: give a file with --input FILE, pipe messages into standard \
                 input, or generate messages with --synthetic"
            ),
        }
    }

    /// Checks what clap cannot. `piped` says whether standard input is a pipe or a file, and so meant
    /// to be read.
    pub fn plan(self, piped: bool) -> Result<Plan> {
        check_topic(self.topic.as_bytes())?;
        let transmit = self.transmit()?;
        let job = self.job(piped)?;
        if self.rate.is_some_and(|rate| rate.as_u64() == 0) {
            bail!("--rate 0 would never end; leave it out for full speed");
        }
        let config = Config {
            transmit,
            mode: match self.mode {
                PathMode::Tcp => Mode::Tcp,
                PathMode::Xdp => Mode::Xdp,
                PathMode::Auto => Mode::Auto,
            },
            topic: self.topic.clone(),
            ack: self.ack,
            order: self.order,
            threads_per_broker: self.threads_per_broker,
            io_threads: self.io_threads,
            batch_size: self.batch_size.as_u64() as usize,
            linger: self.linger,
            in_flight: self.in_flight as usize,
            timeout: self.timeout,
            connect_timeout: self.connect_timeout,
            on_broker_loss: self.on_broker_loss.map(|action| match action {
                BrokerLoss::Wait => OnBrokerLoss::Wait,
                BrokerLoss::Reroute => OnBrokerLoss::Reroute,
                BrokerLoss::Fail => OnBrokerLoss::Fail,
            }),
            sndbuf: self.sndbuf.map(|size| size.as_u64() as usize),
            packet_auth: self.packet_auth,
            digest: self.digest,
            ..Config::new(self.brokers, &self.topic)
        };
        config.check()?;
        Ok(Plan {
            config,
            key: self.auth_key,
            job,
            rate: self.rate.map(|rate| rate.as_u64()),
            format: self.format,
        })
    }
}

fn parse_broker(text: &str) -> Result<String, AddressError> {
    check_broker(text).map(|()| text.trim().to_owned())
}

fn parse_queues(list: &str) -> Result<Queues> {
    let mut queues = Vec::new();
    for part in list.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (Ok(low), Ok(high)) = (low.parse::<u32>(), high.parse::<u32>()) else {
            bail!("{part:?} is neither a queue nor a range such as 2-3");
        };
        if low > high || high > MAX_QUEUE {
            bail!("{part:?} is not a range of queues from 0 to {MAX_QUEUE}");
        }
        for queue in low..=high {
            if !queues.contains(&queue) {
                queues.push(queue);
            }
        }
    }
    Ok(Queues(queues))
}

fn synthetic(message_size: Option<ByteSize>, total: Option<ByteSize>) -> Result<Job> {
    let size = message_size.unwrap_or(MESSAGE_SIZE).as_u64();
    let total = total.unwrap_or(TOTAL_SIZE.max(ByteSize(size))).as_u64();
    if total < size {
        bail!(
            "--total-size {} is less than one message of --message-size {}",
            size_text(total),
            size_text(size)
        );
    }
    Ok(Job::Synthetic {
        message_size: size as usize,
        messages: total / size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(flags: &[&str]) -> Result<Plan> {
        let words = ["penstock-publisher", "--brokers", "127.0.0.1:1"]
            .iter()
            .chain(flags);
        Cli::try_parse_from(words)?.plan(false)
    }

    fn plan_with_pipe(flags: &[&str]) -> Result<Plan> {
        let words = ["penstock-publisher", "--brokers", "127.0.0.1:1"]
            .iter()
            .chain(flags);
        Cli::try_parse_from(words)?.plan(true)
    }

    #[test]
    fn a_pipe_is_read_unless_something_else_is_asked_for() {
        let source = |flags: &[&str]| match plan_with_pipe(flags).unwrap().job {
            Job::Input { source, .. } => source.display().to_string(),
            Job::Synthetic { .. } => "synthetic".to_owned(),
        };
        assert_eq!(source(&[]), "-");
        assert_eq!(source(&["--split", "length-prefixed"]), "-");
        assert_eq!(source(&["--input", "x"]), "x");
        assert_eq!(source(&["--synthetic"]), "synthetic");
        assert_eq!(source(&["--total-size", "1MB"]), "synthetic");
        for (flags, words) in [
            (&["--message-size", "5"][..], "--synthetic"),
            (&["--synthetic", "--input", "x"], "cannot be used with"),
            (&["--synthetic", "--split", "lines"], "cannot be used with"),
        ] {
            let error = format!("{:#}", plan_with_pipe(flags).unwrap_err());
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }

    #[test]
    fn nothing_to_publish_is_told_with_what_there_is_to_choose() {
        let error = plan(&[]).unwrap_err().to_string();
        for choice in ["--input FILE", "pipe", "--synthetic"] {
            assert!(error.contains(choice), "{error}");
        }
    }

    #[test]
    fn brokers_are_checked_at_once() {
        let brokers = |list: &str| -> Result<Vec<String>> {
            let words = ["penstock-publisher", "--synthetic", "--brokers", list];
            Ok(Cli::try_parse_from(words)?.plan(false)?.config.brokers)
        };
        let two = brokers("a:1, [fd00::2]:2").unwrap();
        assert_eq!(two, ["a:1", "[fd00::2]:2"]);
        for (list, words) in [
            ("10.0.0.2", "no port"),
            ("a:1,", "no port"),
            (":1214", "has no host"),
            ("[fe80::1]:1214", "link-local address"),
        ] {
            let error = format!("{:#}", brokers(list).unwrap_err());
            assert!(error.contains(words), "{list}: {error}");
        }
    }

    #[test]
    fn durations_take_units() {
        let config = |flags: &[&str]| {
            let flags = [&["--synthetic"], flags].concat();
            plan(&flags).unwrap().config
        };
        let defaults = config(&[]);
        assert_eq!(defaults.timeout, Duration::from_secs(30));
        assert_eq!(defaults.linger, Duration::from_millis(5));
        let bare = config(&["--timeout", "2", "--linger", "3", "--connect-timeout", "0"]);
        assert_eq!(bare.timeout, Duration::from_secs(2));
        assert_eq!(bare.linger, Duration::from_millis(3));
        assert_eq!(bare.connect_timeout, Duration::ZERO);
        let units = config(&["--timeout", "2m", "--linger", "1s"]);
        assert_eq!(units.timeout, Duration::from_secs(120));
        assert_eq!(units.linger, Duration::from_secs(1));
    }

    #[test]
    fn examples_are_valid_and_fit_in_80_columns() {
        assert_eq!(EXAMPLES.lines().find(|line| line.len() > 79), None);
        let examples = penstock_flags::examples(EXAMPLES, "penstock-publisher");
        assert_eq!(examples.len(), 7);
        for words in examples {
            Cli::try_parse_from(&words).unwrap().plan(true).unwrap();
        }
    }

    #[test]
    fn the_original_workload() {
        let flags = [
            "--total-size",
            "10737418240",
            "--message-size",
            "1024",
            "--ack",
            "1",
        ];
        let Job::Synthetic {
            message_size,
            messages,
        } = plan(&flags).unwrap().job
        else {
            panic!("synthetic")
        };
        assert_eq!((message_size, messages), (1024, 10_485_760));
    }

    #[test]
    fn transmit_queues_are_a_list() {
        let transmit = |flags: &[&str]| {
            let flags = [&["--synthetic", "--mode", "xdp", "--tx", "af_xdp"], flags].concat();
            plan(&flags).unwrap().config.transmit
        };
        let af_xdp = |interface: Option<&str>, queues: &[u32]| Transmit::AfXdp {
            interface: interface.map(str::to_owned),
            queues: queues.to_vec(),
        };
        assert_eq!(transmit(&[]), af_xdp(None, &[0]));
        let flags = ["--tx-iface", "eth1", "--tx-queue", "4,0-2,2"];
        assert_eq!(transmit(&flags), af_xdp(Some("eth1"), &[4, 0, 1, 2]));
    }

    #[test]
    fn wrong_flags_say_what_to_do() {
        let wrong = [
            (&["--mode", "udp"][..], "possible values: tcp, xdp, auto"),
            (
                &["--on-broker-loss", "panic"],
                "possible values: wait, reroute, fail",
            ),
            (&["--tx", "raw"], "possible values: udp, af_xdp"),
            (&["--tx", "af_xdp"], "--mode xdp or auto"),
            (&["--tx-queue", "1", "--mode", "xdp"], "need --tx af_xdp"),
            (&["--tx-iface", "eth0", "--mode", "xdp"], "need --tx af_xdp"),
            (&["--tx-queue", "a"], "is neither a queue"),
            (&["--tx-queue", "3-1"], "not a range of queues"),
            (&["--tx-queue", "0-5000"], "not a range of queues"),
            (&["--packet-auth"], "--auth-key"),
            (&["--ack", "2"], "supported: 0 (none), 1"),
            (&["--order", "4"], "supported: 0 (per stream)"),
            (&["--topic", "a/b"], "not allowed"),
            (&["--rate", "0"], "leave it out"),
            (&["--sndbuf", "4GiB"], "the nearest is 1073741823"),
            (&["--sndbuf", "0"], "the nearest is 4KiB"),
            (&["--batch-size", "1"], "the nearest is 64"),
            (&["--batch-size", "5x"], "KiB, MiB, GiB"),
            (&["--message-size", "0"], "the nearest is 1"),
            (&["--in-flight", "0"], "1..=65536"),
            (&["--threads-per-broker", "0"], "1..=1024"),
            (&["--timeout", "0"], "the nearest is 1s"),
            (&["--timeout", "5x"], "such as 5s"),
            (&["--linger", "0"], "the nearest is 1ms"),
            (&["--message-size", "2MiB"], "less than one message"),
            (&["--input", "x"], "cannot be used with"),
        ];
        for (flags, words) in wrong {
            let flags = [&["--total-size", "1MB"], flags].concat();
            let error = format!("{:#}", plan(&flags).unwrap_err());
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }
}
