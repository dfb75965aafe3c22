//! What an interface is like.

use std::ffi::CStr;
use std::fs;
use std::io;

use penstock_ebpf::Features;

use crate::Error;
use crate::change::Attribute;
use crate::ethtool::{Ethtool, Rule, UDP_V4_FLOW, UDP_V6_FLOW};

/// State of an interface's link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Link {
    /// Packets can come.
    Up,
    /// Switched on, but nothing is at the other end.
    NoCarrier,
    /// Switched off (`ip link set dev ... down`).
    Down,
    /// The interface has been deleted, or moved to another namespace.
    Gone,
}

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

/// All that matters here about an interface. What the driver does not tell is `None`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Its name.
    pub interface: String,
    /// Its number in this network namespace.
    pub index: u32,
    /// Its hardware address.
    pub address: String,
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
    /// Asks the kernel about an interface of this network namespace.
    ///
    /// # Errors
    /// [`Error::NoInterface`], [`Error::OtherNamespace`], [`Error::Read`].
    pub fn read(interface: &str) -> Result<Self, Error> {
        let index = penstock_ebpf::index_of(interface)
            .map_err(|_| Error::NoInterface(interface.to_owned()))? as u32;
        let read = |what| {
            move |source| Error::Read {
                what,
                interface: interface.to_owned(),
                source,
            }
        };
        if number(interface, "ifindex") != Some(u64::from(index)) {
            return Err(Error::OtherNamespace(interface.to_owned()));
        }
        let mtu = number(interface, "mtu").ok_or_else(|| io::Error::other("no number"));
        let driver = Ethtool::of(interface).map_err(read("driver"))?;
        let features = driver.features().unwrap_or_default();
        let feature = |name| {
            let found = features.iter().find(|(known, ..)| known == name);
            found.map(|&(_, on, changeable)| Feature { on, changeable })
        };
        let attribute = |attribute: Attribute| {
            let text = fs::read_to_string(attribute.path(interface)).ok()?;
            text.trim().parse().ok()
        };
        Ok(Self {
            interface: interface.to_owned(),
            index,
            address: fs::read_to_string(format!("/sys/class/net/{interface}/address"))
                .map(|text| text.trim().to_owned())
                .map_err(read("address"))?,
            driver: driver.name().ok(),
            mtu: mtu.map_err(read("MTU"))? as u32,
            link: link(index).map_err(read("flags"))?,
            queues: queues(interface).map_err(read("queues"))?,
            channels: driver.channels().ok().map(channels),
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
/// If the kernel does not tell.
pub fn link(index: u32) -> io::Result<Link> {
    let mut name = [0u8; libc::IF_NAMESIZE];
    // SAFETY: the buffer has IF_NAMESIZE bytes, as the call requires.
    if unsafe { libc::if_indextoname(index, name.as_mut_ptr().cast()) }.is_null() {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENXIO | libc::ENODEV) => Ok(Link::Gone),
            // It asks through a socket of its own, for which there may be no descriptor.
            _ => Err(error),
        };
    }
    let name = CStr::from_bytes_until_nul(&name).expect("the kernel ends names with a zero");
    let flags = match Ethtool::of(&name.to_string_lossy()).and_then(|driver| driver.flags()) {
        // It went just now.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(Link::Gone),
        flags => flags?,
    };
    Ok(match (flags & libc::IFF_UP, flags & libc::IFF_RUNNING) {
        (0, _) => Link::Down,
        (_, 0) => Link::NoCarrier,
        _ => Link::Up,
    })
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

fn queues(interface: &str) -> io::Result<u32> {
    let entries = fs::read_dir(format!("/sys/class/net/{interface}/queues"))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    Ok(names.filter(|name| name.starts_with("rx-")).count() as u32)
}

fn number(interface: &str, file: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/sys/class/net/{interface}/{file}")).ok()?;
    text.trim().parse().ok()
}
