//! What was observed over an interval: plain figures, from which rules draw conclusions.

#![allow(missing_docs, reason = "fields are the keys of the JSON")]

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::Serialize;

use super::broker_stats::Broker;
use super::cpu::{Core, Process};
use super::interfaces::Interface;
use super::other_processes::Others;
use super::settings::{Pressure, Settings};
use super::syscalls::Syscall;

/// Everything that one diagnosis saw.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Sample {
    /// Length of the interval.
    pub seconds: f64,
    /// Samples taken.
    pub looks: u32,
    pub pid: Option<u32>,
    pub name: String,
    /// Ports that it listens on.
    pub ports: Vec<u16>,
    pub connections: Vec<Connection>,
    /// The observed process first, then those at the other ends of its connections.
    pub processes: Vec<Process>,
    pub cores: Vec<Core>,
    /// What the rest of the host did.
    pub others: Others,
    /// Sockets on which the process accepts connections.
    pub listeners: Vec<Listener>,
    pub syscalls: Option<Vec<Syscall>>,
    /// The process whose calls these are: the one with the busiest connection.
    pub traced_pid: Option<u32>,
    pub interfaces: Vec<Interface>,
    pub tcp_events: BTreeMap<String, u64>,
    pub settings: Settings,
    pub pressure: Option<Pressure>,
    /// Set when the process is a Penstock broker that reported its figures.
    pub broker: Option<Broker>,
    /// It is a broker that reported nothing, so the traffic over xdp is unknown.
    pub broker_silent: bool,
}

/// A socket on which the observed process accepts connections.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Listener {
    pub local: SocketAddr,
    /// Mean number of connections that wait to be accepted.
    pub waiting: f64,
    /// Maximum number that may wait: the smaller of the backlog given to listen(2) and
    /// net.core.somaxconn.
    pub backlog: u32,
    /// Share of samples in which the queue was full, 0 to 1.
    pub full: f64,
    /// The application's limit on the window of its connections, bytes (TCP_WINDOW_CLAMP).
    pub window_clamp: Option<u32>,
}

/// A connection of the observed process, its payload's direction, and both of its ends.
#[derive(Debug, Clone, Serialize)]
pub struct Connection {
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// Whether the observed process receives the payload.
    pub receives: bool,
    /// The observed process's end.
    pub end: End,
    /// The other end, when it is on this host and can be seen.
    pub peer: Option<End>,
}

/// One end of a connection. Shares are of the interval, 0 to 1.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct End {
    pub pid: Option<u32>,
    pub process: Option<String>,
    /// Bytes received and not read, mean and at the end.
    pub recv_q: f64,
    pub recv_q_last: u32,
    /// Bytes written and not acknowledged, mean.
    pub send_q: f64,
    /// Memory of the receive queue, mean, and its limit (`r` and `rb` of skmem).
    pub receive_memory: f64,
    pub receive_buffer: u32,
    /// Memory of the send queue, mean, and its limit (`w` and `tb` of skmem).
    pub send_memory: f64,
    pub send_buffer: u32,
    /// Whether the application sized the receive buffer, which switches autotuning off.
    pub receive_buffer_set: Option<bool>,
    /// Maximum window that the socket may offer, bytes (TCP_WINDOW_CLAMP), of a receiver.
    pub window_clamp: Option<u32>,
    /// The route's limits: the offered window, bytes, and the congestion window, packets.
    pub route_window: Option<u32>,
    pub route_cwnd: Option<u32>,
    /// Whether both ends agreed on window scaling.
    pub window_scaling: Option<bool>,
    /// Bytes that the application copied in one round trip, the most so far; a first value of the
    /// kernel's own before it ever did.
    pub rcv_space: u32,
    /// Largest window that may be offered, at the start and at the end.
    pub rcv_ssthresh_first: u32,
    pub rcv_ssthresh: u32,
    /// Window offered to the peer, and by it.
    pub rcv_wnd: u32,
    pub snd_wnd: u32,
    /// Bits that windows offered to the peer, and by it, are shifted by.
    pub rcv_wscale: u8,
    pub snd_wscale: u8,
    pub bytes_received: u64,
    pub bytes_acked: u64,
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    pub retransmits: u32,
    pub out_of_order: u32,
    /// Data was waiting or on its way.
    pub busy: f64,
    /// The peer's window was closed.
    pub rwnd_limited: f64,
    /// The send buffer was too small.
    pub sndbuf_limited: f64,
    /// Share of samples in which the application limited the delivery rate.
    pub app_limited: f64,
    /// Share of samples with a full congestion window.
    pub cwnd_full: f64,
    pub cwnd: u32,
    pub mss: u32,
    pub rtt_us: f64,
    pub min_rtt_us: f64,
    pub rcv_rtt_us: f64,
    /// Bytes per second.
    pub delivery_rate: u64,
    pub pacing_rate: u64,
    pub congestion_control: Option<String>,
}

/// Something that could not be seen, why, and what to do to see it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Unavailable {
    pub what: String,
    pub why: String,
    pub how: String,
}

impl End {
    /// Whether something other than the buffer limits the window that it offers: missing scaling, the
    /// route, or the application.
    pub fn window_is_bounded(&self) -> bool {
        self.window_scaling == Some(false) || self.route_window.is_some() || self.has_clamp()
    }

    /// Whether the application limits the window; otherwise the limit follows the buffer.
    pub fn has_clamp(&self) -> bool {
        self.window_clamp.is_some_and(|clamp| {
            let reach = 65_535 << self.rcv_wscale;
            clamp < reach && clamp < self.receive_buffer / 4 && self.rcv_ssthresh <= clamp
        })
    }
}

impl Connection {
    /// The end that sends payload.
    pub fn sender(&self) -> Option<&End> {
        match self.receives {
            true => self.peer.as_ref(),
            false => Some(&self.end),
        }
    }

    /// The end that receives payload.
    pub fn receiver(&self) -> Option<&End> {
        match self.receives {
            true => Some(&self.end),
            false => self.peer.as_ref(),
        }
    }

    /// Payload bytes of the interval.
    pub fn bytes(&self) -> u64 {
        match self.receives {
            true => self.end.bytes_received,
            false => self.end.bytes_acked,
        }
    }

    /// Bytes that wait at either end, mean.
    pub fn queued(&self) -> f64 {
        self.receiver().map_or(0.0, |end| end.recv_q) + self.sender().map_or(0.0, |end| end.send_q)
    }
}

impl Unavailable {
    /// The broker does not answer.
    pub fn silent_broker(answers: usize, samples: u32) -> Self {
        Self {
            what: "what the broker says of itself".to_owned(),
            why: format!("it answered {answers} of {samples} times"),
            how: "observe for longer (--duration); a broker without CPU is slow to answer"
                .to_owned(),
        }
    }

    /// The kernel keeps no PSI.
    pub fn no_pressure() -> Self {
        Self {
            what: "pressure stall information (PSI)".to_owned(),
            why: "this kernel does not keep it".to_owned(),
            how: "boot with psi=1".to_owned(),
        }
    }
}
