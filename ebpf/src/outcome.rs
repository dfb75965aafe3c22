//! What became of packets, as the program counts it.

/// Names of the program's outcomes, in the order of its `enum outcome`.
pub const OUTCOMES: [&str; 10] = [
    "steered",
    "no_socket",
    "unknown_stream",
    "not_ip",
    "not_udp",
    "fragment",
    "other_port",
    "other_address",
    "not_payload",
    "malformed",
];

/// Packets by outcome, over all cores. All but `steered` and `unknown_stream` went on to the kernel.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    /// Redirected to an AF_XDP socket.
    pub steered: u64,
    /// Payload packets of a queue that has no socket.
    pub no_socket: u64,
    /// Payload packets with an unknown stream key: dropped.
    pub unknown_stream: u64,
    /// Neither IPv4 nor IPv6 (below at most two VLAN tags).
    pub not_ip: u64,
    /// IP, but not UDP; IPv6 with extension headers counts as that.
    pub not_udp: u64,
    /// Fragments of IP datagrams.
    pub fragment: u64,
    /// UDP to another port.
    pub other_port: u64,
    /// UDP to the port, but to another address.
    pub other_address: u64,
    /// UDP to the broker without the magic of a payload packet.
    pub not_payload: u64,
    /// Shorter than its headers claim, or of an impossible version.
    pub malformed: u64,
}

impl Outcomes {
    /// Each count with its name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); OUTCOMES.len()] {
        let counts = [
            self.steered,
            self.no_socket,
            self.unknown_stream,
            self.not_ip,
            self.not_udp,
            self.fragment,
            self.other_port,
            self.other_address,
            self.not_payload,
            self.malformed,
        ];
        std::array::from_fn(|index| (OUTCOMES[index], counts[index]))
    }

    pub(crate) fn of(counts: [u64; OUTCOMES.len()]) -> Self {
        let [
            steered,
            no_socket,
            unknown_stream,
            not_ip,
            not_udp,
            fragment,
            other_port,
            other_address,
            not_payload,
            malformed,
        ] = counts;
        Self {
            steered,
            no_socket,
            unknown_stream,
            not_ip,
            not_udp,
            fragment,
            other_port,
            other_address,
            not_payload,
            malformed,
        }
    }
}
