//! Checks of the interface that payload is to come in on: pure functions, like those of the machine.
//! What the broker itself would ask of it comes from the same plan that the broker makes.

use std::net::IpAddr;

use penstock_ebpf::{Mode, STEERING_NAME};
use penstock_nic::{Choice, Fitness, Link, ONE_BUFFER, Unfit, Wanted, choose, fitness, quote};
use penstock_xsk::{ETHERNET, HEADROOM, fits};

use super::check::{Check, Topic};
use super::facts::{Capabilities, Host, Interface};
use super::host::{FEATURES_SINCE, SEVERAL_BUFFERS_SINCE};

/// The port of Penstock.
const PORT: u16 = 1214;

/// All checks of an interface.
pub fn checks(host: &Host, interface: &Interface) -> Vec<Check> {
    let mut checks = vec![
        link(interface),
        device(interface),
        addresses(interface),
        program(host, interface),
        native(host, interface),
        mtu(host, interface),
        queues(host, interface),
        steering(interface),
    ];
    checks.extend(chosen_mode(interface));
    checks.extend(zero_copy(interface));
    checks.extend(settings(interface));
    checks.extend(interrupts(interface));
    checks.extend(numa(host, interface));
    checks
}

fn link(interface: &Interface) -> Check {
    let topic = Topic {
        name: "link",
        why: "an interface that is down receives nothing",
    };
    let name = &interface.nic.interface;
    match interface.nic.link {
        Link::Up => topic.ok(format!(
            "{name} is up, driver {}",
            interface.nic.driver_name()
        )),
        Link::NoCarrier => topic.warn(
            format!("{name} has no carrier"),
            "plug in the cable, or switch on the other end",
        ),
        Link::Down => topic.fail(
            format!("{name} is down"),
            format!("ip link set dev {} up", quote(name)),
        ),
        Link::Gone => topic.fail(format!("{name} has just disappeared"), "ip link"),
    }
}

fn device(interface: &Interface) -> Check {
    let topic = Topic {
        name: "device",
        why: "the xdp path needs an Ethernet interface that has no master; a program in the driver of a bond's port cannot pass packets to a socket of the bond",
    };
    let nic = &interface.nic;
    match fitness(nic) {
        Ok(Fitness::Any) if nic.link_type == libc::ARPHRD_LOOPBACK => topic.warn(
            format!("{} carries packets of this host only", nic.interface),
            "publishers on this host should use tcp: the kernel drops IPv4 answers there unless net.ipv4.conf.lo.route_localnet and accept_local are 1",
        ),
        Ok(Fitness::Any) => topic.ok(match &nic.kind {
            Some(kind) => format!("{}, a virtual interface ({kind})", nic.interface),
            None => format!("{}, not a port of another interface", nic.interface),
        }),
        Ok(Fitness::GenericOnly { why }) => topic.warn(
            format!("generic mode only: {why}"),
            "nothing: penstock-broker uses generic mode on its own and rejects --xdp-mode native",
        ),
        Err(unfit) => {
            let fix = match &unfit {
                Unfit::Port { master, .. } => {
                    format!("penstock-broker --iface {}", quote(master))
                }
                Unfit::Vrf { interface } => format!("ip link show vrf {}", quote(interface)),
                _ => "penstock-broker --mode tcp".to_owned(),
            };
            topic.fail(unfit.to_string(), fix)
        }
    }
}

fn addresses(interface: &Interface) -> Check {
    let topic = Topic {
        name: "addresses",
        why: "publishers send to an address of the interface, and the XDP program matches it",
    };
    let name = &interface.nic.interface;
    let shown: Vec<_> = usable(interface).map(IpAddr::to_string).collect();
    if shown.is_empty() {
        return topic.fail(
            format!("{name} has no address"),
            format!("ip addr add ADDRESS/PREFIX dev {}", quote(name)),
        );
    }
    topic.ok(shown.join(", "))
}

/// Every interface has a link-local address; publishers use another.
fn usable(interface: &Interface) -> impl Iterator<Item = &IpAddr> {
    let addresses = interface.addresses.iter();
    addresses.filter(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
}

fn program(host: &Host, interface: &Interface) -> Check {
    let topic = Topic {
        name: "xdp_program",
        why: "an interface has one XDP program; the broker replaces another one only with --force",
    };
    let name = quote(&interface.nic.interface);
    let Some(program) = &interface.program else {
        return topic.ok("no XDP program is attached");
    };
    let mode = program.mode;
    let id = program.id;
    if program.name == STEERING_NAME {
        return topic.warn(
            format!("another penstock-broker serves this interface (program {id}, {mode})"),
            "nothing, if that is intended; otherwise stop that broker",
        );
    }
    let called = match program.name.as_str() {
        "" if host.capabilities.has(Capabilities::SYS_ADMIN) => "which has no name",
        "" => "whose name only root may see",
        name => name,
    };
    topic.fail(
        format!("XDP program {id} ({called}) is attached, {mode}"),
        format!(
            "bpftool net show dev {name} shows what it is; ip link set dev {name} {} off detaches it, unless a bpf_link holds it: then stop its owner, or use penstock-broker --force",
            mode.keyword()
        ),
    )
}

fn native(host: &Host, interface: &Interface) -> Check {
    let topic = Topic {
        name: "native_xdp",
        why: "in generic mode the kernel first allocates a socket buffer for each packet, as for any other socket",
    };
    let driver = interface.nic.driver_name();
    match interface.native_xdp() {
        Some(xdp) if xdp.native => topic.ok(format!("{driver} runs XDP programs in the driver")),
        // The device check has already reported what the interface is.
        _ if fitness(&interface.nic) != Ok(Fitness::Any) => {
            topic.ok("not on this interface (see device)")
        }
        _ if older_than(host, FEATURES_SINCE) => topic.warn(
            format!("this kernel does not report what {driver} supports"),
            "penstock-broker --xdp-mode native fails if the driver cannot; auto uses what works",
        ),
        _ => topic.warn(
            format!("{driver} runs no XDP programs; the broker uses generic mode"),
            "no command helps: use another driver or NIC (i40e, ice, igb, ixgbe, mlx5, virtio_net ...)",
        ),
    }
}

/// What `--xdp-mode auto` does; the device check reports why an interface does not work at all.
fn chosen_mode(interface: &Interface) -> Option<Check> {
    let topic = Topic {
        name: "xdp_mode",
        why: "--xdp-mode auto chooses by driver and MTU; generic mode costs a socket buffer per packet, native mode on veth a copy of every page of it",
    };
    let Choice { mode, why } = choose(&interface.nic).ok()?;
    Some(topic.ok(match mode {
        Mode::Auto => format!("the kernel chooses: {why}"),
        Mode::Native | Mode::Generic => format!("{mode}: {why}"),
    }))
}

fn zero_copy(interface: &Interface) -> Option<Check> {
    let topic = Topic {
        name: "zero_copy",
        why: "without it, the kernel copies each packet into the socket's memory",
    };
    let xdp = interface.native_xdp()?;
    let driver = interface.nic.driver_name();
    Some(if xdp.zero_copy {
        topic.ok(format!(
            "{driver} receives straight into the sockets' memory"
        ))
    } else {
        topic.warn(
            format!("{driver} has no zero-copy mode; the broker uses copy mode"),
            "no command helps: use another driver or NIC (i40e, ice, igb, ixgbe, mlx5 ...)",
        )
    })
}

/// What a buffer of `frame` bytes takes of a packet.
fn room(frame: u32) -> u32 {
    frame - HEADROOM - ETHERNET
}

fn mtu(host: &Host, interface: &Interface) -> Check {
    let topic = Topic {
        name: "mtu",
        why: "a packet larger than one buffer needs a driver and a kernel with multi-buffer support",
    };
    let nic = &interface.nic;
    let (name, mtu) = (quote(&nic.interface), nic.mtu);
    let found = format!("MTU {mtu}");
    let frame = interface.frame_size();
    if interface
        .native_xdp()
        .is_some_and(|xdp| xdp.native && !xdp.multi_buffer)
        && mtu > ONE_BUFFER
    {
        return topic.warn(
            format!(
                "{found}, but {} has no multi-buffer XDP; the broker uses generic mode",
                nic.driver_name()
            ),
            format!("ip link set dev {name} mtu {ONE_BUFFER}"),
        );
    }
    let one = room(frame);
    let several = !fits(mtu, frame, interface.zero_copy());
    if several && older_than(host, SEVERAL_BUFFERS_SINCE) {
        return topic.fail(
            format!("{found} needs AF_XDP sockets with multi-buffer support (Linux 6.6)"),
            format!("ip link set dev {name} mtu {one}"),
        );
    }
    topic.ok(match several {
        true => format!("{found}, packets in several buffers"),
        false => format!("{found}, each packet in one buffer"),
    })
}

fn older_than(host: &Host, version: (u32, u32)) -> bool {
    host.kernel
        .as_ref()
        .is_some_and(|kernel| kernel.version < version)
}

fn queues(host: &Host, interface: &Interface) -> Check {
    let topic = Topic {
        name: "queues",
        why: "a socket sees only its own receive queue: the broker opens one for each, and its workers share them",
    };
    let nic = &interface.nic;
    let (queues, most, cores) = (nic.queues, nic.max_queues(), host.cpus.len());
    let found = format!("{queues} of at most {most} receive queues, {cores} cores");
    if let Some(table) = &nic.indirection {
        let mut used = table.clone();
        used.sort_unstable();
        used.dedup();
        if used.len() < queues as usize {
            let used: Vec<_> = used.iter().map(u32::to_string).collect();
            return topic.warn(
                format!("{found}; RSS uses only {}", used.join(", ")),
                format!(
                    "ethtool -X {0} default, or penstock-broker --queues {1}",
                    quote(&nic.interface),
                    used.join(",")
                ),
            );
        }
    }
    topic.ok(found)
}

fn steering(interface: &Interface) -> Check {
    let topic = Topic {
        name: "steering",
        why: "with --queues, packets must reach those queues: through a rule (ntuple), the RSS table, or because there are no others",
    };
    let nic = &interface.nic;
    let name = quote(&nic.interface);
    let rules = nic.rules.is_some();
    match nic.ntuple {
        Some(ntuple) if rules && !ntuple.on && ntuple.changeable => topic.ok(format!(
            "{name} supports rules (ethtool -K {name} ntuple on) that give payload a queue of its own"
        )),
        ntuple if rules && ntuple.is_none_or(|ntuple| ntuple.on) => topic.ok(format!(
            "{name} supports rules that give payload a queue of its own"
        )),
        _ if nic.indirection.is_some() => topic.ok(format!(
            "{name} has no rules, but an RSS table (ethtool -X)"
        )),
        _ if nic.queues == 1 => topic.ok("there is one queue"),
        _ => topic.warn(
            format!("{name} cannot steer packets: leave --queues out, so that the broker serves all queues"),
            format!("ethtool -L {name} rx 1, or combined 1, if one queue is enough"),
        ),
    }
}

/// What the broker would ask for.
fn plan(interface: &Interface) -> Result<penstock_nic::Plan, Unfit> {
    let wanted = Wanted {
        queues: None,
        workers: interface.nic.queues,
        port: PORT,
        families: [
            usable(interface).any(IpAddr::is_ipv4),
            usable(interface).any(IpAddr::is_ipv6),
        ],
        native: interface.chosen_native().is_some(),
        zero_copy: true,
        busy_poll: false,
    };
    penstock_nic::plan(&interface.nic, &wanted)
}

fn settings(interface: &Interface) -> Vec<Check> {
    let topic = Topic {
        name: "settings",
        why: "offloads, hashing and rings decide which packets arrive, and where; penstock-broker --configure-nic sets them while it runs",
    };
    // The link check already reports an interface that is down.
    let Ok(plan) = plan(interface) else {
        return Vec::new();
    };
    if plan.steps.is_empty() {
        return vec![topic.ok("offloads, hashing and ring sizes are as they should be")];
    }
    let steps = plan.steps.into_iter();
    steps
        .map(|step| topic.warn(step.why, step.change.to_string()))
        .collect()
}

fn interrupts(interface: &Interface) -> Option<Check> {
    let topic = Topic {
        name: "interrupts",
        why: "--busy-poll takes over from interrupts only if they are deferred; without it, deferring them makes packets wait",
    };
    let (defer, flush) = (
        interface.nic.defer_hard_irqs?,
        interface.nic.gro_flush_timeout?,
    );
    let found = format!("napi_defer_hard_irqs {defer}, gro_flush_timeout {flush} ns");
    let directory = format!("/sys/class/net/{}", interface.nic.interface);
    let directory = quote(&directory);
    Some(match (defer, flush) {
        (0, 0) => topic.ok(format!(
            "{found}: not deferred; a broker that is started as root with --busy-poll does so while it runs"
        )),
        (0, _) | (_, 0) => topic.warn(
            format!("{found}: one without the other does not defer them"),
            format!(
                "echo 0 > {directory}/napi_defer_hard_irqs; echo 0 > {directory}/gro_flush_timeout"
            ),
        ),
        _ => topic.warn(
            format!("{found}: deferred for busy polling"),
            format!(
                "use penstock-broker --busy-poll 64; or echo 0 > {directory}/napi_defer_hard_irqs; echo 0 > {directory}/gro_flush_timeout"
            ),
        ),
    })
}

fn numa(host: &Host, interface: &Interface) -> Option<Check> {
    let topic = Topic {
        name: "numa",
        why: "packets and their memory that cross between NUMA nodes cost time on each access",
    };
    if host.nodes.len() < 2 {
        return Some(topic.ok("one NUMA node"));
    }
    let number = interface.node?;
    let node = host.nodes.iter().find(|node| node.number == number)?;
    let local: Vec<usize> = node
        .cpus
        .iter()
        .copied()
        .filter(|cpu| host.cpus.contains(cpu))
        .collect();
    let found = format!(
        "{} is on node {number} of {}",
        interface.nic.interface,
        host.nodes.len()
    );
    if local.is_empty() {
        return Some(topic.warn(
            format!("{found}, where this process may not run"),
            format!(
                "taskset or AllowedCPUs= with cores {}, and penstock-broker --cpus with the same",
                ranges(&node.cpus)
            ),
        ));
    }
    Some(if host.cpus.iter().all(|cpu| node.cpus.contains(cpu)) {
        topic.ok(format!("{found}, and so are all cores of this process"))
    } else {
        topic.warn(
            format!("{found}; cores of other nodes may run the workers"),
            format!("penstock-broker --cpus {}", ranges(&local)),
        )
    })
}

/// A list such as 0-3,8.
fn ranges(cpus: &[usize]) -> String {
    let mut parts: Vec<(usize, usize)> = Vec::new();
    for &cpu in cpus {
        match parts.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => parts.push((cpu, cpu)),
        }
    }
    let parts: Vec<_> = parts
        .into_iter()
        .map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        })
        .collect();
    parts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_are_shown_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 8, 10, 11]), "0-2,8,10-11");
        assert_eq!(ranges(&[]), "");
    }
}
