//! Faults: of links, of the broker that is killed at random moments, of everything by the lab's schedules,
//! and all of it for a while. Nothing that was acknowledged is lost, doubled, torn or out of order.

#[path = "faults/kills.rs"]
mod kills;
#[path = "faults/links.rs"]
mod links;
#[path = "faults/schedules.rs"]
mod schedules;
#[path = "faults/soak.rs"]
mod soak;

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use penstock_e2e::bed::Bed;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(links::cases());
    all.extend(kills::cases());
    all.extend(schedules::cases());
    all.extend(soak::cases());
    penstock_e2e::run(all)
}

/// `PENSTOCK_SEED`, or another seed each time; says which, so that a failure can be repeated.
fn seed(bed: &Bed) -> Result<u64> {
    let seed = match std::env::var("PENSTOCK_SEED") {
        Ok(seed) => seed.parse().context("PENSTOCK_SEED is not a number")?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
    };
    penstock_e2e::say(&format!("{}: PENSTOCK_SEED={seed}", bed.test()));
    Ok(seed)
}

/// A number that the environment may set.
fn setting(name: &str, default: u64) -> Result<u64> {
    let Ok(value) = std::env::var(name) else {
        return Ok(default);
    };
    value
        .parse()
        .with_context(|| format!("{name} is not a number"))
}
