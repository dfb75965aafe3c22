//! Limits on what publishers may claim before they have sent it, over both paths: room in a ring, and
//! memory outside the rings.
//!
//! A batch's header claims the batch's length: a few bytes of header can claim up to a gigabyte. So a
//! claim takes room in the ring only within a share of its host, of its key or IPv6 site, and of all publishers
//! together. Beyond these shares the broker receives the batch outside the ring, into a `Spill`,
//! which takes memory piece by piece as bytes arrive, again within shares. A denied claim puts pressure
//! on the holders of what it needs: the holder with most that does not arrive at a fair rate gives way.
//! The broker ends the stream of a batch that arrives more slowly than [`MIN_RATE`], even if its
//! publisher shows that it is alive.
//!
//! Accounts are atomics that change when a batch begins and ends, and for each piece of a spill;
//! packets and receive calls take no lock here.

mod pool;
mod spill;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use self::pool::PiecePool;
pub(crate) use self::spill::Spill;
use penstock_log::Log;
use penstock_runtime::poison::lock;
use penstock_runtime::poller::Poller;

use crate::session::peer::{Group, Host, Tenant};

/// Memory for batches outside the rings, and for what a stream uses beyond the free allowance of every
/// stream: all publishers together, bytes.
pub const MEMORY: u64 = 32 << 20;
/// Fraction of [`MEMORY`] that a host, a key, or an IPv6 site may use.
const MEMORY_PART: u64 = 2;
/// Fraction of a ring that unfinished batches may occupy: all publishers together.
const RING_PART: u64 = 2;
/// Fraction of that for a host, a key, or an IPv6 site. It has room for the largest batch: half a segment, and a ring
/// has at least two segments.
const RING_SHARE: u64 = 2;
/// The last quarter of what all may take is reserved for hosts that hold at most an eighth of it.
const SMALL_HOLDER_PART: u64 = 8;
const RESERVED_FOR_SMALL_PART: u64 = 4;
/// Batches that are not next in their stream leave a quarter of their host's share to those that are,
/// because they cannot commit before those.
const RESERVED_FOR_NEXT_PART: u64 = 4;

/// Room that was reserved but not filled is lost for one round of the ring, and reserving it overwrote older
/// batches. So it still counts in the shares and decays: a full share takes this long. Bytes that arrived do
/// not count.
const FORFEIT_MS: u64 = 10_000;

/// Minimum rate, bytes per second, at which a batch must arrive once the stall timeout has passed.
pub const MIN_RATE: u64 = 16 << 10;
/// Rate, bytes per second, below which a batch counts as slow and must leave the ring when others need the
/// room; it applies after the grace period.
const RING_RATE: u64 = 16 << 20;
const RING_GRACE: Duration = Duration::from_millis(50);
/// Rate, bytes per second, below which a batch must give up memory that others need, after its grace period.
const MEMORY_RATE: u64 = 256 << 10;
const MEMORY_GRACE: Duration = Duration::from_secs(1);

/// Duration for which a denied claim keeps up its pressure. The claimant asks again within this time.
const PRESSURE_MS: u64 = 20;
/// Time limit for a batch that must leave the ring to get memory outside it.
pub(crate) const SPILL_TIMEOUT: Duration = Duration::from_millis(200);

/// Interval between wake-ups of workers to release what others need.
const WAKE_MS: u64 = 5;

/// Whether a batch is overdue: it has taken longer than the stall timeout plus the time that its bytes
/// need at [`MIN_RATE`]. Only bytes of the batch itself extend that time.
pub(crate) fn is_overdue(elapsed: Duration, received: u64, stall_timeout: Duration) -> bool {
    elapsed > stall_timeout + transfer_time(received, MIN_RATE)
}

/// Whether a batch arrives too slowly to stay in the ring, where it blocks others.
pub(crate) fn is_slow(elapsed: Duration, received: u64) -> bool {
    elapsed > RING_GRACE + transfer_time(received, RING_RATE)
}

/// Whether a batch arrives too slowly to keep memory that others need.
pub(crate) fn is_stalling(elapsed: Duration, received: u64) -> bool {
    elapsed > MEMORY_GRACE + transfer_time(received, MEMORY_RATE)
}

/// Error text for the publisher of an overdue batch.
pub(crate) fn overdue_text(seq: u64, received: u64, len: u32, elapsed: Duration) -> String {
    format!(
        "only {received} of {len} bytes of batch {seq} arrived in {elapsed:.0?}; after the broker's --stall-timeout a batch must arrive at {} KiB/s or more: send smaller batches over a slow link (--batch-size)",
        MIN_RATE >> 10
    )
}

/// Milliseconds since the start; never 0.
fn millis_since(start: Instant) -> u64 {
    start.elapsed().as_millis() as u64 + 1
}

fn transfer_time(bytes: u64, rate: u64) -> Duration {
    Duration::from_micros(bytes.saturating_mul(1_000_000) / rate)
}

/// A broker's accounts, shared by both paths.
#[derive(Debug, Clone, Default)]
pub struct Claims(Arc<Ledger>);

/// The owner of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Owner {
    All,
    Host(Host),
    Group(Group),
}

/// What an account is for: memory (`None`), or a log's ring, by the log's address.
type Asset = Option<usize>;

#[derive(Debug)]
struct Ledger {
    start: Instant,
    accounts: Mutex<Accounts>,
    pool: PiecePool,
    /// Time of the last denial, milliseconds since the start.
    pressed: AtomicU64,
    /// Time when workers were last woken.
    woken: AtomicU64,
    workers: Mutex<Vec<Arc<Poller>>>,
}

#[derive(Debug, Default)]
struct Accounts {
    open: HashMap<(Asset, Owner), Weak<Account>>,
    /// Number of entries at which unused accounts are dropped.
    sweep_at: usize,
}

/// What one owner holds of one asset.
#[derive(Debug, Default)]
struct Account {
    held: AtomicU64,
    limit: u64,
    /// Forfeited bytes, and when they last changed, milliseconds.
    forfeited: AtomicU64,
    forfeited_at: AtomicU64,
    /// Time when this account last caused a denial, milliseconds.
    pressed: AtomicU64,
    /// Batches that wait for room.
    waiting: AtomicU64,
}

/// The accounts that a stream's claims are charged to.
#[derive(Debug)]
struct Shares {
    start: Instant,
    all: Arc<Account>,
    host: Arc<Account>,
    /// Of its key or IPv6 site; none where that is the host alone.
    group: Option<Arc<Account>>,
}

/// Precedence of a claim among those of a stream and its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ClaimPriority {
    /// The batch is the next one to commit.
    Next,
    /// The batch comes later in its stream.
    Later,
    /// The batch has been waiting (see [`Claimant::wait`]): new claims yield to it.
    Waiting,
}

/// A stream that claims room for its batches.
#[derive(Debug)]
pub(crate) struct Claimant {
    ledger: Arc<Ledger>,
    ring: Arc<Shares>,
    memory: Arc<Shares>,
}

/// A batch's claim to room in the ring, until the batch is complete. Dropping it earlier forfeits the part
/// that is not filled.
#[derive(Debug)]
#[must_use = "dropping it forfeits the room at once"]
pub(crate) struct RingClaim {
    shares: Arc<Shares>,
    len: u64,
    /// Bytes of the batch that were received before it had this room.
    before: u64,
    filled: u64,
}

/// Memory other than that of a spill; returned when dropped.
#[derive(Debug)]
pub(crate) struct MemoryCharge {
    shares: Arc<Shares>,
    bytes: u64,
}

/// A batch that waits for room; dropping it ends the wait.
#[derive(Debug)]
#[must_use = "dropping it ends the batch's precedence"]
pub(crate) struct WaitingBatch(Arc<Shares>);

/// Whether others need what this stream holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Pressure {
    pub(crate) ring: bool,
    pub(crate) memory: bool,
}

impl Default for Ledger {
    fn default() -> Self {
        Self {
            start: Instant::now(),
            accounts: Mutex::default(),
            pool: PiecePool::new(MEMORY),
            pressed: AtomicU64::new(0),
            woken: AtomicU64::new(0),
            workers: Mutex::default(),
        }
    }
}

impl Claims {
    /// A stream that writes `log` and is charged to `tenant`.
    pub(crate) fn claimant(&self, log: &Arc<Log>, tenant: &Tenant) -> Claimant {
        let ring = log.geometry().ring_bytes() / RING_PART;
        let asset = Some(Arc::as_ptr(log).addr());
        Claimant {
            ring: Arc::new(self.0.shares(asset, ring, ring / RING_SHARE, tenant)),
            memory: Arc::new(self.0.shares(None, MEMORY, MEMORY / MEMORY_PART, tenant)),
            ledger: Arc::clone(&self.0),
        }
    }

    /// Registers the poller of a worker, to be woken when others need what the worker's streams may
    /// hold.
    pub(crate) fn register_worker(&self, poller: &Arc<Poller>) {
        self.0.lock_workers().push(Arc::clone(poller));
    }

    /// Whether any claim waits for what others hold.
    pub(crate) fn is_pressed(&self, now: Instant) -> bool {
        let pressed = self.0.pressed.load(Ordering::Relaxed);
        let since = now.saturating_duration_since(self.0.start);
        pressed != 0 && u128::from(pressed + PRESSURE_MS) > since.as_millis()
    }

    /// Reports that a batch waits for room in a ring, which unfinished batches of other workers may
    /// block.
    pub(crate) fn wake_others(&self) {
        self.0.wake(self.0.now());
    }

    /// Bytes of memory in use.
    #[must_use]
    pub fn memory_held(&self) -> u64 {
        let accounts = self.0.lock_accounts();
        let all = accounts.open.get(&(None, Owner::All));
        let all = all.and_then(Weak::upgrade);
        all.map_or(0, |all| all.held.load(Ordering::Relaxed))
    }
}

impl Ledger {
    fn lock_accounts(&self) -> std::sync::MutexGuard<'_, Accounts> {
        lock(&self.accounts)
    }

    fn lock_workers(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Poller>>> {
        lock(&self.workers)
    }

    fn shares(&self, asset: Asset, all: u64, each: u64, tenant: &Tenant) -> Shares {
        let mut accounts = self.lock_accounts();
        let mut account = |owner, limit| accounts.account(asset, owner, limit);
        Shares {
            start: self.start,
            all: account(Owner::All, all),
            host: account(Owner::Host(tenant.host), each),
            group: (tenant.key.is_some() || tenant.host.is_of_site())
                .then(|| account(Owner::Group(tenant.group()), each)),
        }
    }

    fn now(&self) -> u64 {
        millis_since(self.start)
    }

    /// Puts pressure on the holders of what this account lacks.
    fn press(&self, account: &Account) {
        let now = self.now();
        account.pressed.store(now, Ordering::Relaxed);
        self.pressed.store(now, Ordering::Relaxed);
        self.wake(now);
    }

    fn wake(&self, now: u64) {
        let before = self.woken.load(Ordering::Relaxed);
        let due = now >= before + WAKE_MS;
        let is_first = |()| {
            let order = Ordering::Relaxed;
            self.woken
                .compare_exchange(before, now, order, order)
                .is_ok()
        };
        if due && is_first(()) {
            for poller in self.lock_workers().iter() {
                // A worker that cannot be woken checks at its next tick.
                let _ = poller.notify();
            }
        }
    }
}

impl Accounts {
    fn account(&mut self, asset: Asset, owner: Owner, limit: u64) -> Arc<Account> {
        let known = self.open.get(&(asset, owner)).and_then(Weak::upgrade);
        // A closed log may have had the same address.
        if let Some(known) = known.filter(|known| known.limit == limit) {
            return known;
        }
        if self.open.len() >= self.sweep_at {
            self.open.retain(|_, account| account.strong_count() > 0);
            self.sweep_at = 2 * self.open.len().max(64);
        }
        let account = Arc::new(Account {
            limit,
            ..Account::default()
        });
        self.open.insert((asset, owner), Arc::downgrade(&account));
        account
    }
}

impl Account {
    /// Adds to what is held, if it and the forfeited bytes stay within `most`; returns their sum.
    fn take(&self, bytes: u64, most: u64, start: Instant) -> Option<u64> {
        let held = self.held.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let counted = held + self.forfeited(start);
        if counted > most {
            self.give(bytes);
            return None;
        }
        Some(counted)
    }

    fn give(&self, bytes: u64) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Forfeited bytes that still count.
    fn forfeited(&self, start: Instant) -> u64 {
        let bytes = self.forfeited.load(Ordering::Relaxed);
        // Usually there are none, which saves reading the clock.
        if bytes == 0 {
            return 0;
        }
        let since = millis_since(start).saturating_sub(self.forfeited_at.load(Ordering::Relaxed));
        let left = bytes.saturating_sub(self.limit.saturating_mul(since) / FORFEIT_MS);
        if left == 0 {
            self.forfeited.store(0, Ordering::Relaxed);
        }
        left
    }

    /// Gives back room that was not filled. If two threads do so at the same moment, one update may be
    /// lost.
    fn forfeit(&self, bytes: u64, start: Instant) {
        let sum = (self.forfeited(start) + bytes).min(self.limit);
        let now = millis_since(start);
        self.forfeited_at.store(now, Ordering::Relaxed);
        self.forfeited.store(sum, Ordering::Relaxed);
        self.give(bytes);
    }

    fn is_pressed(&self, now: u64) -> bool {
        let pressed = self.pressed.load(Ordering::Relaxed);
        pressed != 0 && pressed + PRESSURE_MS >= now
    }
}

impl Shares {
    /// Takes from each account, or from none.
    ///
    /// # Errors
    /// The first account without enough left.
    fn take(&self, bytes: u64, priority: ClaimPriority) -> Result<(), &Account> {
        let most = |account: &Account| match priority {
            ClaimPriority::Later => account.limit - account.limit / RESERVED_FOR_NEXT_PART,
            ClaimPriority::Next | ClaimPriority::Waiting => account.limit,
        };
        let start = self.start;
        let of_host = self.host.take(bytes, most(&self.host), start);
        let of_host = of_host.ok_or(&*self.host)?;
        if let Some(group) = &self.group
            && group.take(bytes, most(group), start).is_none()
        {
            self.host.give(bytes);
            return Err(group);
        }
        let reserve = match of_host <= self.all.limit / SMALL_HOLDER_PART {
            true => 0,
            false => self.all.limit / RESERVED_FOR_SMALL_PART,
        };
        let most = self.all.limit - reserve;
        if self.all.take(bytes, most, start).is_none() {
            self.host.give(bytes);
            if let Some(group) = &self.group {
                group.give(bytes);
            }
            return Err(&self.all);
        }
        Ok(())
    }

    fn give(&self, bytes: u64) {
        for account in self.each() {
            account.give(bytes);
        }
    }

    fn each(&self) -> impl Iterator<Item = &Account> {
        [Some(&self.all), Some(&self.host), self.group.as_ref()]
            .into_iter()
            .flatten()
            .map(|account| &**account)
    }

    /// Whether other batches of the host, or of its key or site, wait.
    fn has_waiting(&self) -> bool {
        let own = [Some(&self.host), self.group.as_ref()];
        own.into_iter()
            .flatten()
            .any(|account| account.waiting.load(Ordering::Relaxed) > 0)
    }

    fn is_pressed(&self, now: u64) -> bool {
        self.each().any(|account| account.is_pressed(now))
    }
}

impl Claimant {
    /// Claims room in the ring for a batch of `len` bytes, if the shares allow it.
    pub(crate) fn claim(&self, len: u32, priority: ClaimPriority) -> Option<RingClaim> {
        let len = u64::from(len);
        if priority != ClaimPriority::Waiting && self.ring.has_waiting() {
            return None;
        }
        if let Err(account) = self.ring.take(len, priority) {
            self.ledger.press(account);
            return None;
        }
        Some(RingClaim {
            shares: Arc::clone(&self.ring),
            len,
            before: 0,
            filled: 0,
        })
    }

    /// Registers a waiting batch: new claims of its host yield to it.
    pub(crate) fn wait(&self) -> WaitingBatch {
        let shares = Arc::clone(&self.ring);
        for account in [Some(&shares.host), shares.group.as_ref()]
            .into_iter()
            .flatten()
        {
            account.waiting.fetch_add(1, Ordering::Relaxed);
        }
        WaitingBatch(shares)
    }

    /// Memory for a batch outside the ring; empty at first.
    pub(crate) fn spill(&self) -> Spill {
        Spill::new(Arc::clone(&self.ledger), Arc::clone(&self.memory))
    }

    /// Memory for other purposes.
    pub(crate) fn charge(&self, bytes: u64) -> Option<MemoryCharge> {
        if let Err(account) = self.memory.take(bytes, ClaimPriority::Next) {
            self.ledger.press(account);
            return None;
        }
        Some(MemoryCharge {
            shares: Arc::clone(&self.memory),
            bytes,
        })
    }

    /// What others need of what this stream holds.
    pub(crate) fn pressure(&self) -> Pressure {
        let now = self.ledger.now();
        Pressure {
            ring: self.ring.is_pressed(now),
            memory: self.memory.is_pressed(now),
        }
    }
}

impl MemoryCharge {
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl RingClaim {
    /// Marks the batch as complete.
    pub(crate) fn complete(mut self) {
        self.filled = self.len;
    }

    /// Notes that `received` bytes of the batch arrived before this claim, so they do not count as its fill.
    pub(crate) fn with_received_before(mut self, received: u64) -> Self {
        self.before = received;
        self
    }

    /// Gives up the room of a batch of which `received` bytes arrived: only the rest is forfeited.
    pub(crate) fn release(mut self, received: u64) {
        self.filled = received.saturating_sub(self.before).min(self.len);
    }
}

impl Drop for RingClaim {
    fn drop(&mut self) {
        if self.filled > 0 {
            self.shares.give(self.filled);
        }
        let unfilled = self.len - self.filled;
        if unfilled == 0 {
            return;
        }
        for account in self.shares.each() {
            account.forfeit(unfilled, self.shares.start);
        }
    }
}

impl Drop for MemoryCharge {
    fn drop(&mut self) {
        self.shares.give(self.bytes);
    }
}

impl Drop for WaitingBatch {
    fn drop(&mut self) {
        for account in [Some(&self.0.host), self.0.group.as_ref()]
            .into_iter()
            .flatten()
        {
            account.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests;
