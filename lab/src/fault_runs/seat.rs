//! The broker's place in a fault run: there may be none for a while, and the next one takes up the log.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;

use super::kinds::Room;
use crate::actors::Stage;
use crate::cli::{self, FaultPath, Mode, Route, Workload};
use crate::cluster::{Brokers, Cluster};
use crate::interrupt::Interrupt;
use crate::netns::Net;
use crate::process::Running;
use crate::testbed::{Binaries, BufferDir};

/// Batches that a log's index holds: more than any run sends.
const INDEX_SLOTS: u64 = 32_768;
/// Of a directory that holds little more than the logs: so many logs.
const LOGS: u64 = 5;
/// What takes up the rest of the directory.
const FILLER: &str = "filler";

/// Where the broker is, or was.
#[derive(Debug)]
pub struct Seat<'a> {
    net: &'a Net,
    binaries: &'a Binaries,
    buffers: &'a BufferDir,
    folder: &'a Path,
    route: Route,
    workload: Workload,
    cluster: Option<Cluster>,
    /// Brokers that there have been.
    lives: u32,
}

impl<'a> Seat<'a> {
    /// Starts the first broker, in an empty directory.
    pub fn take(
        stage: Stage<'a>,
        buffers: &'a BufferDir,
        path: FaultPath,
        room: Room,
        interrupt: &Interrupt,
    ) -> Result<Self> {
        let mode = if path == FaultPath::Tcp {
            Mode::Tcp
        } else {
            Mode::Xdp
        };
        let (route, mut workload) = cli::of_brokers(mode, stage.topic, ByteSize(room.ring()));
        let segment = (16 << 20).min(room.ring() / 8);
        workload.broker_option = vec![
            format!("--segment-size={segment}"),
            format!("--index-slots={INDEX_SLOTS}"),
        ];
        buffers.clear()?;
        if room == Room::Bounded {
            buffers.bound(0, LOGS * (room.ring() + INDEX_SLOTS * 128 + (64 << 10)))?;
        }
        let mut seat = Self {
            net: stage.net,
            binaries: stage.binaries,
            buffers,
            folder: stage.folder,
            route,
            workload,
            cluster: None,
            lives: 0,
        };
        seat.ensure(0, interrupt)?;
        Ok(seat)
    }

    /// Starts a broker if there is none, whose monotonic clock is so many seconds ahead.
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
        self.cluster = Some(brokers.start_by(starter, interrupt)?);
        Ok(())
    }

    /// SIGKILL; whether there was a broker.
    pub fn kill(&mut self) -> bool {
        self.cluster.take().is_some()
    }

    /// Its process, if there is one.
    pub fn process(&mut self) -> Option<&mut Running> {
        self.cluster.as_mut()?.processes().next()
    }

    /// Forgets a broker that has ended by itself; returns what it said at last.
    pub fn bury(&mut self) -> Result<Option<String>> {
        let Some(cluster) = &mut self.cluster else {
            return Ok(None);
        };
        let Err(error) = cluster.check() else {
            return Ok(None);
        };
        self.cluster = None;
        Ok(Some(error.to_string()))
    }

    /// Ends the broker as an operator would.
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

    /// Leaves no byte of the directory free.
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
            // SAFETY: the descriptor is open; posix_fallocate touches no memory of ours.
            match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, bytes as i64) } {
                0 => return Ok(()),
                // A log that is being made has taken some of it.
                libc::ENOSPC => {}
                code => return Err(std::io::Error::from_raw_os_error(code)).with_context(what),
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
