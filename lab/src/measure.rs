//! What is measured about the host, and yardsticks to compare with.

pub mod environment;
pub mod host;
pub mod host_load;
pub mod iperf;
pub mod resource_usage;
pub mod rmem;
pub mod stats;
pub mod xsk_baseline;
