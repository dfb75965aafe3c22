//! Reads messages where the broker placed them, without a copy.
//!
//! `cargo run -p penstock-examples --example read_in_place -- /dev/shm/penstock/demo.log 1000`
#![allow(clippy::disallowed_macros, reason = "an example may print")]

use std::env;
use std::path::Path;

use anyhow::{Context, Result, bail};
use penstock_subscriber::{Event, Start, Subscriber};

/// Reads `count` messages; returns how many bytes they have.
pub fn read(log: &Path, count: u64) -> Result<u64> {
    let mut subscriber = Subscriber::open(log, Start::Oldest)?;
    // A broker with `--full block` waits for registered readers, so they need no copy. Without this
    // line, each batch is copied and then checked for overwrites.
    subscriber.register()?;
    let (mut messages, mut bytes) = (0, 0);
    while messages < count {
        match subscriber.next() {
            Event::Batch(batch) => {
                batch.verify()?;
                for message in batch.messages() {
                    // `message` borrows from the mapped file.
                    bytes += message?.len() as u64;
                    messages += 1;
                }
            }
            Event::Idle => subscriber.rest(),
            Event::Lost { messages, .. } => bail!("{messages} messages were overwritten"),
            Event::Damaged { index } => bail!("batch {index} is damaged"),
            Event::Evicted => bail!("evicted for reading too slowly"),
        }
    }
    Ok(bytes)
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let log = arguments.next().context("usage: read_in_place LOG COUNT")?;
    let count = arguments.next().context("usage: read_in_place LOG COUNT")?;
    let bytes = read(Path::new(&log), count.parse()?)?;
    println!("{count} messages with {bytes} bytes");
    Ok(())
}
