//! `penstock-lab bench`: every figure that must hold, with peers on the same links, in one command.
//!
//! [`plan`] lists cases, each with contenders that alternate; this file runs them; [`rows`] compares
//! the figures with the targets, and [`reasons`] says why a target is missed.

mod aeron;
mod earlier;
pub mod flags;
mod idle;
mod nats;
mod peers;
mod plan;
mod reasons;
pub mod rows;
mod tally;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bytesize::ByteSize;
use earlier::{in_better_mode, slower_path};
use flags::{Extent, View};
use jiff::Timestamp;
use peers::Peers;
use penstock_ebpf::Mode as AttachMode;
use penstock_process::output;
use penstock_wire::message::OVERHEAD;
use plan::{Case, Contender, Kind, Work};
use tally::{Figures, Tally, described, figures_of, figures_of_hosts};
use tracing::{info, warn};

use crate::commands::compare::host_time;
use crate::commands::compare::trial::{Bench as Runner, Cores, Load, Site};
use crate::commands::compare::{self, FULL_BATCH, HIGH};
use crate::measure::environment::Environment;
use crate::measure::host_load::{self, HostWatch};
use crate::measure::iperf;
use crate::measure::iperf::Amount;
use crate::measure::stats::Spread;
use crate::measure::xsk_baseline;
use crate::report::model::{Bench, BenchCase, BenchContender, bench_figures};
use crate::report::result_folder;
use crate::report::terminal::{self, Screen};
use crate::report::text;
use crate::settings::Pin;
use penstock_process::interrupt::{Interrupt, Interrupted};
use penstock_testbed::netns::{self, Net};
use penstock_testbed::programs::Binaries;
use penstock_testbed::settings::{Workload, XdpMode};

/// The kind of the report.
pub const BENCH: &str = "bench";
/// Payload of the run that only tells how fast this machine is, for a second of a run.
const TRIAL_PER_SECOND: f64 = 128e6;
const MIN_PAYLOAD: f64 = 8e6;
/// A ring of this size holds less than any sensible run; longer runs only go round.
const MAX_PAYLOAD: f64 = 64e9;

/// Runs it; errors aside, always a success: rows that miss their targets are a result.
pub fn run(options: &flags::Bench, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let extent = Extent::of(options);
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let peers = Peers::find(options, &extent)?;
    let folder = result_folder::create_folder(&options.results, started)?;
    let session = Session {
        extent: &extent,
        binaries: &binaries,
        peers,
        folder: &folder,
        started,
        interrupt,
    };
    let measured = session.run();
    let printed = measured.and_then(|report| {
        output::print_line(match options.format {
            View::Text => terminal::markdown(&text::bench(&report), Screen::stdout()),
            View::Json => serde_json::to_string_pretty(&report)?,
            View::Markdown => text::bench_tables(&report),
        })?;
        Ok(true)
    });
    result_folder::print_path(&folder, printed)
}

/// Everything that all cases have in common.
struct Session<'a> {
    extent: &'a Extent,
    binaries: &'a Binaries,
    peers: Peers,
    folder: &'a Path,
    started: Timestamp,
    interrupt: &'a Interrupt,
}

/// How much a run of a case moves.
#[derive(Debug, Clone, Copy)]
struct Amounts {
    payload: u64,
    /// Batches per second, with the payload of each.
    rate: Option<(u32, u64)>,
}

impl Session<'_> {
    fn run(&self) -> Result<Bench> {
        let cases = plan::cases(&self.extent.groups);
        let minutes = plan::estimate(&cases, self.extent) / 60.0;
        info!(
            "{} cases, {} rounds, runs of {} s: about {:.0} minutes",
            cases.len(),
            self.extent.runs,
            self.extent.seconds,
            minutes.max(1.0)
        );
        let began = Instant::now();
        let host = HostWatch::start()?;
        let mut report = Bench {
            kind: BENCH.to_owned(),
            runs: self.extent.runs,
            seconds: self.extent.seconds,
            rows: Vec::new(),
            cases: Vec::new(),
            peers: self.peers.known.clone(),
            took_seconds: 0.0,
            complete: false,
            host_load: None,
            warnings: Vec::new(),
            environment: self.environment()?,
        };
        for (index, case) in cases.iter().enumerate() {
            let left = plan::estimate(&cases[index..], self.extent) / 60.0;
            info!(
                "case {}/{}: {} ({:.0} minutes left)",
                index + 1,
                cases.len(),
                case.id,
                left.ceil()
            );
            let measured = match self.case(case, &report.cases) {
                Ok(measured) => measured,
                Err(error) if error.is::<Interrupted>() => return Err(error),
                Err(error) => {
                    // The other cases are worth having.
                    warn!("case {} failed: {error:#}", case.id);
                    failed(case, &first_line(&error))
                }
            };
            report.cases.push(measured);
            report.rows = rows::rows(&report.cases);
            report.took_seconds = began.elapsed().as_secs_f64();
            // What is measured is kept, whatever becomes of the rest.
            self.write(&report)?;
        }
        let load = host.finish()?;
        report.warnings = load.warnings();
        let spreads = report.cases.iter().flat_map(throughputs);
        report.warnings.extend(host_load::spread_warning(spreads));
        report.host_load = Some(load);
        report.complete = true;
        self.write(&report)?;
        Ok(report)
    }

    fn environment(&self) -> Result<Environment> {
        Environment::read(None, self.started)
    }

    fn write(&self, report: &Bench) -> Result<()> {
        result_folder::write(self.folder, report, &text::bench(report))
    }

    /// All rounds of one case.
    fn case(&self, case: &Case, earlier: &[BenchCase]) -> Result<BenchCase> {
        self.interrupt.check()?;
        let net = Net::create(case.brokers() as usize, case.profile, case.mtu)?;
        let contenders: Vec<Contender> = case
            .contenders
            .iter()
            .map(|contender| in_better_mode(*contender, case, earlier))
            .collect();
        let mut sides: Vec<Tally> = contenders
            .iter()
            .map(|contender| Tally::new(self.peers.absence(contender.kind)))
            .collect();
        let amounts = self.amounts(&net, case, &contenders, earlier)?;
        for round in 0..self.extent.runs as usize {
            for position in 0..contenders.len() {
                // A B B A: neither always runs after the other.
                let index = match round % 2 {
                    0 => position,
                    _ => contenders.len() - 1 - position,
                };
                let contender = &contenders[index];
                if sides[index].is_out() {
                    continue;
                }
                let name = format!("{}-{}-{}", case.id, index, round + 1);
                let mut figures = self.attempt(&net, case, contender, &amounts, &name)?;
                if let Err(why) = figures {
                    // Once more, so that rounds still match; a second failure counts.
                    sides[index].add(Err(why));
                    let name = format!("{name}-again");
                    figures = self.attempt(&net, case, contender, &amounts, &name)?;
                }
                let shown = sides[index].add(figures);
                info!(
                    "{}, round {}/{}: {} {shown}",
                    case.id,
                    round + 1,
                    self.extent.runs,
                    described(contender).name()
                );
            }
        }
        let sides = contenders.iter().zip(sides);
        Ok(BenchCase {
            id: case.id.clone(),
            group: case.group.name().to_owned(),
            profile: case.profile,
            mtu: case.mtu,
            message_size: amounts.rate.map_or(case.message_size, |(_, batch)| batch),
            rate: amounts.rate.map(|(rate, _)| rate),
            payload_bytes: amounts.payload,
            contenders: sides.map(|(of, tally)| tally.report(of)).collect(),
        })
    }

    /// One run, in a folder of its own that is kept only if the run failed. An error is an
    /// interruption; a run that failed tells why.
    fn attempt(
        &self,
        net: &Net,
        case: &Case,
        contender: &Contender,
        amounts: &Amounts,
        name: &str,
    ) -> Result<Result<Figures, String>> {
        let folder = self.folder.join(name);
        let outcome = self.once(net, case, contender, amounts, &folder);
        self.interrupt.check()?;
        match outcome {
            Ok(figures) => {
                // Seven rounds of all cases would leave some hundred folders of logs.
                if let Err(error) = fs::remove_dir_all(&folder) {
                    warn!("cannot remove {}: {error}", folder.display());
                }
                Ok(Ok(figures))
            }
            Err(error) if error.is::<Interrupted>() => Err(error),
            Err(error) => {
                warn!("a run failed: {error:#}");
                Ok(Err(first_line(&error)))
            }
        }
    }

    fn once(
        &self,
        net: &Net,
        case: &Case,
        contender: &Contender,
        amounts: &Amounts,
        folder: &Path,
    ) -> Result<Figures> {
        let payload = |rate: f64| Figures::from([(bench_figures::PAYLOAD, rate)]);
        let path = match contender.kind {
            Kind::Tcp => compare::contender::Contender::Tcp,
            Kind::Xdp(mode) => compare::contender::Contender::Xdp(mode),
            other => {
                fs::create_dir(folder)
                    .with_context(|| format!("cannot create {}", folder.display()))?;
                return self
                    .peer(net, case, contender, other, amounts, folder)
                    .map(payload);
            }
        };
        if case.work == Work::Idle {
            fs::create_dir(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            let route = path.route("adaptive");
            let bytes = idle::measure(net, self.binaries, &route, folder, self.interrupt)?;
            return Ok(Figures::from([(bench_figures::IDLE_STREAM, bytes)]));
        }
        if case.work == Work::Hosts {
            fs::create_dir(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            let window = Duration::from_secs_f64(self.extent.seconds);
            let (binaries, interrupt) = (self.binaries, self.interrupt);
            let of_hosts = host_time::measure(net, binaries, path, window, folder, interrupt)?;
            return Ok(figures_of_hosts(&of_hosts));
        }
        let workload = Workload {
            threads_per_broker: contender.streams,
            ..Workload::default()
        };
        let load = match amounts.rate {
            Some((rate, batch)) => Load::at_rate(rate, batch, self.extent.seconds),
            None => Load::full_speed(ByteSize(amounts.payload), ByteSize(case.message_size), None),
        };
        let runner = Runner {
            site: Site::Testbed {
                net,
                brokers: contender.brokers,
            },
            binaries: self.binaries,
            workload: &workload,
            pin: Pin::Xdp,
            cores: match contender.brokers {
                1 => Cores::of_host(1)?,
                _ => None,
            },
            interrupt: self.interrupt,
        };
        Ok(figures_of(&runner.run(path, &load, folder)?))
    }

    /// MB/s of somebody else's program.
    fn peer(
        &self,
        net: &Net,
        case: &Case,
        contender: &Contender,
        kind: Kind,
        amounts: &Amounts,
        folder: &Path,
    ) -> Result<f64> {
        let interrupt = self.interrupt;
        match kind {
            Kind::RawAfXdp(mode) => {
                let mode = match mode {
                    XdpMode::Native => AttachMode::Native,
                    XdpMode::Generic => AttachMode::Generic,
                };
                let time = Duration::from_secs_f64(self.extent.seconds);
                Ok(xsk_baseline::measure(net, mode, case.mtu, time, interrupt)?.mb_per_s)
            }
            Kind::Iperf3 => iperf::measure(
                net.broker(0),
                net.publisher(),
                netns::broker_address(0),
                contender.streams,
                Amount::Bytes(ByteSize(amounts.payload)),
                folder,
                interrupt,
            ),
            Kind::Nats => {
                let size = usize::try_from(case.message_size)?;
                nats::measure(net, amounts.payload, size, folder, interrupt)
            }
            Kind::Aeron => {
                let aeron = self.peers.aeron.as_ref();
                let aeron = aeron.map_err(|why| anyhow::anyhow!("Aeron is {why}"))?;
                aeron.measure(net, amounts.payload, case.message_size, folder, interrupt)
            }
            Kind::Tcp | Kind::Xdp(_) => unreachable!("these are no peers"),
        }
    }

    /// How much a run moves: as much as takes the time of a run on this machine.
    fn amounts(
        &self,
        net: &Net,
        case: &Case,
        contenders: &[Contender],
        earlier: &[BenchCase],
    ) -> Result<Amounts> {
        let seconds = self.extent.seconds;
        match case.work {
            Work::Idle | Work::Hosts => Ok(Amounts {
                payload: 0,
                rate: None,
            }),
            Work::Rate(rate) => Ok(at_rate(rate, case.message_size, seconds)),
            Work::HalfLoad => {
                let slower = match slower_path(case, earlier) {
                    Some(rate) => rate,
                    None => self.speed(net, case, contenders)?,
                };
                let batch = FULL_BATCH.as_u64() - OVERHEAD as u64;
                let rate = (HIGH * slower * 1e6 / batch as f64) as u32;
                Ok(at_rate(rate.max(1), batch, seconds))
            }
            Work::FullSpeed => {
                let speed = self.speed(net, case, contenders)?;
                Ok(Amounts {
                    payload: (speed * 1e6 * seconds).clamp(MIN_PAYLOAD, MAX_PAYLOAD) as u64,
                    rate: None,
                })
            }
        }
    }

    /// What the slowest of our contenders moves, MB/s, from one short run of each; its figures do
    /// not count.
    fn speed(&self, net: &Net, case: &Case, contenders: &[Contender]) -> Result<f64> {
        let payload = (TRIAL_PER_SECOND * self.extent.seconds).clamp(MIN_PAYLOAD, MAX_PAYLOAD);
        let amounts = Amounts {
            payload: payload as u64,
            rate: None,
        };
        let mut slowest: Option<f64> = None;
        let ours = |contender: &&Contender| matches!(contender.kind, Kind::Tcp | Kind::Xdp(_));
        for (index, contender) in contenders.iter().enumerate().filter(|(_, c)| ours(c)) {
            let name = format!("{}-{index}-trial", case.id);
            let figures = self.attempt(net, case, contender, &amounts, &name)?;
            if let Some(rate) = figures
                .ok()
                .and_then(|f| f.get(bench_figures::PAYLOAD).copied())
            {
                slowest = Some(slowest.map_or(rate, |other| other.min(rate)));
            }
        }
        slowest.with_context(|| format!("no run of case {} succeeded", case.id))
    }
}

fn at_rate(rate: u32, batch: u64, seconds: f64) -> Amounts {
    let load = Load::at_rate(rate, batch, seconds);
    Amounts {
        payload: load.payload.as_u64(),
        rate: Some((rate, batch)),
    }
}

/// Throughputs of a case, whose runs should agree.
fn throughputs(case: &BenchCase) -> Vec<(String, &Spread)> {
    let of = |contender: &'_ BenchContender| format!("{} in {}", contender.name(), case.id);
    let full_speed = case.rate.is_none();
    let found = case.contenders.iter().filter_map(|contender| {
        let spread = contender.figure(bench_figures::PAYLOAD)?;
        full_speed.then(|| (of(contender), spread))
    });
    found.collect()
}

/// A case without figures.
fn failed(case: &Case, why: &str) -> BenchCase {
    let contenders = case.contenders.iter().map(|contender| BenchContender {
        failures: vec![why.to_owned()],
        ..described(contender)
    });
    BenchCase {
        id: case.id.clone(),
        group: case.group.name().to_owned(),
        profile: case.profile,
        mtu: case.mtu,
        message_size: case.message_size,
        rate: None,
        payload_bytes: 0,
        contenders: contenders.collect(),
    }
}

/// Why a run failed, without the log that is on stderr and in the run's folder.
fn first_line(error: &anyhow::Error) -> String {
    let text = format!("{error:#}");
    text.lines().next().unwrap_or_default().to_owned()
}
