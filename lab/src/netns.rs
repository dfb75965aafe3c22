//! Network namespaces and veth pairs: one namespace for the publisher, one per broker, each broker
//! joined to the publisher by a pair of its own. Nothing outside these namespaces is touched.

use std::fs;
use std::net::Ipv4Addr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tracing::{info, warn};

use crate::cli::Profile;
use crate::command::run;

/// Name of every broker's end of its veth pair.
pub const BROKER_END: &str = "eth0";
/// Longest wait for a link to come up.
const CARRIER_LIMIT: Duration = Duration::from_secs(5);
/// Where `ip netns` keeps its handles.
pub const HANDLES: &str = "/run/netns";

/// Namespaces of one lab process; removed when dropped.
#[derive(Debug)]
pub struct Net {
    publisher: String,
    brokers: Vec<String>,
    created: Vec<String>,
}

impl Net {
    /// Creates the namespaces and links for `brokers` brokers.
    ///
    /// Namespaces that a killed lab left behind are removed first.
    pub fn create(brokers: usize, profile: Profile, mtu: u32) -> Result<Self> {
        sweep_stale()?;
        let pid = std::process::id();
        let mut net = Self {
            publisher: format!("penstock-{pid}-pub"),
            brokers: (0..brokers)
                .map(|i| format!("penstock-{pid}-b{i}"))
                .collect(),
            created: Vec::new(),
        };
        net.add_namespace(net.publisher.clone())?;
        for index in 0..brokers {
            net.add_namespace(net.brokers[index].clone())?;
            net.join(index, profile, mtu)?;
        }
        for broker in &net.brokers {
            wait_for_carrier(broker)?;
        }
        Ok(net)
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
        let publisher_end = format!("b{index}");
        let (publisher, broker) = (self.publisher.as_str(), self.brokers[index].as_str());
        #[rustfmt::skip]
        run(&["ip", "link", "add", &publisher_end, "netns", publisher,
              "type", "veth", "peer", "name", BROKER_END, "netns", broker])?;
        let ends = [
            (publisher, publisher_end.as_str(), publisher_address(index)),
            (broker, BROKER_END, broker_address(index)),
        ];
        for (namespace, device, address) in ends {
            bring_up(namespace, device, address, profile, mtu)?;
        }
        Ok(())
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for name in &self.created {
            if let Err(error) = run(&["ip", "netns", "del", name]) {
                warn!("namespace {name} is left behind: {error:#}");
            }
        }
    }
}

fn bring_up(
    namespace: &str,
    device: &str,
    address: Ipv4Addr,
    profile: Profile,
    mtu: u32,
) -> Result<()> {
    let cidr = format!("{address}/24");
    let mtu = mtu.to_string();
    run(&["ip", "-n", namespace, "addr", "add", &cidr, "dev", device])?;
    if profile == Profile::Wire {
        #[rustfmt::skip]
        run(&["ip", "netns", "exec", namespace,
              "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "off",
              "tx-udp-segmentation", "off"])?;
    }
    run(&[
        "ip", "-n", namespace, "link", "set", "dev", device, "mtu", &mtu, "up",
    ])?;
    Ok(())
}

/// Waits until the link works: the kernel brings a queue into service up to a second after its
/// device, and drops what is sent before, which would cost the first SYN.
fn wait_for_carrier(namespace: &str) -> Result<()> {
    let deadline = Instant::now() + CARRIER_LIMIT;
    while !run(&[
        "ip", "-n", namespace, "-o", "link", "show", "dev", BROKER_END,
    ])?
    .contains("state UP")
    {
        ensure!(
            Instant::now() < deadline,
            "{BROKER_END} in {namespace} has no carrier after {CARRIER_LIMIT:?}"
        );
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
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
    (is_number(pid) && (role == "pub" || role == "shm" || numbered(role)))
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
        info!("removing namespace {name}, left behind by a lab that was killed");
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
        assert_eq!(owner_of("penstock-42-b0"), Some(42));
        assert_eq!(owner_of("penstock-42-b13"), Some(42));
        assert_eq!(owner_of("penstock-42-shm"), Some(42));
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
