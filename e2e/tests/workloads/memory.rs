//! Memory of a broker stays at its ring's size, however much passes through.

use std::time::Duration;

use anyhow::Result;
use penstock_e2e::bed::Bed;
use penstock_e2e::lab::{LabRun, count};
use penstock_e2e::{Case, cases};

/// Beyond the ring: code, index, stacks, socket bookkeeping.
const ALLOWANCE: u64 = 64 << 20;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const LIMIT: Duration = Duration::from_secs(600);

pub fn cases() -> impl IntoIterator<Item = Case> {
    let small = cases![one_gib_passes_a_ring_of_64_mib_in_constant_memory];
    let large = cases![ten_gib_pass_a_ring_of_one_gib_in_constant_memory];
    let all = small.into_iter().chain(large.map(Case::long));
    all.map(Case::alone)
}

fn one_gib_passes_a_ring_of_64_mib_in_constant_memory(bed: &Bed) -> Result<()> {
    passes(bed, 64 * MIB, GIB)
}

fn ten_gib_pass_a_ring_of_one_gib_in_constant_memory(bed: &Bed) -> Result<()> {
    passes(bed, GIB, 10 * GIB)
}

/// Every byte passes a ring that is much smaller.
fn passes(bed: &Bed, ring: u64, total: u64) -> Result<()> {
    let (ring_size, total_size) = (ring.to_string(), total.to_string());
    #[rustfmt::skip]
    let mut command = bed.lab(&[
        "throughput", "--brokers", "1", "--profile", "offload", "--ring-size", &ring_size,
        "--total-size", &total_size]);
    let report = LabRun::within(LIMIT, bed, &mut command)?.report;
    assert_eq!(report["messages_in_logs"], total / 1024);
    assert_eq!(count(&report, "/brokers/0/ring_bytes"), ring);
    let peak = count(&report, "/brokers/0/peak_rss_bytes");
    assert!(peak <= ring + ALLOWANCE, "peak {peak}, ring {ring}");
    Ok(())
}
