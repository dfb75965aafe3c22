//! The program as others run it, on logs that this process writes.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;

use penstock_log::{Access, Commit, Geometry, Log, LogOptions, RingFullPolicy, Writer};
use penstock_wire::batch::checksum;
use penstock_wire::message::append;
use tempfile::TempDir;

const SEGMENT: u64 = 4096;
const SESSION: u64 = 0xab;

struct Fixture {
    dir: TempDir,
    log: Arc<Log>,
    writer: Writer,
    next: [u64; 4],
}

impl Fixture {
    fn new(full: RingFullPolicy) -> Self {
        Self::in_dir(TempDir::new().unwrap(), "t.log", full)
    }

    fn in_dir(dir: TempDir, name: &str, full: RingFullPolicy) -> Self {
        let options = LogOptions {
            geometry: Geometry::new(4 * SEGMENT, SEGMENT, 64).unwrap(),
            full,
            access: Access::default(),
            writers: 1,
        };
        let log = Arc::new(Log::open(&dir.path().join(name), &options).unwrap());
        let writer = log.writer();
        let next = [0; 4];
        Self {
            dir,
            log,
            writer,
            next,
        }
    }

    fn path(&self) -> PathBuf {
        self.log.path().to_owned()
    }

    /// Commits a batch if there is room for it.
    fn try_write(&mut self, stream: u32, messages: &[&[u8]]) -> bool {
        let mut payload = Vec::new();
        messages.iter().for_each(|m| append(&mut payload, m));
        let room = self.writer.reserve(payload.len() as u32);
        if !self.writer.is_granted(&room) {
            self.writer.abort(room);
            return false;
        }
        self.writer.place(&room, 0, &payload);
        let batch_seq = self.next[stream as usize];
        let count = messages.len() as u32;
        self.next[stream as usize] += 1;
        let commit = Commit {
            session: SESSION,
            stream,
            batch_seq,
            messages: count,
            checksum: checksum(batch_seq, count, &payload),
            arrival_unix_ns: 0,
        };
        self.writer.commit(room, &commit);
        true
    }

    fn write(&mut self, stream: u32, messages: &[&[u8]]) {
        assert!(self.try_write(stream, messages), "the log is full");
    }
}

fn command(path: &Path, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-subscriber"));
    command.arg("--path").arg(path).args(flags);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

fn run(path: &Path, flags: &[&str]) -> Output {
    command(path, flags).output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn follow(path: &Path, flags: &[&str]) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command(path, flags)
        .args(["--follow", "--until-idle", "20"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap());
    (child, lines)
}

fn line(from: &mut impl BufRead) -> String {
    let mut line = String::new();
    from.read_line(&mut line).unwrap();
    line
}

#[test]
fn messages_are_printed_in_every_form() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"one", b"", b"three\xff"]);
    let printed = |flags: &[&str]| {
        let output = run(&f.path(), flags);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output.stdout
    };
    assert_eq!(printed(&[]), b"one\n\nthree\xff\n");
    assert_eq!(printed(&["--output", "raw"]), b"onethree\xff");
    assert_eq!(
        printed(&["--output", "length-prefixed"]),
        b"\x03\0\0\0one\0\0\0\0\x06\0\0\0three\xff"
    );
    assert_eq!(printed(&["--output", "none"]), b"");
    assert_eq!(printed(&["--from", "end"]), b"");
    assert_eq!(printed(&["--count", "1"]), b"one\n");
}

#[test]
fn sessions_and_streams_are_selected() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"zero"]);
    f.write(1, &[b"one"]);
    f.write(0, &[b"again"]);
    let printed = |flags: &[&str]| stdout(&run(&f.path(), flags));
    assert_eq!(printed(&["--stream", "0"]), "zero\nagain\n");
    assert_eq!(printed(&["--session", "ab", "--stream", "1"]), "one\n");
    assert_eq!(printed(&["--session", "00000000000000cd"]), "");
}

#[test]
fn sums_are_those_of_the_messages() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(2, &[b"a", b"", b"bc"]);
    f.write(2, &[b"d"]);
    let output = run(&f.path(), &["--stat", "--verify", "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let stat: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(stat["messages"], 4);
    assert_eq!(stat["payload_bytes"], 4);
    assert_eq!(stat["log"]["batches"], 2);
    let stream = &stat["streams"][0];
    assert_eq!(stream["session"], "00000000000000ab");
    assert_eq!(stream["stream"], 2);
    assert_eq!(stream["missing_batches"], 0);
    // printf 'a\n\nbc\nd\n' | sha256sum
    assert_eq!(
        stream["sha256"],
        "c85a88e1bbfe4f80022743150d4be66ac9bb37bd4a1b64f22730c55981571e7d"
    );
    let text = stdout(&run(&f.path(), &["--stat"]));
    assert!(
        text.starts_with("read 4 messages, 2 batches, 4 bytes"),
        "{text}"
    );
    let both = run(&f.path(), &["--stat", "--output", "lines", "--count", "2"]);
    assert_eq!(stdout(&both), "a\n\n");
    assert!(stderr(&both).starts_with("read 2 messages, 1 batches, 1 bytes"));
}

#[test]
fn a_batch_with_a_flipped_byte_is_told_and_never_shown() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"before"]);
    f.write(0, &[b"a needle in a haystack"]);
    f.write(0, &[b"after"]);
    let path = f.path();
    let mut bytes = fs::read(&path).unwrap();
    let needle = bytes.windows(6).position(|w| w == b"needle").unwrap();
    bytes[needle] ^= 0x20;
    let damaged = f.dir.path().join("damaged.log");
    fs::write(&damaged, bytes).unwrap();
    for flags in [&[][..], &["--verify"]] {
        let output = run(&damaged, flags);
        assert_eq!(stdout(&output), "before\nafter\n");
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains("CRC32C"), "{}", stderr(&output));
    }
}

#[test]
fn a_lapped_reader_is_told_what_it_lost() {
    let mut f = Fixture::new(RingFullPolicy::Overwrite);
    let big = [b'x'; 2000];
    f.write(0, &[b"first", b"second"]);
    let mut child = command(&f.path(), &["--follow", "--until-idle", "20", "--stat"])
        .args(["--format", "json", "--output", "lines"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    assert_eq!(
        (&line(&mut lines)[..], &line(&mut lines)[..]),
        ("first\n", "second\n")
    );
    // Megabytes, while nobody takes the child's output: it is lapped.
    (0..2000).for_each(|_| f.write(0, &[&big]));
    let path = f.path();
    drop((f.writer, f.log));
    let printed = 2 + lines.lines().count() as u64;
    let mut told = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut told)
        .unwrap();
    let stat: serde_json::Value = serde_json::from_str(&told[told.find('{').unwrap()..]).unwrap();
    assert_eq!(stat["messages"], printed);
    assert!(printed < 2002, "it was lapped");
    assert_eq!(printed + stat["lost_messages"].as_u64().unwrap(), 2002);
    assert_eq!(child.wait().unwrap().code(), Some(3));
    // Whoever comes late begins with what is left, which is no loss of its own.
    let late = run(&path, &["--stat", "--format", "json"]);
    let stat: serde_json::Value = serde_json::from_slice(&late.stdout).unwrap();
    let read = stat["messages"].as_u64().unwrap();
    assert!(read <= 8);
    assert_eq!(stat["lost_messages"], 0);
    // The output says how much was overwritten: everything that came, less what was read.
    let log = &stat["log"];
    for (total, gone, here) in [
        ("messages", "overwritten_messages", &stat["messages"]),
        ("batches", "overwritten_batches", &stat["batches"]),
        (
            "payload_bytes",
            "overwritten_payload_bytes",
            &stat["payload_bytes"],
        ),
    ] {
        let [total, gone, here] = [&log[total], &log[gone], here].map(|n| n.as_u64().unwrap());
        assert_eq!(gone + here, total);
    }
    assert_eq!(late.status.code(), Some(0));
    let text = stdout(&run(&path, &["--stat"]));
    let gone = format!("gone {} messages", 2002 - read);
    assert!(text.contains(&gone), "{text}");
}

#[test]
fn following_shows_what_is_written_meanwhile_and_ends_with_the_broker() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"before"]);
    let (mut child, mut lines) = follow(&f.path(), &[]);
    assert_eq!(line(&mut lines), "before\n");
    f.write(0, &[b"after"]);
    assert_eq!(line(&mut lines), "after\n");
    f.write(0, &[b"last words"]);
    drop((f.writer, f.log));
    assert_eq!(line(&mut lines), "last words\n");
    assert_eq!(line(&mut lines), "");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_registered_reader_in_another_process_loses_nothing() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"0"]);
    let (mut child, mut lines) = follow(&f.path(), &["--register", "--verify"]);
    assert_eq!(line(&mut lines), "0\n");
    let rest: std::thread::JoinHandle<Vec<String>> =
        std::thread::spawn(move || lines.lines().map(Result::unwrap).collect());
    let filler = [b'y'; 1000];
    for n in 1..500u32 {
        let number = n.to_string();
        while !f.try_write(0, &[number.as_bytes(), &filler]) {
            std::thread::yield_now();
        }
    }
    drop((f.writer, f.log));
    let read = rest.join().unwrap();
    let numbers: Vec<u32> = read.iter().filter_map(|line| line.parse().ok()).collect();
    assert_eq!(numbers, (1..500).collect::<Vec<_>>());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn an_interrupt_prints_the_sums() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    f.write(0, &[b"one"]);
    let (mut child, mut lines) = follow(&f.path(), &["--stat", "--output", "lines"]);
    assert_eq!(line(&mut lines), "one\n");
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_log_that_does_not_exist_yet_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("sub/t.log");
    let mut child = command(
        &path,
        &["--follow", "--from", "end", "--register", "--count", "1"],
    )
    .stdout(Stdio::piped())
    .stderr(Stdio::piped())
    .spawn()
    .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let told = line(&mut said);
    assert!(
        told.contains("sub/t.log") && told.contains("waiting"),
        "{told}"
    );
    fs::create_dir(path.parent().unwrap()).unwrap();
    let mut f = Fixture::in_dir(dir, "sub/t.log", RingFullPolicy::Block);
    f.write(0, &[b"first"]);
    assert_eq!(stdout(&child.wait_with_output().unwrap()), "first\n");
}

#[test]
fn waiting_for_a_log_ends() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("none.log");
    for flags in [
        &["--wait", "10ms"][..],
        &["--follow", "--until-idle", "10ms"],
    ] {
        let output = run(&path, flags);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("no such log;"),
            "{}",
            stderr(&output)
        );
    }
    let mut child = command(&path, &["--follow"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    line(&mut BufReader::new(child.stderr.take().unwrap()));
    let pid = child.id().to_string();
    let kill = Command::new("kill").args(["-INT", &pid]).status();
    assert!(kill.unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn whoever_has_read_enough_is_no_error() {
    let mut f = Fixture::new(RingFullPolicy::Block);
    (0..4).for_each(|_| f.write(0, &[&[b'z'; 2000]]));
    let mut child = command(&f.path(), &["--follow", "--until-idle", "20"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    f.write(0, &[b"into the closed pipe"]);
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut told = String::new();
    child.stderr.unwrap().read_to_string(&mut told).unwrap();
    assert_eq!(told, "");
}

#[test]
fn wrong_files_and_flags_are_explained() {
    let dir = TempDir::new().unwrap();
    let missing = run(&dir.path().join("none.log"), &[]);
    assert_eq!(missing.status.code(), Some(1));
    assert!(
        stderr(&missing).contains("none.log"),
        "{}",
        stderr(&missing)
    );
    let text = dir.path().join("text.log");
    fs::File::create(&text)
        .unwrap()
        .write_all(&[b'#'; 9000])
        .unwrap();
    let foreign = run(&text, &[]);
    assert_eq!(foreign.status.code(), Some(1));
    assert!(
        stderr(&foreign).contains("not a Penstock log"),
        "{}",
        stderr(&foreign)
    );
    for flags in [
        &["--session", "xyz"][..],
        &["--until-idle", "3"],
        &["--output", "pdf"],
    ] {
        assert_eq!(run(&text, flags).status.code(), Some(2), "{flags:?}");
    }
}

/// As `> t.log` or logrotate's `copytruncate` do.
#[test]
fn a_log_that_is_shortened_under_a_reader_is_told_with_its_name() {
    let mut fixture = Fixture::new(RingFullPolicy::Block);
    assert!(fixture.try_write(0, &[b"first"]));
    let path = fixture.path();
    let mut child = Command::new(env!("CARGO_BIN_EXE_penstock-subscriber"))
        .args(["--follow", "--path"])
        .arg(&path)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut first = String::new();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut first).unwrap();
    assert_eq!(first, "first\n");
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(0).unwrap();
    let output = child.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{told}");
    assert!(told.contains("t.log: the log was shortened"), "{told}");
}
