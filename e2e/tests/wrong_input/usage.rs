//! Flags, ports and directories that cannot serve.

use std::fs;

use anyhow::Result;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use penstock_e2e::bed::{BROKER, Bed};
use penstock_e2e::{Case, cases};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        an_unknown_mode_or_level,
        a_port_in_use,
        buffers_that_another_broker_uses,
        no_broker_there,
        a_buffer_directory_that_is_not_writable,
        a_full_disk,
    ]
}

fn an_unknown_mode_or_level(bed: &Bed) -> Result<()> {
    bed.broker(&["--mode", "udp"])
        .refuses("possible values: tcp, xdp, auto");
    bed.broker(&["--mode", "xdp"]).refuses("--iface");
    bed.broker(&["--mode", "xdp", "--iface", "eth7"])
        .refuses("no interface eth7");
    let publisher =
        |flag, value| bed.publisher(&["--brokers", BROKER, "--total-size", "1MiB", flag, value]);
    bed.refuses(
        "possible values: tcp, xdp, auto",
        &mut publisher("--mode", "udp"),
    );
    bed.refuses("supported: 0", &mut publisher("--ack", "2"));
    bed.refuses("supported: 0", &mut publisher("--order", "3"));
    bed.refuses(
        "tcp, xdp, auto",
        &mut bed.lab(&["throughput", "--mode", "udp"]),
    );
    Ok(())
}

fn a_port_in_use(bed: &Bed) -> Result<()> {
    let _broker = bed.start_broker(&[])?;
    let second = bed.broker(&[]).buffer_dir(bed.buffers().join("other"));
    second.refuses("1214.*in use|in use.*1214");
    Ok(())
}

fn buffers_that_another_broker_uses(bed: &Bed) -> Result<()> {
    let _broker = bed.start_broker(&["--topic", "penstock"])?;
    let second = bed.broker(&["--listen", "0.0.0.0:1300", "--topic", "penstock"]);
    second.refuses("penstock|lock|use");
    Ok(())
}

fn no_broker_there(bed: &Bed) -> Result<()> {
    let arguments = [
        "--brokers",
        BROKER,
        "--total-size",
        "1MiB",
        "--timeout",
        "3",
    ];
    bed.refuses(r"10\.214\.0\.2:1214", &mut bed.publisher(&arguments));
    Ok(())
}

/// Mounts a file system of these options on a folder of the test, which is returned.
pub fn mount_tmpfs(bed: &Bed, flags: MsFlags, options: &str) -> Result<std::path::PathBuf> {
    let path = bed.file("mnt");
    fs::create_dir_all(&path)?;
    mount(Some("tmpfs"), &path, Some("tmpfs"), flags, Some(options))?;
    Ok(path)
}

fn a_buffer_directory_that_is_not_writable(bed: &Bed) -> Result<()> {
    let path = mount_tmpfs(bed, MsFlags::MS_RDONLY, "size=1m")?;
    bed.broker(&["--topic", "penstock"])
        .buffer_dir(path.join("buffers"))
        .refuses(&path.display().to_string());
    Ok(())
}

fn a_full_disk(bed: &Bed) -> Result<()> {
    let path = mount_tmpfs(bed, MsFlags::empty(), "size=64m")?;
    bed.broker(&["--topic", "penstock", "--ring-size", "256MiB"])
        .buffer_dir(path.clone())
        .refuses("no room|space");
    // A topic that comes later is refused to its publisher; the broker goes on.
    let buffers = path.join("b0");
    let small = ["--ring-size", "32MiB", "--topic", "small"];
    let broker = bed.broker(&small).buffer_dir(buffers.clone()).start()?;
    #[rustfmt::skip]
    let mut second = bed.publisher(&[
        "--brokers", BROKER, "--topic", "second", "--total-size", "1MiB"]);
    bed.refuses("no room|space", &mut second);
    let report = bed.publish(&[
        "--brokers",
        BROKER,
        "--topic",
        "small",
        "--total-size",
        "128MiB",
    ])?;
    assert_eq!(report["messages_acked"], 128 * 1024);
    broker.stop()?;
    let bytes = fs::metadata(buffers.join("small.log"))?.len();
    umount2(&path, MntFlags::MNT_DETACH)?;
    // Space for the log and the lock files, but not for the registry of readers.
    let path = mount_tmpfs(bed, MsFlags::empty(), &format!("size={}", bytes + 4096))?;
    bed.broker(&small)
        .buffer_dir(path)
        .refuses("readers: no room for [0-9]+ bytes; free some space");
    Ok(())
}
