//! Topics: which log a stream writes, whether a publisher may create it, and the thread that opens
//! logs.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use penstock_ingest::session::admission::{Refused, StreamRequest};
use penstock_ingest::session::peer::{Host, Tenant};
use penstock_ingest::session::shares::{Exceeded, Shares, Use};
use penstock_log::{Log, LogOptions, Lost};
use penstock_runtime::poison::lock;
use penstock_wire::handshake::Refusal;
use tracing::{info, warn};

use crate::earlier::EarlierStreams;
use crate::liveness::{IDLE_ROUND_MS, Pulse};
use crate::topic_policy::TopicPolicy;
use crate::{buffer_dir, memory};

/// A log that was created for a publisher which then went away is closed after this time.
const UNCLAIMED: Duration = Duration::from_secs(2);
/// Publishers that request a topic get the same error for this long; then the broker tries to open its
/// log again.
const FAILED: Duration = Duration::from_secs(1);

/// Configuration of topics.
#[derive(Debug, Clone)]
pub struct TopicConfig {
    /// Maximum number of topics.
    pub max: usize,
    /// Maximum share, in percent of what others leave free, that one host may create.
    pub share_percent: u8,
    pub policy: TopicPolicy,
}

/// Every topic's log; shared with the report and with the thread that opens logs.
#[derive(Debug)]
pub struct Topics {
    directory: PathBuf,
    options: LogOptions,
    policy: TopicPolicy,
    table: Mutex<Table>,
    /// Set when a log was opened, or failed to open, since a publisher last asked.
    news: AtomicBool,
}

#[derive(Debug)]
struct Table {
    topics: HashMap<String, Entry>,
    /// Topics by the tenant that they were opened for; those of --topic are the broker's own.
    shares: Shares<String>,
}

#[derive(Debug)]
struct Entry {
    tenant: Tenant,
    state: State,
}

#[derive(Debug)]
enum State {
    /// The thread that opens logs is working on it.
    Opening,
    Open(Open),
    Failed(Refused, Instant),
}

/// A topic that is open.
#[derive(Debug, Clone)]
pub struct Topic {
    pub log: Arc<Log>,
    earlier: Arc<Mutex<EarlierStreams>>,
}

impl Topic {
    /// A topic with an open log, and the streams that the log's index knows.
    fn new(log: Log) -> Self {
        let slots = log.geometry().index_slots();
        let earlier = EarlierStreams::new(log.streams(), log.info().batches, slots);
        Self {
            log: Arc::new(log),
            earlier: Arc::new(Mutex::new(earlier)),
        }
    }

    /// Streams that committed batches and belong to no current session.
    pub fn earlier(&self) -> MutexGuard<'_, EarlierStreams> {
        lock(&self.earlier)
    }
}

#[derive(Debug)]
struct Open {
    topic: Topic,
    /// The log did not exist before a publisher requested it.
    is_new: bool,
    opened: Instant,
    /// A stream was opened on it.
    is_claimed: bool,
}

/// Requests to the thread that opens logs. It handles them in order, so a log is closed before another
/// of the same name is created.
#[derive(Debug)]
pub enum Job {
    Open(String),
    /// Closes a log, and removes its file if the flag is set.
    Close(Arc<Log>, bool),
}

impl Topics {
    /// Topics with their logs in `directory`, which must exist.
    pub fn new(directory: PathBuf, options: LogOptions, config: TopicConfig) -> Result<Self> {
        buffer_dir::check(&directory, options.access)?;
        Ok(Self {
            directory,
            options,
            policy: config.policy,
            table: Mutex::new(Table {
                topics: HashMap::new(),
                shares: Shares::new(config.max, config.share_percent),
            }),
            news: AtomicBool::new(false),
        })
    }

    /// Opens or creates the log of one of the broker's own topics.
    pub fn open_own(&self, name: &str) -> Result<Arc<Log>, Refused> {
        let mut table = self.lock();
        if let Some(topic) = table.find(name) {
            return Ok(topic.log);
        }
        let mut open = self.open_log(name)?;
        let log = Arc::clone(&open.topic.log);
        (open.is_new, open.is_claimed) = (false, true);
        // No peer has this address.
        let tenant = Tenant {
            host: Host::of(([0, 0, 0, 0], 0).into()),
            key: None,
        };
        table.shares.charge(&tenant, 1);
        let state = State::Open(open);
        table
            .topics
            .insert(name.to_owned(), Entry { tenant, state });
        Ok(log)
    }

    /// Whether a publisher may have the topic that it requests. Creates nothing.
    pub fn check(&self, asked: &StreamRequest<'_>) -> Result<(), Refused> {
        let table = self.lock();
        match table.topics.get(asked.topic).map(|entry| &entry.state) {
            Some(State::Open(_) | State::Opening) => Ok(()),
            Some(State::Failed(refused, at)) if at.elapsed() < FAILED => Err(refused.clone()),
            _ if self.path(asked.topic).exists() => Ok(()),
            _ => self.policy.check(asked),
        }
    }

    /// The topic that a publisher requests; `None` while its log is being opened or created.
    /// [`Self::take_news`] reports when that has finished.
    pub fn find_or_open(
        &self,
        asked: &StreamRequest<'_>,
        jobs: &Sender<Job>,
    ) -> Result<Option<Topic>, Refused> {
        self.check(asked)?;
        let mut table = self.lock();
        if let Some(topic) = table.find(asked.topic) {
            return Ok(Some(topic));
        }
        match table.topics.get(asked.topic).map(|entry| &entry.state) {
            Some(State::Opening) => return Ok(None),
            Some(State::Failed(..)) => {
                table.forget(asked.topic);
            }
            _ => {}
        }
        self.start_opening(&mut table, asked.topic, asked.tenant, jobs)?;
        Ok(None)
    }

    /// The log of a topic for a subscriber; `None` while it is being opened. Creates no topic.
    pub fn find_log(
        &self,
        topic: &str,
        tenant: Tenant,
        jobs: &Sender<Job>,
    ) -> Result<Option<Arc<Log>>, Refused> {
        let mut table = self.lock();
        match table.topics.get(topic).map(|entry| &entry.state) {
            Some(State::Open(open)) => return Ok(Some(Arc::clone(&open.topic.log))),
            Some(State::Opening) => return Ok(None),
            Some(State::Failed(refused, at)) if at.elapsed() < FAILED => {
                return Err(refused.clone());
            }
            Some(State::Failed(..)) => {
                table.forget(topic);
            }
            None => {}
        }
        if !self.path(topic).exists() {
            return Err(Refused {
                refusal: Refusal::Topic,
                text: format!(
                    "this broker has no topic {topic:?}: a publisher creates it, or the broker's --topic"
                ),
            });
        }
        self.start_opening(&mut table, topic, tenant, jobs)?;
        Ok(None)
    }

    fn start_opening(
        &self,
        table: &mut Table,
        topic: &str,
        tenant: Tenant,
        jobs: &Sender<Job>,
    ) -> Result<(), Refused> {
        self.make_room(table, topic, &tenant, jobs)?;
        table.shares.charge(&tenant, 1);
        let name = topic.to_owned();
        table.shares.list(&tenant, name.clone(), |_| false);
        let entry = Entry {
            tenant,
            state: State::Opening,
        };
        table.topics.insert(name.clone(), entry);
        send(jobs, Job::Open(name))
    }

    /// The topic, if it is open.
    pub fn find(&self, name: &str) -> Option<Topic> {
        self.lock().find(name)
    }

    /// Records that a stream was opened on a topic.
    pub fn claim(&self, name: &str) {
        if let Some(State::Open(open)) = self.lock().topics.get_mut(name).map(|e| &mut e.state) {
            open.is_claimed = true;
        }
    }

    /// Simulates that this much time has passed.
    #[cfg(test)]
    pub fn backdate(&self, time: Duration) {
        for entry in self.lock().topics.values_mut() {
            match &mut entry.state {
                State::Open(open) => open.opened -= time,
                State::Failed(_, at) => *at -= time,
                State::Opening => {}
            }
        }
    }

    /// Ensures that there is room for the log that a publisher requests, if necessary by closing an
    /// unused one.
    fn make_room(
        &self,
        table: &mut Table,
        topic: &str,
        tenant: &Tenant,
        jobs: &Sender<Job>,
    ) -> Result<(), Refused> {
        let Err(exceeded) = table.shares.check(tenant) else {
            return Ok(());
        };
        let topics = &table.topics;
        let look = |name: &String| match topics.get(name).map(|entry| &entry.state) {
            Some(State::Open(open)) if open.is_unused() => Use::Unused,
            Some(_) => Use::InUse,
            None => Use::Gone,
        };
        // There are few topics, and what holds one is gone at any time.
        table.shares.refresh(look);
        let Some((_, name)) = table.shares.evict(tenant, exceeded, look) else {
            return Err(refuse(topic, tenant, exceeded, table.shares.limit()));
        };
        table.close(&name, jobs)
    }

    /// Closes logs whose publishers went away before opening a stream.
    pub fn tick(&self, jobs: &Sender<Job>) {
        let mut table = self.lock();
        let abandoned = table.topics.iter().filter(|(_, entry)| match &entry.state {
            State::Open(open) => {
                open.is_new
                    && !open.is_claimed
                    && Arc::strong_count(&open.topic.log) == 1
                    && open.opened.elapsed() >= UNCLAIMED
            }
            State::Failed(_, at) => at.elapsed() >= FAILED,
            State::Opening => false,
        });
        let abandoned: Vec<_> = abandoned.map(|(name, _)| name.clone()).collect();
        for name in abandoned {
            // When the broker ends, no thread opens logs any more.
            let _ = table.close(&name, jobs);
        }
    }

    /// Whether a log was opened, or failed to open, since the last call.
    pub fn take_news(&self) -> bool {
        self.news.swap(false, Ordering::AcqRel)
    }

    /// Opens and closes logs until all senders are gone; calls `wake` after each.
    pub fn serve(&self, jobs: &Receiver<Job>, pulse: &Pulse, wake: impl Fn()) {
        let idle = Duration::from_millis(IDLE_ROUND_MS.into());
        loop {
            pulse.count();
            match jobs.recv_timeout(idle) {
                Ok(Job::Open(name)) => {
                    pulse.slowly(|| self.open_for_publisher(&name));
                    self.news.store(true, Ordering::Release);
                    wake();
                }
                Ok(Job::Close(log, with_file)) => pulse.slowly(|| close(log, with_file)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    /// Handles the loss of a topic's log: ends its streams, and then frees the topic or gives it a new
    /// log.
    ///
    /// # Errors
    /// Why there is no new log.
    pub fn on_lost(
        &self,
        name: &str,
        log: &Log,
        lost: Lost,
        is_replaced: bool,
    ) -> Result<(), Refused> {
        {
            let mut table = self.lock();
            let Some(entry) = table.topics.get_mut(name) else {
                return Ok(());
            };
            match &entry.state {
                State::Open(open) if std::ptr::eq(&*open.topic.log, log) => {}
                _ => return Ok(()),
            }
            // Meanwhile, a publisher that requests the topic waits for the new log.
            entry.state = State::Opening;
            if !is_replaced {
                table.forget(name);
            }
            log.set_lost(lost);
        }
        if !is_replaced {
            return Ok(());
        }
        let opened = self.open_log(name);
        let mut table = self.lock();
        let result = match (opened, table.topics.get_mut(name)) {
            (Ok(mut open), Some(entry)) => {
                (open.is_new, open.is_claimed) = (false, true);
                entry.state = State::Open(open);
                Ok(())
            }
            (Ok(_), None) => Ok(()),
            (Err(refused), _) => {
                table.forget(name);
                Err(refused)
            }
        };
        self.news.store(true, Ordering::Release);
        result
    }

    fn open_for_publisher(&self, name: &str) {
        // Takes as long as the file system needs to allocate a whole ring. The table is not locked
        // meanwhile.
        let state = match self.open_log(name) {
            Ok(open) => State::Open(open),
            Err(refused) => State::Failed(refused, Instant::now()),
        };
        if let Some(entry) = self.lock().topics.get_mut(name) {
            entry.state = state;
        }
    }

    fn open_log(&self, name: &str) -> Result<Open, Refused> {
        let path = self.path(name);
        let is_new = !path.exists();
        let refuse = |text| Refused {
            refusal: Refusal::Resources,
            text,
        };
        memory::check(&path, self.options.geometry.file_bytes()).map_err(refuse)?;
        let log = Log::open(&path, &self.options).map_err(|e| refuse(e.to_string()))?;
        let found = log.info();
        info!(
            topic = name,
            path = %path.display(),
            ring_bytes = found.ring_bytes,
            epoch = found.epoch,
            batches = found.batches,
            "log open"
        );
        Ok(Open {
            topic: Topic::new(log),
            is_new,
            opened: Instant::now(),
            is_claimed: false,
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.log"))
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    /// Open logs by topic, sorted.
    pub fn list(&self) -> Vec<(String, Arc<Log>)> {
        let table = self.lock();
        let open = table.topics.iter().filter_map(|(name, entry)| {
            let State::Open(open) = &entry.state else {
                return None;
            };
            Some((name.clone(), Arc::clone(&open.topic.log)))
        });
        let mut list: Vec<_> = open.collect();
        list.sort_by(|a, b| a.0.cmp(&b.0));
        list
    }
}

impl Table {
    /// An open topic.
    fn find(&self, name: &str) -> Option<Topic> {
        match &self.topics.get(name)?.state {
            State::Open(open) => Some(open.topic.clone()),
            State::Opening | State::Failed(..) => None,
        }
    }

    fn forget(&mut self, name: &str) -> Option<Entry> {
        let entry = self.topics.remove(name)?;
        self.shares.unlist(&entry.tenant, |listed| listed == name);
        self.shares.release(&entry.tenant, 1);
        Some(entry)
    }

    /// Closes a topic's log, and removes its file if it was created for a publisher and is empty.
    fn close(&mut self, name: &str, jobs: &Sender<Job>) -> Result<(), Refused> {
        match self.forget(name).map(|entry| entry.state) {
            Some(State::Open(open)) => {
                info!(
                    topic = name,
                    is_new = open.is_new,
                    "log closed: no stream uses it"
                );
                let with_file = open.is_new && open.is_empty();
                send(jobs, Job::Close(open.topic.log, with_file))
            }
            _ => Ok(()),
        }
    }
}

impl Open {
    fn is_empty(&self) -> bool {
        self.topic.log.info().batches == 0
    }

    /// Whether the log may be closed: no stream uses it, and it holds nothing that would be lost.
    fn is_unused(&self) -> bool {
        Arc::strong_count(&self.topic.log) == 1 && (!self.is_new || self.is_empty())
    }
}

fn close(log: Arc<Log>, with_file: bool) {
    let path = log.path().to_owned();
    if with_file && let Err(error) = log.remove_files() {
        warn!(path = %path.display(), %error, "cannot remove the file of an empty log");
    }
    drop(log);
}

fn send(jobs: &Sender<Job>, job: Job) -> Result<(), Refused> {
    // The queue has room for one job of each kind for every topic.
    jobs.send(job).map_err(|_| Refused {
        refusal: Refusal::Resources,
        text: "the broker is ending".to_owned(),
    })
}

fn refuse(topic: &str, tenant: &Tenant, exceeded: Exceeded, max: usize) -> Refused {
    let text = match exceeded {
        Exceeded::Total => {
            format!(
                "topic {topic:?} would exceed this broker's --max-topics {max}; raise it, or reuse a topic"
            )
        }
        Exceeded::Host { held } => format!(
            "topic {topic:?} would exceed the share of host {}, which has created {held} of at most {max} topics; raise the broker's --max-topics or --max-share, or start it with --topic {topic}",
            tenant.host
        ),
        Exceeded::Site { held } => format!(
            "topic {topic:?} would exceed the share of site {}, whose hosts have created {held} of at most {max} topics; raise the broker's --max-topics or --max-share, or start it with --topic {topic}",
            tenant.host.site()
        ),
        Exceeded::Key { held } => format!(
            "topic {topic:?} would exceed the share of this key, whose publishers have created {held} of at most {max} topics; raise the broker's --max-topics or --max-share, or start it with --topic {topic}"
        ),
    };
    Refused {
        refusal: Refusal::Topic,
        text,
    }
}
