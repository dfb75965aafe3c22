//! The harness itself: however a run ends, nothing of it stays.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::{Background, command};
use penstock_e2e::{cases, eventually, run};
use penstock_testbed::netns::file_names;

/// Set for a run whose test waits, or fails.
const ROLE: &str = "PENSTOCK_E2E_ROLE";

fn main() -> ExitCode {
    match std::env::var(ROLE).as_deref() {
        Ok("waits") => run(cases![waits]),
        Ok("panics") => run(cases![panics]),
        _ => run(cases![
            a_panic_leaves_nothing,
            a_signal_leaves_nothing,
            the_next_run_removes_what_a_killed_one_left,
        ]),
    }
}

/// Says that it is ready, with a process, a mount and a folder in memory, and waits.
fn waits(bed: &Bed) -> Result<()> {
    let _sleeper = make(bed)?;
    penstock_e2e::say("ready");
    loop {
        std::thread::park();
    }
}

fn panics(bed: &Bed) -> Result<()> {
    let _sleeper = make(bed)?;
    panic!("on purpose");
}

fn make(bed: &Bed) -> Result<Background> {
    std::fs::create_dir_all(bed.buffer_dir())?;
    let mount = bed.file("mnt");
    std::fs::create_dir(&mount)?;
    let mut tmpfs = command("mount", &["-t", "tmpfs", "tmpfs"]);
    bed.run("mount", tmpfs.arg(&mount))?.success()?;
    // It does not die with its parent, because it belongs to another user.
    #[rustfmt::skip]
    let sleeper = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "sleep", "600"];
    bed.background("sleeper", &mut bed.in_broker_ns("setpriv", &sleeper))
}

/// A run of this program with one test that does this.
fn start(bed: &Bed, role: &str) -> Result<Background> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    bed.background("run", Command::new(own).env(ROLE, role))
}

/// Everything that still has the name of a run, and processes in its namespaces.
fn left_by(pid: u32) -> Vec<String> {
    let prefix = format!("penstock-e2e-{pid}-");
    let mut left = Vec::new();
    for dir in ["/run/netns", "/tmp", "/dev/shm"] {
        let names = file_names(dir.as_ref()).unwrap_or_default();
        left.extend(names.into_iter().filter(|name| name.starts_with(&prefix)));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounts = mounts.lines().filter(|line| line.contains(&prefix));
    left.extend(mounts.map(str::to_owned));
    left
}

fn a_panic_leaves_nothing(bed: &Bed) -> Result<()> {
    let run = start(bed, "panics")?;
    let pid = run.pid();
    let ended = run.wait()?;
    assert!(!ended.status.success());
    assert!(ended.stdout.contains("on purpose"), "{}", ended.stdout);
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}

fn a_signal_leaves_nothing(bed: &Bed) -> Result<()> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let run = start(bed, "waits")?;
        let pid = run.pid();
        eventually("the test is ready", || run.stderr().contains("ready"));
        assert!(left_by(pid).len() >= 5, "{:?}", left_by(pid));
        run.signal(signal);
        assert_eq!(run.wait()?.status.code(), Some(128 + signal));
        assert_eq!(left_by(pid), Vec::<String>::new());
    }
    Ok(())
}

fn the_next_run_removes_what_a_killed_one_left(bed: &Bed) -> Result<()> {
    let run = start(bed, "waits")?;
    let pid = run.pid();
    eventually("the test is ready", || run.stderr().contains("ready"));
    run.signal(libc::SIGKILL);
    run.wait()?;
    assert!(left_by(pid).len() >= 5, "{:?}", left_by(pid));
    start(bed, "panics")?.wait()?;
    assert_eq!(left_by(pid), Vec::<String>::new());
    Ok(())
}
