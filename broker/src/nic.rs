//! Makes the interface ready for the xdp path, and has a second process take that back.
//!
//! The second process is this program with `--restore-nic`. It keeps CAP_NET_ADMIN, which this one
//! gives up, and does nothing until this one is gone, however that ends; then it takes the changes
//! back and ends. Nobody talks to it: all it knows is a file, and who holds the file's lock.

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
    Change, DIRECTORY, Facts, Fitness, Kind, Link, Reverse, Step, Sysfs, Taken, Undo, Unfit,
    Wanted, Watch, fitness, quote,
};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use tracing::{info, warn};

use crate::following::served;
use crate::privileges;
use crate::xdp;

/// New settings may take the link away for a moment.
const CARRIER_PATIENCE: Duration = Duration::from_secs(10);

/// An interface that is ready. Dropping it takes back what was changed.
pub struct Ready {
    pub facts: Facts,
    /// How it is to run the program.
    pub mode: Mode,
    _keeper: Option<Keeper>,
}

/// Compares the interface with what is wanted of it; tells the commands that it needs, or runs them.
pub fn prepare(config: &xdp::Config, listen: SocketAddr) -> Result<Ready> {
    let facts = Facts::read(&config.interface)?;
    let interface = &facts.interface.clone();
    if *interface != config.interface {
        info!("{:?} is another name of {interface}", config.interface);
    }
    let mode = mode(&facts, config.mode)?;
    if !config.force {
        // Another broker's settings are its own.
        penstock_ebpf::check_free(interface)?;
    }
    clean_up(interface);
    let facts = Facts::by_index(facts.index)?;
    tell(&facts);
    let wanted = wanted(config, mode, &facts, listen);
    let plan = penstock_nic::plan(&facts, &wanted)?;
    plan.notes
        .iter()
        .for_each(|note| warn!("{interface}: {note}"));
    let is_ours = |step: &Step| config.configure || step.kind == Kind::BusyPoll;
    let (ours, told): (Vec<_>, Vec<_>) = plan.steps.into_iter().partition(is_ours);
    advise(interface, &told)?;
    if ours.is_empty() {
        return Ok(Ready {
            facts,
            mode,
            _keeper: None,
        });
    }
    let keeper = match (make(&facts, &ours), config.configure) {
        (Ok(keeper), _) => Some(keeper),
        (Err(error), true) => {
            return Err(error.context(format!("--configure-nic cannot set {interface} up")));
        }
        (Err(error), false) => {
            warn!(
                "{interface}: --busy-poll goes on with interrupts in between: {error:#}; as root: {}",
                line(&ours)
            );
            None
        }
    };
    let facts = settled(&facts)?;
    for step in penstock_nic::plan(&facts, &wanted)?.steps {
        if ours.contains(&step) && keeper.is_some() {
            warn!(
                "{interface}: {} was accepted, but had no effect",
                step.change
            );
        }
    }
    Ok(Ready {
        facts,
        mode,
        _keeper: keeper,
    })
}

/// How the interface is to run the program: as it is asked for, if it can.
fn mode(facts: &Facts, asked: Mode) -> Result<Mode> {
    let interface = facts.interface.clone();
    match (fitness(facts)?, asked) {
        (Fitness::Any, asked) => Ok(asked),
        (Fitness::GenericOnly { why }, Mode::Native) => {
            Err(Unfit::GenericOnly { interface, why }.into())
        }
        (Fitness::GenericOnly { .. }, Mode::Generic) => Ok(Mode::Generic),
        (Fitness::GenericOnly { why }, Mode::Auto) => {
            info!("{interface} takes the program in generic mode: {why}");
            Ok(Mode::Generic)
        }
    }
}

/// What a broker without an interface is told: those that publishers' packets may come in on.
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
        names => format!("; here that may be {}", names.join(" or ")),
    }
}

/// Takes back what brokers changed that are gone: `--restore-nic`.
pub fn restore(interface: &str, when_gone: bool) -> Result<()> {
    // Changes are kept under the name that the kernel calls it by.
    let interface = &Facts::read(interface).map_or(interface.to_owned(), |facts| facts.interface);
    let directory = Path::new(DIRECTORY);
    // Now, for it may take a capability that is given up.
    let sysfs = Sysfs::open().ok();
    let taken = if when_gone {
        be_patient()?;
        Undo::wait(directory, interface)?
    } else {
        Undo::find(directory, interface)?
    };
    match taken {
        Taken::Busy => bail!("a broker uses {interface}; its changes are taken back when it ends"),
        Taken::Ours(undo) if !undo.is_empty() => take_back(undo, interface, sysfs.as_ref()),
        Taken::Ours(undo) => Ok(undo.remove()?),
        Taken::Missing if when_gone => Ok(()),
        Taken::Missing => {
            info!("{interface}: nothing to take back");
            Ok(())
        }
    }
}

/// Holds the lock that tells that this process lives.
struct Keeper {
    interface: String,
    undo: Option<Undo>,
    process: Child,
}

impl Keeper {
    fn start(undo: Undo, interface: &str) -> Result<Self> {
        let process = Command::new("/proc/self/exe")
            .args(["--restore-nic", interface, "--when-gone"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .current_dir("/")
            // Ctrl-C is for this process.
            .process_group(0)
            .spawn()
            .context("cannot start the process that takes changes back")?;
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

impl Drop for Keeper {
    fn drop(&mut self) {
        // With the lock, the other process has its turn.
        self.undo = None;
        let interface = &self.interface;
        match self.process.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => warn!(
                "{interface}: the process that takes changes back ended with {status}; penstock-broker --restore-nic {} does it as well",
                quote(interface)
            ),
            Err(error) => {
                warn!("{interface}: cannot wait for the process that takes changes back: {error}");
            }
        }
    }
}

/// Runs the steps; what was done is taken back when the keeper is dropped, or at once on failure.
fn make(facts: &Facts, steps: &[Step]) -> Result<Keeper> {
    let interface = &facts.interface;
    let Taken::Ours(undo) = Undo::take(Path::new(DIRECTORY), interface)? else {
        bail!("another broker has settings of {interface}");
    };
    let mut keeper = Keeper::start(undo, interface)?;
    let sysfs = Sysfs::open().ok();
    for Step {
        why,
        change,
        reverse,
        ..
    } in steps
    {
        if let Reverse::Change(reverse) = reverse {
            keeper.undo().remember(facts, reverse.clone())?;
        }
        let said = match (change.apply(sysfs.as_ref()), reverse) {
            (Err(error), Reverse::Change(_)) => {
                keeper.undo().forget_last()?;
                return Err(error.into());
            }
            (said, _) => said?,
        };
        if *reverse == Reverse::Rule {
            let number = rule_number(&said)
                .with_context(|| format!("{change}: no number of a rule in {said:?}"))?;
            let words = ["-N", interface, "delete", number].map(str::to_owned);
            keeper
                .undo()
                .remember(facts, Change::Ethtool(words.to_vec()))?;
        }
        info!("{interface}: {why}: {change}; taken back at the end");
    }
    Ok(keeper)
}

/// `Added rule with ID 1023`
fn rule_number(said: &str) -> Option<&str> {
    let number = said.trim().rsplit(' ').next()?;
    number.parse::<u32>().is_ok().then_some(number)
}

/// What an earlier broker left, that was killed together with its keeper.
fn clean_up(interface: &str) {
    let cleaned = match Undo::find(Path::new(DIRECTORY), interface) {
        Ok(Taken::Ours(undo)) if !undo.is_empty() => {
            info!("{interface}: taking back what an earlier broker changed");
            take_back(undo, interface, Sysfs::open().ok().as_ref())
        }
        Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    };
    if let Err(error) = cleaned {
        warn!("{interface}: settings of an earlier broker may be left: {error:#}");
    }
}

fn take_back(mut undo: Undo, interface: &str, sysfs: Option<&Sysfs>) -> Result<()> {
    // By its number: it may have another name by now.
    let now = Facts::by_index(undo.index()).ok();
    let done = undo.restore(now.as_ref(), sysfs)?;
    for (change, failure) in &done {
        match failure {
            None => info!("{interface}: taken back: {change}"),
            Some(error) => warn!("{interface}: not taken back: {error}"),
        }
    }
    let all = undo.is_empty();
    undo.remove()?;
    if !all {
        bail!(
            "not everything is as it was; again with --restore-nic {}",
            quote(interface)
        );
    }
    Ok(())
}

/// For the process that waits: it ends when its broker has, and not before.
fn be_patient() -> Result<()> {
    let ignored = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&ignored))
            .context("cannot ignore signals")?;
    }
    privileges::give_up(None, privileges::CHANGE_INTERFACES)?;
    Ok(())
}

fn wanted(config: &xdp::Config, mode: Mode, facts: &Facts, listen: SocketAddr) -> Wanted {
    // That there is none is told when the path is opened; the interface may be down.
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

fn tell(facts: &Facts) {
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
        // Answers come from no socket, so the kernel takes their source for a martian
        // (`ip_route_input_slow`).
        warn!(
            "{} carries packets of this host only, and IPv4 answers are dropped there unless its net.ipv4.conf settings route_localnet and accept_local are 1: publishers here use tcp, or [::1]",
            facts.interface
        );
    }
    if facts.link == Link::NoCarrier {
        warn!(
            "{}: no carrier; nothing comes in before it has one",
            facts.interface
        );
    }
}

/// Commands that somebody else is to run; an error if it cannot go on without.
fn advise(interface: &str, steps: &[Step]) -> Result<()> {
    if let Some(step) = steps.iter().find(|step| step.kind == Kind::Required) {
        bail!(
            "{interface}: {}; do {}, or use --configure-nic, which takes it back at the end",
            step.why,
            step.change
        );
    }
    for Step { why, change, .. } in steps {
        warn!("{interface}: {why}; do: {change}");
    }
    if !steps.is_empty() {
        warn!("--configure-nic does so, and takes it back at the end");
    }
    Ok(())
}

fn line(steps: &[Step]) -> String {
    let commands: Vec<_> = steps.iter().map(|step| step.change.to_string()).collect();
    commands.join("; ")
}

/// Facts as they are once the link is back, if it was there before.
fn settled(before: &Facts) -> Result<Facts> {
    let start = Instant::now();
    while before.link == Link::Up
        && penstock_nic::link(before.index).context("cannot see the link")? == Link::NoCarrier
        && start.elapsed() < CARRIER_PATIENCE
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
            assert_eq!(of("a1", Mode::Auto).unwrap(), Mode::Auto);
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
