//! The logs of several brokers as one: a stream's batches may be in any of them, and in several. A batch is known
//! by its session, stream and number.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use penstock_log::{Reader, Start};
use penstock_wire::message::Messages;
use sha2::{Digest, Sha256};

use crate::program_reports::{Publisher, SentStream};

/// Session and number of a stream.
pub type StreamKey = (u64, u32);

/// Every stream of several logs.
#[derive(Debug, Default)]
pub struct MergedLogs {
    /// The messages of each batch, by its number, as they are in the log.
    streams: BTreeMap<StreamKey, BTreeMap<u64, Vec<u8>>>,
    /// For each log, how many batches it has, and how many of them an earlier log has as well.
    logs: Vec<(u64, u64)>,
}

impl MergedLogs {
    /// Adds the batches of a log, whose broker may be running: those that are in it now.
    ///
    /// # Errors
    /// If the log cannot be read, misses a batch, or has a batch whose checksum is wrong, that is out of order or
    /// doubled in this log, or that differs from the same batch in another log.
    pub fn add(&mut self, path: &Path) -> Result<()> {
        let log = self.logs.len();
        let (mut batches, mut doubles) = (0, 0);
        let mut next: BTreeMap<StreamKey, u64> = BTreeMap::new();
        let mut reader = Reader::open(path, Start::Oldest)
            .with_context(|| format!("cannot open {}", path.display()))?;
        loop {
            let batch = reader.next().with_context(|| path.display().to_string())?;
            let Some(batch) = batch else { break };
            batch.verify()?;
            let (stream, seq) = ((batch.session, batch.stream), batch.batch_seq);
            let least = next.insert(stream, seq + 1).unwrap_or(0);
            ensure!(
                seq >= least,
                "log {log}: batch {seq} of {} follows batch {}",
                name(stream),
                least - 1
            );
            batches += 1;
            match self.streams.entry(stream).or_default().entry(seq) {
                Entry::Vacant(place) => {
                    place.insert(batch.payload.to_vec());
                }
                Entry::Occupied(earlier) => {
                    doubles += 1;
                    ensure!(
                        earlier.get() == batch.payload,
                        "log {log}: batch {seq} of {} differs from that of an earlier log",
                        name(stream)
                    );
                }
            }
        }
        self.logs.push((batches, doubles));
        Ok(())
    }

    /// Batches that an earlier log has as well.
    pub fn doubles(&self) -> u64 {
        self.logs.iter().map(|(_, doubles)| doubles).sum()
    }

    /// Batches in a log, counting doubles.
    pub fn batches_in(&self, log: usize) -> u64 {
        self.logs[log].0
    }

    /// Compares everything with the report of a publisher whose messages were all acknowledged; returns what
    /// differs. Each batch must be in some log, and nothing else in any.
    pub fn differences(&self, sent: &Publisher) -> Vec<String> {
        let mut found = Vec::new();
        let mut unknown: BTreeMap<_, _> = self.streams.iter().collect();
        for session in &sent.brokers {
            let Ok(key) = u64::from_str_radix(&session.session, 16) else {
                found.push(format!("{} is no session", session.session));
                continue;
            };
            for stream in &session.streams {
                let key = (key, stream.stream);
                let empty = BTreeMap::new();
                let batches = unknown.remove(&key).unwrap_or(&empty);
                let differences = compare(stream, batches);
                found.extend(differences.map(|what| format!("{}: {what}", name(key))));
            }
        }
        found.extend(
            unknown
                .keys()
                .map(|key| format!("{} was not sent", name(**key))),
        );
        found
    }
}

fn compare(
    sent: &SentStream,
    batches: &BTreeMap<u64, Vec<u8>>,
) -> impl Iterator<Item = String> + use<> {
    let mut found = Vec::new();
    let missing = (0..sent.batches).filter(|seq| !batches.contains_key(seq));
    if let Some(first) = missing.clone().next() {
        let count = missing.count();
        found.push(format!("{count} batches are missing, the first is {first}"));
    }
    let mut digest = Sha256::new();
    let (mut messages, mut bytes) = (0, 0);
    for message in batches.values().flat_map(|payload| Messages::new(payload)) {
        let Ok(message) = message else {
            found.push("a batch is malformed".to_owned());
            continue;
        };
        messages += 1;
        bytes += message.len() as u64;
        digest.update(message);
        digest.update(b"\n");
    }
    for (what, sent, read) in [
        ("batches", sent.batches, batches.len() as u64),
        ("messages", sent.messages, messages),
        ("messages", sent.messages_acked, messages),
        ("payload bytes", sent.payload_bytes, bytes),
    ] {
        if sent != read {
            found.push(format!("{sent} {what} sent, {read} in the logs"));
        }
    }
    if let Some(sha256) = &sent.sha256
        && *sha256 != hex(&digest.finalize())
    {
        found.push("SHA-256 differs".to_owned());
    }
    found.into_iter()
}

fn name((session, stream): StreamKey) -> String {
    format!("session {session:016x} stream {stream}")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: StreamKey = (0xab, 1);

    /// A message and its length.
    fn payload(message: &str) -> Vec<u8> {
        let len = (message.len() as u32).to_le_bytes();
        [&len[..], message.as_bytes()].concat()
    }

    fn merged(batches: &[(u64, &str)]) -> MergedLogs {
        let batches = batches.iter().map(|(seq, text)| (*seq, payload(text)));
        MergedLogs {
            streams: [(STREAM, batches.collect())].into(),
            logs: Vec::new(),
        }
    }

    fn sent(batches: u64, bytes: u64) -> SentStream {
        let text = serde_json::json!({
            "stream": 1, "messages": batches, "messages_acked": batches, "batches": batches,
            "payload_bytes": bytes, "sha256": null, "path": "tcp", "moves": 0,
        });
        serde_json::from_value(text).unwrap()
    }

    fn differences(merged: &MergedLogs, batches: u64, bytes: u64) -> Vec<String> {
        compare(&sent(batches, bytes), &merged.streams[&STREAM]).collect()
    }

    #[test]
    fn what_is_missing_or_too_much_is_named() {
        let whole = merged(&[(0, "a"), (1, "b"), (2, "c")]);
        assert!(differences(&whole, 3, 3).is_empty());
        let gap = differences(&merged(&[(0, "a"), (2, "c")]), 3, 3);
        assert_eq!(gap[0], "1 batches are missing, the first is 1");
        let more = differences(&whole, 2, 2);
        assert_eq!(more[0], "2 batches sent, 3 in the logs");
        let other = differences(&whole, 3, 4);
        assert_eq!(other, ["4 payload bytes sent, 3 in the logs"]);
    }

    #[test]
    fn the_digest_is_that_of_the_stream_in_order() {
        let whole = merged(&[(0, "a"), (1, "b")]);
        let sent = |text: &str| SentStream {
            sha256: Some(hex(&Sha256::digest(text))),
            ..sent(2, 2)
        };
        let streams = &whole.streams[&STREAM];
        assert_eq!(compare(&sent("a\nb\n"), streams).count(), 0);
        assert_eq!(compare(&sent("b\na\n"), streams).count(), 1);
    }
}
