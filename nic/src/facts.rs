//! What an interface is like.

use std::ffi::CStr;
use std::io;

use penstock_ebpf::Features;

use crate::Error;
use crate::change::Attribute;
use crate::ethtool::{Ethtool, Rule, UDP_V4_FLOW, UDP_V6_FLOW};
use crate::netlink::{Interface, Link, Netlink};
use crate::sysfs::Sysfs;

/// Numbers of channels; receive queues are those for receiving alone and the combined ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Channels {
    /// For receiving alone.
    pub rx: u32,
    /// Most of these.
    pub max_rx: u32,
    /// For both directions.
    pub combined: u32,
    /// Most of these.
    pub max_combined: u32,
}

/// Size of a receive queue's ring, in packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ring {
    /// At present.
    pub rx: u32,
    /// At most.
    pub max_rx: u32,
}

/// Something that a driver can do by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Feature {
    /// It does so now.
    pub on: bool,
    /// It can be switched.
    pub changeable: bool,
}

/// The master of another interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Master {
    /// Its name.
    pub name: String,
    /// Its kind, such as `bridge`, if it is virtual; `None` for hardware.
    pub kind: Option<String>,
}

/// All that matters here about an interface. What the driver does not report is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name, not an alternative one.
    pub interface: String,
    /// Its number in this network namespace.
    pub index: u32,
    /// Its hardware address.
    pub address: String,
    /// Its kind, such as `bond`, if it is virtual; `None` for hardware.
    pub kind: Option<String>,
    /// Its hardware type (`ARPHRD_`, linux/if_arp.h).
    pub link_type: u16,
    /// Its master, if it is a port of one.
    pub master: Option<Master>,
    /// Whether other interfaces are ports of it.
    pub has_ports: bool,
    /// Its driver.
    pub driver: Option<String>,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// State of its link.
    pub link: Link,
    /// Receive queues.
    pub queues: u32,
    /// How many there may be.
    pub channels: Option<Channels>,
    /// Their rings.
    pub ring: Option<Ring>,
    /// Receive queue by hash value.
    pub indirection: Option<Vec<u32>>,
    /// What the hash of UDP over IPv4, and over IPv6, is made of (`RXH_` bits).
    pub udp_hash: [Option<u64>; 2],
    /// Rules that steer UDP flows to queues, where the driver has any.
    pub rules: Option<Vec<Rule>>,
    /// Whether they are switched on.
    pub ntuple: Option<Feature>,
    /// Joining packets of a flow, the old way.
    pub lro: Option<Feature>,
    /// Joining packets of a flow, the new way.
    pub gro_hw: Option<Feature>,
    /// Taking VLAN tags out of packets.
    pub vlan_strip: Option<Feature>,
    /// [`Attribute::NapiDeferHardIrqs`].
    pub defer_hard_irqs: Option<u64>,
    /// [`Attribute::GroFlushTimeout`], nanoseconds.
    pub gro_flush_timeout: Option<u64>,
    /// What the driver does of XDP (Linux 6.3).
    pub xdp: Option<Features>,
}

impl Facts {
    /// Queries the kernel about an interface of this network namespace, by any of its names.
    ///
    /// # Errors
    /// [`Error::NoInterface`], [`Error::Read`].
    pub fn read(name: &str) -> Result<Self, Error> {
        let mut netlink = Netlink::open().map_err(read(name, "its description"))?;
        let found = netlink
            .find(name)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENODEV | libc::ERANGE | libc::EINVAL) => {
                    Error::NoInterface(name.to_owned())
                }
                _ => read(name, "its description")(error),
            })?;
        Self::of(&mut netlink, found)
    }

    /// Queries the kernel about an interface of this network namespace by its index, because names can
    /// be reassigned.
    ///
    /// # Errors
    /// [`Error::NoInterface`], [`Error::Read`].
    pub fn by_index(index: u32) -> Result<Self, Error> {
        let name = || format!("interface {index}");
        let mut netlink = Netlink::open().map_err(read(&name(), "its description"))?;
        let found = netlink
            .by_index(index)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENODEV) => Error::NoInterface(name()),
                _ => read(&name(), "its description")(error),
            })?;
        Self::of(&mut netlink, found)
    }

    fn of(netlink: &mut Netlink, found: Interface) -> Result<Self, Error> {
        let interface = found.name.as_str();
        let all = netlink
            .interfaces()
            .map_err(read(interface, "its relations"))?;
        let master = all.iter().find(|other| Some(other.index) == found.master);
        let sysfs = Sysfs::open().ok();
        let driver = Ethtool::of(interface).map_err(read(interface, "driver"))?;
        let features = driver.features().unwrap_or_default();
        let feature = |name| {
            let found = features.iter().find(|(known, ..)| known == name);
            found.map(|&(_, on, changeable)| Feature { on, changeable })
        };
        let attribute =
            |attribute: Attribute| sysfs.as_ref()?.number(interface, attribute.file_name());
        let channels = driver.channels().ok().map(channels);
        // The kernel reports room for more queues than exist.
        let queues = sysfs
            .as_ref()
            .and_then(|sysfs| sysfs.rx_queues(interface).ok())
            .or(channels.map(|channels| channels.rx + channels.combined))
            .filter(|queues| *queues > 0)
            .unwrap_or(found.rx_queues);
        Ok(Self {
            index: found.index,
            address: found.address.clone(),
            kind: found.kind.clone(),
            link_type: found.link_type,
            master: master.map(|master| Master {
                name: master.name.clone(),
                kind: master.kind.clone(),
            }),
            has_ports: all.iter().any(|other| other.master == Some(found.index)),
            driver: driver.name().ok(),
            mtu: found.mtu,
            link: found.link,
            queues,
            channels,
            ring: driver.rings().ok().map(|rings| Ring {
                rx: rings[4],
                max_rx: rings[0],
            }),
            indirection: driver.indirection().ok().filter(|table| !table.is_empty()),
            udp_hash: [UDP_V4_FLOW, UDP_V6_FLOW].map(|flow| driver.flow_hash(flow).ok()),
            rules: driver.rules().ok(),
            ntuple: feature("rx-ntuple-filter"),
            lro: feature("rx-lro"),
            gro_hw: feature("rx-gro-hw"),
            vlan_strip: feature("rx-vlan-hw-parse"),
            defer_hard_irqs: attribute(Attribute::NapiDeferHardIrqs),
            gro_flush_timeout: attribute(Attribute::GroFlushTimeout),
            xdp: penstock_ebpf::features(interface).ok().flatten(),
            interface: found.name,
        })
    }

    /// Receive queues that there can be.
    #[must_use]
    pub fn max_queues(&self) -> u32 {
        let most = self.channels.map_or(0, |c| match c.max_combined {
            0 => c.max_rx,
            combined => combined + c.rx,
        });
        most.max(self.queues)
    }

    /// The driver's name, for people.
    #[must_use]
    pub fn driver_name(&self) -> &str {
        self.driver.as_deref().unwrap_or("unknown")
    }
}

/// State of the link of an interface, by its number: names can be given anew.
///
/// # Errors
/// If the kernel does not report it.
pub fn link(index: u32) -> io::Result<Link> {
    let Some(name) = name_of(index)? else {
        return Ok(Link::Gone);
    };
    let flags = match Ethtool::of(&name).and_then(|driver| driver.flags()) {
        // It has just disappeared.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(Link::Gone),
        flags => flags?,
    };
    Ok(match (flags & libc::IFF_UP, flags & libc::IFF_RUNNING) {
        (0, _) => Link::Down,
        (_, 0) => Link::NoCarrier,
        _ => Link::Up,
    })
}

/// The present name of an interface; `None` if it is gone.
///
/// # Errors
/// If the kernel does not answer.
pub fn name_of(index: u32) -> io::Result<Option<String>> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // nix 0.31 takes the null pointer of a failure for success, and returns an empty name.
    // SAFETY: the buffer has IF_NAMESIZE bytes, as the call requires.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENXIO | libc::ENODEV) => Ok(None),
            // It asks through a socket of its own, for which there may be no descriptor.
            _ => Err(error),
        };
    }
    let name = CStr::from_bytes_until_nul(&name).expect("the kernel ends names with a zero");
    Ok(Some(name.to_string_lossy().into_owned()))
}

/// The present number of receive queues, if the driver reports it.
#[must_use]
pub fn rx_queues(index: u32) -> Option<u32> {
    let name = name_of(index).ok()??;
    let channels = channels(Ethtool::of(&name).ok()?.channels().ok()?);
    Some(channels.rx + channels.combined)
}

fn read(interface: &str, what: &'static str) -> impl FnOnce(io::Error) -> Error {
    let interface = interface.to_owned();
    move |source| Error::Read {
        what,
        interface,
        source,
    }
}

fn channels(counts: [u32; 8]) -> Channels {
    let [max_rx, _, _, max_combined, rx, _, _, combined] = counts;
    Channels {
        rx,
        max_rx,
        combined,
        max_combined,
    }
}
