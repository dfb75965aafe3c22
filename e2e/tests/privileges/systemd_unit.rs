//! The systemd unit: what systemd says of it, and whether the broker can live with what it allows. Starting
//! it takes a systemd; scripts/vm_test.sh does that.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit};
use penstock_e2e::bed::{Bed, program, root};
use penstock_e2e::commands::{command, text};
use penstock_e2e::{BrokerSetup, Case, cases, eventually, skip};
use penstock_testbed::command::run;

use crate::{NONE, XDP, publish, user, with};

/// Exposure that systemd works out, times 10; above it something was forgotten.
const EXPOSURE: &str = "--threshold=25";
/// A sysfs of the broker's own takes `CAP_SYS_ADMIN`, which the unit does not give: these are refused there,
/// and /sys is read instead.
const OF_SYSFS: [&str; 3] = ["fsopen", "fsconfig", "fsmount"];

pub fn cases() -> impl IntoIterator<Item = Case> {
    let all = cases![
        systemd_understands_the_unit,
        systemd_finds_little_exposed,
        the_units_user_capabilities_and_limits_are_enough_and_given_up,
        every_capability_of_the_unit_is_needed,
        every_system_call_of_the_broker_is_allowed,
    ];
    all.map(Case::long)
}

fn unit() -> PathBuf {
    root().join("packaging/penstock-broker.service")
}

/// Values of a setting of the unit, one for each line.
fn values(name: &str) -> Vec<String> {
    let unit = text(&unit());
    let values = unit
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

fn value(name: &str) -> Result<String> {
    let values = values(name);
    values
        .into_iter()
        .next()
        .with_context(|| format!("no {name}= in the unit"))
}

fn need(program: &str, package: &str) -> Result<()> {
    if command(program, &["--version"]).output().is_err() {
        let reason = format!("{program} is missing; install it: apt-get install {package}");
        return Err(skip(&reason));
    }
    Ok(())
}

fn systemd_understands_the_unit(bed: &Bed) -> Result<()> {
    need("systemd-analyze", "systemd")?;
    // What it names must be there.
    let broker = program("broker").display().to_string();
    let unit = text(&unit()).replace("/usr/local/bin/penstock-broker", &broker);
    let unit = unit.replace("\n#LoadCredential", "\nLoadCredential");
    let has_credential = unit.lines().any(|line| line.starts_with("LoadCredential="));
    assert!(has_credential, "nothing shows how to hand on secrets");
    let path = bed.file("penstock-broker.service");
    fs::write(&path, unit)?;
    let mut verify = command("systemd-analyze", &["verify", "--man=no"]);
    let said = bed.run("verify", verify.arg(path))?.success()?.said();
    assert_eq!(said, "", "systemd objects to something");
    Ok(())
}

fn systemd_finds_little_exposed(bed: &Bed) -> Result<()> {
    need("systemd-analyze", "systemd")?;
    let arguments = ["security", "--offline=true", "--no-pager", EXPOSURE];
    let mut security = command("systemd-analyze", &arguments);
    bed.run("security", security.arg(unit()))?.success()?;
    Ok(())
}

/// The broker as the unit starts it: its user, capabilities and limits, without one capability if one is
/// given.
fn as_in_unit<'a>(bed: &'a Bed, without: Option<&str>) -> Result<BrokerSetup<'a>> {
    let all = value("AmbientCapabilities")?;
    assert_eq!(value("CapabilityBoundingSet")?, all);
    let kept = all.split_whitespace().filter(|one| Some(*one) != without);
    let kept = kept.filter_map(|one| one.strip_prefix("CAP_"));
    let kept: Vec<_> = kept.map(|one| format!("+{}", one.to_lowercase())).collect();
    let kept = kept.join(",");
    let nobody = user("nobody")?;
    bed.open_to_others()?;
    let copy = bed.file("penstock-broker");
    if !copy.exists() {
        fs::copy(program("broker"), &copy)?;
        fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
        fs::create_dir_all(bed.buffer_dir())?;
        fs::set_permissions(bed.buffer_dir(), Permissions::from_mode(0o755))?;
        fs::write(bed.file("broker-0.json"), "")?;
        for path in [bed.buffer_dir(), bed.file("broker-0.json")] {
            chown(path, Some(nobody.uid.as_raw()), None)?;
        }
    }
    let memlock = run(&["numfmt", "--from=iec", &value("LimitMEMLOCK")?])?;
    // Only root with CAP_SYS_RESOURCE may have more than there is.
    let (_, most) = getrlimit(Resource::RLIMIT_MEMLOCK)?;
    let memlock = memlock.trim().parse::<u64>()?.min(most);
    let memlock = format!("--memlock={memlock}:{memlock}");
    let (group, bounding) = (nobody.gid.to_string(), format!("-all,{kept}"));
    #[rustfmt::skip]
    let starter = [
        "prlimit", &memlock, "setpriv", "--reuid", "nobody", "--regid", &group, "--clear-groups",
        "--bounding-set", &bounding, "--inh-caps", &kept, "--ambient-caps", &kept, "--no-new-privs"];
    Ok(bed.broker(&XDP).program(copy).through(&starter))
}

fn the_units_user_capabilities_and_limits_are_enough_and_given_up(bed: &Bed) -> Result<()> {
    let broker = as_in_unit(bed, None)?.start()?;
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{}/task", broker.pid()))? {
        let status = text(&task?.path().join("status"));
        for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
            let kept = status.lines().find_map(|line| line.strip_prefix(set));
            assert_eq!(kept, Some(format!(":\t{NONE}").as_str()), "{set}");
        }
        threads += 1;
    }
    assert!(threads >= 4, "only {threads} threads were seen");
    publish(bed, "xdp", "first")?;
    publish(bed, "tcp", "second")?;
    broker.stop()?;
    Ok(())
}

fn every_capability_of_the_unit_is_needed(bed: &Bed) -> Result<()> {
    let all = value("AmbientCapabilities")?;
    assert!(!all.is_empty());
    for one in all.split_whitespace() {
        let broker = as_in_unit(bed, Some(one))?;
        broker.refuses(&format!("needs {one}, which"));
    }
    Ok(())
}

/// Adds a system call, or those of a group of systemd's and of the groups in it.
fn add_calls(name: &str, calls: &mut BTreeSet<String>) -> Result<()> {
    if !name.starts_with('@') {
        calls.insert(name.to_owned());
        return Ok(());
    }
    let listed = run(&["systemd-analyze", "syscall-filter", name])?;
    let is_name = |word: &&str| {
        let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-@_".contains(c);
        !word.is_empty() && word.chars().all(is_part) && *word != name
    };
    for member in listed.lines().map(str::trim).filter(is_name) {
        add_calls(member, calls)?;
    }
    Ok(())
}

/// System calls that the unit allows.
fn allowed() -> Result<BTreeSet<String>> {
    let (mut listed, mut denied) = (BTreeSet::new(), BTreeSet::new());
    for line in values("SystemCallFilter") {
        let (calls, names) = match line.strip_prefix('~') {
            Some(names) => (&mut denied, names),
            None => (&mut listed, line.as_str()),
        };
        for name in names.split_whitespace() {
            add_calls(name, calls)?;
        }
    }
    Ok(listed.difference(&denied).cloned().collect())
}

/// System calls in the summary of strace.
fn calls_in(summary: &str) -> BTreeSet<String> {
    let rows = summary
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let is_call = |row: &Vec<&str>| {
        let share = row
            .first()
            .is_some_and(|share| share.parse::<f64>().is_ok());
        share && row.last() != Some(&"total")
    };
    let names = rows
        .filter(is_call)
        .filter_map(|row| row.last().map(|&name| name.to_owned()));
    names.collect()
}

/// On both paths. The first of them, execve, is not the broker's.
fn every_system_call_of_the_broker_is_allowed(bed: &Bed) -> Result<()> {
    need("systemd-analyze", "systemd")?;
    need("strace", "strace")?;
    let allowed = allowed()?;
    assert!(
        allowed.len() > 100,
        "the list is not understood: {allowed:?}"
    );
    let summary = bed.file("calls");
    let path = summary.display().to_string();
    // As root: the calls are the same, and a traced program gets no ambient capabilities.
    let strace = ["strace", "-D", "-f", "-qq", "-c", "-o", &path];
    let options = with(&XDP, &["--workers", "2", "--rcvbuf-force"]);
    let broker = bed.broker(&options).through(&strace).start()?;
    publish(bed, "xdp", "first")?;
    publish(bed, "tcp", "second")?;
    publish(bed, "xdp", "made-later")?;
    broker.stop()?;
    eventually("the summary of strace", || text(&summary).contains("total"));
    let mut made = calls_in(&text(&summary));
    assert!(made.contains("bpf"), "the calls were not seen: {made:?}");
    made.retain(|call| !OF_SYSFS.contains(&call.as_str()));
    let others: Vec<_> = made.difference(&allowed).collect();
    assert!(others.is_empty(), "the unit does not allow {others:?}");
    Ok(())
}
