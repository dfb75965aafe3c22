//! Least privilege: what the broker needs, what it keeps, what works afterwards; and what its systemd unit
//! allows.

#[path = "privileges/systemd_unit.rs"]
mod systemd_unit;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::unistd::User;
use penstock_e2e::bed::{BROKER, Bed, program};
use penstock_e2e::commands::{command, matches, paths, text};
use penstock_e2e::{Broker, BrokerSetup, cases, run, skip};

const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];
const NET_ADMIN: &str = "0000000000001000";
const NONE: &str = "0000000000000000";

fn main() -> ExitCode {
    let own = cases![
        no_thread_keeps_a_capability_over_xdp,
        no_thread_keeps_a_capability_over_tcp,
        no_program_stays_attached_after_kill_9,
        the_accept_loop_keeps_net_admin_for_forced_buffers,
        another_user_and_its_logs,
        a_directory_of_another_user_is_refused_at_once,
        a_missing_capability_is_named,
        mode_auto_without_a_capability_serves_over_tcp,
        file_capabilities_instead_of_root,
        ambient_capabilities_instead_of_root,
    ];
    run(own.into_iter().chain(systemd_unit::cases()))
}

fn with<'a>(first: &[&'a str], further: &[&'a str]) -> Vec<&'a str> {
    [first, further].concat()
}

fn user(name: &str) -> Result<User> {
    User::from_name(name)?.with_context(|| format!("a user {name}"))
}

/// Capabilities of every thread are none, those of the accept loop `accept`; nothing can be gained any
/// more.
#[track_caller]
fn assert_threads(broker: &Broker, name: &str, accept: &str) {
    let user = user(name).expect("a user");
    let ids = |id: u32| {
        [
            id.to_string(),
            id.to_string(),
            id.to_string(),
            id.to_string(),
        ]
        .join("\t")
    };
    let tasks = fs::read_dir(format!("/proc/{}/task", broker.pid())).expect("it runs");
    let mut seen = 0;
    for task in tasks.flatten() {
        let name = text(&task.path().join("comm")).trim().to_owned();
        let status = text(&task.path().join("status"));
        let field = |field: &str| {
            let mut lines = status.lines().filter_map(|line| line.split_once(":\t"));
            lines
                .find(|(its, _)| *its == field)
                .map(|(_, value)| value.to_owned())
        };
        let effective = if name == "accept" { accept } else { NONE };
        let wanted = [
            ("CapEff", effective.to_owned()),
            ("CapPrm", effective.to_owned()),
            ("CapInh", NONE.to_owned()),
            ("CapAmb", NONE.to_owned()),
            ("NoNewPrivs", "1".to_owned()),
            ("Uid", ids(user.uid.as_raw())),
            ("Gid", ids(user.gid.as_raw())),
        ];
        for (what, value) in wanted {
            assert_eq!(field(what), Some(value), "{what} of thread {name}");
        }
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} threads were seen");
}

/// 8 MiB get through over a path.
fn publish(bed: &Bed, path: &str, topic: &str) -> Result<()> {
    #[rustfmt::skip]
    let report = bed.publish(&[
        "--brokers", BROKER, "--mode", path, "--topic", topic, "--total-size", "8MiB"])?;
    assert_eq!(report["messages_acked"], 8192, "over {path}");
    assert_eq!(paths(&report), path);
    Ok(())
}

fn no_thread_keeps_a_capability_over_xdp(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&with(&XDP, &["--workers", "1", "--busy-poll", "64"]))?;
    assert_threads(&broker, "root", NONE);
    publish(bed, "xdp", "penstock")?;
    publish(bed, "tcp", "penstock")?;
    publish(bed, "xdp", "made-later")?;
    let steered = broker.stop()?.count("/xdp/outcomes/steered");
    assert!(
        steered > 1000,
        "the report is without the program's counts: {steered}"
    );
    assert_eq!(bed.programs_attached()?, 0);
    Ok(())
}

fn no_thread_keeps_a_capability_over_tcp(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&["--workers", "2"])?;
    assert_threads(&broker, "root", NONE);
    publish(bed, "tcp", "penstock")?;
    broker.stop()?;
    Ok(())
}

fn no_program_stays_attached_after_kill_9(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&XDP)?;
    assert_eq!(bed.programs_attached()?, 1);
    broker.end(libc::SIGKILL)?;
    assert_eq!(bed.programs_attached()?, 0);
    // The queue is free again.
    let broker = bed.start_broker(&XDP)?;
    publish(bed, "xdp", "penstock")?;
    broker.stop()?;
    Ok(())
}

/// Each accepted socket takes it.
fn the_accept_loop_keeps_net_admin_for_forced_buffers(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&with(&XDP, &["--rcvbuf", "64MiB", "--rcvbuf-force"]))?;
    assert_threads(&broker, "root", NET_ADMIN);
    publish(bed, "tcp", "penstock")?;
    publish(bed, "xdp", "penstock")?;
    let stopped = broker.stop()?;
    let connections = stopped.report["connections"]
        .as_array()
        .context("connections")?;
    assert!(!connections.is_empty());
    for connection in connections {
        assert_eq!(connection["rcvbuf_effective"], 128 << 20);
    }
    Ok(())
}

/// `--user`, with its groups.
fn another_user_and_its_logs(bed: &Bed) -> Result<()> {
    let as_nobody = with(&XDP, &["--user", "nobody"]);
    let forced = ["--rcvbuf", "64MiB", "--rcvbuf-force"];
    let broker = bed.start_broker(&with(&as_nobody, &forced))?;
    assert_threads(&broker, "nobody", NET_ADMIN);
    let groups = bed
        .run("id", &mut command("id", &["-G", "nobody"]))?
        .success()?
        .stdout;
    assert_eq!(broker.status_field("Groups").trim(), groups.trim());
    publish(bed, "xdp", "penstock")?;
    publish(bed, "tcp", "made-later")?;
    broker.stop()?;
    let nobody = user("nobody")?.uid.as_raw();
    for path in [
        bed.buffer_dir(),
        bed.log_of("penstock"),
        bed.log_of("made-later"),
    ] {
        assert_eq!(
            fs::metadata(&path)?.uid(),
            nobody,
            "owner of {}",
            path.display()
        );
    }
    // The next broker continues them.
    let broker = bed.start_broker(&as_nobody)?;
    publish(bed, "xdp", "penstock")?;
    assert_eq!(broker.stop()?.report["topics"][0]["messages"], 16_384);
    Ok(())
}

fn a_directory_of_another_user_is_refused_at_once(bed: &Bed) -> Result<()> {
    let dir = bed.buffer_dir();
    fs::create_dir_all(&dir)?;
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o755))?;
    let shown = dir.display();
    let as_nobody = bed.broker(&["--user", "nobody"]);
    as_nobody.refuses(&format!(
        "user nobody cannot create logs in {shown}, which belongs to root"
    ));
    let (nobody, root) = (user("nobody")?.uid.as_raw(), 0);
    chown(&dir, Some(nobody), None)?;
    bed.broker(&[]).refuses(&format!(
        "user root cannot create logs in {shown}, which belongs to nobody"
    ));
    let broker = as_nobody.start()?;
    publish(bed, "tcp", "penstock")?;
    broker.stop()?;
    chown(&dir, Some(root), None)?;
    bed.broker(&["--topic", "penstock"])
        .refuses("penstock.log: cannot open for writing");
    bed.broker(&["--user", "nobody-at-all"])
        .refuses("no user \"nobody-at-all\"");
    let missing = bed.file("none/report.json").display().to_string();
    bed.broker(&["--report", &missing]).refuses(&missing);
    Ok(())
}

/// Root without these capabilities is refused with something like `regex`, in one line.
#[track_caller]
fn without(bed: &Bed, lacking: &str, starter: &[&str], regex: &str, options: &[&str]) {
    let starter = [starter, &["setpriv", "--bounding-set", lacking]].concat();
    let said = bed.broker(options).through(&starter).refuses(regex);
    let others = |line: &&str| !line.is_empty() && !matches(line, " INFO |--auth-keys");
    assert_eq!(said.lines().filter(others).count(), 1, "{said}");
}

fn a_missing_capability_is_named(bed: &Bed) -> Result<()> {
    let all = "-net_raw,-net_admin,-bpf,-sys_admin";
    let wanted = r" needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, which.*setcap cap_bpf,cap_net_admin,cap_net_raw\+ep /";
    without(bed, "-bpf,-sys_admin", &[], " needs CAP_BPF, which", &XDP);
    without(bed, "-net_admin", &[], " needs CAP_NET_ADMIN, which", &XDP);
    without(bed, "-net_raw", &[], " needs CAP_NET_RAW, which", &XDP);
    without(bed, all, &[], wanted, &XDP);
    without(
        bed,
        "-net_admin",
        &[],
        "rcvbuf-force needs CAP_NET_ADMIN, which",
        &["--rcvbuf-force"],
    );
    without(
        bed,
        "-setuid",
        &[],
        "user needs CAP_SETUID, which",
        &["--user", "nobody"],
    );
    let limited = ["prlimit", "--memlock=65536:65536"];
    without(
        bed,
        "-ipc_lock",
        &limited,
        "limit of locked memory.*CAP_IPC_LOCK",
        &XDP,
    );
    Ok(())
}

/// A missing capability is no reason to stop then.
fn mode_auto_without_a_capability_serves_over_tcp(bed: &Bed) -> Result<()> {
    let starter = ["setpriv", "--bounding-set", "-net_raw"];
    let broker = bed
        .broker(&["--mode", "auto", "--iface", "eth0"])
        .through(&starter)
        .start()?;
    broker.assert_said("tcp only.*CAP_NET_RAW");
    publish(bed, "tcp", "penstock")?;
    broker.stop()?;
    Ok(())
}

/// A copy of the broker that an ordinary user can run, with places for what it writes.
fn as_nobody<'a>(bed: &'a Bed, further: &[&str]) -> Result<BrokerSetup<'a>> {
    bed.open_to_others()?;
    let nobody = user("nobody")?;
    let copy = bed.file("penstock-broker");
    fs::copy(program("broker"), &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    fs::create_dir_all(bed.buffer_dir())?;
    fs::write(bed.file("broker-0.json"), "")?;
    for path in [bed.buffer_dir(), bed.file("broker-0.json")] {
        chown(path, Some(nobody.uid.as_raw()), None)?;
    }
    let group = nobody.gid.to_string();
    let starter = [
        "setpriv",
        "--reuid",
        "nobody",
        "--regid",
        &group,
        "--clear-groups",
    ];
    Ok(bed
        .broker(&XDP)
        .program(copy)
        .through(&with(&starter, further)))
}

fn set_capabilities(bed: &Bed, capabilities: &str, path: &Path) -> Result<()> {
    if command("setcap", &["-h"]).output().is_err() {
        return Err(skip("setcap is missing; install libcap2-bin"));
    }
    let mut setcap = command("setcap", &[capabilities]);
    if !bed.run("setcap", setcap.arg(path))?.status.success() {
        return Err(skip("no file capabilities in the test's folder"));
    }
    Ok(())
}

fn file_capabilities_instead_of_root(bed: &Bed) -> Result<()> {
    let setup = as_nobody(bed, &[])?;
    let copy = bed.file("penstock-broker");
    setup.refuses("needs CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW");
    set_capabilities(
        bed,
        "cap_bpf,cap_net_admin,cap_net_raw,cap_ipc_lock+ep",
        &copy,
    )?;
    let broker = setup.clone().with(&["--busy-poll", "64"]).start()?;
    assert_threads(&broker, "nobody", NONE);
    publish(bed, "xdp", "penstock")?;
    publish(bed, "tcp", "made-later")?;
    let second = setup.clone().with(&["--listen", "0.0.0.0:1300"]);
    second.refuses("eth0 has another XDP program|another penstock-broker");
    broker.end(libc::SIGKILL)?;
    assert_eq!(bed.programs_attached()?, 0);
    // Three are enough where the limit of locked memory is.
    set_capabilities(bed, "cap_bpf,cap_net_admin,cap_net_raw+ep", &copy)
        .expect("they could be set before");
    let broker = setup.start()?;
    publish(bed, "xdp", "penstock")?;
    broker.stop()?;
    Ok(())
}

/// As a service manager gives them to its user.
fn ambient_capabilities_instead_of_root(bed: &Bed) -> Result<()> {
    let all = "+bpf,+net_admin,+net_raw,+ipc_lock";
    let broker = as_nobody(bed, &["--inh-caps", all, "--ambient-caps", all])?.start()?;
    assert_threads(&broker, "nobody", NONE);
    publish(bed, "xdp", "penstock")?;
    broker.stop()?;
    Ok(())
}
