//! `penstock-lab compare`: the xdp and the tcp path, alternating on the same work and links.

pub mod contender;
pub mod flags;
pub mod host_time;
mod rows;
pub mod trial;

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;
use jiff::Timestamp;
use penstock_process::wrong_usage;
use penstock_runtime::address;
use penstock_wire::handshake::AckLevel;
use penstock_wire::message::OVERHEAD;
use tracing::{info, warn};

use crate::commands::limits::{self, Effort, Link};
use crate::measure::environment::Environment;
use crate::measure::host_load::{self, HostWatch};
use crate::measure::iperf;
use crate::measure::stats::Spread;
use crate::report::chart::{Chart, Figure, Panel};
use crate::report::model::{Compare, Limit, Row};
use crate::report::result_folder;
use crate::report::text;
use penstock_process::interrupt::{Interrupt, Interrupted};
use penstock_testbed::command;
use penstock_testbed::netns::Net;
use penstock_testbed::programs::Binaries;
use penstock_testbed::settings::{Profile, XdpMode};

use contender::Contender;
use rows::{Case, Measured};
use trial::{Bench, Cores, Load, Site};

/// The picture's name in the result folder.
const PICTURE: &str = "compare.svg";
/// Payload of a full batch with its framing: the publisher's own default.
pub const FULL_BATCH: ByteSize = ByteSize::kib(64);
/// The high rate, as a part of what the slower path moves at full speed.
pub const HIGH: f64 = 0.5;
/// A run that moved less than this part of what its rate asks for is pointed out.
const KEPT_UP: f64 = 0.95;

/// Time limit for the name service.
const NAME_TIMEOUT: Duration = Duration::from_secs(30);

/// How much is measured.
#[derive(Debug, Clone, Copy)]
struct Extent {
    runs: u32,
    size: ByteSize,
    latency_seconds: f64,
    limits: Effort,
    /// Length of both windows of a run whose kernel work is attributed to hosts.
    host_seconds: f64,
}

impl Extent {
    fn of(options: &flags::Compare) -> Self {
        let (runs, size, latency_seconds, limits, host_seconds) = if options.quick {
            (3, ByteSize::mib(512), 0.5, 2, 0.4)
        } else {
            (5, ByteSize::gib(2), 3.0, 3, 1.0)
        };
        let runs = options.runs.unwrap_or(runs);
        Self {
            runs,
            size: options.size.unwrap_or(size),
            latency_seconds: options.latency_seconds.unwrap_or(latency_seconds),
            limits: Effort {
                runs: limits.min(runs),
                seconds: 1,
            },
            host_seconds,
        }
    }
}

/// Runs it; errors aside, always a success: the ratios are for the reader to judge.
pub fn run(options: &flags::Compare, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    check(options)?;
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let compared = Comparison {
        options,
        extent: Extent::of(options),
        binaries: &binaries,
        folder: &folder,
        started,
        interrupt,
    }
    .run();
    let printed = compared.and_then(|report| {
        result_folder::write(&folder, &report, &text::compare(&report))?;
        result_folder::write_file(&folder.join(PICTURE), &picture(&report)?)?;
        result_folder::print(options.output.format, &report, || {
            text::compare_summary(&report)
        })?;
        Ok(true)
    });
    result_folder::print_path(&folder, printed)
}

/// What clap cannot check.
fn check(options: &flags::Compare) -> Result<()> {
    let extent = Extent::of(options);
    let workload = &options.workload;
    ensure!(
        workload.ack == AckLevel::Committed,
        "--ack 0 has no acks whose latency could be compared; leave it out"
    );
    ensure!(
        extent.size >= workload.message_size,
        "--size {} is less than one message",
        extent.size
    );
    if options.remote.is_empty() {
        iperf::version()?;
        return Ok(());
    }
    for address in &options.remote {
        let known = address::resolve(address, NAME_TIMEOUT);
        known.with_context(|| format!("--remote {address} is not a HOST:PORT that resolves"))?;
    }
    let for_faulty_links = [
        ("--workers", workload.workers.is_some()),
        ("--busy-poll", workload.busy_poll.is_some()),
        ("--ring-size", workload.ring_size.is_some()),
        ("--full", workload.full.is_some()),
        ("--rcvbuf", workload.rcvbuf.is_some()),
        ("--sndbuf", workload.sndbuf.is_some()),
        ("--rcvbuf-on", workload.rcvbuf_on.is_some()),
        ("--rcvbuf-force", workload.rcvbuf_force),
    ];
    if let Some((option, _)) = for_faulty_links.iter().find(|(_, given)| *given) {
        return Err(wrong_usage(format!(
            "{option} configures the broker: with --remote, give it to penstock-broker where it runs"
        )));
    }
    Ok(())
}

struct Comparison<'a> {
    options: &'a flags::Compare,
    extent: Extent,
    binaries: &'a Binaries,
    folder: &'a Path,
    started: Timestamp,
    interrupt: &'a Interrupt,
}

impl Comparison<'_> {
    fn run(&self) -> Result<Compare> {
        let (mut rows, mut limits, mut no_host_times) = (Vec::new(), Vec::new(), None);
        let host = HostWatch::start()?;
        let remote = self.options.remote.join(",");
        let environment = if remote.is_empty() {
            let mut environment = None;
            for profile in Profile::chosen(self.options.profile) {
                for &mtu in &self.options.mtu {
                    let net = Net::create(self.options.brokers as usize, profile, mtu)?;
                    if environment.is_none() {
                        environment = Some(Environment::read(Some(net.publisher()), self.started)?);
                    }
                    let link = Link {
                        net: &net,
                        profile,
                        mtu,
                    };
                    let (more, of_link, unavailable) = self.on_testbed(link)?;
                    rows.extend(more);
                    limits.extend(of_link);
                    no_host_times = no_host_times.or(unavailable);
                }
            }
            limits.push(limits::of_memory(self.extent.limits, self.interrupt)?);
            environment.context("no MTU was given")?
        } else {
            rows = self.against(&remote)?;
            Environment::read(None, self.started)?
        };
        let host_load = host.finish()?;
        let mut warnings = host_load.warnings();
        warnings.extend(host_load::spread_warning(rows.iter().flat_map(spreads)));
        Ok(Compare {
            kind: "compare".to_owned(),
            brokers: match self.options.remote.len() {
                0 => self.options.brokers,
                count => count as u32,
            },
            threads_per_broker: self.options.workload.threads_per_broker,
            message_size: self.options.workload.message_size.as_u64(),
            size_bytes: self.extent.size.as_u64(),
            latency_seconds: self.extent.latency_seconds,
            low_rate: self.options.low_rate,
            remote: (!remote.is_empty()).then_some(remote),
            rows,
            limits,
            host_times_unavailable: no_host_times,
            host_load: Some(host_load),
            warnings,
            environment,
        })
    }

    /// Rows and limits of a link, and why the CPU time of each host is not among them.
    fn on_testbed(&self, link: Link<'_>) -> Result<(Vec<Row>, Vec<Limit>, Option<String>)> {
        let Link { net, profile, mtu } = link;
        let limits = limits::of_link(link, self.extent.limits, self.folder, self.interrupt)?;
        let modes = match self.options.xdp_mode {
            Some(mode) => vec![mode],
            None => vec![XdpMode::Native, XdpMode::Generic],
        };
        let mut contenders = vec![Contender::Tcp];
        contenders.extend(modes.into_iter().map(|mode| Contender::Xdp(Some(mode))));
        let site = Site::Testbed {
            net,
            brokers: self.options.brokers,
        };
        let case = Case {
            profile: profile.name(),
            mtu,
            limits: &limits,
        };
        let (mut rows, mode) = self.measure(site, &case, &contenders)?;
        let unavailable = match self.of_hosts(link, &case, mode) {
            Ok(more) => {
                rows.extend(more);
                None
            }
            Err(error) if error.is::<Interrupted>() => return Err(error),
            Err(error) => {
                warn!("the CPU time of each host is not available: {error:#}");
                Some(format!("{error:#}"))
            }
        };
        Ok((rows, limits, unavailable))
    }

    /// CPU time of the sending and of the receiving host, in runs of their own: measuring it slows
    /// them down.
    fn of_hosts(&self, link: Link<'_>, case: &Case<'_>, mode: Option<XdpMode>) -> Result<Vec<Row>> {
        let contenders = [Contender::Xdp(mode), Contender::Tcp];
        let mut runs = contenders.map(|_| Vec::new());
        for number in 0..self.extent.limits.runs {
            for position in 0..contenders.len() {
                let index = (number as usize + position) % contenders.len();
                let name = format!("{}-{}-hosts-{index}-{}", case.profile, case.mtu, number + 1);
                let folder = self.folder.join(name);
                fs::create_dir(&folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
                let window = Duration::from_secs_f64(self.extent.host_seconds);
                runs[index].push(host_time::measure(
                    link.net,
                    self.binaries,
                    contenders[index],
                    window,
                    &folder,
                    self.interrupt,
                )?);
            }
        }
        let [xdp, tcp] = &runs;
        Ok(case.rows_of_hosts(mode, xdp, tcp))
    }

    fn against(&self, remote: &str) -> Result<Vec<Row>> {
        let case = Case {
            profile: "remote",
            mtu: mtu_towards(&self.options.remote[0])?,
            limits: &[],
        };
        let contenders = [Contender::Tcp, Contender::Xdp(None)];
        Ok(self.measure(Site::Remote(remote), &case, &contenders)?.0)
    }

    /// Full speed first: the high rate follows from it. Also the mode of xdp that moved most.
    fn measure(
        &self,
        site: Site<'_>,
        case: &Case<'_>,
        contenders: &[Contender],
    ) -> Result<(Vec<Row>, Option<XdpMode>)> {
        let bench = Bench {
            binaries: self.binaries,
            workload: &self.options.workload,
            pin: self.options.pin,
            cores: self.cores(&site)?,
            site,
            interrupt: self.interrupt,
        };
        let full = self.alternate(&bench, case, contenders, "full speed", &self.full_speed())?;
        let mut rows = case.rows_of_throughput(&full);
        let low = self.options.workload.message_size.as_u64();
        let high = self
            .options
            .workload
            .batch_size
            .unwrap_or(FULL_BATCH)
            .as_u64();
        let high = high.saturating_sub(OVERHEAD as u64).max(1);
        let high_rate = HIGH * full.slower_path() * 1e6 / high as f64;
        for (rate, batch) in [(self.options.low_rate, low), (high_rate as u32, high)] {
            let rate = rate.max(1);
            let load = Load::at_rate(rate, batch, self.extent.latency_seconds);
            let what = format!("{rate} batches/s");
            let at_rate = self.alternate(&bench, case, contenders, &what, &load)?;
            rows.extend(case.rows_of_latency(&at_rate, rate, batch));
        }
        Ok((rows, full.best_mode()))
    }

    /// Runs all contenders in turn, `runs` times, in rotating order.
    fn alternate(
        &self,
        bench: &Bench<'_>,
        case: &Case<'_>,
        contenders: &[Contender],
        what: &str,
        load: &Load,
    ) -> Result<Measured> {
        let mut measured = Measured::of(contenders);
        for number in 0..self.extent.runs as usize {
            for offset in 0..contenders.len() {
                let index = (number + offset) % contenders.len();
                let contender = contenders[index];
                let folder = format!(
                    "{}-{}-{}-{}-{}",
                    case.profile,
                    case.mtu,
                    what.replace([' ', '/'], "-"),
                    contender.name().replace(' ', "-"),
                    number + 1
                );
                let trial = bench.run(contender, load, &self.folder.join(folder))?;
                let waited = &trial.ack_latency_us;
                info!(
                    "{} MTU {}, {what}, run {}/{}: {} {:.0} MB/s, ack p50 {:.0} µs, p99 {:.0} µs",
                    case.profile,
                    case.mtu,
                    number + 1,
                    self.extent.runs,
                    contender.name(),
                    trial.payload_mb_per_s,
                    waited.p50,
                    waited.p99
                );
                let wanted = load.bytes_per_second.unwrap_or(0) as f64 / 1e6;
                if trial.payload_mb_per_s < KEPT_UP * wanted {
                    warn!("it did not keep up with the {wanted:.1} MB/s that the rate asks for");
                }
                measured.push(index, trial);
            }
        }
        Ok(measured)
    }

    fn full_speed(&self) -> Load {
        Load::full_speed(
            self.extent.size,
            self.options.workload.message_size,
            self.options.workload.batch_size,
        )
    }

    /// Several brokers would have to share cores, and remote ones have their own.
    fn cores(&self, site: &Site<'_>) -> Result<Option<Cores>> {
        let Site::Testbed { brokers: 1, .. } = site else {
            return Ok(None);
        };
        Cores::of_host(self.options.workload.workers.unwrap_or(1))
    }
}

/// Figures whose runs should agree; drops and similar counts vary by chance.
fn spreads(row: &Row) -> Vec<(String, &Spread)> {
    match row.metric == "payload_mb_per_s" {
        true => [("xdp", &row.xdp), ("tcp", &row.tcp)]
            .map(|(path, spread)| (format!("{path} {} {}", row.profile, row.mtu), spread))
            .into(),
        false => Vec::new(),
    }
}

/// MTU of the interface towards a host.
fn mtu_towards(address: &str) -> Result<u32> {
    let found = address::resolve(address, NAME_TIMEOUT)?;
    let found = found.first().context("no address")?;
    let ip = found.ip().to_string();
    let mut question = vec!["ip", "route", "get", &ip];
    // A link-local address is reached through its own interface.
    let scope = match found {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => penstock_nic::name_of(v6.scope_id())?,
        _ => None,
    };
    if let Some(name) = &scope {
        question.extend(["oif", name]);
    }
    let route = command::run(&question)?;
    let mut words = route.split_whitespace();
    let device = words
        .find(|word| *word == "dev")
        .and_then(|_| words.next())
        .with_context(|| format!("no route to {address}: `ip route get {ip}` names no device"))?;
    Ok(penstock_nic::Facts::read(device)?.mtu)
}

/// All metrics, in a file of their own.
pub fn picture(report: &Compare) -> Result<String> {
    drawn(report, |chart| chart.svg())
}

/// All metrics, for a page.
pub fn figures(report: &Compare) -> Result<Vec<Figure>> {
    drawn(report, |chart| chart.figures())
}

/// One panel per metric, with a pair of bars for each case.
fn drawn<T>(report: &Compare, draw: impl FnOnce(&Chart<'_>) -> Result<T>) -> Result<T> {
    let group = |row: &'_ Row| {
        let ratio = row
            .ratio
            .map_or_else(String::new, |r| format!("\n{r:.2} ×"));
        format!("{} {}{ratio}", row.profile, row.mtu)
    };
    let panels = text::panels(report)
        .into_iter()
        .map(|(title, unit, rows)| Panel {
            title: title.to_owned(),
            unit,
            logarithmic: rows.iter().all(|row| row.rate.is_some()),
            groups: rows
                .into_iter()
                .map(|row| (group(row), vec![&row.xdp, &row.tcp]))
                .collect(),
        });
    draw(&Chart {
        title: "xdp beside tcp: median and range of the runs, ratio xdp / tcp",
        series: &["xdp", "tcp"],
        panels: panels.collect(),
    })
}
