//! Counts and digest of what was read, per stream, and what is wrong with it.

use std::collections::BTreeMap;

use penstock_log::{Batch, ChecksumMismatch};
use penstock_wire::message::{Malformed, Messages};
use serde::Serialize;
use sha2::{Digest, Sha256};
use thiserror::Error;

/// What was read so far.
#[derive(Debug, Default)]
pub struct Tally {
    digest: bool,
    lost_batches: u64,
    lost_messages: u64,
    streams: BTreeMap<(u64, u32), Open>,
}

/// A stream whose digest is still open.
#[derive(Debug)]
struct Open {
    next_seq: u64,
    messages: u64,
    batches: u64,
    payload_bytes: u64,
    missing_batches: u64,
    digest: Sha256,
}

/// Totals of one stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StreamTotals {
    /// Session key, hexadecimal.
    pub session: String,
    /// Stream inside the session.
    pub stream: u32,
    /// Messages read.
    pub messages: u64,
    /// Batches read.
    pub batches: u64,
    /// Message bytes read, without framing.
    pub payload_bytes: u64,
    /// Batches between those read that were not there.
    pub missing_batches: u64,
    /// SHA-256 over every message followed by one newline, if asked for.
    pub sha256: Option<String>,
}

/// Something is wrong with a batch.
#[derive(Debug, Error, PartialEq, Eq, Clone, Copy)]
pub enum Trouble {
    /// Its bytes are not those that were sent.
    #[error(transparent)]
    Checksum(#[from] ChecksumMismatch),
    /// Its messages do not fit in it.
    #[error("batch {index}: {reason}")]
    Malformed {
        /// Position in the log.
        index: u64,
        /// What does not fit.
        reason: Malformed,
    },
    /// It holds another number of messages than it claims.
    #[error("batch {index} claims {claimed} messages and holds {found}")]
    Count {
        /// Position in the log.
        index: u64,
        /// Messages that the header claims.
        claimed: u32,
        /// Messages found.
        found: u64,
    },
    /// It comes before a batch that its stream had already shown.
    #[error("batch {index}: sequence {found} of its stream came where {expected} was due")]
    Order {
        /// Position in the log.
        index: u64,
        /// Sequence number expected.
        expected: u64,
        /// Sequence number found.
        found: u64,
    },
}

impl Tally {
    /// An empty tally; `digest` computes a SHA-256 per stream.
    #[must_use]
    pub fn new(digest: bool) -> Self {
        Self {
            digest,
            ..Self::default()
        }
    }

    /// Takes a batch into tally.
    ///
    /// # Errors
    /// The first [`Trouble`] with it. A batch whose bytes are not those that were sent counts as
    /// missing; any other is counted all the same, as far as it goes.
    pub fn add(&mut self, batch: &Batch<'_>) -> Result<(), Trouble> {
        self.add_first(batch, u64::MAX)
    }

    /// As [`Self::add`], but only the first `limit` messages of the batch are counted.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_first(&mut self, batch: &Batch<'_>, limit: u64) -> Result<(), Trouble> {
        batch.verify()?;
        self.add_verified(batch, limit)
    }

    /// As [`Self::add_first`], for a batch whose checksum was verified already.
    pub(crate) fn add_verified(&mut self, batch: &Batch<'_>, limit: u64) -> Result<(), Trouble> {
        let index = batch.index;
        let key = (batch.session, batch.stream);
        let open = self
            .streams
            .entry(key)
            .or_insert_with(|| Open::starting_at(batch.batch_seq));
        let expected = open.next_seq;
        open.batches += 1;
        let mut found = 0;
        let mut malformed = None;
        for message in Messages::new(batch.payload) {
            match message {
                Ok(_) if found >= limit => found += 1,
                Ok(message) => {
                    found += 1;
                    open.payload_bytes += message.len() as u64;
                    if self.digest {
                        open.digest.update(message);
                        open.digest.update(b"\n");
                    }
                }
                Err(reason) => malformed = Some(Trouble::Malformed { index, reason }),
            }
        }
        open.messages += found.min(limit);
        let in_order = batch.batch_seq >= expected;
        if in_order {
            open.missing_batches += batch.batch_seq - expected;
            open.next_seq = batch.batch_seq + 1;
        }
        if let Some(malformed) = malformed {
            return Err(malformed);
        }
        if found != u64::from(batch.messages) {
            return Err(Trouble::Count {
                index,
                claimed: batch.messages,
                found,
            });
        }
        if !in_order {
            return Err(Trouble::Order {
                index,
                expected,
                found: batch.batch_seq,
            });
        }
        Ok(())
    }

    /// Takes note of what was overwritten before it was read.
    pub fn add_lost(&mut self, batches: u64, messages: u64) {
        self.lost_batches += batches;
        self.lost_messages += messages;
    }

    /// Batches overwritten before they were read.
    #[must_use]
    pub fn lost_batches(&self) -> u64 {
        self.lost_batches
    }

    /// Messages overwritten before they were read.
    #[must_use]
    pub fn lost_messages(&self) -> u64 {
        self.lost_messages
    }

    /// Every stream, by session and number.
    #[must_use]
    pub fn streams(&self) -> Vec<StreamTotals> {
        let close = |(key, open): (&(u64, u32), &Open)| StreamTotals {
            session: format!("{:016x}", key.0),
            stream: key.1,
            messages: open.messages,
            batches: open.batches,
            payload_bytes: open.payload_bytes,
            missing_batches: open.missing_batches,
            sha256: self.digest.then(|| hex(&open.digest.clone().finalize())),
        };
        self.streams.iter().map(close).collect()
    }
}

impl Open {
    /// A log may no longer hold a stream's beginning, so its first batch seen sets the start.
    fn starting_at(next_seq: u64) -> Self {
        Self {
            next_seq,
            messages: 0,
            batches: 0,
            payload_bytes: 0,
            missing_batches: 0,
            digest: Sha256::new(),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::batch::checksum;
    use penstock_wire::message::append;

    fn payload(messages: &[&[u8]]) -> Vec<u8> {
        let mut payload = Vec::new();
        messages
            .iter()
            .for_each(|message| append(&mut payload, message));
        payload
    }

    fn batch(index: u64, batch_seq: u64, messages: u32, payload: &[u8]) -> Batch<'_> {
        Batch {
            index,
            session: 0xab,
            stream: 3,
            batch_seq,
            messages,
            checksum: checksum(batch_seq, messages, payload),
            arrival_unix_ns: 0,
            payload,
        }
    }

    #[test]
    fn counts_and_digest_are_those_of_the_lines() {
        let mut tally = Tally::new(true);
        tally
            .add(&batch(0, 0, 2, &payload(&[b"one", b""])))
            .unwrap();
        tally.add(&batch(1, 1, 1, &payload(&[b"two"]))).unwrap();
        let three = payload(&[b"left out", b"so", b"too"]);
        let mut cut = Tally::new(true);
        cut.add(&batch(0, 0, 2, &payload(&[b"one", b""]))).unwrap();
        let longer = payload(&[b"two", b"left out", b"too"]);
        cut.add_first(&batch(1, 1, 3, &longer), 1).unwrap();
        assert_eq!(cut.streams(), tally.streams());
        cut.add_first(&batch(2, 2, 3, &three), 0).unwrap();
        assert_eq!(cut.streams()[0].messages, 3);
        let [stream] = &tally.streams()[..] else {
            panic!("one stream")
        };
        assert_eq!(
            (stream.messages, stream.batches, stream.payload_bytes),
            (3, 2, 6)
        );
        assert_eq!(stream.session, "00000000000000ab");
        // printf 'one\n\ntwo\n' | sha256sum
        let expected = hex(&Sha256::digest(b"one\n\ntwo\n"));
        assert_eq!(stream.sha256.as_deref(), Some(&expected[..]));
    }

    #[test]
    fn every_kind_of_trouble_is_named() {
        let mut tally = Tally::new(false);
        let good = payload(&[b"x"]);
        tally.add(&batch(0, 5, 1, &good)).unwrap();
        let mut damaged = batch(1, 6, 1, &good);
        damaged.checksum ^= 1;
        assert!(matches!(tally.add(&damaged), Err(Trouble::Checksum(_))));
        let short = [9, 0, 0, 0, 1];
        assert!(matches!(
            tally.add(&batch(2, 7, 1, &short)),
            Err(Trouble::Malformed { .. })
        ));
        assert_eq!(
            tally.add(&batch(3, 8, 2, &good)),
            Err(Trouble::Count {
                index: 3,
                claimed: 2,
                found: 1
            })
        );
        assert_eq!(
            tally.add(&batch(4, 8, 1, &good)),
            Err(Trouble::Order {
                index: 4,
                expected: 9,
                found: 8
            })
        );
        tally.add(&batch(5, 12, 1, &good)).unwrap();
        // Sequence numbers 6, which was damaged, and 9 to 11.
        assert_eq!(tally.streams()[0].missing_batches, 4);
    }
}
