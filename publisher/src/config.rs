//! Settings of a publisher.

use std::time::Duration;

use penstock_auth::Key;
use penstock_wire::handshake::{AckLevel, MAX_STREAMS, OrderLevel};

use crate::Error;

/// Path that payload takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The connection itself.
    Tcp,
    /// Datagrams that the broker receives with AF_XDP sockets; an error if that is not available.
    Xdp,
    /// Datagrams if they are answered within a second; otherwise, or if they fail later, the
    /// connection.
    Auto,
}

impl Mode {
    /// The name on command lines and in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Xdp => "xdp",
            Self::Auto => "auto",
        }
    }
}

/// What happens to the streams of a broker that is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBrokerLoss {
    /// They wait for it, at most [`Config::timeout`]; then the publisher fails.
    Wait,
    /// They continue at other brokers under the same identity, and return once the broker is back. With a
    /// single broker the same as [`Self::Wait`].
    Reroute,
    /// The publisher fails at once.
    Fail,
}

/// How datagrams leave, on the path xdp.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transmit {
    /// Through an ordinary UDP socket, which needs no privilege.
    Udp,
    /// Past the kernel's network stack: each stream through an AF_XDP socket on a transmit queue of
    /// its own. Needs CAP_NET_RAW. With [`Mode::Auto`], where it is not to be had, UDP with a warning.
    AfXdp {
        /// Interface that the brokers are reached through; none takes that of the route to each.
        interface: Option<String>,
        /// Transmit queues of each interface that streams may take.
        queues: Vec<u32>,
    },
}

impl Transmit {
    /// The name of [`Self::Udp`] on command lines and in reports.
    pub const UDP: &'static str = "udp";
    /// The name of [`Self::AfXdp`] on command lines and in reports.
    pub const AF_XDP: &'static str = "af_xdp";
}

/// Settings of a [`crate::Publisher`]; [`Config::new`] gives sensible ones.
#[derive(Debug, Clone)]
pub struct Config {
    /// Brokers, each `host:port`.
    pub brokers: Vec<String>,
    /// Topic; the same at every broker.
    pub topic: String,
    /// Path that payload takes.
    pub mode: Mode,
    /// How datagrams leave; of no account over tcp.
    pub transmit: Transmit,
    /// When a message counts as delivered.
    pub ack: AckLevel,
    /// Order kept between batches.
    pub order: OrderLevel,
    /// Streams, each a connection, to each broker; 1 to 1024.
    pub threads_per_broker: u32,
    /// Threads that send what the streams of this publisher have and take their acks; 1 to 64, and never more
    /// than there are streams. None means as many as brokers, but no more than cores.
    pub io_threads: Option<u32>,
    /// Bytes of a batch, framing included, at which it is sent.
    pub batch_size: usize,
    /// Time after which a batch that is not full is sent.
    pub linger: Duration,
    /// Batches of one stream that may be unacknowledged.
    pub in_flight: usize,
    /// Time limit for opening each connection, and for a broker to make progress, whether it is silent
    /// or waits for room in its log. At least 4 s over xdp.
    pub timeout: Duration,
    /// How long [`crate::Publisher::connect`] retries while nothing listens at a broker's address,
    /// because the broker may have been started at the same moment.
    pub connect_timeout: Duration,
    /// What happens to the streams of a broker that is lost. `None`: they wait if there is only one broker,
    /// and continue at the others if there are more.
    pub on_broker_loss: Option<OnBrokerLoss>,
    /// `SO_SNDBUF`, bytes; `None` leaves the kernel's autotuning on.
    pub sndbuf: Option<usize>,
    /// Key that the brokers accept. With a key, the publisher rejects brokers that do not prove that
    /// they hold it. [`penstock_auth::read_key`] reads it from a file.
    pub key: Option<Key>,
    /// Require authenticated payload: each packet over xdp, each batch over tcp. Needs a key. Brokers
    /// may require it as well.
    pub packet_auth: bool,
    /// Compute the SHA-256 of each stream.
    pub digest: bool,
}

/// Largest `SO_SNDBUF`: the option is an `int`, which the kernel doubles (`sock_setsockopt` in
/// net/core/sock.c); a larger number would be truncated.
const MAX_SNDBUF: usize = i32::MAX as usize / 2;

/// Most I/O threads: more than any machine needs for one publisher.
const MAX_IO_THREADS: u32 = 64;

impl Config {
    /// Most I/O threads.
    pub const MAX_IO_THREADS: u32 = MAX_IO_THREADS;

    /// Settings for publishing to `topic` at `brokers`, acknowledged once committed.
    pub fn new(brokers: impl IntoIterator<Item = String>, topic: &str) -> Self {
        Self {
            brokers: brokers.into_iter().collect(),
            topic: topic.to_owned(),
            mode: Mode::Tcp,
            transmit: Transmit::Udp,
            ack: AckLevel::Committed,
            order: OrderLevel::PerStream,
            threads_per_broker: 1,
            io_threads: None,
            // With packet headers: what one call can send over xdp.
            batch_size: 60 << 10,
            linger: Duration::from_millis(5),
            in_flight: 32,
            timeout: Duration::from_secs(30),
            connect_timeout: Duration::ZERO,
            on_broker_loss: None,
            sndbuf: None,
            key: None,
            packet_auth: false,
            digest: false,
        }
    }

    /// What happens to the streams of a broker that is lost, with this number of brokers.
    pub(crate) fn broker_loss(&self) -> OnBrokerLoss {
        match self.on_broker_loss {
            None | Some(OnBrokerLoss::Reroute) if self.brokers.len() < 2 => OnBrokerLoss::Wait,
            None => OnBrokerLoss::Reroute,
            Some(chosen) => chosen,
        }
    }

    /// Whether streams of a lost broker continue at others.
    pub(crate) fn reroutes(&self) -> bool {
        self.broker_loss() == OnBrokerLoss::Reroute
    }

    /// Checks the settings; [`crate::Publisher::connect`] does so as well.
    ///
    /// # Errors
    /// The first invalid setting, and its valid values.
    pub fn check(&self) -> Result<(), Error> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.brokers.is_empty() {
            return wrong("there is no broker; give at least one host:port".to_owned());
        }
        if !(1..=MAX_STREAMS).contains(&self.threads_per_broker) {
            return wrong(format!(
                "{} threads per broker is not from 1 to {MAX_STREAMS}",
                self.threads_per_broker
            ));
        }
        if let Some(threads) = self.io_threads
            && !(1..=MAX_IO_THREADS).contains(&threads)
        {
            return wrong(format!(
                "{threads} I/O threads is not from 1 to {MAX_IO_THREADS}"
            ));
        }
        if !(64..=1 << 30).contains(&self.batch_size) {
            return wrong(format!(
                "batch size {} is not from 64 B to 1 GiB",
                self.batch_size
            ));
        }
        if let Transmit::AfXdp { queues, .. } = &self.transmit {
            if self.mode == Mode::Tcp {
                return wrong(
                    "AF_XDP transmits datagrams: the mode must be xdp or auto".to_owned(),
                );
            }
            if queues.is_empty() {
                return wrong("AF_XDP transmits through a queue: give at least one".to_owned());
            }
        }
        if self.in_flight == 0 || self.in_flight > 65_536 {
            return wrong(format!(
                "{} batches in flight is not from 1 to 65536",
                self.in_flight
            ));
        }
        if let Some(bytes) = self.sndbuf
            && !(1..=MAX_SNDBUF).contains(&bytes)
        {
            return wrong(format!(
                "a send buffer of {bytes} bytes is not from 1 to {MAX_SNDBUF}"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_a_lost_broker_continue_elsewhere_if_there_is_another_broker() {
        use OnBrokerLoss::{Fail, Reroute, Wait};
        for (brokers, chosen, result) in [
            (1, None, Wait),
            (4, None, Reroute),
            (1, Some(Reroute), Wait),
            (2, Some(Reroute), Reroute),
            (4, Some(Wait), Wait),
            (1, Some(Fail), Fail),
            (4, Some(Fail), Fail),
        ] {
            let names = (0..brokers).map(|number| format!("b{number}:1214"));
            let config = Config {
                on_broker_loss: chosen,
                ..Config::new(names, "t")
            };
            assert_eq!(config.broker_loss(), result, "{brokers} {chosen:?}");
        }
    }
}
