//! Command line of the publisher, and what it means.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use clap::{Parser, ValueEnum};
use penstock_dataplane::auth;
use penstock_dataplane::wire::handshake::{AckLevel, OrderLevel, check_topic};
use penstock_publisher::{Config, Mode, Transmit};

const EXAMPLES: &str = "\
Examples:
  1 GB of 1 KiB messages to two brokers:
    penstock-publisher --brokers 10.0.0.1:1214,10.0.0.2:1214 --total-size 1GB

  Every line of a file as a message:
    penstock-publisher --brokers 10.0.0.1:1214 --input app.log --split lines

  Follow a program's output:
    journalctl -f | penstock-publisher --brokers 10.0.0.1:1214 --input -

  From a transmit queue of its own, past the kernel's network stack:
    sudo penstock-publisher --brokers 10.0.0.1:1214 --mode xdp --tx af_xdp --tx-queue 3

  To brokers that take publishers with a key only:
    penstock-publisher --brokers 10.0.0.1:1214 --auth-key eu.key

  100 MB/s in four streams, result for a program:
    penstock-publisher --brokers 10.0.0.1:1214 --rate 100MB --threads-per-broker 4 --format json

  Exactly 1,000 batches a second, one message of 1 KiB in each (4 bytes frame a message):
    penstock-publisher --brokers 10.0.0.1:1214 --rate 1024000 --message-size 1024 \
        --batch-size 1028 --total-size 10MB

Ctrl-C ends the input, waits for the acks and prints the summary.
Exit codes: 0 every message acknowledged, 1 failed, 2 wrong flags, 130 interrupted.";

/// Publishes messages to brokers and counts those that were acknowledged.
#[derive(Debug, Parser)]
#[command(name = "penstock-publisher", version, after_help = EXAMPLES)]
pub struct Cli {
    /// Brokers, separated by commas, each host:port.
    #[arg(long, value_delimiter = ',', required = true)]
    brokers: Vec<String>,
    /// Topic; each broker keeps its own log of it.
    #[arg(long, default_value = "penstock")]
    topic: String,
    /// Path that payload takes.
    #[arg(long, value_enum, default_value_t = PathMode::Tcp)]
    mode: PathMode,
    /// How datagrams leave, with --mode xdp or auto.
    #[arg(long, value_enum, default_value_t = Tx::Udp)]
    tx: Tx,
    /// Interface that --tx af_xdp sends through; without it, that of the route to each broker.
    #[arg(long, value_name = "NAME")]
    tx_iface: Option<String>,
    /// Transmit queues for --tx af_xdp, such as 0,2-3, one for each stream on an interface; without
    /// it, 0.
    #[arg(long, value_name = "LIST", value_parser = parse_queues)]
    tx_queue: Option<Queues>,
    /// Acknowledged: 0 at the end of the stream only, 1 once committed in the broker's buffer.
    #[arg(long, default_value_t = AckLevel::Committed)]
    ack: AckLevel,
    /// Order kept: 0 per stream.
    #[arg(long, default_value_t = OrderLevel::PerStream)]
    order: OrderLevel,
    /// Streams to each broker, each a thread and a connection.
    #[arg(long, default_value_t = 1)]
    threads_per_broker: u32,
    /// Bytes at which a batch is sent; a larger message travels in a batch of its own. With packet
    /// headers, 60KiB are what one call can send over xdp.
    #[arg(long, default_value = "60KiB")]
    batch_size: ByteSize,
    /// Milliseconds after which a batch that is not full is sent.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    linger: u64,
    /// Batches of a stream that may be unacknowledged.
    #[arg(long, default_value_t = 32)]
    in_flight: usize,
    /// Size of a synthetic message.
    #[arg(long, default_value = "1KiB")]
    message_size: ByteSize,
    /// Bytes of synthetic messages in all; without it, 1GiB.
    #[arg(long, conflicts_with = "input")]
    total_size: Option<ByteSize>,
    /// Message bytes per second, such as 100MB; without it, as fast as the brokers take them.
    /// Messages at least 100 µs apart are sent one by one when due, others a few in a row.
    #[arg(long)]
    rate: Option<ByteSize>,
    /// File with real messages; - is standard input.
    #[arg(long, value_name = "FILE|-")]
    input: Option<PathBuf>,
    /// What a message is in the input: a line without its newline, or a 4-byte little-endian
    /// length and so many bytes.
    #[arg(long, value_enum, default_value_t = Split::Lines)]
    split: Split,
    /// Seconds for connecting, and without a sign of life after which a broker is given up.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    timeout: u64,
    /// SO_SNDBUF; without it the kernel tunes it.
    #[arg(long)]
    sndbuf: Option<ByteSize>,
    /// File with the key that the brokers know this publisher by (penstock-broker --keygen makes
    /// one); only its owner may have access to it.
    #[arg(long, value_name = "FILE")]
    auth_key: Option<PathBuf>,
    /// Have each packet authenticated, over xdp, so that nobody on the way can change or add any. Over
    /// tcp there is no such thing: --mode xdp fails rather than go without.
    #[arg(long, requires = "auth_key")]
    packet_auth: bool,
    /// Compute the SHA-256 of each stream: over every message followed by a newline.
    #[arg(long)]
    digest: bool,
    /// Form of the summary.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

/// Path that payload takes.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum PathMode {
    /// The connections themselves.
    Tcp,
    /// Datagrams to brokers with --mode xdp; no privilege needed.
    Xdp,
    /// Datagrams where they are answered within a second, otherwise tcp.
    Auto,
}

/// How datagrams leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Tx {
    /// Through UDP sockets.
    Udp,
    /// Past the kernel's network stack, through AF_XDP sockets with queues of their own; needs
    /// CAP_NET_RAW.
    #[value(name = Transmit::AF_XDP)]
    AfXdp,
}

/// A list of queues; clap would take a plain vector for a flag that may be given several times.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Queues(Vec<u32>);

/// Form of the summary.
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

/// A checked command line.
#[derive(Debug)]
pub struct Plan {
    pub config: Config,
    pub job: Job,
    /// Message bytes per second.
    pub rate: Option<u64>,
    pub format: Format,
}

impl Plan {
    /// Bytes that will be published, as far as it is known.
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
                bail!("--tx-iface and --tx-queue are for --tx af_xdp");
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

    /// Checks what clap cannot.
    pub fn plan(self) -> Result<Plan> {
        check_topic(self.topic.as_bytes())?;
        let transmit = self.transmit()?;
        let job = match self.input {
            Some(source) => Job::Input {
                source,
                split: self.split,
            },
            None => synthetic(self.message_size, self.total_size)?,
        };
        if self.rate.is_some_and(|rate| rate.as_u64() == 0) {
            bail!("--rate 0 would never end; leave it out for full speed");
        }
        let key = self.auth_key.as_deref().map(auth::read_key);
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
            batch_size: usize::try_from(self.batch_size.as_u64())?,
            linger: Duration::from_millis(self.linger),
            in_flight: self.in_flight,
            timeout: Duration::from_secs(self.timeout),
            sndbuf: self.sndbuf.map(|size| size.as_u64() as usize),
            packet_auth: self.packet_auth,
            key: key.transpose().context("--auth-key")?,
            digest: self.digest,
            ..Config::new(self.brokers, &self.topic)
        };
        Ok(Plan {
            config,
            job,
            rate: self.rate.map(|rate| rate.as_u64()),
            format: self.format,
        })
    }
}

fn parse_queues(list: &str) -> Result<Queues> {
    let mut queues = Vec::new();
    for part in list.split(',') {
        let (low, high) = part.split_once('-').unwrap_or((part, part));
        let (Ok(low), Ok(high)) = (low.parse::<u32>(), high.parse::<u32>()) else {
            bail!("{part:?} is no queue, nor a range such as 2-3");
        };
        if low > high || high > MAX_QUEUE {
            bail!("{part:?} is no range of queues from 0 to {MAX_QUEUE}");
        }
        for queue in low..=high {
            if !queues.contains(&queue) {
                queues.push(queue);
            }
        }
    }
    Ok(Queues(queues))
}

fn synthetic(message_size: ByteSize, total: Option<ByteSize>) -> Result<Job> {
    let size = message_size.as_u64();
    if size == 0 || size > 1 << 30 {
        bail!("--message-size {message_size} is not from 1 B to 1 GiB");
    }
    let total = total.unwrap_or(ByteSize::gib(1)).as_u64();
    if total < size {
        bail!("--total-size {total} is less than one message of {size} bytes");
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
        Cli::try_parse_from(words)?.plan()
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
            let flags = [&["--mode", "xdp", "--tx", "af_xdp"], flags].concat();
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
        for (flags, words) in [
            (&["--mode", "udp"][..], "possible values: tcp, xdp, auto"),
            (&["--tx", "raw"], "possible values: udp, af_xdp"),
            (&["--tx", "af_xdp"], "--mode xdp or auto"),
            (&["--tx-queue", "1", "--mode", "xdp"], "for --tx af_xdp"),
            (&["--tx-iface", "eth0", "--mode", "xdp"], "for --tx af_xdp"),
            (&["--tx-queue", "a"], "is no queue"),
            (&["--tx-queue", "3-1"], "no range of queues"),
            (&["--tx-queue", "0-5000"], "no range of queues"),
            (&["--packet-auth"], "--auth-key"),
            (&["--ack", "2"], "supported: 0 (none), 1"),
            (&["--order", "4"], "supported: 0 (per stream)"),
            (&["--topic", "a/b"], "not allowed"),
            (&["--rate", "0"], "leave it out"),
            (
                &["--message-size", "2KiB", "--total-size", "1KiB"],
                "less than one message",
            ),
            (
                &["--input", "x", "--total-size", "1KiB"],
                "cannot be used with",
            ),
        ] {
            let error = format!("{:#}", plan(flags).unwrap_err());
            assert!(error.contains(words), "{flags:?}: {error}");
        }
    }
}
