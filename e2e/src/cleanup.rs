//! Removes what a run leaves behind when a signal ends it, or left behind when it was killed: everything
//! that a test makes outside its process has the run's pid in its name.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use penstock_testbed::command::run;
use penstock_testbed::netns;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// All names begin with it, followed by the run's pid.
const PREFIX: &str = "penstock-e2e-";
/// Where folders of a run are.
const FOLDERS: [&str; 2] = ["/tmp", "/dev/shm"];
/// Where its control groups are, with version 1 and 2.
const GROUPS: [&str; 2] = ["/sys/fs/cgroup/cpu", "/sys/fs/cgroup"];
/// Time for labs to remove their namespaces after SIGINT.
const LAB_TIMEOUT: Duration = Duration::from_secs(10);

/// What only this process knows about.
#[derive(Debug)]
struct Changes {
    /// Labs: they remove their own namespaces.
    labs: Vec<i32>,
    /// Settings of the whole machine and their earlier values.
    settings: Vec<(PathBuf, String)>,
}

static CHANGES: Mutex<Changes> = Mutex::new(Changes {
    labs: Vec::new(),
    settings: Vec::new(),
});

/// Beginning of the names of everything that the bed with this number makes.
#[must_use]
pub fn name_of_bed(number: usize) -> String {
    format!("{PREFIX}{}-{number}", std::process::id())
}

/// Removes what killed runs left, and arranges for the same when a signal ends this one.
pub fn install() -> Result<()> {
    remove(|pid| !Path::new("/proc").join(pid.to_string()).exists())?;
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot catch signals")?;
    let on_signal = move || {
        if let Some(signal) = signals.forever().next() {
            crate::say(&format!(
                "signal {signal}: removing namespaces, folders and processes of this run"
            ));
            end_this_run();
            std::process::exit(128 + signal);
        }
    };
    let thread = thread::Builder::new().name("signals".to_owned());
    thread.spawn(on_signal).context("cannot start a thread")?;
    Ok(())
}

fn end_this_run() {
    let mut changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    for (path, value) in changes.settings.drain(..) {
        // Nothing is left to do about a failure.
        let _ = fs::write(path, value);
    }
    let deadline = Instant::now() + LAB_TIMEOUT;
    for pid in &changes.labs {
        let _ = kill(Pid::from_raw(*pid), Signal::SIGINT);
    }
    // A zombie counts as running until its test reaps it, which may not happen any more.
    let runs = |pid: &i32| {
        Path::new(&format!("/proc/{pid}/fd/0"))
            .symlink_metadata()
            .is_ok()
    };
    while changes.labs.iter().any(runs) && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(20));
    }
    if let Err(error) = remove(|pid| pid == std::process::id()) {
        crate::say(&format!("{error:#}"));
    }
}

/// Removes everything with the name of a run whose pid is in `of`.
fn remove(of: impl Fn(u32) -> bool) -> Result<()> {
    let is_listed = |name: &str| owner_of(name).is_some_and(&of);
    let names = |dir: &str| {
        let names = netns::file_names(Path::new(dir)).unwrap_or_default();
        names.into_iter().filter(|name| is_listed(name))
    };
    for namespace in names("/run/netns") {
        remove_namespace(&namespace)?;
    }
    for (dir, name) in GROUPS
        .iter()
        .flat_map(|dir| names(dir).map(move |name| (dir, name)))
    {
        // Its processes ended with their namespace.
        let _ = fs::remove_dir(Path::new(dir).join(name));
    }
    for (dir, name) in FOLDERS
        .iter()
        .flat_map(|dir| names(dir).map(move |name| (dir, name)))
    {
        remove_folder(&Path::new(dir).join(name))?;
    }
    Ok(())
}

/// The run that made something with this name.
fn owner_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

/// Ends the processes of a namespace of this run and removes it.
pub fn remove_namespace(name: &str) -> Result<()> {
    end_processes_in(name)?;
    run(&["ip", "netns", "del", name])?;
    Ok(())
}

/// Kills what still runs in a namespace of this run and waits until it is gone.
pub fn end_processes_in(namespace: &str) -> Result<()> {
    let deadline = Instant::now() + LAB_TIMEOUT;
    loop {
        let pids = run(&["ip", "netns", "pids", namespace])?;
        let pids = pids.lines().filter_map(|pid| pid.trim().parse().ok());
        // A thread of this process may be in there, and ends with its test.
        let own = std::process::id().cast_signed();
        let pids: Vec<i32> = pids.filter(|pid| *pid != own).collect();
        if pids.is_empty() || Instant::now() > deadline {
            return Ok(());
        }
        for pid in pids {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Unmounts what is mounted in a folder of this run and removes it; leaves alone another user's.
pub fn remove_folder(path: &Path) -> Result<()> {
    let Ok(metadata) = path.symlink_metadata() else {
        return Ok(());
    };
    if metadata.uid() != geteuid().as_raw() || !metadata.is_dir() {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the mounts")?;
    let targets = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for target in targets.filter(|target| Path::new(target).starts_with(path)) {
        umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW)
            .with_context(|| format!("cannot unmount {target}"))?;
    }
    fs::remove_dir_all(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// A setting of the whole machine that is changed until this is dropped.
#[derive(Debug)]
pub struct ChangedSetting(PathBuf);

impl ChangedSetting {
    /// Changes it.
    pub fn write(path: &Path, value: &str) -> Result<Self> {
        let what = || format!("cannot change {}", path.display());
        let mut changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(path).with_context(what)?;
        changes.settings.push((path.to_owned(), before));
        fs::write(path, value).with_context(what)?;
        Ok(Self(path.to_owned()))
    }
}

impl Drop for ChangedSetting {
    fn drop(&mut self) {
        let mut changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = changes
            .settings
            .iter()
            .rposition(|(path, _)| *path == self.0)
        {
            let (path, value) = changes.settings.remove(at);
            if let Err(error) = fs::write(&path, value) {
                crate::say(&format!("cannot restore {}: {error}", path.display()));
            }
        }
    }
}

/// Notes that this lab has to end before its run does.
pub fn note_lab(pid: u32) {
    let mut changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    changes.labs.push(pid.cast_signed());
}

/// Notes that it has ended.
pub fn forget_lab(pid: u32) {
    let mut changes = CHANGES.lock().unwrap_or_else(PoisonError::into_inner);
    changes.labs.retain(|lab| *lab != pid.cast_signed());
}
