//! Starts the broker's threads: supervised, and on cores of their own if the user names some.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use penstock_process::supervisor::{Supervised, Supervisor};

use crate::cli::Config;
use crate::machine;

/// Starts a worker's thread, on the next core of the list if cores are given.
pub fn spawn_pinned<T: Send + 'static>(
    config: &Config,
    supervisor: &Supervisor,
    (name, number): (&str, usize),
    stop: &Arc<AtomicBool>,
    body: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<Supervised<T>> {
    let cpu = config.cpus.get(number % config.cpus.len().max(1)).copied();
    let (pinned, pinning) = crossbeam_channel::bounded(1);
    let label = name.to_owned();
    let thread = supervisor.spawn(name, stop, move || {
        let result = cpu.map_or(Ok(()), machine::pin_to);
        let is_pinned = result.is_ok();
        // The parent waits for this before it continues.
        let _ = pinned.send(result);
        ensure!(is_pinned, "it cannot be pinned to its core");
        rehearse_fault(&label)?;
        Ok(body()?)
    })?;
    let result = pinning.recv().context("a worker ended at once")?;
    result.with_context(|| {
        format!(
            "cannot pin a worker to core {}; see --cpus and nproc",
            cpu.unwrap_or_default()
        )
    })?;
    Ok(thread)
}

/// Starts a supervised thread.
pub fn spawn<T: Send + 'static>(
    supervisor: &Supervisor,
    name: &str,
    stop: &Arc<AtomicBool>,
    body: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<Supervised<T>> {
    let label = name.to_owned();
    supervisor.spawn(name, stop, move || {
        rehearse_fault(&label)?;
        Ok(body()?)
    })
}

/// Tests set `PENSTOCK_TEST_THREAD=accept=panic`, or `hang` or `fail`; release builds ignore it.
pub fn rehearse_fault(thread: &str) -> Result<()> {
    if !cfg!(debug_assertions) {
        return Ok(());
    }
    let wanted = std::env::var("PENSTOCK_TEST_THREAD").unwrap_or_default();
    match wanted.split_once('=') {
        Some((name, fault)) if name == thread => match fault {
            "hang" => loop {
                thread::park();
            },
            "fail" => bail!("as the test wants it"),
            _ => panic!("as the test wants it"),
        },
        _ => Ok(()),
    }
}
