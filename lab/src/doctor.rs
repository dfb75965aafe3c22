//! `penstock-lab doctor`: looks whether this machine is ready for the xdp path, before anybody relies
//! on it. [`gather`] reads facts; [`host`] and [`interface`] judge them, without any I/O.

mod check;
mod facts;
mod gather;
mod host;
mod interface;
#[cfg(test)]
mod tests;

use std::fmt::Write;
use std::io::IsTerminal;

use anyhow::Result;
use serde::Serialize;

use penstock_process::output;

use crate::cli::{self, Format};
use check::{Check, Level};
use facts::{Interface, Seen};

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
pub fn run(options: &cli::Doctor) -> Result<bool> {
    let seen = gather::gather(
        options.iface.as_deref(),
        options.programs.bin_dir.as_deref(),
    )?;
    let report = judge(seen);
    match options.format {
        Format::Text => output::print(text(&report, std::io::stdout().is_terminal()))?,
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
fn text(report: &Report, colours: bool) -> String {
    let mut out = String::new();
    section(&mut out, "This machine", &report.host, colours);
    if let Some(examined) = &report.interface {
        let title = format!("\nInterface {}", examined.name);
        section(&mut out, &title, &examined.checks, colours);
    }
    if !report.interfaces.is_empty() {
        push(
            &mut out,
            "\nInterfaces that could be used (--iface NAME checks one)",
        );
    }
    for candidate in &report.interfaces {
        push(&mut out, &shown(candidate));
    }
    if !report.not_seen.is_empty() {
        push(&mut out, "\nCould not be seen");
    }
    for what in &report.not_seen {
        push(&mut out, &format!("  {what}"));
    }
    let Report { ok, warn, fail, .. } = report;
    push(
        &mut out,
        &format!("\n{ok} ok, {warn} to look at, {fail} failed"),
    );
    out
}

fn section(out: &mut String, title: &str, checks: &[Check], colours: bool) {
    push(out, title);
    for Check {
        name,
        level,
        found,
        why,
        fix,
    } in checks
    {
        push(
            out,
            &format!("  {} {name:<15} {found}", mark(*level, colours)),
        );
        if let Some(fix) = fix {
            push(out, &format!("       {:<15} why: {why}", ""));
            push(out, &format!("       {:<15} do:  {fix}", ""));
        }
    }
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
        name,
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
    format!("  {name:<15} {driver}, {state}, MTU {mtu}, {queues} queues, {xdp}{taken}")
}

fn push(out: &mut String, line: &str) {
    writeln!(out, "{line}").expect("a string takes all");
}
