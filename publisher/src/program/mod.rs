//! The program `penstock-publisher`: publishes real input or synthetic load.

mod cli;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod input;
mod interrupt;
mod pace;

use std::fmt::Write;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use penstock_process::{Program, exit, output, progress, usage};
use penstock_runtime::profile::ProcessUsage;
use penstock_runtime::sleep;
use serde::Serialize;

pub use self::cli::Cli;
use self::cli::{Format, Plan};
use self::input::Source;
use self::interrupt::Interrupt;
use self::pace::Pace;
use crate::{Config, Publisher, Summary};

/// How the program presents itself.
pub const PROGRAM: Program = Program {
    name: "penstock-publisher",
    log_variable: "RUST_LOG",
    log_level: "warn",
    log_target: true,
    log_thread: true,
};
/// Messages between two updates of the progress bar.
const REDRAW: u64 = 4096;

/// What `--format json` prints; field names are stable.
#[derive(Debug, Serialize)]
struct Output<'a> {
    kind: &'static str,
    mode: &'static str,
    topic: &'a str,
    ack: u8,
    order: u8,
    #[serde(flatten)]
    summary: &'a Summary,
    #[serde(flatten)]
    usage: ProcessUsage,
}

/// Publishes what the command line asks for.
///
/// # Errors
/// If the settings are wrong, input cannot be read, or a message was not delivered.
pub fn run(cli: Cli) -> Result<ExitCode> {
    execute(cli.plan(input::is_piped()).map_err(usage)?)
}

fn execute(mut plan: Plan) -> Result<ExitCode> {
    let interrupt = Interrupt::watch()?;
    let key = plan.key.as_deref().map(penstock_auth::read_key).transpose();
    plan.config.key = key.context("--auth-key")?;
    let plan = &plan;
    let source = Source::open(&plan.job)?;
    let mut publisher = Publisher::connect(plan.config.clone())?;
    interrupt.connected(publisher.canceller(), publisher.progress());
    let progress = publisher.progress();
    let published = publish(plan, source, &mut publisher, interrupt.flag());
    let closed = match published {
        Ok(()) => publisher.close().map_err(anyhow::Error::from),
        // The publisher was cancelled: the summary shows how far it got.
        Err(Halt::Publisher(crate::Error::Failed)) if interrupt.came() => {
            publisher.close().map_err(anyhow::Error::from)
        }
        // Messages before an input error are still delivered.
        Err(Halt::Input(error)) => match publisher.close() {
            Ok(_) => Err(error),
            Err(failure) => Err(failure).context(penstock_flags::explain(error.as_ref())),
        },
        Err(Halt::Publisher(error)) => Err(error.into()),
    };
    let summary = closed.with_context(|| {
        format!(
            "failed; {} messages were acknowledged before that",
            progress.messages_acked()
        )
    })?;
    print(plan, &summary)?;
    interrupt.finished();
    let complete = summary.messages_acked == summary.messages_sent;
    Ok(match (interrupt.came(), complete) {
        (true, _) => ExitCode::from(exit::INTERRUPTED),
        (false, true) => ExitCode::SUCCESS,
        (false, false) => ExitCode::FAILURE,
    })
}

/// Why publishing ended early.
enum Halt {
    /// The input cannot be read any further.
    Input(anyhow::Error),
    /// The publisher accepts no more messages.
    Publisher(crate::Error),
}

fn publish(
    plan: &Plan,
    source: Source,
    publisher: &mut Publisher,
    stop: &AtomicBool,
) -> Result<(), Halt> {
    if plan.rate.is_some() {
        let punctual = sleep::minimize_timer_slack().context("cannot set the timer slack");
        punctual.map_err(Halt::Input)?;
    }
    let mut pace = plan.rate.map(Pace::new);
    let bar = progress_bar(plan);
    let mut count = 0u64;
    let mut bytes = 0u64;
    let limit = publisher.max_message();
    let mut failure = None;
    let mut one = |message: &[u8]| {
        if let Err(error) = publisher.publish(message) {
            failure = Some(error);
            return false;
        }
        bytes += message.len() as u64;
        count += 1;
        if let Some(pace) = &mut pace {
            pace.wait_after(message.len(), stop);
        }
        if count.is_multiple_of(REDRAW) {
            bar.set_position(bytes);
        }
        !stop.load(Ordering::Relaxed)
    };
    let read = source.read(limit, stop, &mut one);
    bar.finish_and_clear();
    match failure {
        Some(error) => Err(Halt::Publisher(error)),
        None => read.map_err(Halt::Input),
    }
}

fn progress_bar(plan: &Plan) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(plan.total_bytes(), progress::target());
    let template = match bar.length() {
        Some(_) => {
            "{elapsed_precise} [{bar:30}] {decimal_bytes}/{decimal_total_bytes} \
             {decimal_bytes_per_sec} eta {eta}"
        }
        None => "{elapsed_precise} {decimal_bytes} {decimal_bytes_per_sec}",
    };
    let style = ProgressStyle::with_template(template);
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn print(plan: &Plan, summary: &Summary) -> Result<()> {
    let Config {
        topic, ack, order, ..
    } = &plan.config;
    let usage = ProcessUsage::now().context("cannot read this process's usage")?;
    let text = match plan.format {
        Format::Json => serde_json::to_string_pretty(&Output {
            kind: "publisher",
            mode: plan.config.mode.name(),
            topic,
            ack: ack.number(),
            order: order.number(),
            summary,
            usage,
        })?,
        Format::Text => text(summary, &usage)?,
    };
    output::print_line(text)
}

fn text(summary: &Summary, usage: &ProcessUsage) -> Result<String, std::fmt::Error> {
    let mut out = format!(
        "{} of {} messages acknowledged, {} bytes in {:.3} s: {:.2} MB/s, {:.2} CPU s",
        summary.messages_acked,
        summary.messages_sent,
        summary.payload_bytes,
        summary.seconds,
        summary.bandwidth_mb_per_s,
        usage.cpu_seconds
    );
    if let Some(waited) = &summary.ack_latency_us {
        write!(
            out,
            "\nack latency: p50 {:.0} µs, p99 {:.0} µs, p99.9 {:.0} µs, longest {:.0} µs, {} batches",
            waited.p50, waited.p99, waited.p999, waited.max, waited.count
        )?;
    }
    if summary.reroutes > 0 {
        write!(
            out,
            "\n{} reroutes to other brokers, {} returns",
            summary.reroutes, summary.returns
        )?;
    }
    if let (Some(detection), Some(recovery)) = (summary.detection_ms, summary.recovery_ms) {
        write!(
            out,
            "; losses detected within {detection:.0} ms, recovered {recovery:.0} ms later"
        )?;
    }
    write!(out, "\n{:<14} {:>8} {:>14}", "stage", "%", "ns per batch")?;
    for stage in &summary.stages {
        write!(
            out,
            "\n{:<14} {:>8.2} {:>14.0}",
            stage.name, stage.percent, stage.ns_per_batch
        )?;
    }
    for broker in &summary.brokers {
        for stream in &broker.streams {
            write!(
                out,
                "\n{} session {} stream {}: {} of {} messages, {} batches",
                broker.address,
                broker.session,
                stream.stream,
                stream.messages_acked,
                stream.messages,
                stream.batches
            )?;
            if let Some(at) = &stream.at {
                write!(out, ", at the end to {at}")?;
            }
            if let Some(sha256) = &stream.sha256 {
                write!(out, ", sha256 {sha256}")?;
            }
        }
    }
    Ok(out)
}
