//! Publishes a thousand messages over tcp and waits until the broker has committed all of them.
//!
//! `cargo run -p penstock-examples --example publish -- 127.0.0.1:1214 demo`
#![allow(clippy::disallowed_macros, reason = "an example may print")]

use std::env;

use anyhow::{Context, Result};
use penstock_publisher::{Config, Publisher, Summary};

const MESSAGES: u64 = 1000;

/// Publishes to one broker, over two streams.
pub fn publish(broker: &str, topic: &str) -> Result<Summary> {
    let mut config = Config::new([broker.to_owned()], topic);
    config.threads_per_broker = 2;
    let mut publisher = Publisher::connect(config)?;
    for number in 0..MESSAGES {
        // This copies the message into the open batch and rarely waits.
        publisher.publish(format!("message {number}").as_bytes())?;
    }
    // Only `close` (or `flush`) tells that everything has arrived.
    Ok(publisher.close()?)
}

fn main() -> Result<()> {
    let mut arguments = env::args().skip(1);
    let broker = arguments.next().context("usage: publish BROKER TOPIC")?;
    let topic = arguments.next().context("usage: publish BROKER TOPIC")?;
    let summary = publish(&broker, &topic)?;
    println!("{} messages acknowledged", summary.messages_acked);
    Ok(())
}
