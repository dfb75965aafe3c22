//! Streams after the death of their broker, and files of keys that change or that others may read.

use std::os::unix::fs::PermissionsExt;

use anyhow::Result;
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::commands::{assert_says, paths};
use penstock_e2e::{Case, cases, eventually};

use crate::access::expose;
use crate::bench::{Keys, XDP};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        a_stream_over_tcp_goes_on_after_kill_9,
        a_stream_over_xdp_goes_on_after_kill_9,
        a_stream_of_authenticated_packets_goes_on_after_kill_9,
        a_stream_of_authenticated_frames_goes_on_after_kill_9,
        without_its_key_a_stream_does_not_go_on,
        keys_are_read_again_on_sighup,
        files_that_others_may_read_are_refused,
    ]
}

/// kill -9 of the broker in the middle; the same key resumes the session.
fn goes_on(bed: &Bed, mode: &str, broker: &[&str]) -> Result<()> {
    let keys = Keys::make(bed)?;
    let options = [&["--topic", "penstock", "--auth-keys", &keys.file], broker].concat();
    let broker = bed.start_broker(&options)?;
    #[rustfmt::skip]
    let publisher = bed.start_numbered(&[
        "--brokers", BROKER, "--auth-key", &keys.eu, "--mode", mode, "--rate", "600KB",
        "--batch-size", "2KiB"])?;
    bed.until_messages("penstock", 1000);
    broker.end(libc::SIGKILL)?;
    let broker = bed.start_broker(&options)?;
    bed.until_it_goes_further("penstock");
    let input = publisher.input().to_owned();
    let (report, _) = publisher.finish()?;
    assert_eq!(report["brokers"][0]["streams"][0]["moves"], 1);
    assert_eq!(paths(&report), mode);
    broker.stop()?;
    bed.assert_log_has_lines_of("penstock", &input);
    Ok(())
}

fn a_stream_over_tcp_goes_on_after_kill_9(bed: &Bed) -> Result<()> {
    goes_on(bed, "tcp", &[])
}

fn a_stream_over_xdp_goes_on_after_kill_9(bed: &Bed) -> Result<()> {
    goes_on(bed, "xdp", &XDP)
}

fn a_stream_of_authenticated_packets_goes_on_after_kill_9(bed: &Bed) -> Result<()> {
    goes_on(bed, "xdp", &[&XDP[..], &["--packet-auth"]].concat())
}

fn a_stream_of_authenticated_frames_goes_on_after_kill_9(bed: &Bed) -> Result<()> {
    goes_on(bed, "tcp", &["--packet-auth"])
}

/// The broker comes back without it.
fn without_its_key_a_stream_does_not_go_on(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let options = ["--topic", "penstock", "--auth-keys", &keys.file];
    let broker = bed.start_broker(&options)?;
    #[rustfmt::skip]
    let mut publisher = bed.publisher(&[
        "--brokers", BROKER, "--auth-key", &keys.eu, "--total-size", "64MiB", "--rate", "4MB"]);
    let publisher = bed.background("publisher", &mut publisher)?;
    bed.until_messages("penstock", 1);
    broker.stop()?;
    keys.remove_eu()?;
    let broker = bed.start_broker(&options)?;
    let ended = publisher.wait()?;
    assert!(
        !ended.status.success(),
        "the publisher went on without its key"
    );
    assert_says(&ended.stderr, "could not continue.*does not accept the key");
    broker.stop()?;
    Ok(())
}

fn keys_are_read_again_on_sighup(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    let broker = bed.start_broker(&["--auth-keys", &keys.file])?;
    keys.remove_eu()?;
    broker.signal(libc::SIGHUP);
    eventually("the keys are read again", || {
        broker.log().contains("keys reloaded")
    });
    keys.refuses("does not accept the key", &["--auth-key", &keys.eu]);
    keys.publishes(&["--auth-key", &keys.us, "--topic", "audit"])?;
    broker.stop()?;
    Ok(())
}

/// With the command that mends it.
fn files_that_others_may_read_are_refused(bed: &Bed) -> Result<()> {
    let keys = Keys::make(bed)?;
    expose(&keys.file)?;
    expose(&keys.eu)?;
    let mend = |file: &str| format!("chmod 600 {file}");
    bed.broker(&["--auth-keys", &keys.file])
        .refuses(&mend(&keys.file));
    keys.refuses(&mend(&keys.eu), &["--auth-key", &keys.eu]);
    let mut again = bed.broker(&["--keygen", &keys.eu]).command_without_dir();
    bed.refuses("exists", &mut again);
    let none = bed.file("none.key").display().to_string();
    keys.refuses("No such file", &["--auth-key", &none]);
    let mode = std::fs::metadata(&keys.us)?.permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "mode of a new key");
    Ok(())
}
