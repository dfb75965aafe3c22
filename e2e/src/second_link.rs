//! A second link between the namespaces of a bed, with several queues: `eth1` at the broker's end, `m0` at
//! the publisher's.

use anyhow::Result;
use penstock_testbed::command::run;
use penstock_testbed::netns::wait_for_carrier;

use crate::bed::Bed;

/// Where a broker listens on the second link.
pub const SECOND_BROKER: &str = "10.215.0.2:1214";

/// How the link is set up.
#[derive(Debug, Clone, Copy)]
pub struct SecondLink {
    /// Queues of the broker's end.
    pub broker_queues: u32,
    /// Queues of the publisher's end. The driver demands a receive queue of the broker's end for each.
    pub publisher_queues: u32,
    /// MTU of both ends.
    pub mtu: u32,
}

impl Default for SecondLink {
    fn default() -> Self {
        Self {
            broker_queues: 4,
            publisher_queues: 1,
            mtu: 1500,
        }
    }
}

impl Bed {
    /// Adds the second link as it is by default.
    pub fn add_second_link(&self) -> Result<()> {
        self.add_link(SecondLink::default())
    }

    /// Adds a second link.
    pub fn add_link(&self, link: SecondLink) -> Result<()> {
        let broker_queues = link.broker_queues.to_string();
        let publisher_queues = link.publisher_queues.to_string();
        let mtu = link.mtu.to_string();
        let (broker, publisher) = (self.broker_ns(), self.publisher_ns());
        #[rustfmt::skip]
        run(&["ip", "link", "add", "eth1", "netns", broker,
              "numrxqueues", &broker_queues, "numtxqueues", &broker_queues,
              "type", "veth", "peer", "name", "m0", "netns", publisher,
              "numrxqueues", &publisher_queues, "numtxqueues", &publisher_queues])?;
        self.broker_ip(&["addr", "add", "10.215.0.2/24", "dev", "eth1"])?;
        self.publisher_ip(&["addr", "add", "10.215.0.1/24", "dev", "m0"])?;
        #[rustfmt::skip]
        run(&["ip", "netns", "exec", publisher, "ethtool", "-K", "m0",
              "tso", "off", "gso", "off", "gro", "off", "tx-udp-segmentation", "off"])?;
        self.broker_ip(&["link", "set", "eth1", "mtu", &mtu, "up"])?;
        self.publisher_ip(&["link", "set", "m0", "mtu", &mtu, "up"])?;
        wait_for_carrier(broker, "eth1")
    }

    /// Removes the second link.
    pub fn remove_second_link(&self) -> Result<()> {
        self.broker_ip(&["link", "del", "eth1"])?;
        Ok(())
    }
}
