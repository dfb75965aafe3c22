//! The receiver's window is too small, each time for another reason.

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::loads::{Send, Serve};
use penstock_e2e::{Case, cases, eventually};
use penstock_testbed::command::run;
use penstock_testbed::netns::set_sysctl;

use crate::bench::{LabLink, because, names, settle};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        window_capped,
        window_late,
        window_fixed,
        window_without_autotuning,
        window_at_tcp_rmem,
        window_without_scaling,
        window_of_the_route,
        window_clamped,
    ]
}

/// A client sends to a server of this kind, 30 ms away, after `change`; the diagnosis names the window,
/// because of `words`.
fn small_window(
    bed: &Bed,
    serve: Serve,
    words: &str,
    change: impl FnOnce(&LabLink) -> Result<()>,
) -> Result<()> {
    let link = LabLink::with_delay(bed, "30ms")?;
    change(&link)?;
    let server = link.ends.serve(bed, serve)?;
    let _client = link.ends.send(bed, Send::default())?;
    settle();
    let diagnosis = names(
        bed,
        "receive-window-limited",
        &["--pid", &server.pid().to_string()],
    );
    because(&diagnosis, words);
    Ok(())
}

/// A buffer that rmem_max caps: 8 MiB, twice the usual rmem_max, over 100 ms is 80 MB/s. The sender's
/// buffer must hold more.
fn window_capped(bed: &Bed) -> Result<()> {
    let link = LabLink::with_delay(bed, "100ms")?;
    set_sysctl(&link.ends.publisher, "ipv4/tcp_wmem", "4096 16384 67108864")?;
    let server = link.ends.serve(
        bed,
        Serve {
            rcvbuf: 32 << 20,
            ..Serve::default()
        },
    )?;
    let _client = link.ends.send(bed, Send::default())?;
    eventually("the window holds up the sender", || {
        link.ends.is_window_limited(bed)
    });
    let diagnosis = names(
        bed,
        "receive-window-limited",
        &["--pid", &server.pid().to_string()],
    );
    because(&diagnosis, "rmem_max caps");
    Ok(())
}

/// The listener's buffer fixed a window scale that ends below what was set on the accepted socket.
fn window_late(bed: &Bed) -> Result<()> {
    let serve = Serve {
        rcvbuf: 16384,
        accepted_rcvbuf: 4 << 20,
        ..Serve::default()
    };
    small_window(bed, serve, "set too late", |_| Ok(()))
}

fn window_fixed(bed: &Bed) -> Result<()> {
    let serve = Serve {
        rcvbuf: 65536,
        ..Serve::default()
    };
    small_window(bed, serve, "switches autotuning off", |_| Ok(()))
}

fn window_without_autotuning(bed: &Bed) -> Result<()> {
    small_window(bed, Serve::default(), "tcp_moderate_rcvbuf=0", |link| {
        set_sysctl(&link.ends.broker, "ipv4/tcp_moderate_rcvbuf", "0")
    })
}

fn window_at_tcp_rmem(bed: &Bed) -> Result<()> {
    small_window(bed, Serve::default(), "tcp_rmem allows 262144", |link| {
        set_sysctl(&link.ends.broker, "ipv4/tcp_rmem", "4096 65536 262144")
    })
}

fn window_without_scaling(bed: &Bed) -> Result<()> {
    small_window(
        bed,
        Serve::default(),
        "tcp_window_scaling is 0 here",
        |link| set_sysctl(&link.ends.broker, "ipv4/tcp_window_scaling", "0"),
    )
}

fn window_of_the_route(bed: &Bed) -> Result<()> {
    let words = "route to the sender bounds the window at 32768";
    small_window(bed, Serve::default(), words, |link| {
        #[rustfmt::skip]
        run(&["ip", "-n", &link.ends.broker, "route", "change", "10.214.0.0/24", "dev", "eth0",
              "window", "32768"])?;
        Ok(())
    })
}

/// By the application.
fn window_clamped(bed: &Bed) -> Result<()> {
    let serve = Serve {
        clamp: 32768,
        ..Serve::default()
    };
    small_window(bed, serve, "TCP_WINDOW_CLAMP", |_| Ok(()))
}
