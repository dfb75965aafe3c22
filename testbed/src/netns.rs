//! Network namespaces and veth pairs: one namespace for the publisher, one per broker, each broker
//! joined to the publisher by a pair of its own, or by two with an emulation namespace between them.
//! Nothing outside these namespaces is touched.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use tracing::{info, warn};

use crate::command::run;
use crate::settings::Profile;

/// Name of every broker's end of its veth pair.
pub const BROKER_END: &str = "eth0";
/// Time limit for a link to come up.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);
/// Where `ip netns` keeps its handles.
const HANDLES: &str = "/run/netns";

/// Namespaces of one lab process or test; removed when dropped.
#[derive(Debug)]
pub struct Net {
    publisher: String,
    brokers: Vec<String>,
    emulation: Option<String>,
    created: Vec<String>,
}

/// How links that lead through the emulation namespace are set up. There, each link has an interface
/// towards the publisher and one towards the broker; packets pass only while something forwards them.
#[derive(Debug, Clone, Copy)]
pub struct LinkEmulation {
    /// Offloads of the pair on the publisher's side.
    pub publisher_side: Profile,
    /// Offloads of the pair on the broker's side.
    pub broker_side: Profile,
    /// Publisher and broker compute checksums before a packet leaves them, as hardware would.
    pub checksums: bool,
    /// A further pair in the emulation namespace, through which packets pass to the broker.
    pub detour: bool,
}

/// The four interfaces of a link that leads through the emulation namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The publisher's end.
    Publisher,
    /// The end of the emulation namespace towards the publisher.
    TowardsPublisher,
    /// The end of the emulation namespace towards the broker.
    TowardsBroker,
    /// The broker's end.
    Broker,
}

impl Place {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Publisher,
        Self::TowardsPublisher,
        Self::TowardsBroker,
        Self::Broker,
    ];
}

/// One end of a veth pair.
struct End<'a> {
    namespace: &'a str,
    device: &'a str,
    /// None in the emulation namespace.
    address: Option<Ipv4Addr>,
}

impl Net {
    /// Creates the namespaces and links for `brokers` brokers.
    ///
    /// Namespaces that a killed lab left behind are removed first.
    pub fn create(brokers: usize, profile: Profile, mtu: u32) -> Result<Self> {
        Self::of_this_lab(brokers)?.with_links(profile, mtu)
    }

    /// As [`Self::create`], with names that begin with `prefix` instead of the lab's; whoever chose it
    /// also removes what is left behind.
    pub fn create_as(prefix: &str, brokers: usize, profile: Profile, mtu: u32) -> Result<Self> {
        Self::named(prefix, brokers).with_links(profile, mtu)
    }

    fn with_links(self, profile: Profile, mtu: u32) -> Result<Self> {
        let mut net = self;
        let brokers = net.brokers.len();
        net.add_namespaces()?;
        for index in 0..brokers {
            net.join(index, profile, mtu)?;
        }
        net.wait_for_carriers()?;
        Ok(net)
    }

    /// As [`Self::create`], with an emulation namespace between the ends of all links.
    pub fn create_with_emulation(
        brokers: usize,
        mtu: u32,
        emulation: &LinkEmulation,
    ) -> Result<Self> {
        let mut net = Self::of_this_lab(brokers)?;
        let name = format!("penstock-{}-mid", std::process::id());
        net.add_namespaces()?;
        net.add_namespace(name.clone())?;
        for index in 0..brokers {
            net.join_through(&name, index, mtu, emulation)?;
        }
        net.emulation = Some(name);
        net.wait_for_carriers()?;
        Ok(net)
    }

    fn of_this_lab(brokers: usize) -> Result<Self> {
        sweep_stale()?;
        Ok(Self::named(
            &format!("penstock-{}", std::process::id()),
            brokers,
        ))
    }

    fn named(prefix: &str, brokers: usize) -> Self {
        Self {
            publisher: format!("{prefix}-pub"),
            brokers: (0..brokers).map(|i| format!("{prefix}-b{i}")).collect(),
            emulation: None,
            created: Vec::new(),
        }
    }

    fn add_namespaces(&mut self) -> Result<()> {
        self.add_namespace(self.publisher.clone())?;
        for broker in self.brokers.clone() {
            self.add_namespace(broker)?;
        }
        Ok(())
    }

    /// Namespace of the publisher.
    pub fn publisher(&self) -> &str {
        &self.publisher
    }

    /// Namespace of broker `index`.
    pub fn broker(&self, index: usize) -> &str {
        &self.brokers[index]
    }

    fn add_namespace(&mut self, name: String) -> Result<()> {
        run(&["ip", "netns", "add", &name])?;
        run(&["ip", "-n", &name, "link", "set", "lo", "up"])?;
        self.created.push(name);
        Ok(())
    }

    fn join(&self, index: usize, profile: Profile, mtu: u32) -> Result<()> {
        let device = publisher_device(index);
        let ends = [self.publisher_end(index, &device), self.broker_end(index)];
        pair(&ends, profile, mtu)
    }

    fn join_through(
        &self,
        name: &str,
        index: usize,
        mtu: u32,
        emulation: &LinkEmulation,
    ) -> Result<()> {
        let device = publisher_device(index);
        let publisher = self.publisher_end(index, &device);
        let broker = self.broker_end(index);
        for (outer, device, profile) in [
            (
                publisher,
                towards_publisher(index),
                emulation.publisher_side,
            ),
            (broker, towards_broker(index), emulation.broker_side),
        ] {
            let ends = [outer, inner_end(name, &device)];
            pair(&ends, profile, mtu)?;
            if emulation.checksums {
                let (namespace, device) = (ends[0].namespace, ends[0].device);
                #[rustfmt::skip]
                run(&["ip", "netns", "exec", namespace, "ethtool", "-K", device, "tx", "off"])?;
            }
        }
        if emulation.detour {
            let [start, end] = detour(index);
            let ends = [inner_end(name, &start), inner_end(name, &end)];
            pair(&ends, emulation.publisher_side, mtu)?;
        }
        Ok(())
    }

    fn publisher_end<'a>(&'a self, index: usize, device: &'a str) -> End<'a> {
        End {
            namespace: &self.publisher,
            device,
            address: Some(publisher_address(index)),
        }
    }

    fn broker_end(&self, index: usize) -> End<'_> {
        End {
            namespace: &self.brokers[index],
            device: BROKER_END,
            address: Some(broker_address(index)),
        }
    }

    /// Starts a thread in the emulation namespace.
    ///
    /// # Panics
    /// If there is none.
    pub fn in_emulation_namespace<T: Send + 'static>(
        &self,
        action: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        let name = self
            .emulation
            .clone()
            .expect("links have an emulation namespace");
        thread::spawn(move || {
            enter(&name)?;
            action()
        })
    }

    /// Changes the interface of a link at a place, with words of ip-link(8) such as `down` or `mtu 1280`.
    ///
    /// # Panics
    /// If there is no emulation namespace.
    pub fn change(&self, index: usize, place: Place, change: &[&str]) -> Result<()> {
        let emulation = self
            .emulation
            .as_ref()
            .expect("links have an emulation namespace");
        let (namespace, device) = match place {
            Place::Publisher => (&self.publisher, publisher_device(index)),
            Place::TowardsPublisher => (emulation, towards_publisher(index)),
            Place::TowardsBroker => (emulation, towards_broker(index)),
            Place::Broker => (&self.brokers[index], BROKER_END.to_owned()),
        };
        let command = ["ip", "-n", namespace, "link", "set", "dev", &device];
        run(&[&command, change].concat())?;
        Ok(())
    }

    /// All namespaces.
    pub fn namespaces(&self) -> &[String] {
        &self.created
    }

    /// Waits until all links work.
    pub fn wait_for_carriers(&self) -> Result<()> {
        for index in 0..self.brokers.len() {
            wait_for_carrier(&self.publisher, &publisher_device(index))?;
            wait_for_carrier(&self.brokers[index], BROKER_END)?;
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in &self.created {
            if let Err(error) = run(&["ip", "netns", "del", name]) {
                warn!("cannot remove namespace {name}: {error:#}");
            }
        }
    }
}

/// An end in the emulation namespace, without an address.
fn inner_end<'a>(namespace: &'a str, device: &'a str) -> End<'a> {
    End {
        namespace,
        device,
        address: None,
    }
}

/// Joins two ends.
fn pair(ends: &[End<'_>; 2], profile: Profile, mtu: u32) -> Result<()> {
    let [a, b] = ends;
    #[rustfmt::skip]
    run(&["ip", "link", "add", a.device, "netns", a.namespace,
          "type", "veth", "peer", "name", b.device, "netns", b.namespace])?;
    for end in ends {
        bring_up(end, profile, mtu)?;
    }
    Ok(())
}

fn bring_up(end: &End<'_>, profile: Profile, mtu: u32) -> Result<()> {
    let End {
        namespace, device, ..
    } = *end;
    if let Some(address) = end.address {
        let cidr = format!("{address}/24");
        run(&["ip", "-n", namespace, "addr", "add", &cidr, "dev", device])?;
    }
    if profile == Profile::Wire {
        #[rustfmt::skip]
        run(&["ip", "netns", "exec", namespace,
              "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off",
              "tx-udp-segmentation", "off"])?;
    }
    let mtu = mtu.to_string();
    run(&[
        "ip", "-n", namespace, "link", "set", "dev", device, "mtu", &mtu, "up",
    ])?;
    Ok(())
}

/// Moves the calling thread into a namespace.
pub fn enter(namespace: &str) -> Result<()> {
    let path = handle_path(namespace);
    let handle = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(handle, CloneFlags::CLONE_NEWNET)
        .with_context(|| format!("cannot enter the namespace {namespace}"))
}

/// Changes a setting of a namespace of this lab, such as `ipv4/tcp_wmem`; it goes with the namespace.
pub fn set_sysctl(namespace: &str, setting: &str, value: &str) -> Result<()> {
    let write = || {
        enter(namespace)?;
        let path = format!("/proc/sys/net/{setting}");
        fs::write(&path, value).with_context(|| format!("cannot set {path} in {namespace}"))
    };
    thread::scope(|scope| {
        let outcome = scope.spawn(write).join();
        outcome.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Where a namespace of this lab can be entered.
pub fn handle_path(namespace: &str) -> PathBuf {
    Path::new(HANDLES).join(namespace)
}

/// Waits until the link works: the kernel brings a queue into service up to a second after its
/// device, and drops what is sent before, which would cost the first SYN.
pub fn wait_for_carrier(namespace: &str, device: &str) -> Result<()> {
    let deadline = Instant::now() + CARRIER_TIMEOUT;
    while !run(&["ip", "-n", namespace, "-o", "link", "show", "dev", device])?.contains("state UP")
    {
        ensure!(
            Instant::now() < deadline,
            "{device} in {namespace} has no carrier after {CARRIER_TIMEOUT:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The publisher's end of the link to broker `index`.
pub fn publisher_device(index: usize) -> String {
    format!("b{index}")
}

/// In the emulation namespace, the interface of link `index` towards the publisher.
pub fn towards_publisher(index: usize) -> String {
    format!("p{index}")
}

/// In the emulation namespace, the interface of link `index` towards its broker.
pub fn towards_broker(index: usize) -> String {
    format!("b{index}")
}

/// In the emulation namespace, where packets of link `index` enter and leave the detour.
pub fn detour(index: usize) -> [String; 2] {
    [format!("d{index}"), format!("e{index}")]
}

/// Address of broker `index` on its link.
pub fn broker_address(index: usize) -> Ipv4Addr {
    link_address(index, 2)
}

fn publisher_address(index: usize) -> Ipv4Addr {
    link_address(index, 1)
}

fn link_address(index: usize, host: u8) -> Ipv4Addr {
    let link = u8::try_from(index).expect("the command line allows at most 200 brokers");
    Ipv4Addr::new(10, 214, link, host)
}

/// The lab process that made a namespace or buffer directory, from its name; `None` for others.
pub fn owner_of(name: &str) -> Option<u32> {
    let (pid, role) = name.strip_prefix("penstock-")?.split_once('-')?;
    let numbered = |role: &str| role.strip_prefix('b').is_some_and(is_number);
    let buffers = |role: &str| role == "shm" || role.starts_with("shm.");
    let is_role = ["pub", "mid"].contains(&role) || buffers(role) || numbered(role);
    (is_number(pid) && is_role)
        .then(|| pid.parse().ok())
        .flatten()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

/// Entries of `names` whose lab is not alive any more.
pub fn stale<'a>(
    names: impl IntoIterator<Item = &'a str>,
    alive: impl Fn(u32) -> bool,
) -> Vec<&'a str> {
    names
        .into_iter()
        .filter(|name| owner_of(name).is_some_and(|pid| !alive(pid)))
        .collect()
}

/// Whether `pid` is a running lab; the number alone may have passed to another program.
pub fn lab_is_alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "penstock-lab")
}

fn sweep_stale() -> Result<()> {
    if !Path::new(HANDLES).exists() {
        return Ok(());
    }
    let names = file_names(Path::new(HANDLES))?;
    for name in stale(names.iter().map(String::as_str), lab_is_alive) {
        info!("removing namespace {name}, left by a lab that was killed");
        run(&["ip", "netns", "del", name])?;
    }
    Ok(())
}

/// Names of the entries of a directory.
pub fn file_names(dir: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    Ok(entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_read_from_names_of_labs_only() {
        assert_eq!(owner_of("penstock-42-pub"), Some(42));
        assert_eq!(owner_of("penstock-42-mid"), Some(42));
        assert_eq!(owner_of("penstock-42-b0"), Some(42));
        assert_eq!(owner_of("penstock-42-b13"), Some(42));
        assert_eq!(owner_of("penstock-42-shm"), Some(42));
        assert_eq!(owner_of("penstock-42-shm.Xy3"), Some(42));
        #[rustfmt::skip]
        let foreign = ["penstock-pub", "penstock-b0", "penstock-42", "penstock-42-", "penstock-42-b",
            "penstock-42-bx", "penstock--pub", "penstock-+4-pub", "penstock-99999999999-pub", "x-42-pub"];
        for name in foreign {
            assert_eq!(owner_of(name), None, "{name}");
        }
    }

    #[test]
    fn only_names_of_dead_labs_are_stale() {
        let names = [
            "penstock-1-pub",
            "penstock-2-b0",
            "penstock-pub",
            "other",
            "penstock-2-pub",
        ];
        assert_eq!(
            stale(names, |pid| pid == 1),
            ["penstock-2-b0", "penstock-2-pub"]
        );
    }

    #[test]
    fn a_process_that_is_no_lab_does_not_count_as_one() {
        assert!(!lab_is_alive(1));
        assert!(!lab_is_alive(u32::MAX));
    }

    #[test]
    fn both_ends_of_a_link_share_a_subnet_and_links_do_not() {
        assert_eq!(
            publisher_address(3).octets()[..3],
            broker_address(3).octets()[..3]
        );
        assert_ne!(
            broker_address(3).octets()[..3],
            broker_address(4).octets()[..3]
        );
    }
}
