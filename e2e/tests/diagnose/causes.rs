//! Causes at either end and in the network, over tcp.

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::Result;
use penstock_e2e::bed::{BROKER_ADDRESS, Bed};
use penstock_e2e::cleanup::ChangedSetting;
use penstock_e2e::commands::{Background, command, unwrapped};
use penstock_e2e::loads::{Load, Send, Serve};
use penstock_e2e::{Case, cases, skip};

use crate::bench::{
    Ends, LabLink, PORT, Quota, because, diagnose_as_text, names, publish, settle, stop,
};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        throttled_publisher,
        throttled_iperf,
        starved_worker,
        starved_publisher,
        blocked_reader,
        slow_receiver,
        tiny_receives,
        small_send_buffer,
        slow_network,
        drops_before_the_socket,
        publisher_displaced,
        receiver_displaced,
        work_that_moves,
        accept_queue,
        stopped_server,
        starved_nats,
        idle_connection,
        idle_broker,
    ]
}

fn throttled_publisher(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let _publisher = publish(bed, &["--rate", "50MB"])?;
    settle();
    names(
        bed,
        "sender-application-limited",
        &["--pid", &broker.pid_text()],
    );
    Ok(())
}

/// A foreign server.
fn throttled_iperf(bed: &Bed) -> Result<()> {
    let port = PORT.to_string();
    let mut serve = bed.in_broker_ns("iperf3", &["-s", "-1", "-p", &port]);
    let server = bed.background("iperf3-server", &mut serve)?;
    Ends::of(bed).until_listening(bed);
    #[rustfmt::skip]
    let mut send = bed.in_publisher_ns(
        "iperf3", &["-c", BROKER_ADDRESS, "-p", &port, "-b", "200M", "-t", "60"]);
    let _client = bed.background("iperf3-client", &mut send)?;
    settle();
    names(
        bed,
        "sender-application-limited",
        &["--pid", &server.pid().to_string()],
    );
    Ok(())
}

fn starved_worker(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let _quota = Quota::set(bed, 5, broker.pid())?;
    let _publisher = publish(bed, &[])?;
    settle();
    names(bed, "receiver-cpu", &["--pid", &broker.pid_text()]);
    Ok(())
}

fn starved_publisher(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let publisher = publish(bed, &[])?;
    let _quota = Quota::set(bed, 5, publisher.pid())?;
    settle();
    names(bed, "sender-cpu", &["--pid", &broker.pid_text()]);
    Ok(())
}

fn blocked_reader(bed: &Bed) -> Result<()> {
    blocked_by_reader(bed, &[], &[])
}

/// A registered reader stops, and the ring fills.
pub fn blocked_by_reader(bed: &Bed, broker: &[&str], publisher: &[&str]) -> Result<()> {
    let ring = ["--ring-size", "64MiB", "--topic", "penstock"];
    let broker = bed.start_broker(&[broker, &ring].concat())?;
    let mut read = bed.subscriber(&["--register", "--follow", "--output", "none"]);
    read.arg("--path").arg(bed.log_of("penstock"));
    let reader = bed.background("reader", &mut read)?;
    settle();
    stop(&reader)?;
    let _publisher = publish(bed, publisher)?;
    settle();
    names(bed, "shared-buffer-full", &["--pid", &broker.pid_text()]);
    Ok(())
}

/// Reads, then pauses.
fn slow_receiver(bed: &Bed) -> Result<()> {
    let pause_us = 20_000;
    let serve = Serve {
        pause_us,
        ..Serve::default()
    };
    served(bed, serve, "receiver-application-limited")?;
    Ok(())
}

/// 64 bytes a call.
fn tiny_receives(bed: &Bed) -> Result<()> {
    let serve = Serve {
        bytes: 64,
        ..Serve::default()
    };
    served(bed, serve, "syscall-overhead")?;
    Ok(())
}

/// Two threads of one name take turns, as tasks move in a runtime: neither thread is busy.
fn work_that_moves(bed: &Bed) -> Result<()> {
    let serve = Serve {
        spin_us: 500,
        relay: true,
        ..Serve::default()
    };
    let diagnosis = served(bed, serve, "receiver-cpu")?;
    because(&diagnosis, "moves between");
    Ok(())
}

/// A client sends all the time to a server of this kind, for which a diagnosis names this cause.
fn served(bed: &Bed, serve: Serve, cause: &str) -> Result<serde_json::Value> {
    let ends = Ends::of(bed);
    let server = ends.serve(bed, serve)?;
    let _client = ends.send(bed, Send::default())?;
    settle();
    Ok(names(bed, cause, &["--pid", &server.pid().to_string()]))
}

/// 64 KiB, 30 ms away.
fn small_send_buffer(bed: &Bed) -> Result<()> {
    let link = LabLink::with_delay(bed, "30ms")?;
    let server = link.ends.serve(bed, Serve::default())?;
    let _client = link.ends.send(
        bed,
        Send {
            sndbuf: 65536,
            ..Send::default()
        },
    )?;
    settle();
    names(
        bed,
        "send-buffer-limited",
        &["--pid", &server.pid().to_string()],
    );
    Ok(())
}

/// 100 Mbit/s.
fn slow_network(bed: &Bed) -> Result<()> {
    #[rustfmt::skip]
    let mut limit = bed.in_publisher_ns("tc", &[
        "qdisc", "add", "dev", "b0", "root", "tbf", "rate", "100mbit", "burst", "64kb", "latency", "50ms"]);
    bed.run("tc", &mut limit)?.success()?;
    let broker = bed.start_broker(&[])?;
    let _publisher = publish(bed, &[])?;
    settle();
    names(bed, "congestion-limited", &["--pid", &broker.pid_text()]);
    Ok(())
}

/// The queues of the cores have room for so few packets that a burst does not fit.
fn drops_before_the_socket(bed: &Bed) -> Result<()> {
    let backlog = Path::new("/proc/sys/net/core/netdev_max_backlog");
    if OpenOptions::new().write(true).open(backlog).is_err() {
        return Err(skip("net.core.netdev_max_backlog cannot be set here"));
    }
    let broker = bed.start_broker(&[])?;
    let _publisher = publish(bed, &[])?;
    settle();
    let _changed = ChangedSetting::write(backlog, "5")?;
    let diagnosis = names(bed, "nic-drops", &["--pid", &broker.pid_text()]);
    because(&diagnosis, "raise net.core.netdev_max_backlog");
    Ok(())
}

/// Programs that use all cores, several times over.
fn hogs(bed: &Bed) -> Result<Vec<Background>> {
    let cores = std::thread::available_parallelism().map_or(1, Into::into);
    (0..4 * cores)
        .map(|_| {
            bed.background(
                "hog",
                &mut Load::Spin.command(bed.publisher_ns(), BROKER_ADDRESS)?,
            )
        })
        .collect()
}

fn publisher_displaced(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let _publisher = publish(bed, &[])?;
    Ends::of(bed).until_connected(bed, 1214, 1);
    let _hogs = hogs(bed)?;
    settle();
    let diagnosis = names(bed, "cpu-taken-by-others", &["--pid", &broker.pid_text()]);
    because(&diagnosis, "e2e-load");
    Ok(())
}

fn receiver_displaced(bed: &Bed) -> Result<()> {
    let ends = Ends::of(bed);
    let server = ends.serve(bed, Serve::default())?;
    let _client = ends.send(bed, Send::default())?;
    ends.until_connected(bed, PORT, 1);
    let _hogs = hogs(bed)?;
    settle();
    names(
        bed,
        "cpu-taken-by-others",
        &["--pid", &server.pid().to_string()],
    );
    Ok(())
}

/// More connections than have room in the queue of a server that never accepts.
fn accept_queue(bed: &Bed) -> Result<()> {
    let ends = Ends::of(bed);
    let _server = ends.serve(
        bed,
        Serve {
            backlog: 4,
            ..Serve::default()
        },
    )?;
    let send = Send {
        total: 1000,
        ..Send::default()
    };
    let _clients = (0..12)
        .map(|_| ends.send(bed, send))
        .collect::<Result<Vec<_>>>()?;
    ends.until_connected(bed, PORT, 5);
    let port = PORT.to_string();
    let diagnosis = names(bed, "accept-queue-full", &["--port", &port]);
    because(&diagnosis, "room for 4");
    let text = unwrapped(&diagnose_as_text(bed, &["--port", &port])?);
    assert!(
        text.contains("waiting to be accepted"),
        "the text does not show the queue: {text}"
    );
    Ok(())
}

fn stopped_server(bed: &Bed) -> Result<()> {
    let ends = Ends::of(bed);
    let server = ends.serve(bed, Serve::default())?;
    let _client = ends.send(bed, Send::default())?;
    ends.until_connected(bed, PORT, 1);
    settle();
    stop(&server)?;
    settle();
    let pid = server.pid().to_string();
    let diagnosis = names(bed, "receiver-application-limited", &["--pid", &pid]);
    because(&diagnosis, &format!("process {pid} is stopped"));
    Ok(())
}

/// A server of another project.
fn starved_nats(bed: &Bed) -> Result<()> {
    if command("nats-server", &["--version"]).output().is_err() {
        return Err(skip("there is no nats-server; apt-get install nats-server"));
    }
    let ends = Ends::of(bed);
    let port = PORT.to_string();
    let mut serve = bed.in_broker_ns("nats-server", &["-a", "0.0.0.0", "-p", &port]);
    let server = bed.background("nats", &mut serve)?;
    ends.until_listening(bed);
    let _client = ends.send(
        bed,
        Send {
            nats: true,
            ..Send::default()
        },
    )?;
    settle();
    let _quota = Quota::set(bed, 5, server.pid())?;
    settle();
    names(bed, "receiver-cpu", &["--pid", &server.pid().to_string()]);
    Ok(())
}

/// It carried a little, and its window is as small as at the start: that is no cause.
fn idle_connection(bed: &Bed) -> Result<()> {
    let ends = Ends::of(bed);
    let server = ends.serve(bed, Serve::default())?;
    let _client = ends.send(
        bed,
        Send {
            total: 1000,
            bytes: 1000,
            ..Send::default()
        },
    )?;
    settle();
    let pid = server.pid().to_string();
    let diagnosis = names(
        bed,
        "idle-or-offered-slower-than-capacity",
        &["--pid", &pid],
    );
    let verdicts = diagnosis["verdicts"].as_array().expect("verdicts");
    assert!(
        verdicts
            .iter()
            .all(|verdict| verdict["cause"] != "receive-window-limited")
    );
    Ok(())
}

/// A broker without connections.
fn idle_broker(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let pid = broker.pid_text();
    names(
        bed,
        "idle-or-offered-slower-than-capacity",
        &["--pid", &pid],
    );
    Ok(())
}
