//! Aeron as a peer: its C media drivers, a subscriber and a publisher on the testbed's links.
//!
//! The programs are those of Aeron's own build (`aeronmd`, `rate_subscriber`, `streaming_publisher`).
//! `AERON_*` variables of the lab's environment reach them, so that an expert can tune them; see
//! [`DEFAULTS`] for what is set otherwise.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use penstock_process::text::escape;

use super::flags::Bench;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::netns::{self, Net};
use penstock_testbed::running::{Running, inside, output_of};

/// Settings of the media drivers where the environment has none: one thread each, because two hosts share
/// this machine's cores, and a receive window that is not the limit (the default is 128 KiB).
const DEFAULTS: [(&str, &str); 4] = [
    ("AERON_THREADING_MODE", "SHARED"),
    ("AERON_RCV_INITIAL_WINDOW_LENGTH", "2097152"),
    ("AERON_SOCKET_SO_RCVBUF", "4194304"),
    ("AERON_SOCKET_SO_SNDBUF", "4194304"),
];
const PORT: u16 = 20_121;
/// What the subscriber prints once it is there.
const SUBSCRIBED: &str = "Subscription channel status";
/// Clients wait about ten seconds for their media driver.
const READY_LIMIT: Duration = Duration::from_secs(15);

/// The three programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Aeron {
    driver: PathBuf,
    subscriber: PathBuf,
    publisher: PathBuf,
}

impl Aeron {
    /// Those that the flags name; otherwise why there are none, and how to get them.
    pub fn find(options: &Bench) -> Result<Self, String> {
        let find = |given: &Option<PathBuf>, name: &str| {
            let path = given
                .clone()
                .or_else(|| Some(options.aeron.as_ref()?.join(name)))
                .ok_or_else(|| {
                    "absent: build Aeron's C programs (git clone https://github.com/aeron-io/aeron; \
                     cd aeron; ./cppbuild/cppbuild), then give --aeron cppbuild/Release/binaries"
                        .to_owned()
                })?;
            match path.canonicalize() {
                Ok(found) if found.is_file() => Ok(found),
                _ => Err(format!("absent: there is no {}", path.display())),
            }
        };
        Ok(Self {
            driver: find(&options.aeron_driver, "aeronmd")?,
            subscriber: find(&options.aeron_subscriber, "rate_subscriber")?,
            publisher: find(&options.aeron_publisher, "streaming_publisher")?,
        })
    }

    /// One run; payload MB/s (10^6 bytes) that the publisher was allowed to send.
    pub fn measure(
        &self,
        net: &Net,
        bytes: u64,
        message_size: u64,
        folder: &Path,
        interrupt: &Interrupt,
    ) -> Result<f64> {
        let buffers = BufferDir::create()?;
        // One directory for each host's media driver.
        let [receiving, sending] = [0, 1].map(|index| buffers.of_broker(index));
        let driver = |namespace: &str, directory: &Path, name: &str| {
            let mut command = inside(namespace, &self.driver);
            let log = folder.join(format!("{name}.log"));
            let is_unset = |(name, _): &(&str, &str)| std::env::var_os(name).is_none();
            command.envs(DEFAULTS.into_iter().filter(is_unset));
            let command = command.env("AERON_DIR", directory).stdin(Stdio::null());
            Running::start(name, command, None, &log)
        };
        let _receiver = driver(net.broker(0), &receiving, "aeronmd-receiver")?;
        let _sender = driver(net.publisher(), &sending, "aeronmd-sender")?;
        let channel = format!("aeron:udp?endpoint={}:{PORT}", netns::broker_address(0));
        let subscriber = by_line(net.broker(0), &self.subscriber);
        let log = folder.join("rate_subscriber.log");
        let mut subscriber = started(subscriber, &receiving, &channel, &log)?;
        subscriber.wait_for_line(SUBSCRIBED, READY_LIMIT, interrupt)?;
        let messages = bytes.div_ceil(message_size).max(1);
        let mut publisher = inside(net.publisher(), &self.publisher);
        publisher.arg("-p").arg(&sending).args(["-c", &channel]);
        publisher.args(["-L", &message_size.to_string()]);
        publisher.args(["-m", &messages.to_string(), "-l", "0"]);
        let log = folder.join("streaming_publisher.log");
        let text = output_of("streaming_publisher", &mut publisher, &log, interrupt)?;
        sent_mb_per_s(&text)
    }
}

/// A program whose lines are written when they are complete, although they go to a file.
fn by_line(namespace: &str, program: &Path) -> Command {
    let mut command = inside(namespace, Path::new("stdbuf"));
    command.arg("-oL").arg(program);
    command
}

fn started(mut command: Command, directory: &Path, channel: &str, log: &Path) -> Result<Running> {
    command.arg("-p").arg(directory).args(["-c", channel]);
    command.stdin(Stdio::null());
    Running::start("rate_subscriber", &mut command, None, log)
}

/// Payload MB/s from the publisher's line `Total: 1000ms, 1e+06 msgs/sec, 1.024e+09 bytes/sec, ...`.
fn sent_mb_per_s(text: &str) -> Result<f64> {
    let total = text.lines().find_map(|line| line.strip_prefix("Total: "));
    let rate = total.and_then(|total| {
        total
            .split(", ")
            .find_map(|part| part.strip_suffix(" bytes/sec"))
    });
    let rate: f64 = rate
        .and_then(|rate| rate.trim().parse().ok())
        .with_context(|| {
            let end: Vec<_> = text.lines().rev().take(3).map(escape).collect();
            format!(
                "streaming_publisher printed no total in bytes/sec, but at its end: {}",
                end.join(" / ")
            )
        })?;
    Ok(rate / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn options(flags: &[&str]) -> Bench {
        let line = ["penstock-lab", "bench"].iter().chain(flags);
        match Cli::try_parse_from(line).unwrap().command {
            Command::Bench(options) => *options,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn absent_programs_are_named_with_a_way_to_get_them() {
        let none = Aeron::find(&options(&[])).unwrap_err();
        assert!(
            none.contains("git clone") && none.contains("--aeron"),
            "{none}"
        );
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        let empty = Aeron::find(&options(&["--aeron", path])).unwrap_err();
        assert!(empty.contains("aeronmd"), "{empty}");
    }

    #[test]
    fn programs_are_found_in_a_directory_or_one_by_one() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["aeronmd", "rate_subscriber", "streaming_publisher", "other"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let path = dir.path().to_str().unwrap();
        let other = dir.path().join("other");
        let flags = [
            "--aeron",
            path,
            "--aeron-publisher",
            other.to_str().unwrap(),
        ];
        let found = Aeron::find(&options(&flags)).unwrap();
        assert!(found.driver.ends_with("aeronmd"));
        assert!(found.publisher.ends_with("other"));
    }

    #[test]
    fn the_total_of_the_publisher_counts() {
        let text = "Streaming 100 messages\n\
            990.0 msgs/sec, 5 bytes/sec, totals 2 messages\nDone sending.\n\
            Total: 1000ms, 1.172e+05 msgs/sec, 1.2e+08 bytes/sec, totals 100 messages 0 MB payloads\n";
        assert_eq!(sent_mb_per_s(text).unwrap(), 120.0);
        let error = sent_mb_per_s("a\nno driver\x1b\n").unwrap_err().to_string();
        assert!(
            error.contains("no driver") && !error.contains('\x1b'),
            "{error}"
        );
    }
}
