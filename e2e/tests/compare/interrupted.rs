//! Ctrl-C leaves nothing behind.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::commands::Background;
use penstock_e2e::lab::left_by;
use penstock_e2e::{Case, cases};
use penstock_testbed::command::run;

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        an_interrupt_while_limits_are_measured,
        an_interrupt_while_a_path_is_measured,
    ]
}

/// Interrupts the lab once the condition holds.
fn interrupted_once(bed: &Bed, condition: impl Fn(&Background) -> bool) -> Result<()> {
    #[rustfmt::skip]
    let mut lab = bed.start_lab(&[
        "compare", "--runs", "1", "--profile", "wire", "--mtu", "1500"])?;
    lab.until("the lab is at work", condition);
    thread::sleep(Duration::from_millis(500));
    let pid = lab.pid();
    let ended = lab.end(libc::SIGINT)?;
    assert_eq!(ended.status.code(), Some(130), "{}", ended.said());
    assert_eq!(left_by(pid), Vec::<String>::new());
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
