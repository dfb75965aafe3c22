//! `penstock-lab doctor`: checks whether this machine is ready for the xdp path. [`gather`] reads facts; [`host`] and [`interface`] judge them, without any I/O.

mod check;
mod facts;
pub mod flags;
mod gather;
mod host;
mod interface;
#[cfg(test)]
mod tests;

use std::fmt::Write;

use anyhow::Result;
use serde::Serialize;

use penstock_process::output;

use crate::report::terminal::{self, Screen};
use crate::settings::Format;
use check::{Check, Level};
use facts::{Interface, Seen};

/// Column where marks end and findings begin.
const MARK: usize = 6;
const COLUMN: usize = 23;

/// What `--format json` prints.
#[derive(Debug, Serialize)]
struct Report {
    /// Checks of the machine, then of the interface, in a fixed order.
    host: Vec<Check>,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<Examined>,
    /// Interfaces that could be used, when none was named.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    interfaces: Vec<Candidate>,
    /// What could not be seen, and what would show it.
    not_seen: Vec<String>,
    ok: usize,
    warn: usize,
    fail: usize,
}

/// The interface that was named.
#[derive(Debug, Serialize)]
struct Examined {
    name: String,
    checks: Vec<Check>,
}

/// An interface that could be used.
#[derive(Debug, Serialize)]
struct Candidate {
    name: String,
    driver: String,
    mtu: u32,
    queues: u32,
    up: bool,
    native_xdp: bool,
    zero_copy: bool,
    multi_buffer: bool,
    xdp_program: Option<u32>,
}

/// Runs it; true when nothing fails.
pub fn run(options: &flags::Doctor) -> Result<bool> {
    let seen = gather::gather(
        options.iface.as_deref(),
        options.programs.bin_dir.as_deref(),
    )?;
    let report = judge(seen);
    match options.format {
        Format::Text => output::print(text(&report, Screen::stdout()))?,
        Format::Json => output::print_line(serde_json::to_string_pretty(&report)?)?,
    }
    Ok(report.fail == 0)
}

fn judge(seen: Seen) -> Report {
    let Seen {
        host,
        interface,
        candidates,
        unseen,
    } = seen;
    let of_host = host::checks(&host, interface.as_ref());
    let examined = interface.map(|interface| Examined {
        checks: interface::checks(&host, &interface),
        name: interface.nic.interface,
    });
    let of_interface = examined.iter().flat_map(|examined| &examined.checks);
    let all: Vec<Level> = of_host
        .iter()
        .chain(of_interface)
        .map(|check| check.level)
        .collect();
    let count = |level| all.iter().filter(|found| **found == level).count();
    Report {
        ok: count(Level::Ok),
        warn: count(Level::Warn),
        fail: count(Level::Fail),
        host: of_host,
        interface: examined,
        interfaces: candidates.iter().map(candidate).collect(),
        not_seen: unseen,
    }
}

fn candidate(interface: &Interface) -> Candidate {
    let nic = &interface.nic;
    let xdp = interface.native_xdp();
    Candidate {
        name: nic.interface.clone(),
        driver: nic.driver_name().to_owned(),
        mtu: nic.mtu,
        queues: nic.queues,
        up: nic.link == penstock_nic::Link::Up,
        native_xdp: xdp.is_some_and(|xdp| xdp.native),
        zero_copy: xdp.is_some_and(|xdp| xdp.zero_copy),
        multi_buffer: xdp.is_some_and(|xdp| xdp.multi_buffer),
        xdp_program: interface.program.as_ref().map(|program| program.id),
    }
}

/// For people.
fn text(report: &Report, screen: Screen) -> String {
    let mut out = String::new();
    section(&mut out, "This machine", &report.host, screen);
    if let Some(examined) = &report.interface {
        let title = format!("\nInterface {}", examined.name);
        section(&mut out, &title, &examined.checks, screen);
    }
    if !report.interfaces.is_empty() {
        push(&mut out, "\nUsable interfaces (--iface NAME checks one)");
    }
    for candidate in &report.interfaces {
        let first = format!("  {:<15} ", candidate.name);
        let further = " ".repeat(first.len());
        push(
            &mut out,
            &terminal::wrap(&shown(candidate), &first, &further, screen),
        );
    }
    if !report.not_seen.is_empty() {
        push(&mut out, "\nCould not be checked");
    }
    for what in &report.not_seen {
        push(&mut out, &terminal::fit(&format!("  {what}"), screen));
    }
    let Report { ok, warn, fail, .. } = report;
    push(
        &mut out,
        &format!("\n{ok} ok, {warn} warnings, {fail} failed"),
    );
    out
}

/// Checks with their marks; why and what to do follow each finding.
fn section(out: &mut String, title: &str, checks: &[Check], screen: Screen) {
    push(out, title);
    let below = " ".repeat(COLUMN);
    for Check {
        name,
        level,
        found,
        why,
        fix,
    } in checks
    {
        // Wrapped without colours, because escape sequences have no width.
        let plain = format!("  {:<4} {name:<15} ", level.name());
        let line = terminal::wrap(found, &plain, &below, screen);
        let behind = line.get(MARK..).unwrap_or_default();
        push(out, &format!("  {}{behind}", mark(*level, screen.colours)));
        if let Some(fix) = fix {
            let further = format!("{below}     ");
            push(
                out,
                &terminal::wrap(why, &format!("{below}why: "), &further, screen),
            );
            for (number, step) in steps(fix, screen).into_iter().enumerate() {
                let first = match number {
                    0 => format!("{below}do:  "),
                    _ => further.clone(),
                };
                let text = match is_command(step) {
                    true => terminal::command(step, &further, screen).replacen(&further, &first, 1),
                    false => terminal::wrap(step, &first, &further, screen),
                };
                push(out, &text);
            }
        }
    }
}

/// What to do, one command per line if they do not fit on one.
fn steps(fix: &str, screen: Screen) -> Vec<&str> {
    let steps = fix.split_inclusive("; ").map(str::trim_end);
    let too_long = COLUMN + 5 + fix.chars().count() > screen.width;
    match too_long && steps.clone().any(is_command) {
        true => steps.collect(),
        false => vec![fix],
    }
}

/// Whether a step can be pasted into a shell as it is.
fn is_command(step: &str) -> bool {
    const PROGRAMS: [&str; 9] = [
        "sudo", "sysctl", "ethtool", "ip", "setcap", "ulimit", "mount", "apt-get", "modprobe",
    ];
    let program = step.split(' ').next().unwrap_or_default();
    PROGRAMS.contains(&program) && !step.contains(", ")
}

fn mark(level: Level, colours: bool) -> String {
    let name = format!("{:<4}", level.name());
    let colour = match level {
        Level::Ok => "32",
        Level::Warn => "33",
        Level::Fail => "31",
    };
    match colours {
        true => format!("\x1b[{colour}m{name}\x1b[0m"),
        false => name,
    }
}

fn shown(candidate: &Candidate) -> String {
    let Candidate {
        driver,
        mtu,
        queues,
        ..
    } = candidate;
    let features = [
        (candidate.native_xdp, "native XDP"),
        (candidate.zero_copy, "zero-copy"),
        (candidate.multi_buffer, "multi-buffer"),
    ];
    let features: Vec<_> = features
        .iter()
        .filter(|(has, _)| *has)
        .map(|(_, name)| *name)
        .collect();
    let xdp = match features.is_empty() {
        true => "generic XDP only".to_owned(),
        false => features.join(", "),
    };
    let state = if candidate.up { "up" } else { "not up" };
    let taken = match candidate.xdp_program {
        Some(id) => format!(", has XDP program {id}"),
        None => String::new(),
    };
    format!("{driver}, {state}, MTU {mtu}, {queues} queues, {xdp}{taken}")
}

fn push(out: &mut String, line: &str) {
    writeln!(out, "{}", line.trim_end_matches('\n')).expect("a string takes all");
}
