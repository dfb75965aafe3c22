//! `penstock-lab limits`: what this host can do at best, with the same links as every other run, so
//! that figures can be given as a percentage of it.

pub mod flags;

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use jiff::Timestamp;
use penstock_ebpf::Mode;
use tracing::info;

use crate::measure::environment::Environment;
use crate::measure::iperf::{self, Amount};
use crate::measure::stats::Spread;
use crate::measure::xsk_baseline;
use crate::report::model::{Limit, Limits};
use crate::report::result_folder;
use crate::report::text;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::netns::{self, Net};
use penstock_testbed::settings::{Profile, XdpMode};

/// Copied from and to, bytes: more than any cache holds, and as much as a ring by default.
const MEMORY: usize = 256 << 20;
/// Connections of iperf3 that are tried.
const STREAMS: [u32; 2] = [1, 4];

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    pub runs: u32,
    /// Length of a run.
    pub seconds: u32,
}

/// A link, and what it is like.
#[derive(Debug, Clone, Copy)]
pub struct Link<'a> {
    pub net: &'a Net,
    pub profile: Profile,
    pub mtu: u32,
}

/// Runs it; errors aside, always a success.
pub fn run(options: &flags::Limits, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    iperf::version()?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let measured = measure_all(options, &folder, started, interrupt);
    let printed = measured.and_then(|report| {
        result_folder::write(&folder, &report, &text::limits(&report))?;
        result_folder::print(options.output.format, &report, || {
            text::limits_table(&report.limits)
        })?;
        Ok(true)
    });
    result_folder::print_path(&folder, printed)
}

fn measure_all(
    options: &flags::Limits,
    folder: &Path,
    started: Timestamp,
    interrupt: &Interrupt,
) -> Result<Limits> {
    let effort = Effort {
        runs: options.runs,
        seconds: options.seconds,
    };
    let mut limits = Vec::new();
    let mut environment = None;
    for profile in Profile::chosen(options.profile) {
        for &mtu in &options.mtu {
            let net = Net::create(1, profile, mtu)?;
            if environment.is_none() {
                environment = Some(Environment::read(Some(net.publisher()), started)?);
            }
            let link = Link {
                net: &net,
                profile,
                mtu,
            };
            limits.extend(of_link(link, effort, folder, interrupt)?);
        }
    }
    limits.push(of_memory(effort, interrupt)?);
    Ok(Limits {
        kind: "limits".to_owned(),
        limits,
        environment: environment.context("no MTU was given")?,
    })
}

/// What a link can do; what is measured alternates.
pub fn of_link(
    link: Link<'_>,
    effort: Effort,
    folder: &Path,
    interrupt: &Interrupt,
) -> Result<Vec<Limit>> {
    let Link { net, profile, mtu } = link;
    let mut native = Raw::new(XdpMode::Native);
    // Without segmentation the sender's long packets reach a generic program in one piece: no packets
    // of this MTU could be counted.
    let mut generic = (profile == Profile::Wire).then(|| Raw::new(XdpMode::Generic));
    let mut iperf3 = STREAMS.map(|streams| (streams, Vec::new()));
    for number in 1..=effort.runs {
        for raw in [Some(&mut native), generic.as_mut()].into_iter().flatten() {
            raw.measure(link, effort, interrupt)?;
        }
        for (streams, figures) in &mut iperf3 {
            let case = format!("limit-{}-{mtu}-{streams}-{number}", profile.name());
            let folder = folder.join(case);
            fs::create_dir(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            figures.push(iperf::measure(
                net.broker(0),
                net.publisher(),
                netns::broker_address(0),
                *streams,
                Amount::Seconds(effort.seconds),
                &folder,
                interrupt,
            )?);
        }
    }
    let raw = [Some(native), generic].into_iter().flatten();
    let mut limits: Vec<_> = raw.map(|raw| raw.limit(link)).collect();
    limits.extend(iperf3.map(|(streams, figures)| {
        let name = format!("iperf3_{streams}");
        Limit::of_link(&name, profile, mtu, Spread::of(figures))
    }));
    for limit in &limits {
        let Limit { name, mb_per_s, .. } = limit;
        info!(
            "limit {} MTU {mtu}: {name} {mb_per_s:.0} MB/s",
            profile.name()
        );
    }
    Ok(limits)
}

/// Runs of raw AF_XDP in one mode.
struct Raw {
    mode: XdpMode,
    runs: Vec<xsk_baseline::Outcome>,
}

impl Raw {
    fn new(mode: XdpMode) -> Self {
        let runs = Vec::new();
        Self { mode, runs }
    }

    fn measure(&mut self, link: Link<'_>, effort: Effort, interrupt: &Interrupt) -> Result<()> {
        let mode = match self.mode {
            XdpMode::Native => Mode::Native,
            XdpMode::Generic => Mode::Generic,
        };
        let time = Duration::from_secs(effort.seconds.into());
        self.runs.push(xsk_baseline::measure(
            link.net, mode, link.mtu, time, interrupt,
        )?);
        Ok(())
    }

    fn limit(self, Link { profile, mtu, .. }: Link<'_>) -> Limit {
        let name = format!("raw_af_xdp_{}", self.mode.name());
        let rates = self.runs.iter().map(|run| run.mb_per_s).collect();
        let (sent, lost) = self.runs.iter().fold((0, 0), |(sent, lost), run| {
            (sent + run.sent, lost + run.lost)
        });
        Limit {
            mode: Some(self.mode),
            datagram: self.runs.iter().map(|run| run.datagram).min(),
            lost_percent: Some(100.0 * lost as f64 / sent.max(1) as f64),
            ..Limit::of_link(&name, profile, mtu, Spread::of(rates))
        }
    }
}

/// One thread copies memory from one place to another.
pub fn of_memory(effort: Effort, interrupt: &Interrupt) -> Result<Limit> {
    let from = vec![1u8; MEMORY];
    let mut to = vec![2u8; MEMORY];
    let mut figures = Vec::new();
    for _ in 0..effort.runs {
        let time = Duration::from_secs(effort.seconds.into());
        let (started, mut copies) = (Instant::now(), 0);
        while started.elapsed() < time {
            interrupt.check()?;
            black_box(&mut to).copy_from_slice(black_box(&from));
            copies += 1;
        }
        let bytes = (MEMORY * copies) as f64;
        figures.push(bytes / started.elapsed().as_secs_f64() / 1e6);
    }
    let limit = Limit::of_host("memory_copy", Spread::of(figures));
    info!("limit: memory_copy {:.0} MB/s", limit.mb_per_s);
    Ok(limit)
}
