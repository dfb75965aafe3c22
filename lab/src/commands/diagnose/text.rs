//! Prints a diagnosis: verdicts with evidence first, then the figures that they rest on.

use std::collections::BTreeSet;
use std::fmt::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use crate::report::terminal::{self, Screen};
use crate::settings::Format;
use penstock_diagnose::broker_stats::Worker;
use penstock_diagnose::interfaces::Interface;
use penstock_diagnose::other_processes::Other;
use penstock_diagnose::sample::{Connection, End, Listener, Sample};
use penstock_diagnose::verdict::{Diagnosis, Verdict, bytes, counted, percent};

/// Lines of each kind that are shown to a person; all are in the JSON.
const MOST: usize = 8;
/// Threads below this share of a core are left out.
const VISIBLE: f64 = 0.01;

/// The names of all causes.
pub fn causes(format: Format, screen: Screen) -> Result<String> {
    #[derive(Serialize)]
    struct Listed {
        cause: &'static str,
        title: &'static str,
    }
    let listed = penstock_diagnose::causes().map(|(cause, title)| Listed { cause, title });
    match format {
        Format::Json => Ok(serde_json::to_string_pretty(&listed.collect::<Vec<_>>())? + "\n"),
        Format::Text => Ok(listed
            .map(|line| {
                let name = format!("{:<38} ", line.cause);
                terminal::wrap(line.title, &name, &" ".repeat(name.len()), screen) + "\n"
            })
            .collect()),
    }
}

/// A diagnosis as asked for.
pub fn diagnosis(diagnosis: &Diagnosis, format: Format, screen: Screen) -> Result<String> {
    match format {
        Format::Json => Ok(serde_json::to_string_pretty(diagnosis)
            .context("cannot put the diagnosis into JSON")?
            + "\n"),
        Format::Text => {
            let mut text = String::new();
            write_all(&mut text, diagnosis, screen).context("cannot write the diagnosis")?;
            Ok(text)
        }
    }
}

fn write_all(out: &mut String, diagnosis: &Diagnosis, screen: Screen) -> fmt::Result {
    let sample = &diagnosis.sample;
    let mut text = String::new();
    write_head(&mut text, sample)?;
    if diagnosis.verdicts.is_empty() {
        writeln!(text, "No cause fits the observations below.\n")?;
    }
    out.push_str(&terminal::fit(&text, screen));
    for (rank, verdict) in diagnosis.verdicts.iter().enumerate() {
        write_verdict(out, rank + 1, verdict, screen)?;
    }
    let mut text = String::new();
    write_listeners(&mut text, sample)?;
    write_connections(&mut text, sample)?;
    write_processes(&mut text, sample)?;
    write_syscalls(&mut text, sample)?;
    write_broker(&mut text, sample)?;
    write_host(&mut text, sample)?;
    if !diagnosis.unavailable.is_empty() {
        writeln!(text, "Not observed")?;
        for missing in &diagnosis.unavailable {
            writeln!(text, "  {}: {}; {}", missing.what, missing.why, missing.how)?;
        }
    }
    out.push_str(&terminal::fit(&text, screen));
    Ok(())
}

fn write_head(out: &mut String, sample: &Sample) -> fmt::Result {
    let name = match sample.name.as_str() {
        "" => "a server",
        name => name,
    };
    write!(out, "{name}")?;
    if let Some(pid) = sample.pid {
        write!(out, ", process {pid}")?;
    }
    let served: BTreeSet<u32> = sample
        .connections
        .iter()
        .filter_map(|connection| connection.end.pid)
        .filter(|pid| Some(*pid) != sample.pid)
        .collect();
    let ports: Vec<String> = sample.ports.iter().map(u16::to_string).collect();
    if !ports.is_empty() {
        write!(out, ", port {}", ports.join(", "))?;
    }
    if !served.is_empty() {
        let shown: Vec<String> = served.iter().take(MOST).map(u32::to_string).collect();
        write!(out, ", connections of process {}", shown.join(", "))?;
        if let more @ 1.. = served.len().saturating_sub(MOST) {
            write!(out, " and {more} more")?;
        }
    }
    writeln!(
        out,
        ": {}, observed for {:.1} s\n",
        counted(sample.connections.len(), "connection"),
        sample.seconds,
    )
}

fn write_verdict(out: &mut String, rank: usize, verdict: &Verdict, screen: Screen) -> fmt::Result {
    let mut text = String::new();
    let Verdict {
        cause,
        title,
        confidence,
        ..
    } = verdict;
    writeln!(
        text,
        "{rank}. {cause} (confidence {confidence:.2})\n   {title}"
    )?;
    if let Some(reason) = &verdict.reason {
        writeln!(text, "   because {reason}")?;
    }
    for line in &verdict.evidence_for {
        writeln!(text, "   + {line}")?;
    }
    for line in &verdict.evidence_against {
        writeln!(text, "   - {line}")?;
    }
    out.push_str(&terminal::fit(&text, screen));
    let next = terminal::command(&verdict.next_command, "     ", screen);
    writeln!(out, "   next:\n{next}\n")
}

fn write_listeners(out: &mut String, sample: &Sample) -> fmt::Result {
    let waits = |listener: &&Listener| listener.waiting > 0.0 || listener.full > 0.0;
    let mut listeners = sample.listeners.iter().filter(waits).peekable();
    if listeners.peek().is_none() {
        return Ok(());
    }
    writeln!(out, "Connections waiting to be accepted")?;
    for listener in listeners.take(MOST) {
        writeln!(
            out,
            "  {}: {:.1} of at most {}, queue full {} of the time",
            listener.local,
            listener.waiting,
            listener.backlog,
            percent(listener.full),
        )?;
    }
    writeln!(out)
}

fn write_connections(out: &mut String, sample: &Sample) -> fmt::Result {
    if sample.connections.is_empty() {
        return Ok(());
    }
    writeln!(out, "Connections, busiest first")?;
    for connection in sample.connections.iter().take(MOST) {
        let Connection { local, remote, .. } = connection;
        let rate = bytes(connection.bytes() as f64 / sample.seconds);
        let way = if connection.receives { "from" } else { "to" };
        writeln!(out, "  {local} {way} {remote}: {rate}/s")?;
        if let Some(end) = connection.receiver() {
            write_receiver(out, end)?;
        }
        if let Some(end) = connection.sender() {
            write_sender(out, end)?;
        }
    }
    left_out(out, sample.connections.len())
}

fn write_receiver(out: &mut String, end: &End) -> fmt::Result {
    let set = match end.receive_buffer_set {
        Some(true) => " (set by the application)",
        Some(false) => " (tuned by the kernel)",
        None => "",
    };
    writeln!(
        out,
        "    receiver: Recv-Q {}, skmem r {} of rb {}{set}; rcv_ssthresh {} to {}, rcv_space {}, window scale {}",
        bytes(end.recv_q),
        bytes(end.receive_memory),
        bytes(f64::from(end.receive_buffer)),
        end.rcv_ssthresh_first,
        end.rcv_ssthresh,
        end.rcv_space,
        end.rcv_wscale,
    )
}

fn write_sender(out: &mut String, end: &End) -> fmt::Result {
    writeln!(
        out,
        "    sender:   busy {}, rwnd_limited {}, sndbuf_limited {}, app_limited {}; cwnd {}, full {}; Send-Q {}, tb {}; rtt {:.0} us (min {:.0}), {} retransmits",
        percent(end.busy),
        percent(end.rwnd_limited),
        percent(end.sndbuf_limited),
        percent(end.app_limited),
        end.cwnd,
        percent(end.cwnd_full),
        bytes(end.send_q),
        bytes(f64::from(end.send_buffer)),
        end.rtt_us,
        end.min_rtt_us,
        end.retransmits,
    )
}

fn left_out(out: &mut String, count: usize) -> fmt::Result {
    match count.saturating_sub(MOST) {
        0 => writeln!(out),
        more => writeln!(out, "  and {more} more (--format json has all)\n"),
    }
}

fn write_processes(out: &mut String, sample: &Sample) -> fmt::Result {
    for process in sample.processes.iter().take(MOST) {
        write!(
            out,
            "Threads of {} ({}): together {} of a core, and {} waiting for one",
            process.name,
            process.pid,
            percent(process.run),
            percent(process.wait)
        )?;
        if process.stopped {
            write!(out, ", stopped")?;
        }
        if let Some(throttled) = process.throttled.filter(|share| *share > 0.0) {
            write!(out, ", out of CPU quota {} of the time", percent(throttled))?;
        }
        writeln!(out)?;
        let threads = process.threads.iter();
        let visible = threads.filter(|thread| thread.run + thread.wait >= VISIBLE);
        for thread in visible.take(MOST) {
            writeln!(
                out,
                "  {:<16} runs {:>5} ({} in the kernel), waits for a core {:>5}; context switches {:.0}/s voluntary, {:.0}/s forced",
                thread.name,
                percent(thread.run),
                percent(thread.system),
                percent(thread.wait),
                thread.voluntary_switches,
                thread.involuntary_switches,
            )?;
        }
    }
    left_out(out, sample.processes.len())
}

fn write_syscalls(out: &mut String, sample: &Sample) -> fmt::Result {
    let Some(calls) = &sample.syscalls else {
        return Ok(());
    };
    writeln!(out, "System calls")?;
    for call in calls.iter().take(MOST) {
        let size = call
            .bytes_per_call
            .map_or(String::new(), |size| format!(", {} each", bytes(size)));
        writeln!(
            out,
            "  {:<16} {:<16} {:>9.0}/s, {:>8.1} us, {:>5} of the time{size}",
            call.thread,
            call.name,
            call.per_second,
            call.mean_us,
            percent(call.time),
        )?;
    }
    left_out(out, calls.len())
}

fn write_broker(out: &mut String, sample: &Sample) -> fmt::Result {
    let Some(broker) = &sample.broker else {
        return Ok(());
    };
    writeln!(
        out,
        "Broker: connections waited for room in {} of the samples",
        percent(broker.blocked)
    )?;
    for topic in &broker.topics {
        writeln!(
            out,
            "  topic {}: {}/s, {} registered readers, {} of the ring not read",
            topic.topic,
            bytes(topic.bytes_per_second),
            topic.readers,
            percent(topic.unread),
        )?;
    }
    for worker in &broker.workers {
        write_worker(out, worker)?;
    }
    writeln!(out)
}

fn write_worker(out: &mut String, worker: &Worker) -> fmt::Result {
    let stages = worker.stages.iter();
    let stages: Vec<String> = stages
        .map(|(name, share)| format!("{name} {}", percent(*share)))
        .collect();
    let rate = bytes(worker.bytes_per_second);
    writeln!(out, "  {}: {rate}/s, {}", worker.thread, stages.join(", "))?;
    let Some(xdp) = &worker.xdp else {
        return Ok(());
    };
    writeln!(
        out,
        "    {} packets; polls that found packets {}, of these a whole burst {}; dropped {:?}, refused {:?}, never arrived {}; window {}; publishers paused per ACK: idle {:.2}, no credit {:.2}, congestion {:.2}",
        xdp.packets,
        percent(xdp.hit_rate),
        percent(xdp.full_looks),
        xdp.dropped,
        xdp.refused,
        xdp.missing,
        bytes(xdp.window as f64),
        xdp.idle,
        xdp.credit,
        xdp.congestion,
    )
}

fn write_host(out: &mut String, sample: &Sample) -> fmt::Result {
    writeln!(out, "Host")?;
    let busiest = sample.others.busiest.iter().take(3);
    let busiest: String = busiest
        .map(|other| {
            let Other {
                processes, name, ..
            } = other;
            format!(", {processes} × {name} {}", percent(other.cores))
        })
        .collect();
    writeln!(
        out,
        "  other processes used {} of a core{busiest}",
        percent(sample.others.cores)
    )?;
    for core in &sample.cores {
        writeln!(
            out,
            "  core {}: user {}, system {}, softirq {}, idle {}, stolen {}; {} packets, {} dropped at its queue",
            core.core,
            percent(core.user),
            percent(core.system),
            percent(core.softirq),
            percent(core.idle),
            percent(core.steal),
            core.packets,
            core.backlog_dropped,
        )?;
    }
    for interface in &sample.interfaces {
        writeln!(
            out,
            "  {}: {} packets in, {} dropped, {} errors, {} ring overflows",
            interface.name,
            interface.rx_packets,
            interface.rx_dropped,
            interface.rx_errors,
            interface.rx_fifo,
        )?;
        write_queues(out, interface)?;
    }
    write_settings(out, sample)?;
    if let Some(pressure) = sample.pressure {
        writeln!(
            out,
            "  pressure: some task waited for CPU {}, for memory {}, for storage {} of the last 10 s",
            percent(pressure.cpu),
            percent(pressure.memory),
            percent(pressure.io),
        )?;
    }
    writeln!(out)
}

fn write_queues(out: &mut String, interface: &Interface) -> fmt::Result {
    let queues = interface.queues.iter();
    if queues.clone().any(|(_, count)| *count > 0) {
        let packets = queues.map(|(queue, count)| format!("{queue}: {count}"));
        let packets: Vec<_> = packets.collect();
        writeln!(out, "    packets by receive queue {}", packets.join(", "))?;
    }
    let offloads = match interface.offloads.as_slice() {
        [] => "none".to_owned(),
        on => on.join(", "),
    };
    writeln!(out, "    offloads that merge or split packets: {offloads}")
}

fn write_settings(out: &mut String, sample: &Sample) -> fmt::Result {
    let settings = &sample.settings;
    let limit = settings.rmem_max.map(|max| max.to_string());
    let rmem = settings
        .tcp_rmem
        .map(|r| format!("{} {} {}", r[0], r[1], r[2]));
    let unknown = || "unknown".to_owned();
    writeln!(
        out,
        "  rmem_max {}, tcp_rmem {}, autotuning {}",
        limit.unwrap_or_else(unknown),
        rmem.unwrap_or_else(unknown),
        match settings.tcp_moderate_rcvbuf {
            Some(0) => "off",
            Some(_) => "on",
            None => "unknown",
        },
    )
}
