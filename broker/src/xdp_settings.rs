//! What the user asks of the xdp path.

use std::time::Duration;

use clap::ValueEnum;
use penstock_ebpf::Mode;
use penstock_ingest::xdp::Polling;

/// The path as the user asks for it.
#[derive(Debug, Clone)]
pub struct XdpSettings {
    pub interface: String,
    /// Receive queues; `None` means all.
    pub queues: Option<Vec<usize>>,
    pub workers: usize,
    pub mode: Mode,
    pub force: bool,
    pub copy: bool,
    pub ring: u32,
    pub polling: Polling,
    pub busy_poll: Option<u16>,
    pub verify_on_receive: bool,
    pub idle_timeout: Duration,
    /// Change the interface's settings where necessary.
    pub configure: bool,
}

/// How an interface runs the XDP program.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum XdpMode {
    /// The faster one for driver and MTU, with the reason in the log: native where the driver supports
    /// it, generic on veth if packets do not fit into one buffer.
    Auto,
    /// In the driver.
    Native,
    /// In the network stack.
    Generic,
}
