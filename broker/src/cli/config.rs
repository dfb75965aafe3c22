//! What a command line means: its settings checked against each other.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::Group;
use penstock_flags::{nearest_multiple, nearest_power_of_two, size_text};
use penstock_ingest::session::buffers::RequestedBuffers;
use penstock_ingest::session::{Limits, ReadAccess};
use penstock_ingest::tcp::WorkerConfig;
use penstock_ingest::xdp::Polling;
use penstock_log::{Access, Geometry, LogOptions, RingFullPolicy};
use penstock_wire::handshake::check_topic;

use super::{
    Cli, FullPolicy, MAX_RING, Mode, OnDeletedLog, Poll, ReaderTimeoutAction, RemoteRegistration,
    RemoteSubscribers, SEGMENTS,
};
use crate::machine::parse_cpus;
use crate::topic_policy::{Creators, TopicPolicy};
use crate::topics::TopicConfig;
use crate::upkeep::UpkeepConfig;
use crate::xdp_settings::{XdpMode, XdpSettings};

/// Settings of the service for remote subscribers.
#[derive(Debug, Clone, Copy)]
pub struct SubscriberConfig {
    pub access: ReadAccess,
    pub anyone_may_register: bool,
    pub max: usize,
}

/// A checked command line.
#[derive(Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub buffer_dir: PathBuf,
    pub log: LogOptions,
    pub topics: Vec<String>,
    pub topic: TopicConfig,
    pub buffers: RequestedBuffers,
    pub limits: Limits,
    pub subscribers: Option<SubscriberConfig>,
    pub worker: WorkerConfig,
    pub tcp_workers: usize,
    pub xdp: Option<XdpSettings>,
    /// Serve over tcp only if the xdp path is not available.
    pub xdp_may_fail: bool,
    pub cpus: Vec<usize>,
    pub user: Option<String>,
    pub auth_keys: Option<PathBuf>,
    pub packet_auth: bool,
    pub report: Option<PathBuf>,
    pub ready_fd: Option<i32>,
    pub upkeep: UpkeepConfig,
}

impl Cli {
    /// Checks what clap cannot.
    pub fn check(self) -> Result<Config> {
        let xdp = self.xdp()?;
        // Beside xdp workers, one serves publishers that come over tcp.
        let tcp_workers = if xdp.is_some() {
            1
        } else {
            self.workers.into()
        };
        let xdp_workers = xdp.as_ref().map_or(0, |xdp| xdp.workers);
        let log = self.log_options(tcp_workers + xdp_workers)?;
        self.check_topics()?;
        let cpus = self.cpus.as_deref().map(parse_cpus).transpose()?;
        let topic = TopicConfig {
            max: self.max_topics as usize,
            share_percent: self.max_share,
            policy: self.topic_policy()?,
        };
        Ok(Config {
            buffers: self.requested_buffers(),
            limits: self.limits(),
            subscribers: self.subscribers()?,
            worker: WorkerConfig {
                verify_on_receive: self.verify_on_receive,
                stall_timeout: self.stall_timeout,
                ..WorkerConfig::default()
            },
            upkeep: UpkeepConfig {
                reader_timeout: self.reader_timeout,
                evicts_readers: self.evicts_readers(),
                replaces_lost_logs: self.on_deleted_log == OnDeletedLog::Recreate,
            },
            listen: self.listen,
            buffer_dir: self.buffer_dir,
            log,
            topics: self.topics,
            topic,
            tcp_workers,
            xdp,
            xdp_may_fail: self.mode == Mode::Auto,
            cpus: cpus.unwrap_or_default(),
            user: self.user,
            auth_keys: self.auth_keys,
            packet_auth: self.packet_auth,
            report: self.report,
            ready_fd: self.ready_fd,
        })
    }

    /// What each log is like; `writers` is the number of workers.
    fn log_options(&self, writers: usize) -> Result<LogOptions> {
        let geometry = geometry(
            self.ring_size.as_u64(),
            self.segment_size.as_u64(),
            self.index_slots,
        )?;
        // Half of the index is kept for batches that are being received.
        if u64::from(self.max_connections) > self.index_slots / 2 {
            bail!(
                "--max-connections {} needs --index-slots of at least {}",
                self.max_connections,
                (2 * u64::from(self.max_connections)).next_power_of_two()
            );
        }
        if self.evicts_readers() && self.full == FullPolicy::Overwrite {
            bail!(
                "--reader-timeout-action evict needs --full block: with --full overwrite, the broker does not wait for readers"
            );
        }
        Ok(LogOptions {
            geometry,
            full: match self.full {
                FullPolicy::Block if self.evicts_readers() => RingFullPolicy::Evict,
                FullPolicy::Block => RingFullPolicy::Block,
                FullPolicy::Overwrite => RingFullPolicy::Overwrite,
            },
            access: self.access()?,
            writers,
        })
    }

    fn evicts_readers(&self) -> bool {
        self.reader_timeout_action == ReaderTimeoutAction::Evict
    }

    fn check_topics(&self) -> Result<()> {
        for topic in &self.topics {
            check_topic(topic.as_bytes())?;
        }
        if self.topics.len() > self.max_topics as usize {
            bail!(
                "{} topics are more than --max-topics {}",
                self.topics.len(),
                self.max_topics
            );
        }
        Ok(())
    }

    fn requested_buffers(&self) -> RequestedBuffers {
        RequestedBuffers {
            rcvbuf: self.rcvbuf.as_u64() as u32,
            sndbuf: self.sndbuf.as_u64() as u32,
            rcvbuf_on: self.rcvbuf_on,
            force: self.rcvbuf_force,
        }
    }

    fn limits(&self) -> Limits {
        Limits {
            max_connections: self.max_connections as usize,
            max_handshakes: self.max_handshakes as usize,
            handshake_timeout: self.handshake_timeout,
            share_percent: self.max_share,
        }
    }

    fn subscribers(&self) -> Result<Option<SubscriberConfig>> {
        let access = match self.remote_subscribers {
            RemoteSubscribers::Never => return Ok(None),
            RemoteSubscribers::Any if self.auth_keys.is_some() => bail!(
                "--remote-subscribers any is for brokers without keys: with --auth-keys, give read:TOPIC to the keys that may read"
            ),
            RemoteSubscribers::Any => ReadAccess::Anyone,
            RemoteSubscribers::Keyed => ReadAccess::Keyed,
        };
        let anyone_may_register = self.remote_registration == RemoteRegistration::Any;
        if anyone_may_register && access == ReadAccess::Keyed {
            bail!(
                "--remote-registration any needs --remote-subscribers any; with --auth-keys, give register:TOPIC to the keys that may register"
            );
        }
        Ok(Some(SubscriberConfig {
            access,
            anyone_may_register,
            max: self.max_subscribers as usize,
        }))
    }

    /// The configuration of the xdp path, if it was requested.
    fn xdp(&self) -> Result<Option<XdpSettings>> {
        if !self.xdp_ring.is_power_of_two() || !(64..=1 << 16).contains(&self.xdp_ring) {
            bail!(
                "--xdp-ring {} is not a power of two from 64 to 65536",
                self.xdp_ring
            );
        }
        let interface = match (self.mode, &self.iface) {
            (_, None) if self.configure_nic => {
                bail!("--configure-nic needs --mode xdp or auto, and --iface")
            }
            (Mode::Tcp, None) => return Ok(None),
            (Mode::Tcp, Some(_)) => bail!("--iface needs --mode xdp or auto"),
            (Mode::Xdp, None) => {
                bail!("--mode xdp needs --iface, the interface on which publishers' packets arrive")
            }
            (Mode::Auto, None) => return Ok(None),
            (_, Some(interface)) => interface.clone(),
        };
        let queues = self.queues.as_deref().map(|list| {
            parse_cpus(list)
                .map_err(|_| anyhow!("--queues: {list:?} is not a list of queues such as 0,2-3"))
        });
        Ok(Some(XdpSettings {
            interface,
            queues: queues.transpose()?,
            workers: self.workers.into(),
            mode: match self.xdp_mode {
                XdpMode::Auto => penstock_ebpf::Mode::Auto,
                XdpMode::Native => penstock_ebpf::Mode::Native,
                XdpMode::Generic => penstock_ebpf::Mode::Generic,
            },
            force: self.force,
            copy: self.xdp_copy,
            ring: self.xdp_ring,
            polling: match self.poll {
                Poll::Busy => Polling::Busy,
                Poll::Adaptive => Polling::Adaptive,
            },
            busy_poll: self.busy_poll,
            verify_on_receive: self.verify_on_receive,
            idle_timeout: self.stall_timeout,
            configure: self.configure_nic,
        }))
    }

    /// Who may create topics.
    fn topic_policy(&self) -> Result<TopicPolicy> {
        let has_keys = self.auth_keys.is_some();
        if self.create_topics == Some(Creators::Keyed) && !has_keys {
            bail!("--create-topics keyed needs --auth-keys");
        }
        let default = match has_keys {
            true => Creators::Keyed,
            false => Creators::Local,
        };
        Ok(TopicPolicy {
            creators: self.create_topics.unwrap_or(default),
            patterns: self.topic_patterns.clone(),
        })
    }

    /// Who may read the logs.
    fn access(&self) -> Result<Access> {
        let group = self.buffer_group.as_deref().map(|name| {
            let found = Group::from_name(name)
                .with_context(|| format!("--buffer-group: cannot look up {name}"))?;
            let group = found.with_context(|| {
                format!("--buffer-group: there is no group {name:?} here (getent group lists them)")
            })?;
            anyhow::Ok(group.gid.as_raw())
        });
        let mode = u32::from_str_radix(&self.buffer_mode, 8);
        let mode = mode.map_err(|_| {
            anyhow!(
                "--buffer-mode {:?} is not a file mode such as 640",
                self.buffer_mode
            )
        })?;
        Access::new(mode, group.transpose()?)
            .map(|access| access.in_shared_directory(self.shared_buffer_dir))
            .map_err(|rule| anyhow!("--buffer-mode: {rule}"))
    }
}

/// The geometry of a topic's log.
fn geometry(ring: u64, segment: u64, slots: u64) -> Result<Geometry> {
    let nearest = nearest_power_of_two(segment, SEGMENTS);
    if nearest != segment {
        bail!(
            "--segment-size {} is not a power of two from {} to {}; the nearest is {}",
            size_text(segment),
            size_text(*SEGMENTS.start()),
            size_text(*SEGMENTS.end()),
            size_text(nearest)
        );
    }
    let nearest = nearest_multiple(ring, segment, 2, MAX_RING / segment);
    if nearest != ring {
        bail!(
            "--ring-size {} is not a multiple of --segment-size {}, from two of them to {}; the \
             nearest is {}",
            size_text(ring),
            size_text(segment),
            size_text(MAX_RING),
            size_text(nearest)
        );
    }
    Geometry::new(ring, segment, slots).map_err(|e| anyhow!("{e}; see --index-slots"))
}
