//! `penstock-subscriber`: Local reader of a shared buffer: library and program.

fn main() {}
