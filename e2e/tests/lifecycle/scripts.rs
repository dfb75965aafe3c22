//! Scripts that change the machine, and take variables of the original.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use penstock_e2e::bed::{Bed, root};
use penstock_e2e::cleanup::ChangedSetting;
use penstock_e2e::commands::{assert_says, command, text};
use penstock_e2e::{Case, cases, skip};

const RMEM_MAX: &str = "/proc/sys/net/core/rmem_max";
const TCP_RMEM: &str = "/proc/sys/net/ipv4/tcp_rmem";
/// All that the script changes.
const SETTINGS: [&str; 4] = [
    RMEM_MAX,
    "/proc/sys/net/core/wmem_max",
    TCP_RMEM,
    "/proc/sys/net/ipv4/tcp_wmem",
];
/// Where the script keeps the values from before.
const SAVED: &str = "/run/penstock-sysctl.saved";
const MIB: u64 = 1 << 20;

pub fn cases() -> impl IntoIterator<Item = Case> {
    // They change limits of the machine.
    let tuning = cases![
        kernel_buffers_are_planned_set_and_restored,
        kernel_buffers_are_set_for_the_next_boot_and_back,
    ];
    let others = cases![
        namespaces_by_hand_come_up_and_go_with_their_processes,
        variables_of_the_original_are_refused_if_they_cannot_be_honoured,
    ];
    tuning.map(Case::alone).into_iter().chain(others)
}

fn script(name: &str, arguments: &[&str]) -> Command {
    command(root().join("scripts").join(name), arguments)
}

fn tune(arguments: &[&str]) -> Command {
    script("tune_kernel_buffers.sh", arguments)
}

fn now(setting: &str) -> String {
    text(setting.as_ref()).trim().to_owned()
}

/// The limits as they were, which come back however a test ends.
struct Limits {
    before: Vec<String>,
    _settings: Vec<ChangedSetting>,
}

impl Limits {
    fn keep() -> Result<Self> {
        if Path::new(SAVED).exists() {
            let reason = format!("the limits of this host are tuned already ({SAVED})");
            return Err(skip(&reason));
        }
        let before: Vec<_> = SETTINGS.into_iter().map(now).collect();
        let kept = SETTINGS.into_iter().zip(&before);
        let kept = kept.map(|(setting, value)| ChangedSetting::write(setting.as_ref(), value));
        let settings: Result<_> = kept.collect();
        Ok(Self {
            before,
            _settings: settings.map_err(|_| skip("net.core.rmem_max cannot be set here"))?,
        })
    }

    fn rmem_max(&self) -> &str {
        &self.before[0]
    }

    #[track_caller]
    fn assert_unchanged(&self) {
        assert_eq!(SETTINGS.map(now)[..], self.before);
    }
}

impl Drop for Limits {
    fn drop(&mut self) {
        // Left only by a test that failed.
        let _ = fs::remove_file(SAVED);
    }
}

fn kernel_buffers_are_planned_set_and_restored(bed: &Bed) -> Result<()> {
    let limits = Limits::keep()?;
    let run = |arguments: &[&str]| bed.run("tune", &mut tune(arguments))?.success();
    // Without arguments it prints its plan and changes nothing.
    let plan = run(&["--size", "48MiB"])?.stdout;
    let (before, size) = (limits.rmem_max(), 48 * MIB);
    assert_says(
        &plan,
        &format!("(?m)^net.core.rmem_max: {before} -> {size}$"),
    );
    assert_says(&plan, &format!("(?m)^net.ipv4.tcp_rmem: .*-> .*{size}$"));
    limits.assert_unchanged();
    run(&["set", "--size", "48MiB"])?;
    run(&["set", "--size", "40MiB"])?;
    let size = (40 * MIB).to_string();
    assert_eq!(now(RMEM_MAX), size);
    assert_eq!(now(TCP_RMEM).split_whitespace().nth(2), Some(size.as_str()));
    run(&["restore"])?;
    limits.assert_unchanged();
    assert!(!Path::new(SAVED).exists(), "{SAVED} is left");
    Ok(())
}

/// The settings go to a directory of the test's own; /run is empty after a boot.
fn kernel_buffers_are_set_for_the_next_boot_and_back(bed: &Bed) -> Result<()> {
    let limits = Limits::keep()?;
    let script = r#"mkdir -p /etc/sysctl.d; mount -t tmpfs tmpfs /etc/sysctl.d
"$0" set --size 40MiB --persist
cat /etc/sysctl.d/60-penstock.conf
rm /run/penstock-sysctl.saved
"$0" restore
ls -A /etc/sysctl.d"#;
    let mut shell = command("unshare", &["--mount", "sh", "-euc", script]);
    let shell = shell.arg(root().join("scripts/tune_kernel_buffers.sh"));
    let said = bed.run("tune", shell)?.success()?.stdout;
    assert_says(&said, &format!("(?m)^net.core.rmem_max = {}$", 40 * MIB));
    let last = said.lines().last().context("it says something")?;
    assert_eq!(last, "removes /etc/sysctl.d/60-penstock.conf");
    limits.assert_unchanged();
    Ok(())
}

/// Their names are in a mount namespace of the test's own, so that they go with it.
fn namespaces_by_hand_come_up_and_go_with_their_processes(bed: &Bed) -> Result<()> {
    let script = r#"mkdir -p /run/netns; mount -t tmpfs tmpfs /run/netns
"$0" up --name hand --brokers 2 --profile offload --mtu 9000 >/dev/null
ip netns exec hand-b1 sleep 60 &
ip netns exec hand-pub ip -o link show b1
"$0" status --name hand
! "$0" up --name hand
"$0" down --name hand
! wait $!
echo "left: $(ip netns list)""#;
    let mut shell = command("unshare", &["--mount", "sh", "-euc", script]);
    let shell = shell.arg(root().join("scripts/netns.sh"));
    let ended = bed.run("netns", shell)?.success()?;
    for line in [
        "mtu 9000.* state UP",
        "^hand-pub$",
        r"^  b1@.* 10\.214\.1\.1/24 ",
        "^hand-b1$",
        r"^  eth0@.* 10\.214\.1\.2/24 ",
        "^  process [0-9]+: sleep 60",
        "^left: $",
    ] {
        assert_says(&ended.stdout, &format!("(?m){line}"));
    }
    assert_says(&ended.stderr, r"hand-\* exist already; remove them first");
    assert_says(&ended.stderr, "removed hand-b1");
    Ok(())
}

fn variables_of_the_original_are_refused_if_they_cannot_be_honoured(bed: &Bed) -> Result<()> {
    let refuses = |message: &str, name: &str, (variable, value): (&str, &str)| {
        bed.refuses(message, script(name, &[]).env(variable, value));
    };
    for (variable, value) in [
        ("REPLICATION_FACTOR", "2"),
        ("SEQUENCER", "CORFU"),
        ("NUM_TRIALS", "0"),
        ("THREADS_PER_BROKER", "x"),
    ] {
        let message = format!("{variable}={value} is not");
        refuses(&message, "run_throughput.sh", (variable, value));
    }
    for (variable, message) in [
        ("BROKER_PID", "BROKER_PID is one number"),
        ("BROKER_PORT", "BROKER_PORT is a number"),
        ("STRACE_SEC", "STRACE_SEC is a number"),
        ("MPSTAT_SEC", "MPSTAT_SEC is a number"),
    ] {
        refuses(message, "diagnose_recv_bottleneck.sh", (variable, "x"));
    }
    Ok(())
}
