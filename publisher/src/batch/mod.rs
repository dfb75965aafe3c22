//! Batches: filled message by message, sealed, and kept in buffers that are used again.

pub(crate) mod open_batch;
pub(crate) mod payload;
pub(crate) mod pool;
pub(crate) mod sealed_batch;
