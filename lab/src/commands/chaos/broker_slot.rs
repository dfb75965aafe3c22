//! The broker of a fault run: it may be absent for a while, and its successor recovers the log.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use nix::errno::Errno;
use nix::fcntl::posix_fallocate;

use super::fault_catalog::LogCapacity;
use super::path::FaultPath;
use penstock_process::interrupt::Interrupt;
use penstock_testbed::buffers::BufferDir;
use penstock_testbed::cluster::{Brokers, Cluster};
use penstock_testbed::netns::Net;
use penstock_testbed::processes::RunContext;
use penstock_testbed::programs::Binaries;
use penstock_testbed::running::Running;
use penstock_testbed::settings::{self, Mode, Route, Workload};

/// Capacity of a log's index, batches: more than any run sends.
const INDEX_SLOTS: u64 = 32_768;
/// Number of logs that fit in the directory under [`LogCapacity::Bounded`].
const LOGS: u64 = 5;
/// File that takes up the rest of the directory.
const FILLER: &str = "filler";

/// One broker at a time, on the same directory and address.
#[derive(Debug)]
pub struct BrokerSlot<'a> {
    net: &'a Net,
    binaries: &'a Binaries,
    buffers: &'a BufferDir,
    folder: &'a Path,
    route: Route,
    workload: Workload,
    cluster: Option<Cluster>,
    /// Number of brokers started so far.
    lives: u32,
}

impl<'a> BrokerSlot<'a> {
    /// Starts the first broker, in an empty directory.
    pub fn take(
        context: RunContext<'a>,
        buffers: &'a BufferDir,
        path: FaultPath,
        capacity: LogCapacity,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let mode = if path == FaultPath::Tcp {
            Mode::Tcp
        } else {
            Mode::Xdp
        };
        let (route, mut workload) =
            settings::for_faulty_links(mode, context.topic, ByteSize(capacity.ring()));
        let segment = (16 << 20).min(capacity.ring() / 8);
        workload.broker_option = vec![
            format!("--segment-size={segment}"),
            format!("--index-slots={INDEX_SLOTS}"),
        ];
        buffers.clear()?;
        if capacity == LogCapacity::Bounded {
            buffers.mount_limited(0, LOGS * (capacity.ring() + INDEX_SLOTS * 128 + (64 << 10)))?;
        }
        let mut broker_slot = Self {
            net: context.net,
            binaries: context.binaries,
            buffers,
            folder: context.folder,
            route,
            workload,
            cluster: None,
            lives: 0,
        };
        broker_slot.ensure(0, interrupt)?;
        Ok(broker_slot)
    }

    /// Starts a broker if none is running. Its monotonic clock is `ahead` seconds ahead.
    pub fn ensure(&mut self, ahead: i64, interrupt: &Interrupt) -> Result<()> {
        if self.cluster.is_some() {
            return Ok(());
        }
        let folder = self.folder.join(format!("broker-{}", self.lives));
        fs::create_dir(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
        self.lives += 1;
        let brokers = Brokers {
            count: 1,
            net: self.net,
            buffers: self.buffers,
            binaries: self.binaries,
            route: &self.route,
            workload: &self.workload,
            cpus: None,
            folder: &folder,
        };
        let clock = [
            "unshare".to_owned(),
            "--time".to_owned(),
            format!("--monotonic={ahead}"),
            format!("--boottime={ahead}"),
        ];
        let starter: &[String] = if ahead == 0 { &[] } else { &clock };
        self.cluster = Some(brokers.start_through(starter, interrupt)?);
        Ok(())
    }

    /// Sends SIGKILL; false if no broker was running.
    pub fn kill(&mut self) -> bool {
        self.cluster.take().is_some()
    }

    /// The broker's process, if one is running.
    pub fn process(&mut self) -> Option<&mut Running> {
        self.cluster.as_mut()?.processes().next()
    }

    /// Clears the slot if the broker exited by itself, and returns its last message.
    pub fn reap(&mut self) -> Result<Option<String>> {
        let Some(cluster) = &mut self.cluster else {
            return Ok(None);
        };
        let Err(error) = cluster.check() else {
            return Ok(None);
        };
        self.cluster = None;
        Ok(Some(error.to_string()))
    }

    /// Stops the broker with SIGTERM, as an operator would.
    pub fn stop(&mut self) -> Result<()> {
        match self.cluster.take() {
            Some(cluster) => cluster.stop().map(|_| ()),
            None => bail!("no broker is running"),
        }
    }

    /// The log of a topic.
    pub fn log(&self, topic: &str) -> PathBuf {
        self.buffers.of_broker(0).join(format!("{topic}.log"))
    }

    /// Fills the directory to the last byte.
    pub fn fill_directory(&self) -> Result<()> {
        let path = self.buffers.of_broker(0).join(FILLER);
        let what = || format!("cannot fill {}", path.display());
        let file = File::create(&path).with_context(what)?;
        loop {
            let free = nix::sys::statvfs::fstatvfs(&file).with_context(what)?;
            let bytes = free.blocks_available() * free.fragment_size();
            if bytes == 0 {
                return Ok(());
            }
            match posix_fallocate(&file, 0, bytes as i64) {
                Ok(()) => return Ok(()),
                // A log that is being created has taken some of it.
                Err(Errno::ENOSPC) => {}
                Err(error) => return Err(error).with_context(what),
            }
        }
    }

    pub fn empty_directory(&self) -> Result<()> {
        let path = self.buffers.of_broker(0).join(FILLER);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", path.display()))
            }
            _ => Ok(()),
        }
    }
}
