//! Whether an interface can carry the xdp path, and in which mode: used by the broker and by
//! `penstock-lab doctor`.

use penstock_ebpf::Mode;

use crate::error::Unfit;
use crate::facts::Facts;
use crate::netlink::{ETHERNET, LOOPBACK};
use crate::plan::ONE_BUFFER;

/// How an interface can run the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fitness {
    /// In the driver if it supports native XDP, else in the network stack.
    Any,
    /// In the network stack only; a program in the driver would lose packets.
    GenericOnly {
        /// Why.
        why: String,
    },
}

/// Decides, from the properties of an interface and its relations to others, whether an XDP program
/// there can pass its packets to AF_XDP sockets.
///
/// # Errors
/// [`Unfit`] if no packet of the interface can use the xdp path.
pub fn fitness(facts: &Facts) -> Result<Fitness, Unfit> {
    let interface = facts.interface.clone();
    if ![ETHERNET, LOOPBACK].contains(&facts.link_type) {
        let kind = facts.kind.as_deref().or(facts.driver.as_deref());
        return Err(Unfit::NotEthernet {
            interface,
            what: format!(
                "{}link type {}",
                kind.map(|kind| format!("{kind}, ")).unwrap_or_default(),
                facts.link_type
            ),
        });
    }
    if facts.kind.as_deref() == Some("vrf") {
        return Err(Unfit::Vrf { interface });
    }
    // A port of a VRF keeps its packets; masters of any other kind take them (rx_handler).
    if let Some(master) = &facts.master
        && master.kind.as_deref() != Some("vrf")
    {
        return Err(Unfit::Port {
            interface,
            master: master.name.clone(),
            kind: master
                .kind
                .clone()
                .unwrap_or_else(|| "its master".to_owned()),
        });
    }
    let kind = facts.kind.as_deref().unwrap_or("an interface");
    if facts.has_ports || ["bond", "team"].contains(&kind) {
        // The driver's queue belongs to the port, and the socket is bound to another device's
        // (`xsk_rcv_check` in net/xdp/xsk.c): the program would redirect each packet and the kernel
        // drop it.
        return Ok(Fitness::GenericOnly {
            why: format!(
                "its kind is {kind}, and a native program would run on its ports, whose packets reach no socket of {interface}"
            ),
        });
    }
    Ok(Fitness::Any)
}

/// The mode that a broker chooses by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// [`Mode::Auto`] leaves it to the kernel.
    pub mode: Mode,
    /// Why.
    pub why: String,
}

/// Chooses the mode that is known to be faster, by driver and MTU. docs/decisions/0009-native-or-generic.md
/// has the measurements.
///
/// # Errors
/// [`Unfit`] if no packet of the interface can use the xdp path.
pub fn choose(facts: &Facts) -> Result<Choice, Unfit> {
    if let Fitness::GenericOnly { why } = fitness(facts)? {
        return Ok(Choice {
            mode: Mode::Generic,
            why,
        });
    }
    let (driver, mtu) = (facts.driver_name(), facts.mtu);
    let several_buffers = mtu > ONE_BUFFER;
    let (mode, why) = match facts.xdp {
        None => (
            Mode::Auto,
            "the kernel does not report what the driver supports (Linux 6.3)".to_owned(),
        ),
        // A driver from outside the kernel may support more than it reports.
        Some(xdp) if !xdp.native => (
            Mode::Auto,
            format!("the driver ({driver}) reports no native XDP"),
        ),
        Some(xdp) if several_buffers && !xdp.multi_buffer => (
            Mode::Generic,
            format!(
                "the driver ({driver}) takes no packet in several buffers, and those of MTU {mtu} do not fit into one"
            ),
        ),
        // `veth_convert_skb_to_xdp_buff` copies the packet page by page, and so does the socket.
        Some(_) if several_buffers && facts.kind.as_deref() == Some("veth") => (
            Mode::Generic,
            format!(
                "packets of MTU {mtu} do not fit into one buffer, and veth hands on several more slowly than generic mode does"
            ),
        ),
        Some(_) => (Mode::Native, format!("the driver ({driver}) supports it")),
    };
    Ok(Choice { mode, why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::facts::Master;
    use crate::plan::tests::nic;

    fn of(change: impl FnOnce(&mut Facts)) -> Result<Fitness, Unfit> {
        let mut facts = nic();
        change(&mut facts);
        fitness(&facts)
    }

    fn port_of(kind: Option<&str>) -> Result<Fitness, Unfit> {
        of(|facts| {
            facts.master = Some(Master {
                name: "m; id".to_owned(),
                kind: kind.map(str::to_owned),
            });
        })
    }

    #[test]
    fn ordinary_interfaces_run_programs_in_any_mode() {
        for kind in [
            None,
            Some("veth"),
            Some("vlan"),
            Some("macvlan"),
            Some("vxlan"),
        ] {
            let fitness = of(|facts| facts.kind = kind.map(str::to_owned));
            assert_eq!(fitness, Ok(Fitness::Any), "{kind:?}");
        }
        assert_eq!(of(|facts| facts.link_type = LOOPBACK), Ok(Fitness::Any));
        assert_eq!(port_of(Some("vrf")), Ok(Fitness::Any));
    }

    #[test]
    fn interfaces_with_ports_take_generic_mode() {
        // A bond may get its first port later; hardware has ports for failover (hv_netvsc).
        for (kind, has_ports) in [
            (Some("bond"), false),
            (Some("team"), true),
            (Some("bridge"), true),
            (None, true),
        ] {
            let fitness = of(|facts| {
                facts.kind = kind.map(str::to_owned);
                facts.has_ports = has_ports;
            });
            assert!(
                matches!(&fitness, Ok(Fitness::GenericOnly { .. })),
                "{kind:?}: {fitness:?}"
            );
        }
    }

    #[test]
    fn interfaces_that_no_packet_can_leave_for_a_socket_are_refused() {
        // tun and WireGuard, IP in IP, PPP, InfiniBand.
        for link_type in [65534, 768, 512, 32] {
            let unfit = of(|facts| facts.link_type = link_type).unwrap_err();
            assert!(matches!(unfit, Unfit::NotEthernet { .. }), "{unfit}");
            assert!(unfit.to_string().contains("--mode tcp"), "{unfit}");
        }
        let unfit = of(|facts| facts.kind = Some("vrf".to_owned())).unwrap_err();
        assert!(matches!(unfit, Unfit::Vrf { .. }), "{unfit}");
        for kind in [
            Some("bridge"),
            Some("bond"),
            Some("team"),
            Some("openvswitch"),
            None,
        ] {
            let unfit = port_of(kind).unwrap_err().to_string();
            assert!(unfit.ends_with("use --iface 'm; id'"), "{unfit}");
        }
    }

    #[test]
    fn mode_is_chosen_by_driver_and_mtu() {
        const VETH: Option<&str> = Some("veth");
        // Kind, MTU; native XDP and packets in several buffers, if the kernel reports that.
        for (kind, mtu, xdp, mode, why) in [
            (None, 1500, Some([true, true]), Mode::Native, "(fine)"),
            (None, 9000, Some([true, true]), Mode::Native, "(fine)"),
            (
                None,
                ONE_BUFFER,
                Some([true, false]),
                Mode::Native,
                "(fine)",
            ),
            (None, 9000, Some([true, false]), Mode::Generic, "MTU 9000"),
            (None, 9000, Some([false, false]), Mode::Auto, "(fine)"),
            (None, 9000, None, Mode::Auto, "Linux 6.3"),
            (VETH, 1500, Some([true, true]), Mode::Native, "(fine)"),
            (VETH, ONE_BUFFER, Some([true, true]), Mode::Native, "(fine)"),
            (
                VETH,
                ONE_BUFFER + 1,
                Some([true, true]),
                Mode::Generic,
                "veth",
            ),
            (VETH, 9000, None, Mode::Auto, "Linux 6.3"),
            (
                Some("bond"),
                1500,
                Some([true, true]),
                Mode::Generic,
                "bond",
            ),
        ] {
            let mut facts = nic();
            (facts.kind, facts.mtu) = (kind.map(str::to_owned), mtu);
            facts.xdp = xdp.map(|[native, multi_buffer]| penstock_ebpf::Features {
                native,
                zero_copy: false,
                multi_buffer,
            });
            let choice = choose(&facts).unwrap();
            assert_eq!(choice.mode, mode, "{kind:?} {mtu} {xdp:?}");
            assert!(choice.why.contains(why), "{choice:?}");
        }
        let mut port = nic();
        port.master = Some(Master {
            name: "br0".to_owned(),
            kind: Some("bridge".to_owned()),
        });
        assert!(matches!(choose(&port), Err(Unfit::Port { .. })));
    }
}
