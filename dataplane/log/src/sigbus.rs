//! Reports which mapped log was shortened under a process that accesses it.
//!
//! Readers cannot shorten a log, but its owner and root can (`> topic.log`, logrotate's
//! `copytruncate`), and reading a hole on a full tmpfs finds no page. The kernel sends SIGBUS to a
//! process that accesses missing bytes (mmap(2)). The process cannot continue, but it can say why.

use std::io;
use std::os::fd::{IntoRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

/// Number of mappings tracked at once; accesses to others are reported without a name.
const MAX_MAPPINGS: usize = 1024;
/// Maximum length of a message, bytes.
const MAX_MESSAGE: usize = 1024;

/// A mapping: its addresses and its file. Free while `start` is 0.
struct Entry {
    start: AtomicUsize,
    end: AtomicUsize,
    file: AtomicI32,
}

static MAPPINGS: [Entry; MAX_MAPPINGS] = [const {
    Entry {
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        file: AtomicI32::new(-1),
    }
}; MAX_MAPPINGS];

/// A thread that accessed a shortened log waits this many times for so long, so that the main thread can
/// write a report.
const WAITS: usize = 100;
const WAIT_MS: libc::c_int = 100;

/// Descriptor that receives a byte when a log was shortened; -1 for none.
static NOTIFY: AtomicI32 = AtomicI32::new(-1);
/// Whether the message was written.
static SAID: AtomicBool = AtomicBool::new(false);

static PROGRAM: OnceLock<&str> = OnceLock::new();

/// Tracks a mapping until dropped.
#[derive(Debug)]
pub(super) struct Watched(Option<usize>);

impl Watched {
    /// Tracks the mapping of `len` bytes at `start`; `file` must stay open as long.
    pub(super) fn new(start: *const u8, len: usize, file: RawFd) -> Self {
        let start = start as usize;
        let claim = |entry: &Entry| {
            let free = entry.start.load(Ordering::Relaxed) == 0;
            free && entry
                .start
                .compare_exchange(0, start, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        };
        let found = MAPPINGS.iter().position(claim);
        if let Some(number) = found {
            MAPPINGS[number].file.store(file, Ordering::Release);
            MAPPINGS[number].end.store(start + len, Ordering::Release);
        }
        Self(found)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(number) = self.0 {
            MAPPINGS[number].end.store(0, Ordering::Release);
            MAPPINGS[number].start.store(0, Ordering::Release);
        }
    }
}

/// Installs a SIGBUS handler: an access to a log that was shortened ends the process with a message and
/// exit code 1. For programs, not for libraries, because the handler is process-wide.
///
/// # Errors
/// If the handler cannot be installed.
pub fn report_shortened_logs(program: &'static str) -> io::Result<()> {
    PROGRAM.get_or_init(|| program);
    // SAFETY: all zero is a valid sigaction: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the handler has the signature that SA_SIGINFO asks for and does only what
    // signal-safety(7) allows; the action outlives the call.
    match unsafe { libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the process ten seconds to write its report after it accessed a shortened log: the handler
/// writes a byte to this stream, and the thread that accessed the log waits. The main thread writes the
/// report; if it accesses the log too, the process ends at once.
pub fn notify_shortened_logs(stream: UnixStream) {
    NOTIFY.store(stream.into_raw_fd(), Ordering::Release);
}

/// Uses only atomics, memory on the stack and system calls.
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: with SA_SIGINFO the kernel hands over a valid siginfo_t, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let known = MAPPINGS.iter().find(|entry| {
        let (start, end) = (&entry.start, &entry.end);
        start.load(Ordering::Acquire) <= address && address < end.load(Ordering::Acquire)
    });
    let Some(entry) = known else {
        // Not ours: returning executes the instruction again, which then ends the process.
        // SAFETY: SIG_DFL is a valid handler.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    };
    let mut message = Message::new();
    message.push(PROGRAM.get().copied().unwrap_or("penstock").as_bytes());
    message.push(b": ");
    message.push_path_of(entry.file.load(Ordering::Acquire));
    message.push(
        b": the log was shortened while it was open, or its file system has no space for a hole in it (SIGBUS); only a broker may change a log: move the file away and start again\n",
    );
    if !SAID.swap(true, Ordering::AcqRel) {
        message.write();
    }
    let stream = NOTIFY.load(Ordering::Acquire);
    // SAFETY: these system calls access no memory but one byte that outlives the call. The last ends the
    // process at once; no destructor runs.
    unsafe {
        let is_main = libc::syscall(libc::SYS_gettid) == libc::c_long::from(libc::getpid());
        if stream >= 0 && !is_main {
            // If the stream is full, the main thread has been notified.
            libc::write(stream, [0u8].as_ptr().cast(), 1);
            for _ in 0..WAITS {
                libc::poll(std::ptr::null_mut(), 0, WAIT_MS);
            }
        }
        libc::_exit(1);
    }
}

/// A message, built without allocating.
struct Message {
    bytes: [u8; MAX_MESSAGE],
    len: usize,
}

impl Message {
    fn new() -> Self {
        Self {
            bytes: [0; MAX_MESSAGE],
            len: 0,
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = *byte;
                self.len += 1;
            }
        }
    }

    fn push_path_of(&mut self, file: RawFd) {
        let mut link = [0; 32];
        let mut len = 0;
        for byte in b"/proc/self/fd/" {
            link[len] = *byte;
            len += 1;
        }
        let mut divisor = 1_000_000_000;
        while divisor > 1 && file / divisor == 0 {
            divisor /= 10;
        }
        while divisor > 0 {
            link[len] = b'0' + (file / divisor % 10) as u8;
            len += 1;
            divisor /= 10;
        }
        let mut path = [0u8; 512];
        // SAFETY: `link` ends with a zero byte, and the length passed is that of `path`.
        let read =
            unsafe { libc::readlink(link.as_ptr().cast(), path.as_mut_ptr().cast(), path.len()) };
        match usize::try_from(read) {
            Ok(read) => {
                // Another user may have chosen the file's name.
                for byte in &mut path[..read] {
                    *byte = if (b' '..0x7f).contains(byte) {
                        *byte
                    } else {
                        b'?'
                    };
                }
                self.push(&path[..read]);
            }
            Err(_) => self.push(b"a log"),
        }
    }

    /// Writes it to stderr, unless stderr is blocked.
    fn write(&self) {
        let mut stderr = libc::pollfd {
            fd: 2,
            events: libc::POLLOUT,
            revents: 0,
        };
        // SAFETY: one pollfd, which outlives the call; then bytes that do so.
        unsafe {
            if libc::poll(&raw mut stderr, 1, 0) == 1 && stderr.revents & libc::POLLOUT != 0 {
                libc::write(2, self.bytes.as_ptr().cast(), self.len);
            }
        }
    }
}
