//! A run over time, for the report: a sample every 200 ms, less often in a long run.

use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use penstock_log::{Reader, Start};

use crate::report::model::{ConnectionPoint, HostCores, Point, Timeline};
use penstock_diagnose::cpu::CoresSnapshot;
use penstock_diagnose::namespaces::Namespace;
use penstock_diagnose::sockets::{Followed, Socket};
use penstock_testbed::cluster::{Cluster, PORT};
use penstock_testbed::netns::{self, Net};
use penstock_testbed::running::Running;

const INTERVAL: Duration = Duration::from_millis(200);
/// Enough for a smooth plot; beyond that, two points become one.
const MAX_POINTS: usize = 300;
/// Maximum number of brokers whose connections are sampled.
const MAX_BROKERS: usize = 8;

/// Takes the samples.
pub struct Sampler {
    began: Instant,
    interval: Duration,
    next: Duration,
    logs: Vec<Reader>,
    /// Where the publisher's ends of the connections are, then those of the brokers.
    publisher: Namespace,
    brokers: Vec<Namespace>,
    payload: Followed,
    before: Totals,
    points: Vec<Point>,
}

/// Everything that only grows, at one moment.
struct Totals {
    seconds: f64,
    payload: Vec<u64>,
    publisher_cpu: f64,
    brokers_cpu: f64,
    cores: CoresSnapshot,
}

impl Sampler {
    /// Begins now, before the publisher does.
    pub fn start(net: &Net, cluster: &Cluster, logs: &[&Path]) -> Result<Self> {
        let seen = 0..logs.len().min(MAX_BROKERS);
        // A log that cannot be read yet only means a plot that shows less; the run decides.
        let logs = logs
            .iter()
            .filter_map(|path| Reader::open(path, Start::End).ok());
        let open = |name: &str| Namespace::open(&netns::handle_path(name));
        let logs: Vec<Reader> = logs.collect();
        Ok(Self {
            began: Instant::now(),
            interval: INTERVAL,
            next: INTERVAL,
            publisher: open(net.publisher())?,
            brokers: seen.map(|i| open(net.broker(i))).collect::<Result<_>>()?,
            payload: Followed::default(),
            before: Totals {
                seconds: 0.0,
                payload: payload(&logs),
                publisher_cpu: 0.0,
                brokers_cpu: cluster.cpu_seconds()?,
                cores: CoresSnapshot::now()?,
            },
            logs,
            points: Vec::new(),
        })
    }

    /// Payload that is committed at all brokers, bytes.
    pub fn committed(&self) -> u64 {
        payload(&self.logs).iter().sum()
    }

    /// Looks, if it is time; cheap to call often.
    pub fn sample(&mut self, publisher: &Running, cluster: &Cluster) -> Result<()> {
        let elapsed = self.began.elapsed();
        if elapsed < self.next {
            return Ok(());
        }
        let now = Totals {
            seconds: elapsed.as_secs_f64(),
            payload: payload(&self.logs),
            publisher_cpu: publisher.cpu_seconds()?,
            brokers_cpu: cluster.cpu_seconds()?,
            cores: CoresSnapshot::now()?,
        };
        let connections = self.connections()?;
        self.points.push(now.since(&self.before, connections)?);
        self.before = now;
        if self.points.len() >= MAX_POINTS {
            self.interval *= 2;
            self.points = halved(&self.points);
        }
        self.next = elapsed + self.interval;
        Ok(())
    }

    /// What was seen.
    pub fn finish(self) -> Timeline {
        Timeline {
            interval_ms: self.interval.as_millis() as u64,
            points: self.points,
        }
    }

    fn connections(&mut self) -> Result<Vec<ConnectionPoint>> {
        let list = self.payload.is_list_due() || self.payload.is_empty();
        let mut ours = self.payload.sample(&self.publisher.diag, list)?;
        ours.retain(|socket| socket.remote.port() == PORT && !socket.is_listening());
        self.payload.keep(ours.iter());
        let mut points = Vec::new();
        for (broker, namespace) in self.brokers.iter().enumerate() {
            let address = IpAddr::from(netns::broker_address(broker));
            let theirs = ours.iter().filter(|socket| socket.remote.ip() == address);
            for sender in theirs {
                let receiver = namespace.diag.other_end(sender)?;
                points.extend(receiver.and_then(|receiver| connection(broker, &receiver, sender)));
            }
        }
        Ok(points)
    }
}

fn payload(logs: &[Reader]) -> Vec<u64> {
    logs.iter().map(|log| log.info().payload_bytes).collect()
}

fn connection(broker: usize, receiver: &Socket, sender: &Socket) -> Option<ConnectionPoint> {
    let (received, sent) = (receiver.info?, sender.info?);
    Some(ConnectionPoint {
        broker,
        peer: receiver.remote.to_string(),
        bytes_received: received.bytes_received,
        rcv_wnd: received.rcv_wnd,
        rcv_ssthresh: received.rcv_ssthresh,
        recv_q: receiver.recv_q,
        cwnd_bytes: u64::from(sent.snd_cwnd) * u64::from(sent.snd_mss),
        send_q: sender.send_q,
        rtt_us: sent.rtt,
    })
}

impl Totals {
    fn since(&self, before: &Self, connections: Vec<ConnectionPoint>) -> Result<Point> {
        let seconds = self.seconds - before.seconds;
        let mb_per_s = self.payload.iter().zip(&before.payload);
        let mb_per_s = mb_per_s.map(|(now, then)| (now - then) as f64 / 1e6 / seconds);
        let cores = self.cores.since(&before.cores, seconds)?;
        let mut host = HostCores::default();
        for core in cores {
            host.user += core.user;
            host.system += core.system;
            host.softirq += core.softirq + core.irq;
            host.steal += core.steal;
            host.idle += core.idle;
        }
        Ok(Point {
            seconds: self.seconds,
            mb_per_s: mb_per_s.collect(),
            publisher_cores: (self.publisher_cpu - before.publisher_cpu).max(0.0) / seconds,
            broker_cores: (self.brokers_cpu - before.brokers_cpu).max(0.0) / seconds,
            host,
            connections,
        })
    }
}

/// Every two points as one: rates are means, what is a state is that of the later one.
fn halved(points: &[Point]) -> Vec<Point> {
    let both = |pair: &[Point]| match pair {
        [a, b] => {
            let rates = a.mb_per_s.iter().zip(&b.mb_per_s);
            Point {
                seconds: b.seconds,
                mb_per_s: rates.map(|(a, b)| f64::midpoint(*a, *b)).collect(),
                publisher_cores: f64::midpoint(a.publisher_cores, b.publisher_cores),
                broker_cores: f64::midpoint(a.broker_cores, b.broker_cores),
                host: HostCores {
                    user: f64::midpoint(a.host.user, b.host.user),
                    system: f64::midpoint(a.host.system, b.host.system),
                    softirq: f64::midpoint(a.host.softirq, b.host.softirq),
                    steal: f64::midpoint(a.host.steal, b.host.steal),
                    idle: f64::midpoint(a.host.idle, b.host.idle),
                },
                connections: b.connections.clone(),
            }
        }
        rest => rest[0].clone(),
    };
    points.chunks(2).map(both).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_points_become_one_that_keeps_the_mean() {
        let point = |seconds: f64, rate: f64| Point {
            seconds,
            mb_per_s: vec![rate, 2.0 * rate],
            publisher_cores: rate / 100.0,
            ..Point::default()
        };
        let points = [point(0.2, 100.0), point(0.4, 200.0), point(0.6, 300.0)];
        let fewer = halved(&points);
        assert_eq!(fewer.len(), 2);
        assert_eq!(fewer[0].mb_per_s, [150.0, 300.0]);
        assert_eq!((fewer[0].seconds, fewer[0].publisher_cores), (0.4, 1.5));
        assert_eq!(fewer[1], points[2]);
    }

    #[test]
    fn rates_are_those_of_the_interval() {
        let totals = |seconds: f64, bytes: u64, cpu: f64| Totals {
            seconds,
            payload: vec![bytes],
            publisher_cpu: cpu,
            brokers_cpu: 2.0 * cpu,
            cores: CoresSnapshot::now().unwrap(),
        };
        let (then, now) = (totals(1.0, 5_000_000, 0.5), totals(1.5, 105_000_000, 0.75));
        let point = now.since(&then, Vec::new()).unwrap();
        assert_eq!(point.mb_per_s, [200.0]);
        assert_eq!((point.publisher_cores, point.broker_cores), (0.5, 1.0));
    }
}
