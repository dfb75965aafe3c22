//! What changes while a publisher sends: everything arrives once, in order.

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::{Broker, Case, cases};

use crate::{TX, XDP, assert_sent_over};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        the_interface_gets_another_hardware_address,
        the_broker_is_killed_and_restarted,
    ]
}

fn goes_on(bed: &Bed, moves: u64, disturb: impl FnOnce(Broker) -> Result<Broker>) -> Result<()> {
    let broker = start(bed)?;
    let arguments = ["--brokers", BROKER, "--rate", "1MB", "--batch-size", "2KiB"];
    let publisher = bed.start_numbered(&[&TX[..], &arguments].concat())?;
    bed.until_messages("penstock", 1000);
    let broker = disturb(broker)?;
    bed.until_it_goes_further("penstock");
    let input = publisher.input().to_owned();
    let (report, _) = publisher.finish()?;
    let acked = report["messages_acked"].as_u64().expect("a count");
    assert_sent_over(&report, "af_xdp", acked);
    assert_eq!(report["brokers"][0]["streams"][0]["moves"], moves);
    broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &input);
    Ok(())
}

fn start(bed: &Bed) -> Result<Broker> {
    bed.start_broker(&[&XDP[..], &["--topic", "penstock"]].concat())
}

/// ACKs go to the hardware address that packets came from: it must be the new one soon.
fn the_interface_gets_another_hardware_address(bed: &Bed) -> Result<()> {
    goes_on(bed, 0, |broker| {
        bed.publisher_ip(&["link", "set", "dev", "b0", "address", "02:00:00:00:77:01"])?;
        Ok(broker)
    })
}

fn the_broker_is_killed_and_restarted(bed: &Bed) -> Result<()> {
    goes_on(bed, 1, |broker| {
        broker.end(libc::SIGKILL)?;
        start(bed)
    })
}
