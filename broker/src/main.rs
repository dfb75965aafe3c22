//! `penstock-broker`: Broker that ingests into shared buffers.

fn main() {}
