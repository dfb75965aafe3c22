//! The brokers of one run: started in their namespaces, watched, stopped, their reports collected.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::buffers::BufferDir;
use crate::netns::{self, Net};
use crate::program_reports;
use crate::programs::Binaries;
use crate::running::{Running, inside};
use crate::settings::{Mode, Route, Workload};
use penstock_process::interrupt::Interrupt;

/// The port of Penstock; each broker has its namespace to itself.
pub const PORT: u16 = 1214;
/// What a broker prints once it accepts connections.
const READY: &str = "penstock-broker ready on";
/// Time to map and touch a large ring on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Time to finish open connections and write the report.
const STOP_TIMEOUT: Duration = Duration::from_secs(30);

/// How to start the brokers of a run.
#[derive(Debug)]
pub struct Brokers<'a> {
    /// Number of brokers.
    pub count: usize,
    /// Where they run.
    pub net: &'a Net,
    /// Where their buffers are.
    pub buffers: &'a BufferDir,
    /// The programs.
    pub binaries: &'a Binaries,
    /// The path of the payload.
    pub route: &'a Route,
    /// Their other settings.
    pub workload: &'a Workload,
    /// Cores that their workers are pinned to.
    pub cpus: Option<&'a str>,
    /// Gets logs and reports, `broker-<index>.log` and `.json`.
    pub folder: &'a Path,
}

/// Running brokers; killed when dropped.
#[derive(Debug)]
pub struct Cluster {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    process: Running,
    report: PathBuf,
    log_path: PathBuf,
}

impl Brokers<'_> {
    /// Starts them and waits until all are ready.
    pub fn start(&self, interrupt: &Interrupt) -> Result<Cluster> {
        self.start_through(&[], interrupt)
    }

    /// As [`Self::start`], through a program with arguments that executes the broker.
    pub fn start_through(&self, starter: &[String], interrupt: &Interrupt) -> Result<Cluster> {
        let mut cluster = Cluster {
            members: Vec::with_capacity(self.count),
        };
        for index in 0..self.count {
            cluster.members.push(self.start_one(index, starter)?);
        }
        for member in &mut cluster.members {
            member
                .process
                .wait_for_line(READY, READY_TIMEOUT, interrupt)?;
        }
        Ok(cluster)
    }

    fn start_one(&self, index: usize, starter: &[String]) -> Result<Member> {
        let report = self.folder.join(format!("broker-{index}.json"));
        let log = self.folder.join(format!("broker-{index}.log"));
        let buffer_dir = self.buffers.of_broker(index);
        let namespace = self.net.broker(index);
        let mut command = match starter.split_first() {
            None => inside(namespace, &self.binaries.broker),
            Some((program, arguments)) => {
                let mut command = inside(namespace, Path::new(program));
                command.args(arguments).arg(&self.binaries.broker);
                command
            }
        };
        command
            .stdin(Stdio::null())
            .arg("--listen")
            .arg(address(index));
        command.arg("--buffer-dir").arg(&buffer_dir);
        command.arg("--report").arg(&report);
        add_route(&mut command, self.route);
        add_options(&mut command, self.workload);
        if let Some(cpus) = self.cpus {
            command.args(["--cpus", cpus]);
        }
        Ok(Member {
            process: Running::start(&format!("broker {index}"), &mut command, None, &log)?,
            report,
            log_path: buffer_dir.join(format!("{}.log", self.workload.topic)),
        })
    }
}

impl Cluster {
    /// The address list for a publisher.
    pub fn addresses(&self) -> String {
        let addresses: Vec<_> = (0..self.members.len()).map(address).collect();
        addresses.join(",")
    }

    /// The shared buffer of each broker.
    pub fn log_paths(&self) -> Vec<&Path> {
        self.members.iter().map(|m| m.log_path.as_path()).collect()
    }

    /// Numbers of the brokers' processes.
    pub fn pids(&self) -> Vec<u32> {
        self.members.iter().map(|m| m.process.id()).collect()
    }

    /// The brokers' processes.
    pub fn processes(&mut self) -> impl Iterator<Item = &mut Running> {
        self.members.iter_mut().map(|member| &mut member.process)
    }

    /// CPU time that the brokers have used so far, seconds.
    pub fn cpu_seconds(&self) -> Result<f64> {
        self.members
            .iter()
            .map(|member| member.process.cpu_seconds())
            .sum()
    }

    /// Fails when a broker has ended.
    pub fn check(&mut self) -> Result<()> {
        for member in &mut self.members {
            if let Some(status) = member.process.ended()? {
                return Err(member
                    .process
                    .failure(&format!("ended during the run ({status})")));
            }
        }
        Ok(())
    }

    /// Stops every broker and returns their reports, in order.
    pub fn stop(mut self) -> Result<Vec<program_reports::Broker>> {
        let mut reports = Vec::with_capacity(self.members.len());
        for (index, member) in self.members.iter_mut().enumerate() {
            member.process.stop(STOP_TIMEOUT)?;
            let name = format!("broker {index}");
            reports.push(
                program_reports::parse_file(&name, &member.report).context("a broker's report")?,
            );
        }
        Ok(reports)
    }
}

/// Address and port of broker `index`.
pub fn address(index: usize) -> String {
    format!("{}:{PORT}", netns::broker_address(index))
}

fn add_route(command: &mut Command, route: &Route) {
    command.args(["--mode", route.mode.name()]);
    if route.mode != Mode::Tcp {
        command.args(["--iface", netns::BROKER_END]);
    }
    for (option, text) in [("--xdp-mode", &route.xdp_mode), ("--poll", &route.poll)] {
        if let Some(text) = text {
            command.arg(option).arg(text);
        }
    }
}

fn add_options(command: &mut Command, workload: &Workload) {
    command.args(["--topic", &workload.topic]);
    // All publishers belong to this lab and run on one host.
    command.args(["--create-topics", "any", "--max-share", "100"]);
    let sizes = [
        ("--ring-size", workload.ring_size),
        ("--rcvbuf", workload.rcvbuf),
        ("--sndbuf", workload.sndbuf),
    ];
    for (option, size) in sizes {
        if let Some(size) = size {
            command.arg(option).arg(size.as_u64().to_string());
        }
    }
    let texts = [
        ("--workers", workload.workers.map(|n| n.to_string())),
        ("--full", workload.full.clone()),
        ("--busy-poll", workload.busy_poll.map(|n| n.to_string())),
        ("--rcvbuf-on", workload.rcvbuf_on.clone()),
    ];
    for (option, text) in texts {
        if let Some(text) = text {
            command.arg(option).arg(text);
        }
    }
    if workload.rcvbuf_force {
        command.arg("--rcvbuf-force");
    }
    command.args(&workload.broker_option);
}
