//! What each fault of the catalogue does to the links and processes of a run.

use std::fs;
use std::time::Duration;

use anyhow::Result;
use penstock_ebpf::Faults;

use super::super::fault_catalog::Fault;
use super::super::schedule;
use super::{Probe, PublisherRun, Trial};
use crate::measure::resource_usage::ResourceUsage;
use penstock_testbed::netns::Place;
use penstock_testbed::processes::ProcessFault;

/// Bytes sent by a publisher that only creates a topic.
const PROBE_BYTES: usize = 20_000;
/// Address space above the current use that a limited process may still allocate, for its threads to run.
const SPARE_MEMORY: u64 = 1 << 20;
/// Phrase in the error of a broker that was started on an interface that is down.
const LINK_IS_DOWN: &str = "is down; ip link set";

impl Trial<'_> {
    /// Begins a fault that lasts for `lasts`.
    pub fn begin(&mut self, fault: Fault, lasts: Duration) -> Result<()> {
        match fault {
            Fault::Loss => self.draw_share(0.15, |faults, share| faults.loss = share),
            Fault::Reorder => self.draw_share(0.3, |faults, share| faults.reorder = share),
            Fault::Duplicate => self.draw_share(0.3, |faults, share| faults.duplicate = share),
            Fault::Corrupt => self.draw_share(0.05, |faults, share| faults.corrupt = share),
            Fault::Truncate => self.draw_share(0.05, |faults, share| faults.truncate = share),
            Fault::Delay => {
                let least = self.rng.u32(1..=20);
                let jitter = self.rng.u32(0..=least);
                self.links.delay(&format!("{least}ms+{jitter}ms"))
            }
            Fault::LinkDown => self.change_link("links_down", &["down"]),
            Fault::Mtu => {
                let mtu = ["1280", "1400", "9000"][self.rng.usize(..3)];
                self.change_link("mtu_changes", &["mtu", mtu])
            }
            Fault::BrokerKilled => self.kill_broker(),
            Fault::BrokerStopped => self.signal_broker("brokers_stopped", libc::SIGSTOP),
            Fault::PublisherKilled => self.kill_publisher(),
            Fault::PublisherStopped => self.stop_publisher(lasts),
            Fault::DirectoryFull => {
                self.broker.fill_directory()?;
                self.count("directories_full");
                self.probe(Probe::MayBeRefused("no room for"))
            }
            Fault::ReaderSlow => {
                self.stop_reader(true, lasts);
                self.stop_reader(false, lasts);
                Ok(())
            }
            Fault::ReaderKilled => {
                self.stop_reader(true, lasts * 2);
                Ok(())
            }
            Fault::Clock => {
                self.count("clock_jumps");
                self.kill_broker()
            }
            Fault::Descriptors => {
                if self.rng.bool() {
                    self.limit_broker(libc::RLIMIT_NOFILE)?;
                    self.probe(Probe::MayBeRefused("Too many open files"))
                } else {
                    self.limit_publishers(libc::RLIMIT_NOFILE)?;
                    self.kill_broker()?;
                    self.ensure_broker(0)
                }
            }
            Fault::Memory => {
                if self.rng.bool() {
                    self.limit_broker(libc::RLIMIT_AS)?;
                    self.probe(Probe::MayBeRefused("annot allocate memory"))
                } else {
                    self.limit_publishers(libc::RLIMIT_AS)
                }
            }
        }
    }

    /// Ends a fault.
    pub fn end(&mut self, fault: Fault) -> Result<()> {
        match fault {
            Fault::Loss => self.links.set_faults(|faults| faults.loss = 0.0),
            Fault::Reorder => self.links.set_faults(|faults| faults.reorder = 0.0),
            Fault::Duplicate => self.links.set_faults(|faults| faults.duplicate = 0.0),
            Fault::Corrupt => self.links.set_faults(|faults| faults.corrupt = 0.0),
            Fault::Truncate => self.links.set_faults(|faults| faults.truncate = 0.0),
            Fault::Delay => self.links.remove_delay(),
            Fault::LinkDown => self.links.change_all(&["up"]),
            Fault::Mtu => self.links.change_all(&["mtu", "1500"]),
            Fault::BrokerKilled => self.ensure_broker(0),
            Fault::BrokerStopped => self.signal_broker("brokers_resumed", libc::SIGCONT),
            Fault::DirectoryFull => {
                self.broker.empty_directory()?;
                self.probe(Probe::Accepted)
            }
            Fault::ReaderKilled => self.kill_reader(),
            Fault::Clock => {
                let ahead = self.rng.i64(-self.uptime..=10 * 86_400);
                self.ensure_broker(ahead)
            }
            Fault::Descriptors => self.lift_limits(libc::RLIMIT_NOFILE),
            Fault::Memory => self.lift_limits(libc::RLIMIT_AS),
            Fault::PublisherKilled | Fault::PublisherStopped | Fault::ReaderSlow => Ok(()),
        }
    }

    fn draw_share(&mut self, most: f64, set: fn(&mut Faults, f64)) -> Result<()> {
        let share = 0.02 + self.rng.f64() * (most - 0.02);
        self.links.set_faults(|faults| set(faults, share))
    }

    fn change_link(&mut self, counted: &'static str, change: &[&str]) -> Result<()> {
        let place = Place::ALL[self.rng.usize(..Place::ALL.len())];
        self.count(counted);
        self.links.change(place, change)
    }

    pub fn count(&mut self, what: &str) {
        self.add(what, 1);
    }

    pub fn kill_broker(&mut self) -> Result<()> {
        if self.broker.kill() {
            self.count("brokers_killed");
        }
        Ok(())
    }

    /// Starts a broker on the log if none is running, with its monotonic clock `ahead` seconds ahead. While
    /// another fault keeps it from starting, the run retries.
    pub fn ensure_broker(&mut self, ahead: i64) -> Result<()> {
        self.broker_due = None;
        match self.broker.ensure(ahead, self.interrupt) {
            Err(error) if error.to_string().contains(LINK_IS_DOWN) => {
                self.count("brokers_refused_to_start");
                self.broker_due = Some(ahead);
                Ok(())
            }
            other => other,
        }
    }

    pub fn signal_broker(&mut self, counted: &str, signal: i32) -> Result<()> {
        if let Some(process) = self.broker.process() {
            process.signal(signal);
            self.count(counted);
        }
        Ok(())
    }

    pub fn kill_publisher(&mut self) -> Result<()> {
        if let Some(publisher) = self.any_publisher() {
            publisher
                .publishing
                .inject(ProcessFault::Killed(Duration::ZERO));
        }
        Ok(())
    }

    pub fn stop_publisher(&mut self, lasts: Duration) -> Result<()> {
        if let Some(publisher) = self.any_publisher() {
            publisher
                .publishing
                .inject(ProcessFault::Stopped(Duration::ZERO, lasts));
            self.count("publishers_stopped");
        }
        Ok(())
    }

    pub fn stop_reader(&mut self, registered: bool, lasts: Duration) {
        if let Some(reader) = &mut self.readers[usize::from(!registered)] {
            reader.inject(ProcessFault::Stopped(Duration::ZERO, lasts));
            self.count("readers_stopped");
        }
    }

    /// Kills the registered reader and starts another one.
    pub fn kill_reader(&mut self) -> Result<()> {
        if let Some(mut reader) = self.readers[0].take() {
            reader.inject(ProcessFault::Killed(Duration::ZERO));
            self.finish_reader(reader)?;
        }
        self.start_reader(true)
    }

    /// Starts a publisher that creates a topic. If the broker may refuse it, it may also refuse earlier ones
    /// that still wait for a broker.
    pub fn probe(&mut self, probe: Probe) -> Result<()> {
        if probe != Probe::Accepted {
            let waiting = self.publishers.iter_mut().filter_map(|p| p.probe.as_mut());
            waiting.for_each(|earlier| *earlier = probe);
        }
        let topic = format!("probe-{}", self.publisher_count);
        let plan = schedule::Publisher {
            streams: 1,
            rate: 1 << 20,
            batch: 4096,
            bytes: PROBE_BYTES as u64,
        };
        self.start_publisher(&topic, plan, Some(probe))
    }

    pub fn limit_broker(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        if let Some(process) = self.broker.process() {
            let has = held(process.id(), resource)?;
            process.limit(resource, Some(has))?;
            self.broker_may_die |= resource == libc::RLIMIT_AS;
            self.count("limits_set");
        }
        Ok(())
    }

    pub fn limit_publishers(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        for at in 0..self.publishers.len() {
            let publisher = &mut self.publishers[at];
            let process = publisher.publishing.process();
            // It may have exited, or not have called execve yet.
            if process.ended()?.is_some() || !is_publisher(process.id()) {
                continue;
            }
            process.limit(resource, Some(held(process.id(), resource)?))?;
            publisher.may_die |= resource == libc::RLIMIT_AS;
            self.count("limits_set");
        }
        Ok(())
    }

    pub fn lift_limits(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        let publishers = self
            .publishers
            .iter_mut()
            .map(|publisher| publisher.publishing.process());
        for process in publishers.chain(self.broker.process()) {
            if process.ended()?.is_none() {
                process.limit(resource, None)?;
            }
        }
        self.ensure_broker(0)
    }

    /// A random publisher of the run's topic.
    fn any_publisher(&mut self) -> Option<&mut PublisherRun> {
        let mut publishers: Vec<_> = self
            .publishers
            .iter_mut()
            .filter(|publisher| publisher.probe.is_none())
            .collect();
        let count = publishers.len();
        (count > 0).then(|| publishers.swap_remove(self.rng.usize(..count)))
    }
}

/// A process's current use of a resource, as the limit that leaves it no more.
fn held(pid: u32, resource: libc::__rlimit_resource_t) -> Result<u64> {
    let sample = ResourceUsage::at(pid)?;
    Ok(match resource {
        libc::RLIMIT_AS => sample.address_space_bytes + SPARE_MEMORY,
        _ => sample.descriptors,
    })
}

/// Whether a process has already become the publisher through execve.
fn is_publisher(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    name.is_ok_and(|name| name.starts_with("penstock-pub"))
}
