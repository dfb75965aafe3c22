//! What the broker changes or advises, and how it is reverted.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use anyhow::Result;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, User};
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::broker::status_field;
use penstock_e2e::commands::read_json;
use penstock_e2e::second_link::SecondLink;
use penstock_e2e::wait::becomes;
use penstock_e2e::{Broker, Case, cases, eventually};

use crate::bench::{
    assert_deferred_becomes, assert_quiet, deferred, has_notes, publish, queues, restore, restorer,
    restorers, says, xdp,
};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        nothing_is_said_or_done_when_all_is_well,
        deferred_interrupts_are_set_and_reverted_after_every_signal,
        values_that_somebody_chose_stay,
        the_restoring_process_keeps_net_admin_only_and_outlives_signals,
        after_both_are_killed_the_next_broker_reverts,
        after_both_are_killed_a_command_reverts,
        another_interface_of_the_same_name_is_left_alone,
        without_configure_nic_the_commands_are_printed,
        configure_nic_removes_queues_and_adds_them_again,
        missing_queues_are_refused_or_added,
        queues_added_while_the_broker_runs_are_reported,
        changes_before_a_failure_are_reverted,
        an_error_after_the_first_thread_reverts_and_is_reported,
        without_permission_the_commands_are_printed,
    ]
}

const DEFERRED: &str = "2 200000";

fn nothing_is_said_or_done_when_all_is_well(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--configure-nic"]))?;
    publish(bed, "xdp", &[])?;
    assert!(restorers(&broker).is_empty());
    assert_quiet(&broker.stop()?.log, "WARN|ethtool|revert");
    Ok(())
}

fn deferred_interrupts_are_set_and_reverted_after_every_signal(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGKILL] {
        let broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
        assert_eq!(deferred(bed), DEFERRED);
        publish(bed, "xdp", &[])?;
        broker.end(signal)?;
        assert_deferred_becomes(bed, "0 0");
        eventually("the notes are removed", || !has_notes(bed));
    }
    // A broker that starts at once finds the settings reverted, and applies them again.
    bed.start_broker(&xdp(&["--busy-poll", "64"]))?
        .end(libc::SIGKILL)?;
    let broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
    assert_eq!(deferred(bed), DEFERRED);
    broker.stop()?;
    assert_eq!(deferred(bed), "0 0");
    Ok(())
}

fn values_that_somebody_chose_stay(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let script = "echo 7 >/sys/class/net/eth1/napi_defer_hard_irqs
        echo 30000 >/sys/class/net/eth1/gro_flush_timeout";
    bed.broker_shell(script)?;
    let broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
    assert_eq!(deferred(bed), "7 30000");
    broker.stop()?;
    assert_eq!(deferred(bed), "7 30000");
    Ok(())
}

fn the_restoring_process_keeps_net_admin_only_and_outlives_signals(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    // The harness starts each program in a process group of its own.
    let mut broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
    let pid = restorer(&broker);
    let net_admin = "0000000000001000";
    becomes("its capabilities", net_admin.to_owned(), || {
        status_field(pid, "CapPrm")
    });
    assert_eq!(status_field(pid, "CapEff"), net_admin);
    assert_eq!(status_field(pid, "NoNewPrivs"), "1");
    for set in ["CapEff", "CapPrm"] {
        assert_eq!(
            broker.status_field(set),
            "0000000000000000",
            "{set} of the broker"
        );
    }
    let pid = Pid::from_raw(pid.cast_signed());
    kill(pid, Signal::SIGTERM)?;
    kill(pid, Signal::SIGHUP)?;
    // Ctrl-C goes to the whole group.
    killpg(Pid::from_raw(broker.pid().cast_signed()), Signal::SIGINT)?;
    assert!(broker.wait()?.success(), "{}", broker.log());
    assert_eq!(deferred(bed), "0 0");
    Ok(())
}

/// A broker that changed its interface. The process that would revert the changes was killed.
fn without_restorer(bed: &Bed) -> Result<Broker> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--busy-poll", "64"]))?;
    bed.broker(&["--restore-nic", "eth1"])
        .refuses("a broker is using eth1");
    assert_eq!(deferred(bed), DEFERRED);
    let restorer = Pid::from_raw(restorer(&broker).cast_signed());
    kill(restorer, Signal::SIGKILL)?;
    Ok(broker)
}

fn after_both_are_killed_the_next_broker_reverts(bed: &Bed) -> Result<()> {
    let broker = without_restorer(bed)?;
    broker.end(libc::SIGKILL)?;
    assert_eq!(deferred(bed), DEFERRED);
    assert!(has_notes(bed), "nothing tells how to undo it");
    let broker = bed.start_broker(&xdp(&[]))?;
    broker.assert_said("reverting the changes of an earlier broker");
    assert_eq!(deferred(bed), "0 0");
    broker.stop()?;
    assert!(!has_notes(bed));
    Ok(())
}

fn after_both_are_killed_a_command_reverts(bed: &Bed) -> Result<()> {
    let broker = without_restorer(bed)?;
    // Without that process, the broker can only say so.
    let log = broker.end(libc::SIGTERM)?;
    let wanted = "ended with signal: 9.*; run penstock-broker --restore-nic eth1";
    penstock_e2e::commands::assert_says(&log, wanted);
    assert_eq!(deferred(bed), DEFERRED);
    assert!(has_notes(bed), "nothing tells how to undo it");
    restore(bed)?;
    assert_eq!(deferred(bed), "0 0");
    let said = restore(bed)?;
    assert!(said.contains("nothing to revert"), "{said}");
    assert!(!has_notes(bed));
    Ok(())
}

/// The interface is another one by now, and has what its owner gave it.
fn another_interface_of_the_same_name_is_left_alone(bed: &Bed) -> Result<()> {
    let broker = without_restorer(bed)?;
    broker.end(libc::SIGKILL)?;
    bed.remove_second_link()?;
    bed.add_second_link()?;
    bed.broker_shell("echo 5 >/sys/class/net/eth1/napi_defer_hard_irqs")?;
    restore(bed)?;
    assert_eq!(deferred(bed), "5 0");
    assert!(!has_notes(bed));
    Ok(())
}

fn without_configure_nic_the_commands_are_printed(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let broker = bed.start_broker(&xdp(&["--queues", "0,1"]))?;
    broker.assert_said("WARN .*other queues than 0, 1.*run: ethtool -L eth1 rx 2");
    broker.assert_said("configure-nic makes these changes");
    assert_eq!(queues(bed), 4);
    broker.stop()?;
    assert_eq!(queues(bed), 4);
    let broker = bed.start_broker(&xdp(&["--queues", "2"]))?;
    broker.assert_said(r"driver \(veth\) steers nothing; leave --queues out");
    broker.stop()?;
    Ok(())
}

fn configure_nic_removes_queues_and_adds_them_again(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    for signal in [libc::SIGTERM, libc::SIGKILL] {
        let arguments = ["--queues", "0,1", "--workers", "2", "--configure-nic"];
        let broker = bed.start_broker(&xdp(&arguments))?;
        broker.assert_said("ethtool -L eth1 rx 2; reverted at the end");
        assert_eq!(queues(bed), 2);
        publish(bed, "xdp", &[])?;
        broker.end(signal)?;
        becomes("queues", 4, || queues(bed));
    }
    Ok(())
}

fn missing_queues_are_refused_or_added(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    eventually("the link takes fewer queues", || {
        bed.broker_shell("ethtool -L eth1 rx 2").is_ok()
    });
    let advice = "no receive queue 3 yet; run ethtool -L eth1 rx 4, or use --configure-nic";
    bed.broker(&xdp(&["--queues", "0-3"])).refuses(advice);
    assert_eq!(queues(bed), 2);
    let broker = bed.start_broker(&xdp(&["--queues", "0-3", "--configure-nic"]))?;
    assert_eq!(queues(bed), 4);
    publish(bed, "xdp", &[])?;
    broker.stop()?;
    assert_eq!(queues(bed), 2);
    let broker = bed.start_broker(&xdp(&["--workers", "2", "--configure-nic"]))?;
    assert_eq!(queues(bed), 2);
    broker.stop()?;
    bed.broker(&xdp(&["--queues", "4", "--configure-nic"]))
        .refuses("no receive queue 4: it has 2, numbered from 0, and can have 4");
    Ok(())
}

/// Somebody changes the interface while the broker serves all of its queues.
fn queues_added_while_the_broker_runs_are_reported(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    bed.broker_shell("ethtool -L eth1 rx 2")?;
    let broker = bed.start_broker(&xdp(&[]))?;
    bed.broker_shell("ethtool -L eth1 rx 4")?;
    says(
        &broker,
        "eth1 now has 4 receive queues, but only 2 have a socket",
    );
    publish(bed, "xdp", &[])?;
    broker.stop()?;
    Ok(())
}

/// The other end sends on all of its queues, so that fewer cannot have a program.
fn changes_before_a_failure_are_reverted(bed: &Bed) -> Result<()> {
    bed.add_link(SecondLink {
        publisher_queues: 4,
        ..SecondLink::default()
    })?;
    let said = bed
        .broker(&xdp(&["--queues", "0", "--configure-nic"]))
        .refuses("as many receive queues as its other end has transmit queues");
    assert!(said.contains("reverted: ethtool -L eth1 rx 4"), "{said}");
    assert_eq!(queues(bed), 4);
    assert!(!has_notes(bed));
    Ok(())
}

/// A user with capabilities, but without the files of the interface.
fn an_error_after_the_first_thread_reverts_and_is_reported(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    let report = bed.file("failed.json");
    let report_to = report.display().to_string();
    // A worker cannot be pinned to this core. By then the interface is configured.
    let error = "cannot pin a worker to core 1023";
    bed.broker(&xdp(&["--busy-poll", "64", "--cpus", "1023"]))
        .with(&["--report", &report_to])
        .refuses(error);
    assert_eq!(deferred(bed), "0 0");
    assert!(!has_notes(bed));
    let report = read_json(&report)?;
    assert!(
        report["ended_by"]
            .as_str()
            .unwrap_or_default()
            .starts_with(error)
    );
    assert_eq!(report["xdp"]["interface"], "eth1");
    Ok(())
}

fn without_permission_the_commands_are_printed(bed: &Bed) -> Result<()> {
    bed.add_second_link()?;
    bed.open_to_others()?;
    let nobody = User::from_name("nobody")?.expect("a user nobody");
    fs::create_dir_all(bed.buffer_dir())?;
    fs::write(bed.file("broker-0.json"), "")?;
    for path in [bed.buffer_dir(), bed.file("broker-0.json")] {
        chown(path, Some(nobody.uid.as_raw()), None)?;
    }
    let copy = bed.file("penstock-broker");
    fs::copy(program("broker"), &copy)?;
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
    let group = nobody.gid.to_string();
    let capabilities = "+bpf,+net_admin,+net_raw,+ipc_lock";
    #[rustfmt::skip]
    let starter = ["setpriv", "--reuid", "nobody", "--regid", &group, "--clear-groups",
        "--inh-caps", capabilities, "--ambient-caps", capabilities];
    let as_nobody = bed.broker(&xdp(&[])).program(copy).through(&starter);
    let broker = as_nobody.clone().with(&["--busy-poll", "64"]).start()?;
    broker.assert_said(
        "as root: echo 2 > /sys/class/net/eth1/napi_defer_hard_irqs; \
         echo 200000 > /sys/class/net/eth1/gro_flush_timeout",
    );
    publish(bed, "xdp", &[])?;
    broker.stop()?;
    as_nobody
        .with(&["--queues", "0", "--configure-nic"])
        .refuses("configure-nic: cannot configure eth1.*/run/penstock.*permission denied");
    Ok(())
}
