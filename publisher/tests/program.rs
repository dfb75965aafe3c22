//! The program as users run it, against a simulated broker.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::thread::{self, JoinHandle};

use penstock_process::text::is_unsafe;
use penstock_wire::batch::{Frame, HEADER_LEN, Header};
use penstock_wire::handshake::{HELLO_LEN, Hello, Offer, Refusal, Welcome};
use penstock_wire::message::Messages;
use penstock_wire::reply::Reply;
use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

const MAX_PAYLOAD: u32 = 4096;

/// Accepts one stream until its end; returns its messages.
fn serve(mut socket: TcpStream) -> Vec<Vec<u8>> {
    let mut hello = [0; HELLO_LEN];
    socket.read_exact(&mut hello).unwrap();
    let (topic_len, _) = Hello::read_from_bytes(&hello).unwrap().parse().unwrap();
    socket.read_exact(&mut vec![0; topic_len]).unwrap();
    let offer = Offer {
        session: 1,
        max_payload: MAX_PAYLOAD,
        committed: 0,
        datagrams: None,
    };
    socket.write_all(Welcome::accept(offer).as_bytes()).unwrap();
    let mut messages = Vec::new();
    loop {
        let mut header = [0; HEADER_LEN];
        socket.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let committed = match header.parse(MAX_PAYLOAD).unwrap() {
            Frame::End { batches } => batches,
            Frame::Batch(batch) => {
                let mut payload = vec![0; batch.payload_len as usize];
                socket.read_exact(&mut payload).unwrap();
                messages.extend(Messages::new(&payload).map(|m| m.unwrap().to_vec()));
                batch.batch_seq + 1
            }
        };
        let ack = Reply::ack(committed, false);
        socket.write_all(ack.as_bytes()).unwrap();
        if let Frame::End { .. } = header.parse(MAX_PAYLOAD).unwrap() {
            return messages;
        }
    }
}

/// Simulates a broker with one stream; returns its address.
fn broker() -> (String, JoinHandle<Vec<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = thread::spawn(move || serve(listener.accept().unwrap().0));
    (address, serving)
}

/// An address where nothing listens.
fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn publisher(broker: &str, flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-publisher"));
    command.args(["--brokers", broker]).args(flags);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let kill = Command::new("kill").args([name, &pid]).status();
    assert!(kill.unwrap().success());
}

#[test]
fn a_pipe_and_a_file_on_standard_input_are_published() {
    let (address, serving) = broker();
    let mut child = publisher(&address, &[])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"hello\nworld\n").unwrap();
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(serving.join().unwrap(), [b"hello", b"world"]);

    let dir = TempDir::new().unwrap();
    let file = dir.path().join("lines");
    fs::write(&file, "one\n").unwrap();
    let (address, serving) = broker();
    let file = File::open(file).unwrap();
    let output = publisher(&address, &[]).stdin(file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(serving.join().unwrap(), [b"one"]);
}

#[test]
fn without_input_and_without_a_pipe_nothing_is_published() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let output = publisher(&address, &[]).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("--synthetic"),
        "{}",
        stderr(&output)
    );
    assert!(
        listener.accept().is_err(),
        "the broker was asked for a stream"
    );
}

#[test]
fn synthetic_messages_are_asked_for() {
    let (address, serving) = broker();
    let flags = [
        "--synthetic",
        "--message-size",
        "100",
        "--total-size",
        "5000",
    ];
    // An open pipe without data: it is not read.
    let mut child = publisher(&address, &flags)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let stdin = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    drop(stdin);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(serving.join().unwrap().len(), 50);
}

#[test]
fn wrong_usage_ends_with_2_whoever_finds_it() {
    for flags in [
        &["--no-such-flag"][..],
        &["--synthetic", "--rate", "0"],
        &["--synthetic", "--topic", "a/b"],
        &["--synthetic", "--sndbuf", "4GiB"],
        &["--synthetic", "--total-size", "1", "--message-size", "2"],
    ] {
        let output = publisher(&nobody(), flags).output().unwrap();
        assert_eq!(
            output.status.code(),
            Some(2),
            "{flags:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_broker_that_starts_a_moment_later_is_waited_for() {
    let address = nobody();
    let flags = ["--connect-timeout", "1m"];
    let mut child = publisher(&address, &flags)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(
        line.contains(&address) && line.contains("trying again"),
        "{line}"
    );
    let listener = TcpListener::bind(&address).unwrap();
    let serving = thread::spawn(move || serve(listener.accept().unwrap().0));
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"patience\n")
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(serving.join().unwrap(), [b"patience"]);
}

#[test]
fn a_broker_that_never_starts_is_named_once_with_its_cause() {
    let address = nobody();
    let flags = ["--synthetic", "--connect-timeout", "0"];
    let output = publisher(&address, &flags).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert_eq!(said.matches("Connection refused").count(), 1, "{said}");
    assert!(!said.contains("trying again"), "{said}");
}

#[test]
fn an_interrupt_ends_the_wait_for_the_writer_of_a_fifo() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    for name in ["-INT", "-TERM"] {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let input = ["--input", fifo.to_str().unwrap()];
        let child = publisher(&address, &input).spawn().unwrap();
        // Once connected, it waits for the FIFO.
        let socket = listener.accept().unwrap().0;
        signal(&child, name);
        assert!(serve(socket).is_empty());
        assert_eq!(child.wait_with_output().unwrap().status.code(), Some(130));
    }
}

#[test]
fn a_fifo_is_read_until_its_writers_are_gone() {
    let dir = TempDir::new().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    let (address, serving) = broker();
    let child = publisher(&address, &["--input", fifo.to_str().unwrap()])
        .spawn()
        .unwrap();
    // Opens once the publisher has it open for reading.
    let mut writer = File::options().write(true).open(&fifo).unwrap();
    writer.write_all(b"through\nthe fifo").unwrap();
    drop(writer);
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    assert_eq!(serving.join().unwrap(), [&b"through"[..], b"the fifo"]);
}

#[test]
fn what_comes_before_a_line_that_is_too_long_is_delivered() {
    let (address, serving) = broker();
    let mut child = publisher(&address, &[])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo\n").unwrap();
    // Without a newline, until the reader closes.
    while stdin.write_all(&[b'x'; 65536]).is_ok() {}
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    for words in [
        "2 messages were acknowledged",
        "line 3, at byte 8",
        "--segment-size",
    ] {
        assert!(said.contains(words), "{said}");
    }
    assert_eq!(serving.join().unwrap(), [b"one", b"two"]);
}

#[test]
fn inputs_that_cannot_be_read_are_named_before_a_broker_is_asked() {
    let dir = TempDir::new().unwrap();
    let missing = dir.path().join("missing");
    for (input, words) in [(dir.path(), "directory"), (&missing, "No such file")] {
        let flags = ["--input", input.to_str().unwrap()];
        let output = publisher(&nobody(), &flags).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let said = stderr(&output);
        assert!(said.contains(words) && said.contains("--input"), "{said}");
        assert!(!said.contains("connect"), "{said}");
    }
}

/// A stdout or stderr that nobody reads.
fn without_reader() -> Stdio {
    let (_, writer) = std::io::pipe().unwrap();
    writer.into()
}

/// One on a full disk.
fn full_disk() -> Stdio {
    let full = File::options().write(true).open("/dev/full").unwrap();
    full.into()
}

#[test]
fn what_was_acknowledged_counts_also_if_nobody_reads_the_summary() {
    for format in ["text", "json"] {
        let (address, serving) = broker();
        let mut command = publisher(&address, &["--input", "-", "--format", format]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(without_reader())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(b"one\ntwo\n")
            .unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(stderr(&output), "");
        assert_eq!(serving.join().unwrap().len(), 2);
    }
}

#[test]
fn a_summary_that_cannot_be_written_is_a_failure() {
    let (address, serving) = broker();
    let mut command = publisher(&address, &["--synthetic", "--total-size", "1KiB"]);
    let output = command.stdout(full_disk()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("cannot write to stdout"),
        "{}",
        stderr(&output)
    );
    assert_eq!(serving.join().unwrap().len(), 1);
}

#[test]
fn an_error_that_nobody_reads_is_one_all_the_same() {
    for stderr in [without_reader(), full_disk()] {
        let flags = ["--synthetic", "--total-size", "1KiB", "--timeout", "1s"];
        let status = publisher(&nobody(), &flags)
            .stderr(stderr)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(1));
    }
    for stderr in [without_reader(), full_disk()] {
        let status = publisher("a:1", &["--ack", "9"])
            .stderr(stderr)
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(2));
    }
}

/// Simulates a broker that answers each hello with `answer`, byte by byte if it `drips`.
fn answering(answer: Vec<u8>, drips: bool) -> (String, JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = thread::spawn(move || {
        let mut socket = listener.accept().unwrap().0;
        socket.set_nodelay(true).unwrap();
        let mut hello = [0; HELLO_LEN];
        socket.read_exact(&mut hello).unwrap();
        if !drips {
            return socket.write_all(&answer).unwrap();
        }
        for byte in answer {
            if socket.write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(std::time::Duration::from_millis(100));
        }
        // The publisher should have closed the connection long before.
        panic!("the publisher read the whole answer");
    });
    (address, serving)
}

#[test]
fn what_a_broker_says_does_not_reach_the_terminal_as_it_is() {
    let evil =
        "no\u{1b}]0;owned\u{7}\u{1b}[2J\r\npenstock-publisher: all acknowledged\u{202e}\u{9b}1m";
    let answer = Welcome::refuse(Refusal::Topic, evil);
    let (address, serving) = answering(answer, false);
    let output = publisher(&address, &["--synthetic", "--total-size", "1KiB"])
        .output()
        .unwrap();
    serving.join().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.contains("\\x1b]0;owned\\x07\\x1b[2J\\r\\npenstock"),
        "{said}"
    );
    assert_eq!(said.matches('\n').count(), 1, "{said}");
    assert!(!said.trim_end().contains(is_unsafe), "{said}");
}

#[test]
fn a_broker_that_drips_bytes_is_given_up_as_one_that_is_silent() {
    let answer = Welcome::refuse(Refusal::Topic, &"x".repeat(1000));
    let (address, serving) = answering(answer, true);
    let flags = ["--synthetic", "--total-size", "1KiB", "--timeout", "1s"];
    let output = publisher(&address, &flags).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("no whole answer"),
        "{}",
        stderr(&output)
    );
    serving.join().unwrap();
}
