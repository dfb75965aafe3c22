//! The batch that the publisher's thread appends to without a lock, while the linger thread may read
//! what is in it.
//!
//! The memory belongs to the publisher's `BatchBuilder`, behind a lock. Whoever holds the lock may replace the
//! memory, but only the publisher's thread does, and detaches its [`Appender`] first. Everything below
//! the watermark is initialised and never written again; everything beyond is the appender's alone.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use penstock_wire::message::{OVERHEAD, encoded_len};

/// How much of a batch there is.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Bytes from the start of the memory, framing included; fewer than 4 GiB.
    pub(crate) len: usize,
    pub(crate) messages: u32,
}

/// Tells the linger thread how far the open batch is filled. It is written with each message, so nothing
/// else that another thread uses shares its cache line, nor the one that the CPU fetches with it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Watermark<W = AtomicU64>(W);

/// What a watermark is made of: loom has one of its own.
trait Word {
    fn store(&self, value: u64, order: Ordering);
    fn load(&self, order: Ordering) -> u64;
}

impl Word for AtomicU64 {
    #[inline]
    fn store(&self, value: u64, order: Ordering) {
        self.store(value, order);
    }

    #[inline]
    fn load(&self, order: Ordering) -> u64 {
        self.load(order)
    }
}

#[allow(private_bounds, reason = "only the two kinds that are here")]
impl<W: Word> Watermark<W> {
    /// Everything in `extent` is written.
    #[inline]
    fn raise(&self, extent: Extent) {
        let both = u64::from(extent.messages) << 32 | extent.len as u64;
        self.0.store(both, Ordering::Release);
    }

    pub(crate) fn extent(&self) -> Extent {
        let both = self.0.load(Ordering::Acquire);
        Extent {
            len: (both & u64::from(u32::MAX)) as usize,
            messages: (both >> 32) as u32,
        }
    }
}

/// The publisher's thread's way to append small messages: a copy and one store.
#[derive(Debug)]
pub(crate) struct Appender {
    watermark: Arc<Watermark>,
    /// The memory of the open batch; valid for `limit` bytes.
    start: *mut u8,
    extent: Extent,
    /// A message that ends here or beyond takes more than a copy; 0 while there is no memory.
    limit: usize,
    is_attached: bool,
}

// SAFETY: the memory belongs to the publisher that holds this, and only `append`, which borrows this
// exclusively, writes to it.
unsafe impl Send for Appender {}
// SAFETY: nothing can be done with a shared reference.
unsafe impl Sync for Appender {}

impl Appender {
    pub(crate) fn new(watermark: Arc<Watermark>) -> Self {
        Self {
            watermark,
            start: ptr::null_mut(),
            extent: Extent::default(),
            limit: 0,
            is_attached: false,
        }
    }

    /// Goes on at `extent` of the memory at `start`, up to before `limit`.
    ///
    /// # Safety
    /// Until [`Self::detach`], `start` is valid for writes of `limit` bytes, nothing else writes to them,
    /// nothing reads those beyond the watermark, and `extent` is initialised.
    pub(crate) unsafe fn attach(&mut self, start: *mut u8, extent: Extent, limit: usize) {
        debug_assert!(u32::try_from(extent.len.max(limit)).is_ok());
        (self.start, self.extent, self.limit) = (start, extent, limit);
        self.is_attached = true;
        self.watermark.raise(extent);
    }

    /// Gives the memory up, initialised as far as the result says; none if it was given up before.
    pub(crate) fn detach(&mut self) -> Option<Extent> {
        self.limit = 0;
        std::mem::take(&mut self.is_attached).then_some(self.extent)
    }

    /// Appends a message if that takes no more than a copy; says whether it did.
    #[inline]
    pub(crate) fn append(&mut self, message: &[u8]) -> bool {
        let begin = self.extent.len;
        let end = begin + encoded_len(message.len());
        if end >= self.limit {
            return false;
        }
        let len = (message.len() as u32).to_le_bytes();
        // SAFETY: the message and its length end before `limit`, up to which the memory may be written;
        // nothing else refers to bytes beyond the watermark, so `message` does not overlap.
        unsafe {
            let to = self.start.add(begin);
            ptr::copy_nonoverlapping(len.as_ptr(), to, OVERHEAD);
            ptr::copy_nonoverlapping(message.as_ptr(), to.add(OVERHEAD), message.len());
        }
        self.extent.len = end;
        self.extent.messages += 1;
        self.watermark.raise(self.extent);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::message::Messages;
    use std::slice;
    use std::thread;

    const MESSAGES: u32 = 2000;
    const LEN: usize = 40_000;

    fn appender() -> (Appender, Arc<Watermark>) {
        let watermark = Arc::<Watermark>::default();
        (Appender::new(Arc::clone(&watermark)), watermark)
    }

    #[test]
    fn only_what_ends_before_the_limit_is_appended() {
        let (mut appender, watermark) = appender();
        assert!(!appender.append(b""));
        let mut memory = [0; 20];
        // SAFETY: the memory is longer than the limit, and used otherwise only once detached.
        unsafe { appender.attach(memory.as_mut_ptr(), Extent::default(), 16) };
        assert!(appender.append(b"one") && !appender.append(b"12345") && appender.append(b"1234"));
        let filled = Extent {
            len: 15,
            messages: 2,
        };
        assert_eq!(watermark.extent(), filled);
        assert!(!appender.append(b""));
        assert_eq!(appender.detach(), Some(filled));
        assert_eq!(appender.detach(), None);
        assert!(!appender.append(b""));
        let messages: Vec<_> = Messages::new(&memory[..15]).map(Result::unwrap).collect();
        assert_eq!(messages, [&b"one"[..], b"1234"]);
    }

    #[test]
    fn messages_of_every_short_length_are_copied_whole() {
        let bytes: Vec<u8> = (0..200).collect();
        let (mut appender, _) = appender();
        let mut memory = vec![0u8; LEN];
        // SAFETY: as long as the memory, which is used otherwise only once detached.
        unsafe { appender.attach(memory.as_mut_ptr(), Extent::default(), LEN) };
        for len in 0..=bytes.len() {
            assert!(appender.append(&bytes[bytes.len() - len..]));
        }
        let filled = appender.detach().unwrap();
        assert_eq!(filled.messages as usize, bytes.len() + 1);
        for (len, message) in Messages::new(&memory[..filled.len]).enumerate() {
            assert_eq!(message, Ok(&bytes[bytes.len() - len..]));
        }
        assert!(memory[filled.len..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn another_thread_sees_whole_messages_below_the_watermark() {
        struct Memory(*mut u8);
        // SAFETY: the threads of this test agree on who uses which bytes.
        unsafe impl Send for Memory {}
        let (mut appender, watermark) = appender();
        let mut memory = vec![0xffu8; LEN];
        let start = Memory(memory.as_mut_ptr());
        // SAFETY: as long as the memory; the other thread reads what is below the watermark.
        unsafe { appender.attach(start.0, Extent::default(), LEN) };
        let reader = thread::spawn(move || {
            let start = start;
            let mut filled = Extent::default();
            while filled.messages < MESSAGES {
                filled = watermark.extent();
                // SAFETY: the appender has written these, and does not touch them again.
                let bytes = unsafe { slice::from_raw_parts(start.0, filled.len) };
                let mut count = 0;
                for message in Messages::new(bytes) {
                    assert_eq!(message, Ok(&u32::to_le_bytes(count)[..]));
                    count += 1;
                }
                assert_eq!(count, filled.messages);
            }
        });
        for number in 0..MESSAGES {
            assert!(appender.append(&number.to_le_bytes()));
        }
        reader.join().unwrap();
    }
}

/// The protocol between the publisher's thread and the linger thread, with cells instead of bytes: loom
/// fails if both use one at the same time.
#[cfg(test)]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Mutex;
    use loom::sync::atomic::AtomicU64;
    use loom::thread;

    impl Word for AtomicU64 {
        fn store(&self, value: u64, order: Ordering) {
            self.store(value, order);
        }

        fn load(&self, order: Ordering) -> u64 {
            self.load(order)
        }
    }

    const CELLS: usize = 3;
    const MESSAGES: usize = 4;

    struct BatchBuilder {
        cells: Arc<[UnsafeCell<usize>; CELLS]>,
        sent: Extent,
        out: Vec<usize>,
    }

    impl BatchBuilder {
        fn send(&mut self, filled: Extent) {
            for cell in &self.cells[self.sent.len..filled.len] {
                // SAFETY: what this test is about; loom fails if another thread writes it.
                self.out.push(cell.with(|value| unsafe { *value }));
            }
            self.sent = filled;
        }
    }

    #[test]
    #[allow(
        clippy::arc_with_non_send_sync,
        reason = "whether cells are shared rightly is what loom checks"
    )]
    fn loom_what_is_appended_is_sent_once_and_in_order() {
        loom::model(|| {
            let cells = Arc::new(std::array::from_fn(|_| UnsafeCell::new(0)));
            let front = Arc::new(Mutex::new(BatchBuilder {
                cells: Arc::clone(&cells),
                sent: Extent::default(),
                out: Vec::new(),
            }));
            let watermark = Arc::<Watermark<AtomicU64>>::default();
            let linger = {
                let (front, watermark) = (Arc::clone(&front), Arc::clone(&watermark));
                thread::spawn(move || {
                    for _ in 0..2 {
                        let mut front = front.lock().unwrap();
                        let filled = watermark.extent();
                        front.send(filled);
                    }
                })
            };
            let mut filled = Extent::default();
            for number in 0..MESSAGES {
                if filled.len == CELLS {
                    // The batch is full: what is not sent yet goes, and its memory is used again.
                    let mut front = front.lock().unwrap();
                    front.send(filled);
                    (front.sent, filled) = (Extent::default(), Extent::default());
                    watermark.raise(filled);
                }
                // SAFETY: as above; loom fails if another thread reads or writes it.
                cells[filled.len].with_mut(|value| unsafe { *value = number });
                filled.len += 1;
                filled.messages += 1;
                watermark.raise(filled);
            }
            linger.join().unwrap();
            let mut front = front.lock().unwrap();
            front.send(filled);
            assert_eq!(front.out, Vec::from_iter(0..MESSAGES));
        });
    }
}
