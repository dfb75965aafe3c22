//! What is published comes back: the large workload through the lab, real files and awkward lines, and all of
//! it in constant memory.

#[path = "workloads/files.rs"]
mod files;
#[path = "workloads/memory.rs"]
mod memory;
#[path = "workloads/throughput.rs"]
mod throughput;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut all = Vec::new();
    all.extend(throughput::cases());
    all.extend(files::cases());
    all.extend(memory::cases());
    penstock_e2e::run(all)
}
