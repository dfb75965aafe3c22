//! Child processes in namespaces: they log to files, die with their parent, and have a time limit to stop.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, anyhow, bail};
use nix::time::ClockId;
use nix::unistd::Pid;
use penstock_process::text::escape;

use penstock_process::foreign_json;
use penstock_process::interrupt::Interrupt;

/// How much of a log an error message quotes, lines.
const TAIL_LINES: usize = 12;
/// Number of bytes to read of a log, from its end.
const MAX_LOG: u64 = 16 << 20;

/// A command that runs `program` inside the namespace `netns`.
pub fn inside(netns: &str, program: &Path) -> Command {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", netns]).arg(program);
    command
}

/// A command that runs `program` inside a namespace, if one is given, and only on these cores, if
/// any are given.
pub fn on_cores(netns: Option<&str>, cpus: Option<&str>, program: &Path) -> Command {
    let first = if cpus.is_some() {
        Path::new("taskset")
    } else {
        program
    };
    let mut command = match netns {
        Some(netns) => inside(netns, first),
        None => Command::new(first),
    };
    if let Some(cpus) = cpus {
        command.args(["-c", cpus]).arg(program);
    }
    command
}

/// A running child; killed and reaped when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts `command` with stderr to the file `log`, and stdout there too unless `stdout` is given.
    ///
    /// The child is in a process group of its own, so that Ctrl-C reaches the lab alone and the lab
    /// stops its children in order; and it gets SIGKILL when the lab dies, however that happens.
    /// Call it from the main thread only: the death signal follows the thread that started it.
    pub fn start(
        name: &str,
        command: &mut Command,
        stdout: Option<File>,
        log: &Path,
    ) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
        let also = file
            .try_clone()
            .context("cannot duplicate a log's descriptor")?;
        let lab = std::process::id();
        command
            .stdout(stdout.unwrap_or(also))
            .stderr(file)
            .process_group(0);
        // SAFETY: the closure runs between fork and exec and makes system calls only (prctl,
        // getppid), which are async-signal-safe; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(move || die_with(lab)) };
        let child = command
            .spawn()
            .with_context(|| format!("cannot start {name} ({:?})", command.get_program()))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child
            .try_wait()
            .with_context(|| format!("cannot wait for {}", self.name))
    }

    /// CPU time that it has used so far, seconds, all its threads; it must not have been waited for.
    pub fn cpu_seconds(&self) -> Result<f64> {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        let time = ClockId::pid_cpu_clock_id(pid).and_then(|clock| clock.now());
        let time = time.with_context(|| format!("cannot read the CPU time of {}", self.name))?;
        Ok(Duration::from(time).as_secs_f64())
    }

    /// Waits until the log holds a line with `text` in it, for at most `limit`.
    pub fn wait_for_line(
        &mut self,
        text: &str,
        limit: Duration,
        interrupt: &Interrupt,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            if log_text(&self.log)?.lines().any(|line| line.contains(text)) {
                return Ok(());
            }
            if let Some(status) = self.ended()? {
                return Err(self.failure(&format!("ended before it was ready ({status})")));
            }
            if Instant::now() > deadline {
                return Err(self.failure(&format!("was not ready after {limit:?}")));
            }
            interrupt.pause()?;
        }
    }

    /// Waits for its end, for at most `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            match self.ended()? {
                Some(status) => return Ok(status),
                None if Instant::now() > deadline => {
                    return Err(self.failure(&format!("did not end within {limit:?}")));
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// The file that has its stderr.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Asks it to stop with SIGTERM and waits for that, for at most `limit`.
    pub fn stop(&mut self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.signal(libc::SIGTERM);
        loop {
            match self.ended()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(self.failure(&format!("failed ({status})"))),
                None if Instant::now() > deadline => {
                    return Err(self.failure(&format!("did not stop within {limit:?} of SIGTERM")));
                }
                None => thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Sets how much of something it may have from now on (prlimit(2)); the hard limit stays.
    pub fn limit(&self, resource: libc::__rlimit_resource_t, soft: Option<u64>) -> Result<()> {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid fits in pid_t");
        let mut limit = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        let none = std::ptr::null();
        // SAFETY: the limit outlives the call; the child is not reaped yet, so the pid is its own.
        let mut code = unsafe { libc::prlimit(pid, resource, none, &raw mut limit) };
        if code == 0 {
            limit.rlim_cur = soft.unwrap_or(limit.rlim_max).min(limit.rlim_max);
            let none = std::ptr::null_mut();
            // SAFETY: as above.
            code = unsafe { libc::prlimit(pid, resource, &raw const limit, none) };
        }
        if code != 0 {
            let error = io::Error::last_os_error();
            return Err(error).with_context(|| format!("cannot set a limit of {}", self.name));
        }
        Ok(())
    }

    /// An error that says what happened to this process and quotes the end of its log.
    pub fn failure(&self, what: &str) -> anyhow::Error {
        let tail = log_text(&self.log).unwrap_or_default();
        let lines: Vec<_> = tail.lines().map(escape).collect();
        let from = lines.len().saturating_sub(TAIL_LINES);
        anyhow!(
            "{} {what}; the end of its log:\n  {}",
            self.name,
            lines[from..].join("\n  ")
        )
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        let pid = libc::pid_t::try_from(self.child.id()).expect("a pid fits in pid_t");
        // SAFETY: kill takes no pointers; the child is not reaped yet, so the pid is still its own.
        unsafe { libc::kill(pid, signal) };
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only when it has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Asks the kernel to kill this process when the thread that forked it ends.
fn die_with(parent: u32) -> io::Result<()> {
    // SAFETY: prctl with PR_SET_PDEATHSIG takes an integer and touches no memory of ours.
    if unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // The parent may have died before the call above took effect.
    if std::os::unix::process::parent_id() != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    Ok(())
}

fn log_text(log: &Path) -> Result<String> {
    let read = || {
        let mut file = File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(MAX_LOG)))?;
        let mut bytes = Vec::new();
        file.take(MAX_LOG).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let bytes = read().with_context(|| format!("cannot read {}", log.display()))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A child whose stdout is JSON, which stays beside the file that takes stderr.
#[derive(Debug)]
pub struct Reporting {
    running: Running,
    path: PathBuf,
}

impl Reporting {
    /// Starts `command` with stderr to the file `log`.
    pub fn start(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let path = log.with_extension("json");
        let stdout =
            File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
        let running = Running::start(name, command.stdin(Stdio::null()), Some(stdout), log)?;
        Ok(Self { running, path })
    }

    /// The process, to wait for what it says.
    pub fn running(&mut self) -> &mut Running {
        &mut self.running
    }

    /// Waits for its end and returns its stdout.
    pub fn output(mut self, interrupt: &Interrupt) -> Result<String> {
        let status = loop {
            match self.running.ended()? {
                Some(status) => break status,
                None => interrupt.pause()?,
            }
        };
        let text = foreign_json::read_file(&self.path)
            .with_context(|| format!("cannot read {}", self.path.display()))?;
        if !status.success() {
            let failure = self.running.failure(&format!("failed ({status})"));
            bail!("{failure}\n{text}");
        }
        Ok(text)
    }
}

/// Runs `command` to its end and returns its stdout, as [`Reporting`] does.
pub fn output_of(
    name: &str,
    command: &mut Command,
    log: &Path,
    interrupt: &Interrupt,
) -> Result<String> {
    Reporting::start(name, command, log)?.output(interrupt)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_ready_line_is_found_in_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a.log");
        let mut running = Running::start(
            "a",
            &mut shell("echo ready on x; exec sleep 60"),
            None,
            &log,
        )
        .unwrap();
        let limit = Duration::from_secs(20);
        running
            .wait_for_line("ready on", limit, &Interrupt::default())
            .unwrap();
        assert!(running.ended().unwrap().is_none());
        let stopped = running.stop(limit).unwrap_err().to_string();
        assert!(stopped.contains("signal: 15"), "{stopped}");
    }

    #[test]
    fn an_early_end_quotes_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a.log");
        let mut running = Running::start(
            "broker 0",
            &mut shell("echo port in use >&2; exit 7"),
            None,
            &log,
        )
        .unwrap();
        let error = running
            .wait_for_line("ready", Duration::from_secs(20), &Interrupt::default())
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("broker 0") && error.contains("port in use"),
            "{error}"
        );
    }

    #[test]
    fn dropping_ends_the_child() {
        let dir = tempfile::tempdir().unwrap();
        let running = Running::start(
            "a",
            &mut shell("exec sleep 600"),
            None,
            &dir.path().join("a.log"),
        )
        .unwrap();
        let proc = PathBuf::from(format!("/proc/{}", running.child.id()));
        assert!(proc.exists());
        drop(running);
        assert!(!proc.exists());
    }

    #[test]
    fn output_comes_back_and_failures_do_not_pass() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("a.log");
        let interrupt = Interrupt::default();
        let output = |script| output_of("a", &mut shell(script), &log, &interrupt);
        assert_eq!(output("echo 7").unwrap(), "7\n");
        let error = output("echo why >&2; exit 1").unwrap_err();
        assert!(error.to_string().contains("why"));
    }
}
