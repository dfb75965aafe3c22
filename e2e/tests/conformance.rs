//! The broker against a second, independent implementation of the protocol, written from docs/protocol.md in
//! another language: what that publishes over either path is in the log, byte for byte.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;
use penstock_e2e::{cases, run};

fn main() -> ExitCode {
    run(cases![
        another_implementation_over_tcp,
        another_implementation_over_xdp
    ])
}

fn another_implementation_over_tcp(bed: &Bed) -> Result<()> {
    published(bed, "tcp", &["--verify-on-receive"])
}

fn another_implementation_over_xdp(bed: &Bed) -> Result<()> {
    published(bed, "xdp", &["--mode", "xdp", "--iface", "eth0"])
}

fn published(bed: &Bed, path: &str, broker: &[&str]) -> Result<()> {
    let broker = bed.start_broker(broker)?;
    let publisher = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/conformance/publisher.py");
    let publisher = publisher.to_str().context("a plain path")?;
    let arguments = [publisher, path, "10.214.0.2", "1214", "conformance"];
    let ended = bed.run("second", &mut bed.in_publisher_ns("python3", &arguments))?;
    let printed = ended.success()?.stdout;
    let (session, lines) = printed.split_once('\n').context("a session, then lines")?;
    let stopped = broker.stop()?;
    let connection = &stopped.report["connections"][0];
    assert_eq!(connection["path"], path);
    assert_eq!(connection["session"], session);
    assert_eq!(connection["batches"], 40);
    let mut read = bed.subscriber(&["--from", "start", "--verify", "--output", "lines"]);
    let read = bed.run(
        "subscriber",
        read.arg("--path").arg(bed.log_of("conformance")),
    )?;
    assert!(
        read.success()?.stdout == lines,
        "the log differs from what was published"
    );
    Ok(())
}
