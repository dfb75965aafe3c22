//! Periodic checks that do not depend on traffic: registered readers that died or stopped, and logs
//! whose files are gone. One thread runs them twice a second for both paths.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use penstock_ingest::session::{Counters, Shared};
use penstock_log::{FileState, Log, Lost, ReaderInfo};
use tracing::{error, info, warn};

use crate::liveness::Pulse;
use crate::topics::Topics;

/// Time between two rounds.
const INTERVAL: Duration = Duration::from_millis(500);

/// Settings.
#[derive(Debug, Clone)]
pub struct UpkeepConfig {
    /// Report a reader that blocks its log and has read nothing for this long.
    pub reader_timeout: Duration,
    /// Also evict it.
    pub evicts_readers: bool,
    /// Recreate a lost log and continue its streams.
    pub replaces_lost_logs: bool,
}

/// Checks readers and logs.
pub struct Upkeep {
    config: UpkeepConfig,
    /// Topics that the broker opened at startup: these always get a new log.
    own_topics: Vec<String>,
    topics: Arc<Topics>,
    shared: Arc<Shared>,
    /// Readers that block their log, by log and slot.
    stalled: HashMap<(PathBuf, usize), Stalled>,
    /// Own topics whose log could not be recreated yet.
    missing: Vec<String>,
    /// Logs whose registry is not where it was.
    without_registry: HashSet<PathBuf>,
}

/// A reader that blocked its log at the last check.
#[derive(Debug, Clone, Copy)]
struct Stalled {
    cursor: u64,
    process: u64,
    since: Instant,
    is_reported: bool,
    /// Seen in the current round.
    is_seen: bool,
}

impl Upkeep {
    pub fn new(
        config: UpkeepConfig,
        own_topics: Vec<String>,
        topics: Arc<Topics>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            config,
            own_topics,
            topics,
            shared,
            stalled: HashMap::new(),
            missing: Vec::new(),
            without_registry: HashSet::new(),
        }
    }

    /// Runs until the other end of `stop` is dropped.
    pub fn run(mut self, pulse: &Pulse, stop: &Receiver<()>) {
        while stop.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            // A log may have to be made.
            pulse.slowly(|| self.round(Instant::now()));
        }
    }

    fn round(&mut self, now: Instant) {
        for (topic, log) in self.topics.list() {
            if !self.check_file(&topic, &log) {
                continue;
            }
            self.check_registry(&log);
            self.sweep(&log);
            self.check_readers(&log, now);
        }
        self.stalled
            .retain(|_, stalled| std::mem::take(&mut stalled.is_seen));
        let topics = &self.topics;
        self.missing.retain(|topic| match topics.open_own(topic) {
            Ok(_) => {
                info!(topic, "the lost log was recreated");
                false
            }
            Err(_) => true,
        });
    }

    /// Reports once that a registry was deleted or replaced. The broker keeps waiting for the readers
    /// that have it open: they hold locks on the old file.
    fn check_registry(&mut self, log: &Log) {
        let path = log.path();
        if !matches!(log.check_registry(), Ok(FileState::Gone))
            || !self.without_registry.insert(path.to_owned())
        {
            return;
        }
        Counters::count(&self.shared.counters.registries_lost);
        error!(
            "{} was deleted, moved or replaced: the broker still waits for the readers that are registered, but no other reader can register; restart the broker",
            path.with_extension("readers").display()
        );
    }

    /// Frees the slots of dead readers, so that publishers do not wait for them.
    fn sweep(&self, log: &Log) {
        match log.sweep_readers() {
            Ok(0) => {}
            Ok(gone) => {
                warn!(gone, log = %log.path().display(), "registered readers died; the broker no longer waits for them");
                let counter = &self.shared.counters.readers_lost;
                (0..gone).for_each(|_| Counters::count(counter));
            }
            Err(error) => {
                warn!(%error, log = %log.path().display(), "cannot determine which readers are alive");
            }
        }
    }

    fn check_readers(&mut self, log: &Log, now: Instant) {
        // `sweep` reports a registry that it cannot read.
        for reader in log.readers().unwrap_or_default() {
            if reader.holds_up {
                self.check_reader(log, &reader, now);
            }
        }
    }

    fn check_reader(&mut self, log: &Log, reader: &ReaderInfo, now: Instant) {
        let fresh = Stalled {
            cursor: reader.cursor,
            process: reader.process,
            since: now,
            is_reported: false,
            is_seen: true,
        };
        let key = (log.path().to_owned(), reader.slot);
        let stalled = self.stalled.entry(key).or_insert(fresh);
        if (stalled.cursor, stalled.process) != (reader.cursor, reader.process) {
            *stalled = fresh;
        }
        stalled.is_seen = true;
        let time = now - stalled.since;
        if stalled.is_reported || time < self.config.reader_timeout {
            return;
        }
        stalled.is_reported = true;
        Counters::count(&self.shared.counters.readers_stalled);
        let advice = match self.config.evicts_readers {
            true => self.evict(log, reader),
            false => {
                "publishers wait for it: resume or end it, or start the broker with --reader-timeout-action evict"
            }
        };
        warn!(
            log = %log.path().display(),
            process = reader.process,
            unread_batches = reader.unread_batches,
            unread_bytes = reader.unread_bytes,
            "a registered reader is alive but has read nothing for {} s and blocks the log; {advice}",
            time.as_secs()
        );
    }

    fn evict(&self, log: &Log, reader: &ReaderInfo) -> &'static str {
        match log.evict_reader(reader) {
            Ok(false) => {
                "it cannot be evicted, because it may still use bytes that it borrowed from an earlier broker: resume or end it"
            }
            Ok(true) => {
                Counters::count(&self.shared.counters.readers_evicted);
                "it was evicted"
            }
            Err(error) => {
                Counters::count(&self.shared.counters.readers_evicted);
                warn!(%error, "cannot write a reader's eviction notice");
                "it was evicted"
            }
        }
    }

    /// Whether the log's file is still in place and whole; handles the loss if not.
    fn check_file(&mut self, topic: &str, log: &Log) -> bool {
        let path = log.path().display();
        // The contents of a shortened file must not be accessed: that would raise SIGBUS.
        let (what, found) = match log.check_file() {
            Ok(FileState::Whole) => return true,
            Ok(FileState::Gone) => (
                "was deleted, moved or replaced".to_owned(),
                Some(log.info()),
            ),
            Ok(FileState::Resized { bytes }) => {
                let was = log.geometry().file_bytes();
                let what = format!("was resized from {was} to {bytes} bytes");
                (what, None)
            }
            Err(error) => {
                warn!(%error, log = %path, "cannot check a log's file");
                return true;
            }
        };
        Counters::count(&self.shared.counters.logs_lost);
        self.without_registry.remove(log.path());
        error!(
            topic,
            batches = found.map(|found| found.batches),
            messages = found.map(|found| found.messages),
            "{path} {what} under the running broker: its acknowledged batches are lost to readers that have not opened it yet"
        );
        let own = self.own_topics.iter().any(|own| own == topic);
        let goes_on = self.config.replaces_lost_logs;
        let lost = Lost {
            reason: format!(
                "the log of topic {topic:?} {what} under the running broker; its acknowledged batches are lost"
            ),
            is_replaced: goes_on,
        };
        match self.topics.on_lost(topic, log, lost, goes_on || own) {
            Ok(()) if goes_on || own => info!(topic, "the lost log was recreated"),
            Ok(()) => {}
            Err(refused) => {
                error!(topic, "cannot recreate the lost log: {refused}");
                if own {
                    self.missing.push(topic.to_owned());
                }
            }
        }
        false
    }
}
