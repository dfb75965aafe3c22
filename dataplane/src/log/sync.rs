//! Atomics from the standard library, or from loom when the algorithm is model-checked.

#[cfg(loom)]
pub(super) use loom::{
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};
#[cfg(not(loom))]
pub(super) use std::{
    sync::atomic::{AtomicU64, Ordering, fence},
    thread::yield_now,
};
