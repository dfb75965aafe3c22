//! The preflight: what it says of interfaces and of processes in different states.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use nix::sys::utsname::uname;
use nix::unistd::User;
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::commands::{assert_no_crash, assert_says, command};
use penstock_e2e::second_link::SecondLink;
use penstock_e2e::{Case, cases, run, skip};
use penstock_testbed::netns::handle_path;
use serde_json::Value;

fn main() -> ExitCode {
    let all = cases![
        several_queues_and_nothing_fails,
        one_queue,
        locked_memory_that_it_advises_is_what_the_broker_needs,
        large_mtus,
        programs_of_others,
        an_interface_that_is_down_or_has_no_address,
        deferred_interrupts,
        an_ordinary_user,
        root_without_capabilities,
        interfaces_are_listed,
        wrong_usage,
    ];
    run(all.map(Case::long))
}

/// A link with this number of queues at both ends.
fn add_link(bed: &Bed, queues: u32, mtu: u32) -> Result<()> {
    bed.add_link(SecondLink {
        broker_queues: queues,
        publisher_queues: queues,
        mtu,
    })
}

/// The doctor's report about eth1, run through `starter`; it finds failures, or none.
fn doctor(bed: &Bed, starter: &[&str], has_failures: bool) -> Result<Value> {
    examine(
        bed,
        starter,
        &program("lab"),
        &["--iface", "eth1"],
        has_failures,
    )
}

fn examine(
    bed: &Bed,
    starter: &[&str],
    lab: &Path,
    arguments: &[&str],
    has_failures: bool,
) -> Result<Value> {
    let mut command: Command = match starter.split_first() {
        None => bed.in_broker_ns(lab, &[]),
        Some((first, others)) => {
            let mut command = bed.in_broker_ns(first, others);
            command.arg(lab);
            command
        }
    };
    command.args(["doctor", "--format", "json"]).args(arguments);
    let ended = bed.run("doctor", &mut command)?;
    assert_no_crash(&ended.stderr);
    let report = ended.json()?;
    assert_eq!(
        ended.status.code(),
        Some(i32::from(has_failures)),
        "{report}"
    );
    assert_eq!(report["fail"].as_u64() > Some(0), has_failures, "{report}");
    Ok(report)
}

/// All checks of a report.
fn checks(report: &Value) -> impl Iterator<Item = &Value> {
    let parts = [&report["host"], &report["interface"]["checks"]];
    parts
        .into_iter()
        .flat_map(|part| part.as_array().into_iter().flatten())
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let found = checks(report).find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name} in {report}"))
}

/// That check's level, and something in what it found or advises.
#[track_caller]
fn says(report: &Value, name: &str, level: &str, regex: &str) {
    let check = check(report, name);
    assert_eq!(check["level"], level, "{check}");
    let text = |field: &str| check[field].as_str().unwrap_or("null").to_owned();
    assert_says(&format!("{}\n{}", text("found"), text("fix")), regex);
}

/// Runs the command that a check advises.
fn run_advice(bed: &Bed, report: &Value, name: &str) -> Result<()> {
    let fix = check(report, name)["fix"].as_str().context("advice")?;
    bed.broker_shell(fix).map(drop)
}

fn several_queues_and_nothing_fails(bed: &Bed) -> Result<()> {
    add_link(bed, 4, 1500)?;
    let report = doctor(bed, &[], false)?;
    let release = uname()?.release().to_string_lossy().into_owned();
    says(
        &report,
        "kernel",
        "ok",
        &release.replace('.', "[.]").replace('+', "[+]"),
    );
    says(&report, "capabilities", "ok", ".");
    says(&report, "link", "ok", "veth");
    says(&report, "addresses", "ok", r"10\.215\.0\.2");
    says(&report, "xdp_program", "ok", ".");
    says(&report, "native_xdp", "ok", ".");
    says(&report, "zero_copy", "warn", "copy mode");
    says(&report, "queues", "ok", "4 of at most 4");
    says(&report, "steering", "warn", "leave --queues out");
    says(&report, "mtu", "ok", "in one buffer");
    says(&report, "interrupts", "ok", ".");
    let helpless = checks(&report).find(|check| check["level"] != "ok" && check["fix"].is_null());
    assert_eq!(helpless, None, "something is wrong, without advice");
    Ok(())
}

fn one_queue(bed: &Bed) -> Result<()> {
    add_link(bed, 1, 1500)?;
    let report = doctor(bed, &[], false)?;
    says(&report, "queues", "ok", "1 of at most 1");
    says(&report, "steering", "ok", ".");
    Ok(())
}

/// The limit counts only without CAP_IPC_LOCK.
fn locked_memory_that_it_advises_is_what_the_broker_needs(bed: &Bed) -> Result<()> {
    add_link(bed, 1, 1500)?;
    let limited = |limit| ["prlimit", limit];
    let without = |limit| ["prlimit", limit, "setpriv", "--bounding-set", "-ipc_lock"];
    let small = "--memlock=65536:65536";
    says(
        &doctor(bed, &limited(small), false)?,
        "memlock",
        "ok",
        "CAP_IPC_LOCK",
    );
    says(
        &doctor(bed, &without(small), true)?,
        "memlock",
        "fail",
        "ulimit -l 2560",
    );
    let advised = without("--memlock=2621440:2621440");
    says(&doctor(bed, &advised, false)?, "memlock", "ok", ".");
    let broker = bed.broker(&["--mode", "xdp", "--iface", "eth1"]);
    broker.clone().through(&advised).start()?.stop()?;
    // A page less.
    let less = without("--memlock=2617344:2617344");
    broker.through(&less).refuses("limit of locked memory");
    Ok(())
}

fn large_mtus(bed: &Bed) -> Result<()> {
    add_link(bed, 2, 9000)?;
    says(&doctor(bed, &[], false)?, "mtu", "ok", "several buffers");
    Ok(())
}

fn programs_of_others(bed: &Bed) -> Result<()> {
    add_link(bed, 2, 1500)?;
    let broker = bed.broker(&["--mode", "xdp", "--iface", "eth1"]);
    let running = broker.start()?;
    says(
        &doctor(bed, &[], false)?,
        "xdp_program",
        "warn",
        "another penstock-broker",
    );
    running.stop()?;
    says(&doctor(bed, &[], false)?, "xdp_program", "ok", ".");
    // Any other program: one that passes all packets.
    if command("clang", &["--version"]).output().is_err() {
        return Err(skip("clang is missing"));
    }
    let (source, object) = (bed.file("pass.c"), bed.file("pass.o"));
    let text = "__attribute__((section(\"xdp\"))) int pass(void *c) { return 2; }
        char _license[] __attribute__((section(\"license\"))) = \"GPL\";\n";
    fs::write(&source, text)?;
    let mut clang = command("clang", &["-O2", "-g", "-target", "bpf", "-c"]);
    bed.run("clang", clang.arg(&source).arg("-o").arg(&object))?
        .success()?;
    let object = object.to_str().context("a plain path")?;
    bed.broker_ip(&[
        "link",
        "set",
        "dev",
        "eth1",
        "xdpgeneric",
        "obj",
        object,
        "sec",
        "xdp",
    ])?;
    let remove = "ip link set dev eth1 xdpgeneric off";
    says(&doctor(bed, &[], true)?, "xdp_program", "fail", remove);
    let without_admin = ["setpriv", "--bounding-set", "-sys_admin"];
    says(
        &doctor(bed, &without_admin, true)?,
        "xdp_program",
        "fail",
        ".",
    );
    broker.refuses(&format!("XDP program .*{remove}"));
    bed.broker_ip(&["link", "set", "dev", "eth1", "xdpgeneric", "off"])?;
    doctor(bed, &[], false)?;
    Ok(())
}

fn an_interface_that_is_down_or_has_no_address(bed: &Bed) -> Result<()> {
    add_link(bed, 2, 1500)?;
    bed.broker_ip(&["link", "set", "eth1", "down"])?;
    let report = doctor(bed, &[], true)?;
    says(&report, "link", "fail", ".");
    run_advice(bed, &report, "link")?;
    bed.broker_ip(&["addr", "flush", "dev", "eth1"])?;
    says(&doctor(bed, &[], true)?, "addresses", "fail", "ip addr add");
    Ok(())
}

fn deferred_interrupts(bed: &Bed) -> Result<()> {
    add_link(bed, 1, 1500)?;
    bed.broker_shell("echo 2 >/sys/class/net/eth1/napi_defer_hard_irqs")?;
    let report = doctor(bed, &[], false)?;
    says(&report, "interrupts", "warn", ".");
    run_advice(bed, &report, "interrupts")?;
    says(&doctor(bed, &[], false)?, "interrupts", "ok", ".");
    Ok(())
}

/// What can be seen, and file capabilities.
fn an_ordinary_user(bed: &Bed) -> Result<()> {
    add_link(bed, 2, 1500)?;
    bed.open_to_others()?;
    for name in ["lab", "broker", "publisher", "subscriber"] {
        let copy = bed.file(&format!("penstock-{name}"));
        fs::copy(program(name), &copy)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    }
    let (lab, copy) = (bed.file("penstock-lab"), bed.file("penstock-broker"));
    let copy = copy.to_str().context("a plain path")?;
    let group = User::from_name("nobody")?
        .context("a user nobody")?
        .gid
        .to_string();
    let nobody = [
        "setpriv",
        "--reuid",
        "nobody",
        "--regid",
        &group,
        "--clear-groups",
    ];
    let eth1 = ["--iface", "eth1"];
    let report = examine(bed, &nobody, &lab, &eth1, false)?;
    says(
        &report,
        "capabilities",
        "warn",
        &format!("sudo setcap .* {copy}"),
    );
    says(&report, "link", "ok", ".");
    // Somebody's program, but not whose.
    let broker = bed.start_broker(&["--mode", "xdp", "--iface", "eth1"])?;
    let report = examine(bed, &nobody, &lab, &eth1, true)?;
    says(&report, "xdp_program", "fail", "only root may see");
    let not_seen = report["not_seen"].as_array().context("what was not seen")?;
    let is_program = |text: &&Value| {
        let text = text.as_str().unwrap_or_default();
        text.split_once("XDP program")
            .is_some_and(|(_, rest)| rest.contains("sudo"))
    };
    assert_eq!(
        not_seen.iter().filter(is_program).count(),
        1,
        "{not_seen:?}"
    );
    broker.stop()?;
    if command("setcap", &["-h"]).output().is_err() {
        return Err(skip("setcap is missing; install libcap2-bin"));
    }
    // What it advises makes it ready.
    let capabilities = "cap_bpf,cap_net_admin,cap_net_raw,cap_ipc_lock+ep";
    if !bed
        .run("setcap", &mut command("setcap", &[capabilities, copy]))?
        .status
        .success()
    {
        return Err(skip("no file capabilities in the test's folder"));
    }
    let limited = [&nobody[..], &["prlimit", "--memlock=65536:65536"]].concat();
    let report = examine(bed, &limited, &lab, &eth1, false)?;
    says(&report, "capabilities", "ok", copy);
    says(&report, "memlock", "ok", "CAP_IPC_LOCK");
    Ok(())
}

fn root_without_capabilities(bed: &Bed) -> Result<()> {
    let starter = ["setpriv", "--bounding-set", "-bpf,-sys_admin"];
    let report = examine(bed, &starter, &program("lab"), &["--iface", "eth0"], true)?;
    says(&report, "capabilities", "fail", "cap_bpf");
    Ok(())
}

/// Without `--iface`.
fn interfaces_are_listed(bed: &Bed) -> Result<()> {
    add_link(bed, 4, 1500)?;
    let report = examine(bed, &[], &program("lab"), &[], false)?;
    let interfaces = report["interfaces"].as_array().context("interfaces")?;
    let listed: Vec<_> = interfaces
        .iter()
        .map(|i| {
            format!(
                "{} {} {} {}",
                i["name"], i["driver"], i["queues"], i["native_xdp"]
            )
        })
        .collect();
    assert_eq!(
        listed,
        ["\"eth0\" \"veth\" 1 true", "\"eth1\" \"veth\" 4 true"]
    );
    let text = bed
        .run("doctor", &mut bed.in_broker_ns(program("lab"), &["doctor"]))?
        .success()?
        .stdout;
    assert_says(
        &text,
        "(?m)^  eth1 +veth, up, MTU 1500, 4 queues, native XDP",
    );
    assert!(!text.contains('\u{1b}'), "colours in a file");
    Ok(())
}

fn wrong_usage(bed: &Bed) -> Result<()> {
    let mut unknown = bed.in_broker_ns(program("lab"), &["doctor", "--iface", "eth9"]);
    bed.refuses("no interface eth9 here", &mut unknown);
    bed.refuses(
        "possible values: text, json",
        &mut bed.lab(&["doctor", "--format", "xml"]),
    );
    // /sys may belong to another namespace.
    let mut command = command("nsenter", &[]);
    command.arg(format!("--net={}", handle_path(bed.broker_ns()).display()));
    let ended = bed.run(
        "nsenter",
        command
            .arg(program("lab"))
            .args(["doctor", "--iface", "eth0"]),
    )?;
    assert_says(&ended.success()?.stdout, "(?m)^Interface eth0");
    Ok(())
}
