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

/// A moment between two writes at which the process may end; tests have it end there.
#[cfg(any(not(test), loom))]
#[inline(always)]
pub(super) fn crash_point() {}

#[cfg(all(test, not(loom)))]
pub(super) use crash::crash_point;

/// What tests put into the moments at which the process may end.
#[cfg(all(test, not(loom)))]
pub(super) mod crash {
    use std::cell::RefCell;

    type Hook = Box<dyn FnMut()>;

    thread_local! {
        static HOOK: RefCell<Option<Hook>> = const { RefCell::new(None) };
    }

    /// Has `hook` called at every such moment of this thread while `action` runs; not while the
    /// hook itself does.
    pub(crate) fn with_hook<T>(hook: impl FnMut() + 'static, action: impl FnOnce() -> T) -> T {
        HOOK.set(Some(Box::new(hook)));
        let result = action();
        HOOK.take();
        result
    }

    pub(crate) fn crash_point() {
        if let Some(mut hook) = HOOK.take() {
            hook();
            HOOK.set(Some(hook));
        }
    }
}
