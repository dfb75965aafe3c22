//! Prepares the interface for the xdp path, and has a helper process revert the changes.
//!
//! The helper process is this program with `--restore-nic`. It keeps CAP_NET_ADMIN, which this process
//! drops, and waits until the kernel releases this process's file lock, however the process ends. Then
//! it reverts the changes and exits. It takes no input other than a file and the state of the file's
//! lock.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use penstock_ebpf::Mode;
use penstock_nic::{
    Change, Choice, DIRECTORY, Facts, Fitness, Kind, Link, Reverse, Step, Sysfs, Taken, Undo,
    Unfit, Wanted, Watch, choose, fitness, quote,
};
use penstock_process::child;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::{info, warn};

use crate::following::served;
use crate::privileges;
use crate::xdp_settings::XdpSettings;

/// How long the broker waits at its end for the helper process, which may hang in a driver.
const REVERT_WAIT: Duration = Duration::from_secs(60);
/// Applying settings may take the link down for a moment.
const CARRIER_WAIT: Duration = Duration::from_secs(10);

/// A prepared interface. Dropping it reverts the changes.
pub struct PreparedNic {
    pub facts: Facts,
    /// The mode in which it runs the program.
    pub mode: Mode,
    _restore: Option<NicRestoreGuard>,
}

/// Compares the interface with what the xdp path needs; prints the necessary commands, or runs them.
pub fn prepare(config: &XdpSettings, listen: SocketAddr) -> Result<PreparedNic> {
    let facts = Facts::read(&config.interface)?;
    let interface = &facts.interface.clone();
    if *interface != config.interface {
        info!("{:?} is another name of {interface}", config.interface);
    }
    let mode = mode(&facts, config.mode)?;
    if !config.force {
        // Another broker's settings must not be touched.
        penstock_ebpf::check_free(interface)?;
    }
    clean_up(interface);
    let facts = Facts::by_index(facts.index)?;
    log_facts(&facts);
    let wanted = wanted(config, mode, &facts, listen);
    let plan = penstock_nic::plan(&facts, &wanted)?;
    plan.notes
        .iter()
        .for_each(|note| warn!("{interface}: {note}"));
    let is_ours = |step: &Step| config.configure || step.kind == Kind::BusyPoll;
    let (ours, others): (Vec<_>, Vec<_>) = plan.steps.into_iter().partition(is_ours);
    advise(interface, &others)?;
    if ours.is_empty() {
        return Ok(PreparedNic {
            facts,
            mode,
            _restore: None,
        });
    }
    let guard = match (apply(&facts, &ours), config.configure) {
        (Ok(guard), _) => Some(guard),
        (Err(error), true) => {
            return Err(error.context(format!("--configure-nic: cannot configure {interface}")));
        }
        (Err(error), false) => {
            warn!(
                "{interface}: --busy-poll runs with interrupts still enabled: {error:#}; to defer them, run as root: {}",
                command_line(&ours)
            );
            None
        }
    };
    let facts = settled(&facts)?;
    for step in penstock_nic::plan(&facts, &wanted)?.steps {
        if ours.contains(&step) && guard.is_some() {
            warn!("{interface}: {} succeeded but had no effect", step.change);
        }
    }
    Ok(PreparedNic {
        facts,
        mode,
        _restore: guard,
    })
}

/// The mode in which the interface is to run the program: the requested one if possible, or the one
/// that suits driver and MTU.
fn mode(facts: &Facts, asked: Mode) -> Result<Mode> {
    let interface = facts.interface.clone();
    match (fitness(facts)?, asked) {
        (Fitness::GenericOnly { why }, Mode::Native) => {
            Err(Unfit::GenericOnly { interface, why }.into())
        }
        (_, Mode::Native | Mode::Generic) => Ok(asked),
        (_, Mode::Auto) => {
            let Choice { mode, why } = choose(facts)?;
            let text = match mode {
                Mode::Auto => "in the mode that the kernel chooses",
                Mode::Native => "in native mode",
                Mode::Generic => "in generic mode",
            };
            info!("{interface} runs the program {text}: {why}");
            Ok(mode)
        }
    }
}

/// A hint for a broker that was given no interface: the interfaces on which publishers' packets may
/// arrive.
pub fn candidates(listen: SocketAddr) -> String {
    let all = penstock_nic::interfaces().unwrap_or_default();
    let names = all.iter().filter_map(|interface| {
        let facts = Facts::by_index(interface.index).ok()?;
        let usable = interface.link == Link::Up && fitness(&facts).is_ok();
        let addresses = penstock_nic::addresses(interface.index).ok()?;
        let listen = listen.ip().to_canonical();
        let heard = addresses.iter().any(|address| {
            address.beyond_host && (listen.is_unspecified() || address.ip == listen)
        });
        (usable && heard).then(|| format!("--iface {}", quote(&interface.name)))
    });
    let names: Vec<_> = names.collect();
    match names.as_slice() {
        [] => String::new(),
        names => format!("; candidates on this host: {}", names.join(" or ")),
    }
}

/// Reverts the changes of brokers that have ended: `--restore-nic`.
pub fn restore(interface: &str, when_gone: bool) -> Result<()> {
    // The changes are recorded under the name that the kernel uses.
    let interface = &Facts::read(interface).map_or(interface.to_owned(), |facts| facts.interface);
    let directory = Path::new(DIRECTORY);
    // Opened now, because it may need a capability that is dropped later.
    let sysfs = Sysfs::open().ok();
    let taken = if when_gone {
        ignore_signals()?;
        Undo::wait(directory, interface)?
    } else {
        Undo::find(directory, interface)?
    };
    match taken {
        Taken::Busy => bail!("a broker is using {interface}; it reverts its changes when it ends"),
        Taken::Ours(undo) if !undo.is_empty() => revert(undo, interface, sysfs.as_ref()),
        Taken::Ours(undo) => Ok(undo.remove()?),
        Taken::Missing if when_gone => Ok(()),
        Taken::Missing => {
            info!("{interface}: nothing to revert");
            Ok(())
        }
    }
}

/// Has a helper process restore the interface once this is dropped: it holds the file lock that shows that
/// this process is alive.
struct NicRestoreGuard {
    interface: String,
    undo: Option<Undo>,
    process: Child,
}

impl NicRestoreGuard {
    fn start(undo: Undo, interface: &str) -> Result<Self> {
        let process = Command::new("/proc/self/exe")
            .args(["--restore-nic", interface, "--when-gone"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .current_dir("/")
            // Ctrl-C must not reach the helper process.
            .process_group(0)
            .spawn()
            .context("cannot start the helper process that reverts the changes")?;
        Ok(Self {
            interface: interface.to_owned(),
            undo: Some(undo),
            process,
        })
    }

    fn undo(&mut self) -> &mut Undo {
        self.undo.as_mut().expect("it goes at the end")
    }
}

impl Drop for NicRestoreGuard {
    fn drop(&mut self) {
        // Releasing the lock starts the helper process's work.
        self.undo = None;
        let interface = &self.interface;
        match child::wait(&mut self.process, Instant::now() + REVERT_WAIT) {
            Ok(status) if status.success() => {}
            Ok(status) => warn!(
                "{interface}: the helper process that reverts the changes ended with {status}; run penstock-broker --restore-nic {}",
                quote(interface)
            ),
            Err(error) if error.kind() == ErrorKind::TimedOut => warn!(
                "{interface}: the helper process {} that reverts the changes still runs after {REVERT_WAIT:?} and goes on; dmesg may say what the driver waits for",
                self.process.id()
            ),
            Err(error) => {
                warn!(
                    "{interface}: cannot wait for the helper process that reverts the changes: {error}"
                );
            }
        }
    }
}

/// Runs the steps. Dropping the guard reverts them; a failure reverts them at once.
fn apply(facts: &Facts, steps: &[Step]) -> Result<NicRestoreGuard> {
    let interface = &facts.interface;
    let Taken::Ours(undo) = Undo::take(Path::new(DIRECTORY), interface)? else {
        bail!("another broker has changed settings of {interface}");
    };
    let mut guard = NicRestoreGuard::start(undo, interface)?;
    let sysfs = Sysfs::open().ok();
    for Step {
        why,
        change,
        reverse,
        ..
    } in steps
    {
        if let Reverse::Change(reverse) = reverse {
            guard.undo().remember(facts, reverse.clone())?;
        }
        let said = match (change.apply(sysfs.as_ref()), reverse) {
            (Err(error), Reverse::Change(_)) => {
                // One that did not end may still be made: what takes it back is kept.
                if !matches!(error, penstock_nic::Error::NoAnswer { .. }) {
                    guard.undo().forget_last()?;
                }
                return Err(error.into());
            }
            (said, _) => said?,
        };
        if *reverse == Reverse::Rule {
            let number = rule_number(&said)
                .with_context(|| format!("{change}: cannot find a rule number in {said:?}"))?;
            let words = ["-N", interface, "delete", number].map(str::to_owned);
            guard
                .undo()
                .remember(facts, Change::Ethtool(words.to_vec()))?;
        }
        info!("{interface}: {why}: {change}; reverted at the end");
    }
    Ok(guard)
}

/// `Added rule with ID 1023`
fn rule_number(said: &str) -> Option<&str> {
    let number = said.trim().rsplit(' ').next()?;
    number.parse::<u32>().is_ok().then_some(number)
}

/// Reverts what an earlier broker left when it was killed together with its helper process.
fn clean_up(interface: &str) {
    let cleaned = match Undo::find(Path::new(DIRECTORY), interface) {
        Ok(Taken::Ours(undo)) if !undo.is_empty() => {
            info!("{interface}: reverting the changes of an earlier broker");
            revert(undo, interface, Sysfs::open().ok().as_ref())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = cleaned {
        warn!("{interface}: settings of an earlier broker may remain: {error:#}");
    }
}

fn revert(mut undo: Undo, interface: &str, sysfs: Option<&Sysfs>) -> Result<()> {
    // By index, because it may have been renamed.
    let now = Facts::by_index(undo.index()).ok();
    let done = undo.restore(now.as_ref(), sysfs)?;
    for (change, failure) in &done {
        match failure {
            None => info!("{interface}: reverted: {change}"),
            Some(error) => warn!("{interface}: cannot revert: {error}"),
        }
    }
    let all = undo.is_empty();
    undo.remove()?;
    if !all {
        bail!(
            "some settings were not restored; try again with penstock-broker --restore-nic {}",
            quote(interface)
        );
    }
    Ok(())
}

/// Makes the waiting helper process ignore signals: it ends when its broker has ended, not before.
fn ignore_signals() -> Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ignored))
            .context("cannot ignore signals")?;
    }
    privileges::drop_privileges(None, privileges::CHANGE_INTERFACES)?;
    Ok(())
}

fn wanted(config: &XdpSettings, mode: Mode, facts: &Facts, listen: SocketAddr) -> Wanted {
    // Opening the path reports a missing interface; the interface may also be down.
    let seen = Watch::new(facts.index).and_then(|mut watch| watch.look());
    let addresses = served(listen.ip(), &seen.unwrap_or_default());
    // Every interface has a link-local address; publishers use another.
    let is_v6 = |address: &IpAddr| matches!(address, IpAddr::V6(v6) if !v6.is_unicast_link_local());
    let queues = config.queues.as_ref();
    Wanted {
        queues: queues.map(|queues| queues.iter().map(|queue| *queue as u32).collect()),
        workers: config.workers as u32,
        port: listen.port(),
        families: [
            addresses.iter().any(IpAddr::is_ipv4),
            addresses.iter().any(is_v6),
        ],
        native: mode != Mode::Generic,
        zero_copy: !config.copy,
        busy_poll: config.busy_poll.is_some(),
    }
}

fn log_facts(facts: &Facts) {
    info!(
        interface = facts.interface,
        driver = facts.driver_name(),
        queues = facts.queues,
        max_queues = facts.max_queues(),
        ring = facts.ring.map(|ring| ring.rx),
        native_xdp = facts.xdp.map(|xdp| xdp.native),
        zero_copy = facts.xdp.map(|xdp| xdp.zero_copy),
        multi_buffer = facts.xdp.map(|xdp| xdp.multi_buffer),
        vlan_strip = facts.vlan_strip.map(|feature| feature.on),
        "interface"
    );
    if facts.link_type == libc::ARPHRD_LOOPBACK {
        // Answers leave without a socket, so the kernel treats their source address as a martian
        // (`ip_route_input_slow`).
        warn!(
            "{} carries packets of this host only, and the kernel drops IPv4 answers there unless its net.ipv4.conf settings route_localnet and accept_local are 1: local publishers should use --mode tcp or the address [::1]",
            facts.interface
        );
    }
    if facts.link == Link::NoCarrier {
        warn!(
            "{}: no carrier; the xdp path receives nothing until there is one",
            facts.interface
        );
    }
}

/// Prints commands for the user to run; an error if the xdp path cannot work without them.
fn advise(interface: &str, steps: &[Step]) -> Result<()> {
    if let Some(step) = steps.iter().find(|step| step.kind == Kind::Required) {
        bail!(
            "{interface}: {}; run {}, or use --configure-nic, which reverts the change at the end",
            step.why,
            step.change
        );
    }
    for Step { why, change, .. } in steps {
        warn!("{interface}: {why}; run: {change}");
    }
    if !steps.is_empty() {
        warn!("--configure-nic makes these changes and reverts them at the end");
    }
    Ok(())
}

fn command_line(steps: &[Step]) -> String {
    let commands: Vec<_> = steps.iter().map(|step| step.change.to_string()).collect();
    commands.join("; ")
}

/// Facts once the link is up again, if it was up before.
fn settled(before: &Facts) -> Result<Facts> {
    let start = Instant::now();
    while before.link == Link::Up
        && penstock_nic::link(before.index).context("cannot see the link")? == Link::NoCarrier
        && start.elapsed() < CARRIER_WAIT
    {
        thread::sleep(Duration::from_millis(50));
    }
    Ok(Facts::by_index(before.index)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn an_interface_with_ports_runs_the_program_in_generic_mode() {
        let inside = || {
            // SAFETY: takes a number only; concerns this thread alone.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
            for line in [
                "link add a0 type veth peer name a1",
                "link add br0 type bridge",
                "link set a0 master br0",
            ] {
                let done = Command::new("ip").args(line.split(' ')).status();
                assert!(done.unwrap().success(), "ip {line}");
            }
            let of = |name: &str, asked| mode(&Facts::read(name).unwrap(), asked);
            assert_eq!(of("br0", Mode::Auto).unwrap(), Mode::Generic);
            assert_eq!(of("br0", Mode::Generic).unwrap(), Mode::Generic);
            let said = of("br0", Mode::Native).unwrap_err().to_string();
            assert!(said.contains("use --xdp-mode generic"), "{said}");
            let said = of("a0", Mode::Auto).unwrap_err().to_string();
            assert!(said.contains("use --iface br0"), "{said}");
            assert_eq!(of("a1", Mode::Auto).unwrap(), Mode::Native);
            assert_eq!(of("a1", Mode::Generic).unwrap(), Mode::Generic);
            let done = Command::new("ip")
                .args("link set a1 mtu 9000".split(' '))
                .status();
            assert!(done.unwrap().success());
            assert_eq!(of("a1", Mode::Auto).unwrap(), Mode::Generic);
            assert_eq!(of("a1", Mode::Native).unwrap(), Mode::Native);
        };
        thread::spawn(inside).join().unwrap();
    }

    #[test]
    fn rules_are_known_by_their_number() {
        assert_eq!(rule_number("Added rule with ID 1023\n"), Some("1023"));
        assert_eq!(rule_number("done"), None);
        assert_eq!(rule_number(""), None);
    }
}
