//! Ctrl-C leaves nothing behind.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::Background;
use penstock_e2e::{Case, cases, cleanup, eventually};
use penstock_testbed::command::run;
use penstock_testbed::netns::file_names;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        an_interrupt_while_limits_are_measured,
        an_interrupt_while_a_path_is_measured,
    ]
}

/// Interrupts the lab once the condition holds.
fn interrupted_once(bed: &Bed, condition: impl Fn(&Background) -> bool) -> Result<()> {
    let mut command = bed.lab(&[
        "compare",
        "--runs",
        "1",
        "--profile",
        "wire",
        "--mtu",
        "1500",
    ]);
    let lab = bed.background("lab", command.arg("--results").arg(bed.file("results")))?;
    let pid = lab.pid();
    cleanup::note_lab(pid);
    eventually("the lab is at work", || condition(&lab));
    thread::sleep(Duration::from_millis(500));
    lab.signal(libc::SIGINT);
    let ended = lab.wait()?;
    cleanup::forget_lab(pid);
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    for (dir, start) in [
        ("/run/netns", format!("penstock-{pid}-")),
        ("/dev/shm", format!("penstock-{pid}-shm")),
    ] {
        let names = file_names(dir.as_ref())?;
        let left: Vec<_> = names
            .iter()
            .filter(|name| name.starts_with(&start))
            .collect();
        assert!(left.is_empty(), "left in {dir}: {left:?}");
    }
    Ok(())
}

fn an_interrupt_while_limits_are_measured(bed: &Bed) -> Result<()> {
    interrupted_once(bed, |lab| {
        let namespace = format!("penstock-{}-b0", lab.pid());
        let link = run(&["ip", "-n", &namespace, "link", "show", "eth0"]);
        link.is_ok_and(|link| link.contains("xdp"))
    })
}

fn an_interrupt_while_a_path_is_measured(bed: &Bed) -> Result<()> {
    interrupted_once(bed, |lab| lab.stderr().contains("full speed, run 1/1: tcp"))
}
