//! `penstock-lab baseline`: one broker against iperf3, alternating on the same links.

pub mod flags;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use tracing::info;

use crate::measure::environment::Environment;
use crate::measure::host_load::{self, HostWatch};
use crate::measure::iperf;
use crate::measure::iperf::Amount;
use crate::measure::stats::Spread;
use crate::report::chart::{Chart, Figure, Panel};
use crate::report::model::{Baseline, BaselineRow};
use crate::report::result_folder;
use crate::report::text;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::Brokers;
use penstock_testbed::netns::{self, Net};
use penstock_testbed::programs::Binaries;
use penstock_testbed::publish::{Publish, Source};
use penstock_testbed::settings::Profile;

/// The picture's name in the result folder.
const PICTURE: &str = "baseline.svg";

/// Everything that stays the same over the runs of one profile.
struct Bench<'a> {
    options: &'a flags::Baseline,
    binaries: &'a Binaries,
    net: &'a Net,
    folder: &'a Path,
    interrupt: &'a Interrupt,
}

/// Runs it; errors aside, always a success: the ratio is for the reader to judge.
pub fn run(options: &flags::Baseline, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    let iperf3_version = iperf::version()?;
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let host = HostWatch::start()?;
    let report = measure_all(options, &binaries, &folder, started, interrupt);
    let printed = report.and_then(|(rows, environment)| {
        let host_load = host.finish()?;
        let mut warnings = host_load.warnings();
        warnings.extend(host_load::spread_warning(rows.iter().flat_map(spreads)));
        let report = Baseline {
            kind: "baseline".to_owned(),
            mode: options.route.mode.name().to_owned(),
            message_size: options.workload.message_size.as_u64(),
            size_bytes: options.size.as_u64(),
            iperf3_version,
            rows,
            host_load: Some(host_load),
            warnings,
            environment,
        };
        result_folder::write(&folder, &report, &text::baseline(&report))?;
        result_folder::write_file(&folder.join(PICTURE), &picture(&report)?)?;
        result_folder::print(options.output.format, &report, || {
            text::baseline_summary(&report)
        })?;
        Ok(true)
    });
    result_folder::print_path(&folder, printed)
}

fn spreads(row: &BaselineRow) -> Vec<(String, &Spread)> {
    [("penstock", &row.penstock), ("iperf3", &row.iperf3)]
        .map(|(whose, spread)| {
            let case = format!("{whose} {} × {}", row.profile.name(), row.connections);
            (case, spread)
        })
        .into()
}

/// The medians as bars, in a file of their own.
pub fn picture(report: &Baseline) -> Result<String> {
    drawn(report, |chart| chart.svg())
}

/// The medians as bars, for a page.
pub fn figures(report: &Baseline) -> Result<Vec<Figure>> {
    drawn(report, |chart| chart.figures())
}

/// One panel per profile.
fn drawn<T>(report: &Baseline, draw: impl FnOnce(&Chart<'_>) -> Result<T>) -> Result<T> {
    let panels = report.rows.chunk_by(|a, b| a.profile == b.profile);
    let panels = panels.map(|rows| Panel {
        title: format!("{}, MTU {}", rows[0].profile.name(), rows[0].mtu),
        unit: "MB/s",
        logarithmic: false,
        groups: rows
            .iter()
            .map(|row| {
                let streams = if row.connections == 1 { "" } else { "s" };
                let label = format!(
                    "{} stream{streams}: {:.2} of iperf3",
                    row.connections, row.ratio
                );
                (label, vec![&row.penstock, &row.iperf3])
            })
            .collect(),
    });
    draw(&Chart {
        title: "Payload received, median and range of the runs",
        series: &[&format!("penstock, {}", report.mode), "iperf3"],
        panels: panels.collect(),
    })
}

fn measure_all(
    options: &flags::Baseline,
    binaries: &Binaries,
    folder: &Path,
    started: Timestamp,
    interrupt: &Interrupt,
) -> Result<(Vec<BaselineRow>, Environment)> {
    let mut rows = Vec::new();
    let mut environment = None;
    for profile in Profile::chosen(options.profile) {
        let net = Net::create(1, profile, options.mtu)?;
        environment.get_or_insert(Environment::read(Some(net.publisher()), started)?);
        let bench = Bench {
            options,
            binaries,
            net: &net,
            folder,
            interrupt,
        };
        for &connections in &options.connections {
            rows.push(bench.row(profile, connections)?);
        }
    }
    Ok((rows, environment.context("no profile was measured")?))
}

impl Bench<'_> {
    fn row(&self, profile: Profile, connections: u32) -> Result<BaselineRow> {
        let mut runs = Vec::new();
        for number in 0..self.options.runs {
            let case = format!("{}-{connections}-{}", profile.name(), number + 1);
            let folder = self.folder.join(case);
            fs::create_dir(&folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            // Neither program always has the other's leftovers in the caches.
            let (ours, theirs) = if number % 2 == 0 {
                let ours = self.penstock(connections, &folder)?;
                (ours, self.iperf3(connections, &folder)?)
            } else {
                let theirs = self.iperf3(connections, &folder)?;
                (self.penstock(connections, &folder)?, theirs)
            };
            info!(
                "{} MTU {} connections {connections} run {}/{}: penstock {ours:.0} MB/s, \
                 iperf3 {theirs:.0} MB/s, ratio {:.3}",
                profile.name(),
                self.options.mtu,
                number + 1,
                self.options.runs,
                ours / theirs
            );
            runs.push((ours, theirs));
        }
        Ok(BaselineRow::of(
            profile,
            self.options.mtu,
            connections,
            &runs,
        ))
    }

    fn penstock(&self, connections: u32, folder: &Path) -> Result<f64> {
        let mut workload = self.options.workload.clone();
        workload.threads_per_broker = connections;
        let buffers = BufferDir::create()?;
        let (net, interrupt) = (self.net, self.interrupt);
        let brokers = Brokers {
            count: 1,
            net,
            buffers: &buffers,
            binaries: self.binaries,
            route: &self.options.route,
            workload: &workload,
            cpus: None,
            folder,
        };
        let mut cluster = brokers.start(interrupt)?;
        let publish = Publish {
            program: &self.binaries.publisher,
            namespace: Some(net.publisher()),
            cpus: None,
            brokers: cluster.addresses(),
            mode: self.options.route.mode,
            tx: self.options.route.tx.as_deref(),
            workload: &workload,
            source: &Source::Synthetic(self.options.size),
            rate: None,
            digest: false,
            folder,
        };
        let (report, succeeded) = publish.run(|_| cluster.check(), interrupt)?;
        cluster.stop()?;
        if !succeeded || report.messages_acked != report.messages_sent {
            let log: PathBuf = folder.join("publisher.log");
            bail!("not every message was acked; see {}", log.display());
        }
        Ok(report.bandwidth_mb_per_s)
    }

    fn iperf3(&self, connections: u32, folder: &Path) -> Result<f64> {
        iperf::measure(
            self.net.broker(0),
            self.net.publisher(),
            netns::broker_address(0),
            connections,
            Amount::Bytes(self.options.size),
            folder,
            self.interrupt,
        )
    }
}
