//! A publisher of numbered lines that ends when the test has seen enough: what is lost, doubled or reordered
//! shows.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, PipeWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use crate::bed::Bed;
use crate::commands::{Background, Ended};
use crate::wait::eventually;

/// Lines that are written at once.
const CHUNK: u64 = 20_000;

/// The publisher and what feeds it.
#[derive(Debug)]
pub struct Numbered {
    /// Killed before the feeder is forgotten, which ends that as well.
    publisher: Background,
    feeder: JoinHandle<io::Result<u64>>,
    is_enough: Arc<AtomicBool>,
    input: PathBuf,
}

impl Bed {
    /// Starts a publisher with these options, whose input is numbered lines without end.
    pub fn start_numbered(&self, arguments: &[&str]) -> Result<Numbered> {
        let (reader, writer) = io::pipe().context("cannot make a pipe")?;
        let mut command = self.publisher(arguments);
        command.args(["--input", "-", "--format", "json"]);
        let publisher = self.background_with("numbered", &mut command, reader.into())?;
        let input = self.new_file("input", "lines");
        let copy = File::create(&input).context("cannot create a file")?;
        let is_enough = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_enough);
        let feeder = thread::spawn(move || feed(writer, copy, &until));
        Ok(Numbered {
            publisher,
            feeder,
            is_enough,
            input,
        })
    }

    /// Waits until a topic has at least `count` messages.
    #[track_caller]
    pub fn until_messages(&self, topic: &str, count: u64) {
        eventually("messages in the log", || {
            self.messages_in(topic).is_some_and(|now| now >= count)
        });
    }

    /// Waits until a topic has more messages than now.
    #[track_caller]
    pub fn until_it_goes_further(&self, topic: &str) {
        let now = self.messages_in(topic).expect("the log can be read");
        self.until_messages(topic, now + 1);
    }
}

impl Numbered {
    /// The publisher's process.
    pub fn publisher(&self) -> &Background {
        &self.publisher
    }

    /// The lines.
    pub fn input(&self) -> &Path {
        &self.input
    }

    /// Ends the input: the publisher must go on to the end, and each line be acknowledged. Returns its
    /// report and what it logged.
    pub fn finish(self) -> Result<(Value, String)> {
        self.is_enough.store(true, Ordering::Relaxed);
        let ended = self.publisher.wait()?.success().context("the publisher")?;
        let lines = self
            .feeder
            .join()
            .map_err(|_| anyhow!("the feeder panicked"))??;
        let report = ended.json()?;
        assert_eq!(report["messages_acked"], lines, "acked");
        Ok((report, ended.stderr))
    }

    /// Waits for the end of a publisher that was asked to stop.
    pub fn ends(self) -> Result<Ended> {
        self.publisher.wait()
    }
}

/// Returns the number of lines.
fn feed(mut to: PipeWriter, mut copy: File, is_enough: &AtomicBool) -> io::Result<u64> {
    let mut count = 0;
    while !is_enough.load(Ordering::Relaxed) {
        let mut lines = String::new();
        for number in count + 1..=count + CHUNK {
            writeln!(lines, "{number}").map_err(io::Error::other)?;
        }
        copy.write_all(lines.as_bytes())?;
        to.write_all(lines.as_bytes())?;
        count += CHUNK;
    }
    Ok(count)
}
