//! Reads everything that the brokers of a topic have, over the network.
//!
//! `cargo run -p penstock-examples --example read_remote -- demo 10.0.0.1:1214 10.0.0.2:1214`
#![allow(clippy::disallowed_macros, reason = "an example may print")]

use std::env;

use anyhow::{Context, Result, bail};
use penstock_subscriber::{Position, RemoteConfig, RemoteEvent, RemoteSubscriber};

/// Reads up to the end of every log; returns the messages, and where a later subscriber continues.
pub fn read(topic: &str, brokers: &[String]) -> Result<(u64, Position)> {
    let mut subscriber = RemoteSubscriber::connect(RemoteConfig::new(brokers, topic))?;
    let mut messages = 0;
    loop {
        // Each stream in its order, and each batch once, whichever brokers have it.
        match subscriber.next()? {
            RemoteEvent::Batch(batch) => messages += batch.messages().count() as u64,
            RemoteEvent::CaughtUp => return Ok((messages, subscriber.position())),
            RemoteEvent::Idle => {}
            other => bail!("not everything could be read: {other:?}"),
        }
    }
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let topic = arguments
        .next()
        .context("usage: read_remote TOPIC BROKER...")?;
    let (messages, _) = read(&topic, &arguments.collect::<Vec<_>>())?;
    println!("{messages} messages");
    Ok(())
}
