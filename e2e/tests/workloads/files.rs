//! Files by lines to four brokers, read back by subscribers; input with awkward lines.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use penstock_e2e::bed::{Bed, root};
use penstock_e2e::commands::{command, read_json};
use penstock_e2e::lab::{assert_verified, count, rows};
use penstock_e2e::{Broker, Case, cases};
use penstock_testbed::command::run;
use serde_json::Value;

const BROKERS: usize = 4;
/// Bytes of text: at least, and at most of one pass over this machine's files.
const LEAST: usize = 100_000_000;
const MOST: usize = 120_000_000;
/// Endings of names of text files.
const TEXT: [&str; 9] = ["rs", "h", "py", "md", "txt", "c", "pl", "pm", "html"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        a_real_file_by_lines_to_four_brokers_and_back,
        one_streams_sha_256_is_that_of_the_file,
        empty_lines_lines_of_a_mib_and_any_byte_from_stdin,
        a_real_file_through_the_lab,
    ];
    // They use the memory, and all cores.
    all.map(|case| case.brokers(BROKERS).alone())
}

/// Adds the text files below a directory, until there is enough. Other programs may change them meanwhile,
/// and some cannot be read.
fn add_texts(dir: &Path, text: &mut Vec<u8>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut paths: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let Ok(kind) = path.symlink_metadata().map(|metadata| metadata.file_type()) else {
            continue;
        };
        if text.len() >= MOST {
            return;
        } else if kind.is_dir() && !path.ends_with("target") {
            add_texts(&path, text);
        } else if kind.is_file()
            && TEXT
                .iter()
                .any(|end| path.extension() == Some(end.as_ref()))
        {
            text.extend(fs::read(&path).unwrap_or_default());
        }
    }
}

/// Text that is on this machine: sources, headers, documentation.
fn make_input(bed: &Bed) -> Result<PathBuf> {
    let mut text = Vec::new();
    let places = [
        "/usr/include",
        "/usr/lib/python3",
        "/usr/share",
        "/usr/local",
    ];
    let places = places.map(PathBuf::from).into_iter();
    let registry = std::env::home_dir().map(|home| home.join(".cargo/registry/src"));
    for place in [root()].into_iter().chain(places).chain(registry) {
        add_texts(&place, &mut text);
    }
    text.truncate(MOST);
    ensure!(!text.is_empty(), "found no text on this machine");
    // A file ends with a line's end.
    if !text.ends_with(b"\n") {
        text.push(b'\n');
    }
    // A machine with little text gets it several times, each pass with a prefix of its own.
    let once = text.clone();
    let mut pass = 0;
    while text.len() < LEAST {
        pass += 1;
        for line in once.split_inclusive(|byte| *byte == b'\n') {
            text.extend(format!("{pass} ").into_bytes());
            text.extend(line);
        }
    }
    let path = bed.file("input");
    fs::write(&path, &text)?;
    Ok(path)
}

/// A broker in each namespace.
fn start_brokers(bed: &Bed) -> Result<Vec<Broker>> {
    let brokers = (0..BROKERS).map(|index| bed.broker_at(index, &[]).start());
    brokers.collect()
}

/// All brokers' addresses.
fn addresses() -> String {
    let addresses: Vec<_> = (0..BROKERS)
        .map(|index| format!("10.214.{index}.2:1214"))
        .collect();
    addresses.join(",")
}

/// Reads the log of every broker: its lines, and its streams by their figures.
fn read_back(bed: &Bed) -> Result<(PathBuf, Vec<Stream>)> {
    let back = bed.file("back");
    let (mut lines, mut streams) = (File::create(&back)?, Vec::new());
    for index in 0..BROKERS {
        let path = bed.buffer_dir_of(index).join("penstock.log");
        let read = |arguments: &[&str]| {
            let mut command = bed.subscriber(&["--from", "start", "--verify"]);
            command.arg("--path").arg(&path).args(arguments);
            let out = bed.file(&format!("read-{index}"));
            command.stderr(Stdio::inherit()).stdout(File::create(&out)?);
            let status = command.status()?;
            ensure!(status.success(), "the subscriber failed: {status}");
            Ok(out)
        };
        let own = fs::read(read(&["--output", "lines"])?)?;
        assert!(!own.is_empty(), "broker {index} got nothing");
        lines.write_all(&own)?;
        let report = read_json(&read(&["--output", "none", "--stat", "--format", "json"])?)?;
        assert_eq!(report["lost_batches"], 0, "overwritten on broker {index}");
        streams.extend(rows(&report, "/streams").iter().map(|stream| {
            let session = stream["session"].as_str().unwrap_or_default();
            stream_of(session, stream)
        }));
    }
    Ok((back, streams))
}

/// Session, number, messages, SHA-256.
type Stream = (String, u64, u64, String);

#[track_caller]
fn stream_of(session: &str, stream: &Value) -> Stream {
    let sum = stream["sha256"].as_str().expect("a checksum");
    let (number, messages) = (count(stream, "/stream"), count(stream, "/messages"));
    (session.to_owned(), number, messages, sum.to_owned())
}

/// Those that a publisher sent.
fn sent_streams(report: &Value) -> Vec<Stream> {
    let mut streams = Vec::new();
    for broker in rows(report, "/brokers") {
        let session = broker["session"].as_str().expect("a session");
        let own = rows(broker, "/streams").iter();
        let own = own.map(|stream| stream_of(session, stream));
        streams.extend(own.filter(|stream| stream.2 > 0));
    }
    streams
}

fn lines_of(path: &Path) -> Result<u64> {
    let path = path.to_str().context("a plain path")?;
    let count = run(&["wc", "-l", path])?;
    Ok(count.split(' ').next().unwrap_or_default().parse()?)
}

/// Checksum over the lines, whatever their order: it differs if one is lost or doubled.
fn sum_of_sorted_lines(bed: &Bed, path: &Path) -> Result<String> {
    let script = r#"set -o pipefail; LC_ALL=C sort -S 512M "$0" | sha256sum"#;
    let mut sort = command("bash", &["-c", script]);
    Ok(bed.run("sort", sort.arg(path))?.success()?.stdout)
}

/// What was published against what came back, whatever the order of streams: no line is lost or doubled.
fn assert_came_back(bed: &Bed, sent: &Value, input: &Path) -> Result<()> {
    let lines = lines_of(input)?;
    assert_eq!(sent["messages_sent"], lines);
    assert_eq!(sent["messages_acked"], lines);
    let (back, mut streams) = read_back(bed)?;
    assert_eq!(lines_of(&back)?, lines, "lines read back");
    let sums = [input, &back].map(|path| sum_of_sorted_lines(bed, path));
    let [input, back] = sums;
    assert_eq!(back?, input?, "sorted lines");
    let mut sent = sent_streams(sent);
    sent.sort();
    streams.sort();
    assert_eq!(streams, sent, "session, number, messages, SHA-256");
    Ok(())
}

fn a_real_file_by_lines_to_four_brokers_and_back(bed: &Bed) -> Result<()> {
    let input = make_input(bed)?;
    let _brokers = start_brokers(bed)?;
    let path = input.to_str().context("a plain path")?;
    #[rustfmt::skip]
    let sent = bed.publish(&[
        "--brokers", &addresses(), "--input", path, "--split", "lines", "--digest",
        "--threads-per-broker", "2"])?;
    assert_came_back(bed, &sent, &input)
}

/// Order is kept.
fn one_streams_sha_256_is_that_of_the_file(bed: &Bed) -> Result<()> {
    let input = root().join("Cargo.lock");
    let path = input.to_str().context("a plain path")?;
    let _broker = bed.start_broker(&[])?;
    #[rustfmt::skip]
    let sent = bed.publish(&[
        "--brokers", "10.214.0.2:1214", "--input", path, "--split", "lines", "--digest"])?;
    let sum = run(&["sha256sum", path])?;
    let sum = sum.split(' ').next();
    assert_eq!(sent["brokers"][0]["streams"][0]["sha256"].as_str(), sum);
    bed.assert_log_has_lines_of("penstock", &input);
    Ok(())
}

/// Any byte but the line's end.
fn make_awkward_lines(bed: &Bed) -> Result<PathBuf> {
    let mut rng = fastrand::Rng::with_seed(1);
    let path = bed.file("input");
    let mut file = BufWriter::new(File::create(&path)?);
    for letter in (b'a'..=b'z').cycle().take(60) {
        file.write_all(&vec![letter; 1 << 20])?;
        file.write_all(b"\n")?;
        file.write_all(&b"\n\n\n\n"[..rng.usize(..5)])?;
        for _ in 0..1000 {
            write!(file, "{} ", rng.u64(..))?;
            file.write_all(b"\x00\xff\r\n")?;
        }
    }
    file.flush()?;
    Ok(path)
}

fn empty_lines_lines_of_a_mib_and_any_byte_from_stdin(bed: &Bed) -> Result<()> {
    let path = make_awkward_lines(bed)?;
    let _brokers = start_brokers(bed)?;
    #[rustfmt::skip]
    let mut publisher = bed.publisher(&[
        "--brokers", &addresses(), "--input", "-", "--split", "lines", "--digest", "--batch-size", "2MiB",
        "--format", "json"]);
    let stdin = File::open(&path)?.into();
    let publisher = bed.background_with("publisher", &mut publisher, stdin)?;
    let sent = publisher.wait()?.success()?.json()?;
    assert_came_back(bed, &sent, &path)
}

fn a_real_file_through_the_lab(bed: &Bed) -> Result<()> {
    let input = make_input(bed)?;
    let path = input.to_str().context("a plain path")?;
    let report = bed.lab_throughput(&["--brokers", "4", "--input", path])?;
    assert_eq!(report["messages_in_logs"], lines_of(&input)?);
    assert_verified(&report, BROKERS);
    Ok(())
}
