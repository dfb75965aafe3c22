//! Permits for open streams, and for subscribers: a limited number, shared fairly. The broker revokes those of
//! unused ones when others need them.

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use penstock_wire::handshake::Refusal;

use crate::session::admission::Refused;
use crate::session::peer::Tenant;
use crate::session::shares::{Exceeded, Shares, Use};

/// A stream that has committed nothing for this long may lose its permit to another.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Minimum number of a tenant's revoked permits that may be outstanding while it asks for more.
const MIN_REVOKED: usize = 8;

/// All permits of a broker.
#[derive(Debug, Clone)]
pub(crate) struct StreamPermits(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    kind: Kind,
    shares: Shares<Listed>,
    /// Revoked permits whose streams have not ended yet.
    revoked: HashMap<Tenant, usize>,
}

/// What the permits are for, as refusals name it.
#[derive(Debug, Clone, Copy)]
struct Kind {
    /// Whether one that has not had a batch yet gives way at once.
    must_begin: bool,
    name: &'static str,
    holders: &'static str,
    flag: &'static str,
}

const STREAMS: Kind = Kind {
    must_begin: true,
    name: "streams",
    holders: "publishers",
    flag: "--max-connections",
};
const SUBSCRIBERS: Kind = Kind {
    must_begin: false,
    name: "subscribers",
    holders: "subscribers",
    flag: "--max-subscribers",
};

/// An entry in the list of permits.
#[derive(Debug)]
struct Listed {
    permit: Arc<Status>,
    must_begin: bool,
    /// Batches committed at the last check, and when that number was first seen.
    seen: Cell<(u64, Instant)>,
}

/// State shared by a permit's holder and the list.
#[derive(Debug, Default)]
struct Status {
    batches: AtomicU64,
    revoked: AtomicBool,
    returned: AtomicBool,
}

/// The right to have a stream open; returned when dropped.
#[derive(Debug)]
pub struct StreamPermit {
    tenant: Tenant,
    status: Arc<Status>,
    permits: StreamPermits,
}

impl StreamPermits {
    pub(crate) fn new(limit: usize, percent: u8) -> Self {
        Self::of_kind(STREAMS, limit, percent)
    }

    pub(crate) fn for_subscribers(limit: usize, percent: u8) -> Self {
        Self::of_kind(SUBSCRIBERS, limit, percent)
    }

    fn of_kind(kind: Kind, limit: usize, percent: u8) -> Self {
        Self(Arc::new(Mutex::new(State {
            kind,
            shares: Shares::new(limit, percent),
            revoked: HashMap::new(),
        })))
    }

    /// A permit for one more stream, and whether another stream has to end for it.
    pub(crate) fn acquire(
        &self,
        tenant: Tenant,
        now: Instant,
    ) -> Result<(StreamPermit, bool), Refused> {
        let mut state = self.lock();
        let exceeded = state.shares.check(&tenant).err();
        if let Some(exceeded) = exceeded {
            state.revoke_for(&tenant, exceeded, now)?;
        }
        let status = Arc::new(Status::default());
        let listed = Listed {
            permit: Arc::clone(&status),
            must_begin: state.kind.must_begin,
            seen: Cell::new((0, now)),
        };
        state.shares.charge(&tenant, 1);
        state.shares.list(&tenant, listed, Listed::is_gone);
        let permit = StreamPermit {
            tenant,
            status,
            permits: self.clone(),
        };
        Ok((permit, exceeded.is_some()))
    }

    /// Checks which streams still commit; called about once a second.
    pub(crate) fn refresh(&self, now: Instant) {
        let mut state = self.lock();
        state.shares.items().for_each(|listed| {
            listed.check_use(now);
        });
        state.shares.refresh(|listed| listed.check_use(now));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        penstock_runtime::poison::lock(&self.0)
    }
}

impl State {
    /// Revokes the permit of an unused stream, so that this tenant may open one.
    fn revoke_for(
        &mut self,
        tenant: &Tenant,
        exceeded: Exceeded,
        now: Instant,
    ) -> Result<(), Refused> {
        let limit = self.shares.limit();
        let ending = self.revoked.get(tenant).copied().unwrap_or(0);
        let evicted = if ending < MIN_REVOKED.max(limit / 16) {
            let check = |listed: &Listed| listed.check_use(now);
            self.shares.evict(tenant, exceeded, check)
        } else {
            None
        };
        let Some((holder, listed)) = evicted else {
            return Err(refuse(self.kind, tenant, exceeded, limit));
        };
        listed.permit.revoked.store(true, Ordering::Release);
        self.shares.release(&holder, 1);
        *self.revoked.entry(holder).or_default() += 1;
        Ok(())
    }

    fn returned(&mut self, tenant: &Tenant, revoked: bool) {
        if !revoked {
            return self.shares.release(tenant, 1);
        }
        if let Some(count) = self.revoked.get_mut(tenant) {
            *count -= 1;
            if *count == 0 {
                self.revoked.remove(tenant);
            }
        }
    }
}

fn refuse(kind: Kind, tenant: &Tenant, exceeded: Exceeded, limit: usize) -> Refused {
    let Kind {
        name,
        holders,
        flag,
        ..
    } = kind;
    let whose = match exceeded {
        Exceeded::Total => format!("this broker serves at most {limit} {name} at once"),
        Exceeded::Host { held } => format!(
            "host {} has {held} of at most {limit} {name} open, which is its whole share",
            tenant.host
        ),
        Exceeded::Key { held } => format!(
            "{holders} with this key have {held} of at most {limit} {name} open, which is their whole share"
        ),
        Exceeded::Site { held } => format!(
            "hosts of site {} have {held} of at most {limit} {name} open, which is their whole share",
            tenant.host.site()
        ),
    };
    let raise = match exceeded {
        Exceeded::Total => flag.to_owned(),
        _ => format!("{flag} or --max-share"),
    };
    Refused {
        refusal: Refusal::Resources,
        text: format!(
            "{whose}, and all of them are in use; try again later, or raise the broker's {raise}"
        ),
    }
}

impl Listed {
    fn is_gone(&self) -> bool {
        self.permit.returned.load(Ordering::Acquire)
    }

    fn check_use(&self, now: Instant) -> Use {
        if self.is_gone() {
            return Use::Gone;
        }
        let batches = self.permit.batches.load(Ordering::Relaxed);
        let (seen, since) = self.seen.get();
        if batches != seen {
            self.seen.set((batches, now));
            return Use::InUse;
        }
        match (batches == 0 && self.must_begin)
            || now.saturating_duration_since(since) >= IDLE_TIMEOUT
        {
            true => Use::Unused,
            false => Use::InUse,
        }
    }
}

impl StreamPermit {
    /// Counts a batch committed or delivered, which shows that the permit is in use.
    pub fn note_batch(&self) {
        // Only the stream's own worker writes it.
        let batches = self.status.batches.load(Ordering::Relaxed);
        self.status.batches.store(batches + 1, Ordering::Relaxed);
    }

    /// Whether the stream or subscriber must end because its permit was revoked.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.status.revoked.load(Ordering::Acquire)
    }
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut state = self.permits.lock();
        self.status.returned.store(true, Ordering::Release);
        // Permits are revoked under the lock, so this one cannot be revoked any more.
        let revoked = self.is_revoked();
        state.returned(&self.tenant, revoked);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::test_support::tenant;

    fn host(number: u8) -> Tenant {
        tenant(number, None)
    }

    struct Bench {
        permits: StreamPermits,
        now: Instant,
    }

    impl Bench {
        fn new(limit: usize, percent: u8) -> Self {
            Self {
                permits: StreamPermits::new(limit, percent),
                now: Instant::now(),
            }
        }

        fn open(&self, number: u8) -> Result<StreamPermit, String> {
            let acquired = self.permits.acquire(host(number), self.now);
            acquired.map(|(permit, _)| permit).map_err(|e| e.text)
        }

        fn pass(&mut self, time: Duration) {
            self.now += time;
            self.permits.refresh(self.now);
        }
    }

    #[test]
    fn unused_streams_keep_no_other_out() {
        let bench = Bench::new(8, 50);
        let mut held: Vec<_> = (0..4).map(|_| bench.open(1).unwrap()).collect();
        // One more of the same host evicts its oldest.
        held.push(bench.open(1).unwrap());
        let revoked: Vec<_> = held.iter().map(StreamPermit::is_revoked).collect();
        assert_eq!(revoked, [true, false, false, false, false]);
        // Another host has room without anyone's going.
        let other = bench.open(2).unwrap();
        assert_eq!(held.iter().filter(|permit| permit.is_revoked()).count(), 1);
        drop((held, other));
        assert_eq!(bench.permits.lock().shares.total(), 0);
        assert!(bench.permits.lock().revoked.is_empty());
    }

    #[test]
    fn streams_in_use_stay_and_a_tenant_at_its_share_is_refused() {
        let mut bench = Bench::new(8, 50);
        let held: Vec<_> = (0..4).map(|_| bench.open(1).unwrap()).collect();
        held.iter().for_each(StreamPermit::note_batch);
        bench.pass(Duration::from_secs(9));
        held.iter().for_each(StreamPermit::note_batch);
        bench.pass(Duration::from_secs(9));
        let text = bench.open(1).unwrap_err();
        assert!(
            text.contains("host 10.0.0.1 has 4 of at most 8 streams")
                && text.contains("--max-share"),
            "{text}"
        );
        let honest: Vec<_> = (0..2).map(|_| bench.open(2).unwrap()).collect();
        assert!(
            honest
                .iter()
                .chain(&held)
                .all(|permit| !permit.is_revoked())
        );
        // Ten seconds without a batch: they are not used any more.
        bench.pass(IDLE_TIMEOUT);
        bench.open(1).unwrap();
        assert_eq!(held.iter().filter(|permit| permit.is_revoked()).count(), 1);
    }

    #[test]
    fn without_free_permits_the_largest_holder_loses_an_unused_one() {
        let bench = Bench::new(8, 100);
        let most: Vec<_> = (0..6).map(|_| bench.open(1).unwrap()).collect();
        most[0].note_batch();
        let few: Vec<_> = (0..2).map(|_| bench.open(2).unwrap()).collect();
        let pending = bench.open(3).unwrap();
        assert!(few.iter().all(|permit| !permit.is_revoked()));
        let revoked: Vec<_> = most.iter().map(StreamPermit::is_revoked).collect();
        assert_eq!(revoked, [false, true, false, false, false, false]);
        // Its stream has not ended yet, and the total stays the same.
        assert_eq!(bench.permits.lock().shares.total(), 8);
        drop(most);
        drop(pending);
        assert_eq!(bench.permits.lock().shares.total(), 2);
    }

    #[test]
    fn a_tenant_that_opens_streams_repeatedly_is_bounded() {
        let bench = Bench::new(16, 50);
        let opened: Vec<_> = (0..1000).map_while(|_| bench.open(1).ok()).collect();
        assert_eq!(opened.len(), 8 + MIN_REVOKED);
        assert!(bench.open(2).is_ok());
        drop(opened);
        assert!(bench.open(1).is_ok());
    }
}
