//! `penstock-lab experiment rcvbuf`: where `SO_RCVBUF` is set, and its effect.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use bytesize::ByteSize;
use jiff::Timestamp;
use tracing::info;

use super::claims;
use super::flags::Rcvbuf;
use super::outcome::finish;
use super::trial::{Bench, Case};
use crate::measure::environment::Environment;
use crate::measure::rmem;
use crate::report::model::{RCVBUF, RcvbufExperiment, RcvbufRow, RcvbufRun};
use crate::report::result_folder;
use crate::report::text;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::link_emulation::{Forwarders, Plan};
use penstock_testbed::netns::{self, Net};
use penstock_testbed::programs::Binaries;

/// Sender's buffer in its own namespace: so large that it limits nothing before the window does.
const TCP_WMEM: &str = "4096 16384 134217728";
/// What the kernel doubles without overflow.
const LARGEST: u64 = 1 << 30;
/// Below this the kernel has minimums of its own.
const SMALLEST: u64 = 4 << 10;

/// Runs it.
pub fn run(options: &Rcvbuf, interrupt: &Interrupt) -> Result<bool> {
    let started = Timestamp::now();
    check(options)?;
    let binaries = Binaries::find(options.programs.bin_dir.as_deref())?;
    let folder = result_folder::create_folder(&options.output.results, started)?;
    let measured = measure(options, &binaries, &folder, started, interrupt);
    finish(
        &options.output,
        &folder,
        measured,
        text::rcvbuf,
        text::rcvbuf_summary,
    )
}

fn check(options: &Rcvbuf) -> Result<()> {
    let sizes = [
        ("--rcvbuf", options.rcvbuf),
        ("--tcp-rmem-max", options.tcp_rmem_max),
    ];
    let limits = options.rmem_max.iter().map(|size| ("--rmem-max", *size));
    for (option, size) in sizes.into_iter().chain(limits) {
        let possible = (SMALLEST..=LARGEST).contains(&size.as_u64());
        ensure!(possible, "{option} {size} is not from 4 KiB to 1 GiB");
    }
    Ok(())
}

fn measure(
    options: &Rcvbuf,
    binaries: &Binaries,
    folder: &Path,
    started: Timestamp,
    interrupt: &Interrupt,
) -> Result<RcvbufExperiment> {
    let seconds = options
        .seconds
        .unwrap_or(if options.quick { 1.0 } else { 3.0 });
    let runs = options.runs.unwrap_or(if options.quick { 1 } else { 5 });
    // Said before anything is made, should it not be readable here.
    rmem::rmem_max()?;
    let (net, carriers) = link(options)?;
    let environment = Environment::read(Some(net.broker(0)), started)?;
    let bench = Bench {
        options,
        binaries,
        net: &net,
        seconds: Duration::from_secs_f64(seconds),
        folder,
        interrupt,
    };
    let rows = rows(&bench, runs)?;
    carriers.finish()?;
    Ok(RcvbufExperiment {
        kind: RCVBUF.to_owned(),
        folder: folder.display().to_string(),
        delay_us: options.delay.micros(),
        seconds,
        rcvbuf_requested: options.rcvbuf.as_u64(),
        tcp_rmem_max: options.tcp_rmem_max.as_u64(),
        profile: options.profile,
        mtu: options.mtu,
        claims: claims::of(&rows),
        rows,
        environment,
    })
}

/// One broker at the end of a long line, whose namespaces have the buffer limits of the experiment.
fn link(options: &Rcvbuf) -> Result<(Net, Forwarders)> {
    let plan = Plan {
        faults: None,
        delay: Some(options.delay),
        seed: 0,
    };
    let emulation = plan
        .link_emulation(options.profile)
        .expect("a delay needs emulation");
    let net = Net::create_with_emulation(1, options.mtu, &emulation)?;
    netns::set_sysctl(net.publisher(), "ipv4/tcp_wmem", TCP_WMEM)?;
    let rmem = format!("4096 131072 {}", options.tcp_rmem_max.as_u64().max(131_072));
    netns::set_sysctl(net.broker(0), "ipv4/tcp_rmem", &rmem)?;
    let carriers = Forwarders::start(&net, 1, plan)?;
    Ok((net, carriers))
}

/// All cases in turn, again and again, so that none has a better part of the day than another.
fn rows(bench: &Bench<'_>, count: u32) -> Result<Vec<RcvbufRow>> {
    let limits = bench.options.rmem_max.iter().map(ByteSize::as_u64);
    let cases: Vec<(Case, u64)> = limits
        .flat_map(|limit| Case::ALL.map(|case| (case, limit)))
        .collect();
    let mut runs: Vec<Vec<RcvbufRun>> = vec![Vec::new(); cases.len()];
    for number in 1..=count {
        for (&(case, limit), runs) in cases.iter().zip(&mut runs) {
            let name = format!("{}-{limit}-{number}", case.name());
            let run = bench.run(case, limit, &name)?;
            info!(
                "{}, rmem_max {limit}, run {number}/{count}: {:.0} MB/s, rwnd_limited {:.0} %",
                case.name(),
                run.mb_per_s,
                run.rwnd_limited_percent
            );
            runs.push(run);
        }
    }
    let rows = cases.iter().zip(&runs);
    Ok(rows
        .map(|((case, limit), runs)| RcvbufRow::of(case.name(), *limit, runs))
        .collect())
}
