//! `penstock-lab`: Runs workloads in network namespaces, measures and reports.

fn main() {}
