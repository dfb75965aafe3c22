//! The program as others run it, against brokers that this process plays.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use penstock_wire::handshake::Refusal;
use tempfile::TempDir;

#[path = "support/fake_broker.rs"]
mod fake_broker;

use fake_broker::FakeBroker;

fn run(brokers: &[&FakeBroker], flags: &[&str]) -> Output {
    let addresses: Vec<_> = brokers.iter().map(|broker| broker.address()).collect();
    run_at(&addresses.join(","), flags)
}

fn run_at(brokers: &str, flags: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_penstock-subscriber"));
    command
        .args(["--brokers", brokers, "--topic", "t"])
        .args(flags);
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command.output().unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn a_topic_is_printed_from_all_its_brokers() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    brokers[0].publish(0, &[&b"one"[..], b"two"]);
    brokers[1].publish_as(0, 1, &[&b"three"[..]]);
    let read = |flags: &[&str]| {
        let output = run(&[&brokers[0], &brokers[1]], flags);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(read(&[]), "one\ntwo\nthree\n");
    assert_eq!(read(&["--verify", "--output", "raw"]), "onetwothree");
    assert_eq!(read(&["--from", "end"]), "");
    assert_eq!(read(&["--count", "1"]), "one\n");
    assert_eq!(
        read(&["--follow", "--until-idle", "300ms", "--stream", "7"]),
        ""
    );
}

#[test]
fn totals_keep_their_form() {
    let brokers = [(); 2].map(|()| FakeBroker::start());
    brokers[0].publish(0, &[&b"a"[..], b"", b"bc"]);
    brokers[1].publish(0, &[&b"a"[..], b"", b"bc"]);
    brokers[1].publish_as(0, 3, &[&b"d"[..]]);
    let output = run(
        &[&brokers[0], &brokers[1]],
        &["--stat", "--format", "json", "--allow-loss"],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let mut stat = stdout(&output);
    for (broker, name) in brokers.iter().zip(["first", "second"]) {
        stat = stat.replace(&broker.address(), name);
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/remote_stat.json");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&golden, &stat).unwrap();
    }
    assert_eq!(stat, fs::read_to_string(golden).unwrap());
    let text = stdout(&run(&[&brokers[0], &brokers[1]], &["--stat"]));
    assert!(
        text.contains("topic t: 1 batches came twice and were dropped, 2 are missing"),
        "{text}"
    );
}

#[test]
fn a_position_file_continues_where_the_output_ended() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("t.position");
    let broker = FakeBroker::start();
    let read = || {
        let output = run(&[&broker], &["--position-file", file.to_str().unwrap()]);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        stdout(&output)
    };
    assert_eq!(read(), "");
    broker.publish(0, &[&b"one"[..]]);
    assert_eq!(read(), "one\n");
    assert_eq!(read(), "");
    broker.publish(1, &[&b"two"[..]]);
    broker.publish(0, &[&b"three"[..]]);
    assert_eq!(read(), "two\nthree\n");
    let from = format!("@{}", file.display());
    assert_eq!(stdout(&run(&[&broker], &["--from", &from])), "");
    fs::write(&file, "not a position").unwrap();
    let output = run(&[&broker], &["--from", &from]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("position file"),
        "{}",
        stderr(&output)
    );
    let missing = run(&[&broker], &["--from", "@/nonexistent/p"]);
    assert_eq!(missing.status.code(), Some(1), "{}", stderr(&missing));
}

#[test]
fn exit_codes_tell_what_is_not_there() {
    let broker = FakeBroker::start();
    broker.publish_as(0, 0, &[&b"zero"[..]]);
    broker.publish_as(0, 2, &[&b"two"[..]]);
    let code = |flags: &[&str]| run(&[&broker], flags).status.code();
    assert_eq!((code(&[]), code(&["--allow-loss"])), (Some(3), Some(0)));
    broker.set(|state| state.corrupt = [(1, 9)].into());
    let corrupt = run(&[&broker], &[]);
    assert_eq!(stdout(&corrupt), "zero\n");
    assert!(
        stderr(&corrupt).contains("it is not shown"),
        "{}",
        stderr(&corrupt)
    );
    assert_eq!(corrupt.status.code(), Some(1));
    broker.set(|state| state.refusal = Some((Refusal::Unsupported, "path 2".to_owned())));
    let older = run(&[&broker], &["--follow"]);
    assert_eq!(older.status.code(), Some(1));
    assert!(stderr(&older).contains("an older release that serves no remote subscribers"));
    let gone = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .to_string();
    for flags in [
        &[][..],
        &["--wait", "200ms"],
        &["--follow", "--until-idle", "200ms"],
    ] {
        let output = run_at(&gone, flags);
        assert_eq!(output.status.code(), Some(1), "{flags:?}");
        assert!(stderr(&output).contains(&gone), "{}", stderr(&output));
    }
    for flags in [
        &["--from", "3,4"][..],
        &["--window", "1"],
        &["--position-file", "p", "--count", "3"],
        &["--path", "x"],
    ] {
        assert_eq!(run(&[&broker], flags).status.code(), Some(2), "{flags:?}");
    }
    let two = format!("{gone},{}", broker.address());
    let index = run_at(&two, &["--from", "3"]);
    assert_eq!(index.status.code(), Some(2));
    assert!(
        stderr(&index).contains("start at a saved position"),
        "{}",
        stderr(&index)
    );
}
