//! `penstock-publisher`: Publisher client library and program.

fn main() {}
