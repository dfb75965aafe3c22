//! Ends of a lab in the middle of a run.

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::broker::status_field;
use penstock_e2e::commands::assert_says;
use penstock_e2e::lab::{LabRun, RunningLab, left_by, namespaces_of, processes_of};
use penstock_e2e::wait::becomes;
use penstock_e2e::{Case, cases};
use penstock_testbed::command::run;

const EMULATED: [&str; 6] = ["--mode", "xdp", "--faults", "loss=1%", "--delay", "1ms"];
/// A publisher and two brokers.
const PROCESSES: usize = 3;

pub fn cases() -> impl IntoIterator<Item = Case> {
    let ended = cases![
        an_interrupt_leaves_nothing,
        a_sigterm_leaves_nothing,
        an_interrupt_leaves_nothing_of_emulated_links,
        a_broker_that_dies_is_named_and_all_is_taken_down,
    ];
    // Any lab removes what they left.
    let killed = cases![
        kill_9_leaves_no_process_and_the_next_lab_removes_the_rest,
        the_next_lab_removes_emulated_links_after_kill_9,
    ];
    ended.into_iter().chain(killed.map(Case::alone))
}

/// A run too long to end by itself, with its publisher at work.
fn start(bed: &Bed, options: &[&str]) -> Result<RunningLab> {
    let first = ["throughput", "--brokers", "2", "--total-size", "1TB"];
    let mut lab = bed.start_lab(&[&first, options].concat())?;
    lab.until("a connection", |lab| {
        let namespace = format!("penstock-{}-pub", lab.pid());
        // A stream over xdp has a tcp connection for control as well.
        #[rustfmt::skip]
        let connections = run(&["ss", "-Htn", "-N", &namespace, "state", "established", "dport = :1214"]);
        connections.is_ok_and(|connections| !connections.is_empty())
    });
    assert!(processes_of(lab.pid()).len() >= PROCESSES);
    Ok(lab)
}

/// Nothing is there of a lab, and none of these processes runs; who reaps orphans is not the lab's affair.
#[track_caller]
fn assert_nothing_left(lab: u32, processes: &[u32]) {
    assert_eq!(left_by(lab), Vec::<String>::new());
    for pid in processes {
        let state = status_field(*pid, "State");
        let is_gone = state.is_empty() || state.starts_with('Z');
        assert!(is_gone, "process {pid} is left: {state}");
    }
}

fn ends_by(bed: &Bed, signal: i32, options: &[&str]) -> Result<()> {
    let lab = start(bed, options)?;
    let (pid, processes) = (lab.pid(), processes_of(lab.pid()));
    let ended = lab.end(signal)?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    assert_nothing_left(pid, &processes);
    Ok(())
}

fn an_interrupt_leaves_nothing(bed: &Bed) -> Result<()> {
    ends_by(bed, libc::SIGINT, &[])
}

fn a_sigterm_leaves_nothing(bed: &Bed) -> Result<()> {
    ends_by(bed, libc::SIGTERM, &[])
}

fn an_interrupt_leaves_nothing_of_emulated_links(bed: &Bed) -> Result<()> {
    ends_by(bed, libc::SIGINT, &EMULATED)
}

fn killed(bed: &Bed, options: &[&str]) -> Result<()> {
    let lab = start(bed, options)?;
    let (pid, processes) = (lab.pid(), processes_of(lab.pid()));
    lab.end(libc::SIGKILL)?;
    becomes("processes left", vec![], || processes_of(pid));
    assert!(!namespaces_of(pid).is_empty(), "there is nothing to remove");
    let mut next = bed.lab(&["throughput", "--brokers", "1", "--total-size", "8MiB"]);
    LabRun::of(bed, &mut next)?;
    assert_nothing_left(pid, &processes);
    Ok(())
}

fn kill_9_leaves_no_process_and_the_next_lab_removes_the_rest(bed: &Bed) -> Result<()> {
    killed(bed, &[])
}

fn the_next_lab_removes_emulated_links_after_kill_9(bed: &Bed) -> Result<()> {
    killed(bed, &EMULATED)
}

fn a_broker_that_dies_is_named_and_all_is_taken_down(bed: &Bed) -> Result<()> {
    let lab = start(bed, &[])?;
    let (pid, processes) = (lab.pid(), processes_of(lab.pid()));
    let broker = run(&["ip", "netns", "pids", &format!("penstock-{pid}-b1")])?;
    let broker = broker.trim().parse().context("one broker")?;
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(broker),
        nix::sys::signal::SIGKILL,
    )?;
    let ended = lab.wait()?;
    assert_eq!(ended.status.code(), Some(1), "{}", ended.said());
    assert_says(&ended.said(), "broker 1");
    assert_nothing_left(pid, &processes);
    Ok(())
}
