//! The program as a process: closed or blocked stdout and stderr, threads that end or hang, and
//! readiness.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use penstock_publisher::{Config, Publisher};
use tempfile::TempDir;

/// Longer than any step here takes; a test that waits this long fails.
const LIMIT: Duration = Duration::from_secs(60);

struct Place(TempDir);

struct Broker {
    child: Child,
    address: SocketAddr,
    stdout: BufReader<Box<dyn Read>>,
}

impl Place {
    fn new() -> Self {
        Self(TempDir::new().unwrap())
    }

    fn flags(&self) -> Vec<String> {
        let dir = self.0.path().display();
        let flags = format!(
            "--listen 127.0.0.1:0 --buffer-dir {dir}/logs --report {dir}/report.json \
             --ring-size 256KiB --segment-size 64KiB --index-slots 8192"
        );
        flags.split_whitespace().map(str::to_owned).collect()
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
        command.args(self.flags()).env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    fn report(&self) -> serde_json::Value {
        let text = fs::read(self.0.path().join("report.json")).unwrap();
        serde_json::from_slice(&text).unwrap()
    }
}

impl Broker {
    fn start(command: &mut Command) -> Self {
        let mut child = command.spawn().unwrap();
        let stdout: Box<dyn Read> = match child.stdout.take() {
            Some(stdout) => Box::new(stdout),
            None => Box::new(io::empty()),
        };
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim_end().strip_prefix("penstock-broker ready on ");
        Self {
            address: address.unwrap_or("0.0.0.0:0").parse().unwrap(),
            child,
            stdout,
        }
    }

    /// A message, and its ack.
    fn publish(&self) {
        let config = Config {
            timeout: LIMIT,
            ..Config::new([self.address.to_string()], "t")
        };
        let mut publisher = Publisher::connect(config).unwrap();
        publisher.publish(b"a message").unwrap();
        assert_eq!(publisher.close().unwrap().messages_acked, 1);
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the broker does not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn end(&mut self) -> Option<i32> {
        self.signal(Signal::SIGTERM);
        self.wait().code()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        // Fails only if it has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The next line that contains `text`.
fn line_with(lines: &mut impl BufRead, text: &str) -> String {
    let mut line = String::new();
    while !line.contains(text) {
        line.clear();
        assert!(lines.read_line(&mut line).unwrap() > 0, "never: {text}");
    }
    line
}

/// A full pipe without a reader.
fn full_pipe(nonblocking: bool) -> (PipeReader, Stdio) {
    let (reader, mut writer) = io::pipe().unwrap();
    fcntl(&writer, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    while writer.write(&[b'x'; 4096]).is_ok() {}
    while writer.write(b"x").is_ok() {}
    if !nonblocking {
        fcntl(&writer, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    }
    (reader, OwnedFd::from(writer).into())
}

/// Serves normally with such a stderr, and ends in order.
fn serves_with(stderr: Stdio) {
    let place = Place::new();
    let mut broker = Broker::start(place.command().stderr(stderr).env("RUST_LOG", "debug"));
    (0..3).for_each(|_| broker.publish());
    assert_eq!(broker.end(), Some(0));
    let report = place.report();
    assert_eq!(report["topics"][0]["messages"], 3);
    assert_eq!(report["ended_by"], "SIGTERM");
    assert!(report["log_lines_dropped"].as_u64().unwrap() > 0);
}

#[test]
fn a_log_reader_that_goes_away_takes_nothing_with_it() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    serves_with(OwnedFd::from(writer).into());
}

#[test]
fn a_log_on_a_full_disk_takes_nothing_with_it() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    serves_with(full.into());
}

#[test]
fn a_log_that_nobody_reads_holds_nothing_up() {
    let (_reader, stderr) = full_pipe(false);
    let place = Place::new();
    // More lines than the queue holds.
    let mut broker = Broker::start(place.command().stderr(stderr).env("RUST_LOG", "debug"));
    (0..400).for_each(|_| broker.publish());
    assert_eq!(broker.end(), Some(0));
    assert_eq!(place.report()["topics"][0]["messages"], 400);
    assert!(place.report()["log_lines_dropped"].as_u64().unwrap() > 0);
}

#[test]
fn lines_that_a_full_pipe_did_not_take_are_counted_in_it_later() {
    let (reader, stderr) = full_pipe(true);
    let place = Place::new();
    let mut broker = Broker::start(place.command().stderr(stderr));
    broker.publish();
    let mut lines = BufReader::new(reader);
    broker.publish();
    broker.signal(Signal::SIGHUP);
    line_with(&mut lines, "nothing to reload");
    assert_eq!(broker.end(), Some(0));
}

#[test]
fn nobody_reads_its_stdout() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let place = Place::new();
    let (manager, mut command) = managed(&place);
    let mut broker = Broker::start(command.stdout(writer).stderr(Stdio::null()));
    let ready = state(&manager);
    assert!(ready.starts_with("READY=1\n"), "{ready}");
    assert_eq!(broker.end(), Some(0));
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let place = Place::new();
    let key = place.0.path().join("a.key");
    for flags in [
        &["--help"][..],
        &["--version"],
        &["--keygen", key.to_str().unwrap()],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
        let output = command.args(flags).stdout(full()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{flags:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("No space left on device"), "{said}");
    }
}

#[test]
fn wrong_usage_has_an_exit_code_of_its_own() {
    for flags in [
        &["--workers", "0"][..],
        &["--nonsense"],
        &["--ready-fd", "1"],
        &["--ready-fd", "777"],
        &["--ring-size", "17MiB"],
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
        let output = command.args(flags).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {output:?}");
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-broker"));
    let output = command.args(["--listen", "192.0.2.1:1"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
}

#[cfg(debug_assertions)]
#[test]
fn a_thread_that_ends_ends_the_broker_with_a_report() {
    for (thread, fault, said) in [
        (
            "accept",
            "panic",
            "thread accept panicked: as the test wants it",
        ),
        (
            "accept",
            "fail",
            "thread accept failed: as the test wants it",
        ),
        (
            "worker-0",
            "panic",
            "thread worker-0 panicked: as the test wants it",
        ),
        (
            "figures",
            "panic",
            "thread figures panicked: as the test wants it",
        ),
        (
            "signals",
            "fail",
            "thread signals failed: as the test wants it",
        ),
    ] {
        // This does not need a stderr either.
        for stderr in [Stdio::piped(), full_pipe(false).1] {
            let place = Place::new();
            let mut command = place.command();
            command.env("PENSTOCK_TEST_THREAD", format!("{thread}={fault}"));
            let mut broker = Broker::start(command.stderr(stderr));
            assert_eq!(broker.wait().code(), Some(1), "{thread} {fault}");
            let report = place.report();
            assert_eq!(report["ended_by"], said);
            assert_eq!(report["failures"], serde_json::json!([said]));
            if let Some(stderr) = broker.child.stderr.take() {
                line_with(
                    &mut BufReader::new(stderr),
                    &format!("penstock-broker: {said}"),
                );
            }
        }
    }
}

#[test]
fn an_error_after_the_first_thread_ends_the_broker_with_a_report() {
    let full_disk = || File::options().write(true).open("/dev/full").unwrap();
    let (_reader, unread) = full_pipe(false);
    let no_such_core = vec!["--cpus", "1023"];
    for (stdout, flags, error) in [
        (
            Stdio::from(full_disk()),
            vec![],
            "cannot write to stdout: No space left",
        ),
        (unread, vec![], "cannot write to stdout: "),
        (
            Stdio::piped(),
            no_such_core,
            "cannot pin a worker to core 1023",
        ),
    ] {
        let place = Place::new();
        let (manager, mut command) = managed(&place);
        command.args(flags).stdout(stdout).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let said = line_with(&mut stderr, "penstock-broker: ");
        assert!(said.contains(error), "{said}");
        assert_eq!(child.wait().unwrap().code(), Some(1), "{error}");
        let report = place.report();
        let ended_by = report["ended_by"].as_str().unwrap();
        assert!(ended_by.starts_with(error), "{ended_by}");
        assert_eq!(report["failures"], serde_json::json!([ended_by]));
        assert!(state(&manager).starts_with("STOPPING=1"), "{error}");
    }
}

/// The next message to the service manager.
fn heard(manager: &UnixDatagram) -> String {
    let mut bytes = [0; 4096];
    let len = manager.recv(&mut bytes).unwrap();
    String::from_utf8(bytes[..len].to_vec()).unwrap()
}

/// The next message to it other than a watchdog signal.
fn state(manager: &UnixDatagram) -> String {
    loop {
        match heard(manager) {
            alive if alive == "WATCHDOG=1\n" => {}
            state => return state,
        }
    }
}

fn managed(place: &Place) -> (UnixDatagram, Command) {
    let path = place.0.path().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(LIMIT)).unwrap();
    let mut command = place.command();
    command
        .env("NOTIFY_SOCKET", path)
        .env("WATCHDOG_USEC", "400000");
    (manager, command)
}

#[test]
fn a_service_manager_hears_of_every_state() {
    let place = Place::new();
    let (manager, mut command) = managed(&place);
    let mut broker = Broker::start(command.stderr(Stdio::null()));
    let ready = state(&manager);
    assert!(ready.starts_with("READY=1\nSTATUS=serving"), "{ready}");
    for _ in 0..3 {
        assert_eq!(heard(&manager), "WATCHDOG=1\n");
    }
    broker.signal(Signal::SIGHUP);
    assert!(state(&manager).starts_with("RELOADING=1\nMONOTONIC_USEC="));
    assert!(state(&manager).starts_with("READY=1\n"));
    broker.publish();
    broker.signal(Signal::SIGTERM);
    assert_eq!(state(&manager), "STOPPING=1\n");
    assert_eq!(broker.wait().code(), Some(0));
}

#[cfg(debug_assertions)]
#[test]
fn a_thread_that_hangs_is_told_and_the_watchdog_hears_nothing_more() {
    for thread in ["accept", "worker-0"] {
        let place = Place::new();
        let (manager, mut command) = managed(&place);
        command.env("PENSTOCK_TEST_THREAD", format!("{thread}=hang"));
        let mut broker = Broker::start(command.stderr(Stdio::piped()));
        let mut lines = BufReader::new(broker.child.stderr.take().unwrap());
        line_with(&mut lines, &format!("thread {thread} hangs"));
        broker.signal(Signal::SIGHUP);
        while !heard(&manager).starts_with("RELOADING=1") {}
        assert!(heard(&manager).starts_with("READY=1"));
        broker.signal(Signal::SIGTERM);
        assert_eq!(heard(&manager), "STOPPING=1\n");
        assert_eq!(broker.wait().code(), Some(1));
        let hangs = format!("thread {thread} hangs: it does not end");
        assert_eq!(place.report()["failures"], serde_json::json!([hangs]));
    }
}

#[cfg(debug_assertions)]
#[test]
fn no_thread_hangs_unnoticed() {
    // Each with a broker of its own, side by side.
    let brokers = ["topics", "upkeep", "figures", "signals"].map(|thread| {
        let place = Place::new();
        let (manager, mut command) = managed(&place);
        command.env("PENSTOCK_TEST_THREAD", format!("{thread}=hang"));
        let broker = Broker::start(command.stderr(Stdio::piped()));
        (thread, place, manager, broker)
    });
    for (thread, _place, manager, mut broker) in brokers {
        let mut lines = BufReader::new(broker.child.stderr.take().unwrap());
        line_with(&mut lines, &format!("thread {thread} hangs"));
        // Signs of life from before, and then no more.
        manager.set_nonblocking(true).unwrap();
        while manager.recv(&mut [0; 4096]).is_ok() {}
        manager.set_nonblocking(false).unwrap();
        if thread != "signals" {
            broker.signal(Signal::SIGHUP);
            assert!(heard(&manager).starts_with("RELOADING=1"));
        }
    }
}

#[cfg(debug_assertions)]
#[test]
fn a_broker_that_meets_a_shortened_log_ends_with_a_report() {
    let place = Place::new();
    let mut command = place.command();
    // Nobody notices it before a worker does.
    command.env("PENSTOCK_TEST_THREAD", "upkeep=hang");
    let mut broker = Broker::start(command.stderr(Stdio::piped()));
    let config = Config {
        timeout: LIMIT,
        ..Config::new([broker.address.to_string()], "t")
    };
    let mut publisher = Publisher::connect(config).unwrap();
    publisher.publish(b"a message").unwrap();
    publisher.flush().unwrap();
    let log = File::options();
    let log = { log }.write(true).open(place.0.path().join("logs/t.log"));
    log.unwrap().set_len(4096).unwrap();
    publisher.publish(b"another").unwrap();
    let mut lines = BufReader::new(broker.child.stderr.take().unwrap());
    line_with(&mut lines, "t.log: the log was shortened while it was open");
    assert_eq!(broker.wait().code(), Some(1));
    let report = place.report();
    let cause = report["ended_by"].as_str().unwrap();
    assert!(cause.contains("was shortened under the broker"), "{cause}");
    assert_eq!(report["failures"][0], cause);
}

#[test]
fn scripts_are_told_that_it_is_ready() {
    let place = Place::new();
    let ready = place.0.path().join("ready");
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$0\" \"$@\" --ready-fd 7 7>\"$READY\""]);
    command
        .arg(env!("CARGO_BIN_EXE_penstock-broker"))
        .args(place.flags());
    command.env("READY", &ready).env_remove("RUST_LOG");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut broker = Broker::start(&mut command);
    let mut lines = BufReader::new(broker.child.stderr.take().unwrap());
    // Written after the line on stdout, and before the broker handles signals.
    broker.signal(Signal::SIGHUP);
    line_with(&mut lines, "nothing to reload");
    assert_eq!(fs::read_to_string(&ready).unwrap(), "READY=1\n");
    assert_eq!(broker.end(), Some(0));
    let mut rest = String::new();
    broker.stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "");
}
