//! Fair shares of a limited resource, per host and per key.
//!
//! A tenant may hold at most a percentage of what others leave free, so each new tenant finds room, no
//! matter how much the earlier ones hold (the dynamic thresholds of shared-memory switches: Choudhury
//! and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998). Things that are held but unused go to
//! the next tenant that asks: first the tenant's own, else those of the tenant with most.

use std::cmp::Reverse;
use std::collections::{HashMap, VecDeque};

use crate::auth::KeyId;
use crate::peer::Tenant;

/// Default maximum, in percent of what others leave free, that one host may hold.
pub const DEFAULT_PERCENT: u8 = 50;

/// What tenants hold, oldest first; `T` identifies one thing that can be revoked.
#[derive(Debug)]
pub struct Shares<T> {
    limit: usize,
    percent: u8,
    total: usize,
    by_key: HashMap<KeyId, usize>,
    by_tenant: HashMap<Tenant, Held<T>>,
}

/// What one tenant holds.
#[derive(Debug)]
struct Held<T> {
    count: usize,
    items: VecDeque<T>,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self {
            count: 0,
            items: VecDeque::new(),
        }
    }
}

/// Why a tenant may not hold more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exceeded {
    /// Its host (with its key, if there are keys) has reached its share.
    Host {
        /// How much it holds.
        held: usize,
    },
    /// Its key has reached its share, over all hosts.
    Key {
        /// How much it holds.
        held: usize,
    },
    /// Nothing is left.
    Total,
}

/// State of one thing that a tenant holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Held but not in use: it can be revoked.
    Unused,
    /// In use.
    InUse,
    /// No longer held.
    Gone,
}

impl<T> Shares<T> {
    /// Shares of `limit` things, of which one host may hold `percent` of what others leave free.
    #[must_use]
    pub fn new(limit: usize, percent: u8) -> Self {
        Self {
            limit,
            percent: percent.clamp(1, 100),
            total: 0,
            by_key: HashMap::new(),
            by_tenant: HashMap::new(),
        }
    }

    /// The total number.
    #[must_use]
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// The number held.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total
    }

    /// All listed things.
    pub fn items(&self) -> impl Iterator<Item = &T> {
        self.by_tenant.values().flat_map(|held| &held.items)
    }

    /// The number that a tenant holds.
    #[must_use]
    pub fn held_by(&self, tenant: &Tenant) -> usize {
        self.by_tenant.get(tenant).map_or(0, |held| held.count)
    }

    /// Whether a tenant may hold one more.
    ///
    /// # Errors
    /// The limit that it would exceed.
    pub fn check(&self, tenant: &Tenant) -> Result<(), Exceeded> {
        let held = self.held_by(tenant);
        if held >= self.share(held, self.percent) {
            return Err(Exceeded::Host { held });
        }
        let with_key = tenant.key.map_or(0, |key| self.held_with(&key));
        // All hosts with one key leave something to other keys, but may hold more than one host alone.
        if tenant.key.is_some() && with_key >= self.share(with_key, self.percent.midpoint(100)) {
            return Err(Exceeded::Key { held: with_key });
        }
        if self.total >= self.limit {
            return Err(Exceeded::Total);
        }
        Ok(())
    }

    /// The share of a tenant that holds this many: a percentage of what others leave free, at least
    /// one.
    fn share(&self, held: usize, percent: u8) -> usize {
        let left_by_others = self.limit.saturating_sub(self.total - held);
        (left_by_others * usize::from(percent)).div_ceil(100).max(1)
    }

    fn held_with(&self, key: &KeyId) -> usize {
        self.by_key.get(key).copied().unwrap_or(0)
    }

    /// Charges a tenant for this many more.
    pub fn charge(&mut self, tenant: &Tenant, count: usize) {
        self.total += count;
        self.by_tenant.entry(*tenant).or_default().count += count;
        if let Some(key) = tenant.key {
            *self.by_key.entry(key).or_default() += count;
        }
    }

    /// Releases this many of what a tenant was charged for.
    ///
    /// # Panics
    /// If the tenant was not charged for them.
    pub fn release(&mut self, tenant: &Tenant, count: usize) {
        self.total -= count;
        let held = self
            .by_tenant
            .get_mut(tenant)
            .expect("the tenant was charged");
        held.count -= count;
        if held.count == 0 {
            self.by_tenant.remove(tenant);
        }
        if let Some(key) = tenant.key {
            let with_key = self.by_key.get_mut(&key).expect("the key was charged");
            *with_key -= count;
            if *with_key == 0 {
                self.by_key.remove(&key);
            }
        }
    }

    /// Lists something that a tenant was charged for, so that it can be revoked. Occasionally drops
    /// entries for which `is_gone` returns true.
    pub fn list(&mut self, tenant: &Tenant, item: T, is_gone: impl Fn(&T) -> bool) {
        let held = self.by_tenant.entry(*tenant).or_default();
        held.items.push_back(item);
        if held.items.len() > 2 * held.count + 16 {
            held.items.retain(|item| !is_gone(item));
        }
    }

    /// Removes an entry that a tenant no longer holds.
    pub fn unlist(&mut self, tenant: &Tenant, is_gone: impl Fn(&T) -> bool) {
        if let Some(held) = self.by_tenant.get_mut(tenant) {
            held.items.retain(|item| !is_gone(item));
        }
    }

    /// Finds something to revoke, so that a tenant may hold one more: something of its own if it has
    /// reached its share, else of the key and host with most. Checks the oldest entry first, and moves
    /// entries in use to the end of the list (like the clock algorithm of page replacement).
    pub fn evict(
        &mut self,
        tenant: &Tenant,
        exceeded: Exceeded,
        mut look: impl FnMut(&T) -> Use,
    ) -> Option<(Tenant, T)> {
        for holder in self.holders(tenant, exceeded) {
            let items = &mut self.by_tenant.get_mut(&holder)?.items;
            for _ in 0..items.len() {
                let item = items.pop_front()?;
                match look(&item) {
                    Use::Unused => return Some((holder, item)),
                    Use::InUse => items.push_back(item),
                    Use::Gone => {}
                }
            }
        }
        None
    }

    /// Tenants from which to revoke something for this tenant, in this order.
    fn holders(&self, tenant: &Tenant, exceeded: Exceeded) -> Vec<Tenant> {
        if matches!(exceeded, Exceeded::Host { .. }) {
            return vec![*tenant];
        }
        let held = self.held_by(tenant);
        let same_key = |holder: &Tenant| holder.key == tenant.key;
        let mut holders: Vec<_> = self
            .by_tenant
            .iter()
            .filter(|(holder, has)| {
                let from_all = exceeded == Exceeded::Total;
                (from_all || same_key(holder)) && (has.count > held || *holder == tenant)
            })
            .map(|(holder, has)| {
                let with_key = holder.key.map_or(0, |key| self.held_with(&key));
                (with_key, has.count, *holder)
            })
            .collect();
        holders.sort_by_key(|&(with_key, count, _)| Reverse((with_key, count)));
        holders.into_iter().map(|(_, _, holder)| holder).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peer::Host;
    use proptest::prelude::*;

    fn host(number: u8) -> Tenant {
        Tenant {
            host: Host::of(([10, 0, 0, number], 1).into()),
            key: None,
        }
    }

    fn keyed(number: u8, key: u8) -> Tenant {
        Tenant {
            key: Some([key; 16]),
            ..host(number)
        }
    }

    /// Takes as much as a tenant gets; returns how much.
    fn take_all(shares: &mut Shares<u32>, tenant: &Tenant) -> usize {
        while shares.check(tenant).is_ok() {
            shares.charge(tenant, 1);
            shares.list(tenant, 0, |_| false);
        }
        shares.held_by(tenant)
    }

    #[test]
    fn each_host_finds_room_however_much_those_before_it_hold() {
        let mut shares = Shares::new(4096, 50);
        let got: Vec<_> = (1..=12).map(|n| take_all(&mut shares, &host(n))).collect();
        assert_eq!(got, [2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]);
        // What one gives back, others may have.
        shares.release(&host(1), 2048);
        assert!(shares.check(&host(2)).is_ok());
        // Whoever knows its publishers may let one host have everything.
        let mut shares = Shares::new(4096, 100);
        assert_eq!(take_all(&mut shares, &host(1)), 4096);
        assert_eq!(shares.check(&host(2)), Err(Exceeded::Total));
    }

    #[test]
    fn the_last_place_is_still_one() {
        let mut shares: Shares<u32> = Shares::new(1, 50);
        assert_eq!(take_all(&mut shares, &host(1)), 1);
        assert_eq!(shares.check(&host(2)), Err(Exceeded::Total));
        assert_eq!(shares.check(&host(1)), Err(Exceeded::Host { held: 1 }));
    }

    #[test]
    fn a_key_with_many_hosts_leaves_room_for_other_keys() {
        let mut shares = Shares::new(1000, 50);
        let stolen: usize = (1..200).map(|n| take_all(&mut shares, &keyed(n, 1))).sum();
        assert_eq!(stolen, 750);
        assert_eq!(
            shares.check(&keyed(200, 1)),
            Err(Exceeded::Key { held: 750 })
        );
        assert_eq!(take_all(&mut shares, &keyed(200, 2)), 125);
        // The same host with another key is another tenant.
        assert!(shares.check(&keyed(1, 3)).is_ok());
    }

    #[test]
    fn what_is_unused_goes_oldest_first_from_the_one_with_most() {
        let mut shares = Shares::new(10, 100);
        for (tenant, items) in [(host(1), 0..7), (host(2), 10..13)] {
            for item in items {
                shares.charge(&tenant, 1);
                shares.list(&tenant, item, |_| false);
            }
        }
        let newcomer = host(3);
        let exceeded = shares.check(&newcomer).unwrap_err();
        assert_eq!(exceeded, Exceeded::Total);
        // 0 and 1 are in use, 2 is gone already.
        let look = |item: &i32| match item {
            0 | 1 => Use::InUse,
            2 => Use::Gone,
            _ => Use::Unused,
        };
        let evicted = shares.evict(&newcomer, exceeded, look);
        assert_eq!(evicted, Some((host(1), 3)));
        // Nothing unused of the one with most: then of the next.
        let look = |item: &i32| if *item < 10 { Use::InUse } else { Use::Unused };
        let evicted = shares.evict(&newcomer, exceeded, look);
        assert_eq!(evicted, Some((host(2), 10)));
        assert_eq!(shares.evict(&newcomer, exceeded, |_| Use::InUse), None);
        // Nobody is robbed by one who has more.
        assert_eq!(
            shares.evict(&host(1), Exceeded::Total, look),
            None,
            "host 2 has less"
        );
        // Whoever has its share gives up something of its own.
        let own = shares.evict(&host(2), Exceeded::Host { held: 3 }, look);
        assert_eq!(own, Some((host(2), 11)));
    }

    #[test]
    fn what_is_gone_is_not_kept_in_mind() {
        let mut shares = Shares::new(1000, 50);
        for item in 0..100_000 {
            shares.charge(&host(1), 1);
            shares.list(&host(1), item, |listed| *listed < item);
            // Never the last, so that the tenant stays.
            if item > 0 {
                shares.release(&host(1), 1);
            }
        }
        let held = &shares.by_tenant[&host(1)];
        assert!(held.count == 1 && held.items.len() <= 20, "{held:?}");
        shares.release(&host(1), 1);
        assert!(shares.by_tenant.is_empty());
    }

    proptest! {
        /// However hosts ask, one that has less than all others gets something, as long as what others
        /// hold is unused; and nothing is ever held beyond the limit.
        #[test]
        fn a_newcomer_is_never_kept_out_by_what_is_unused(limit in 1usize..40, asks in prop::collection::vec((1u8..6, 0u8..3), 0..200)) {
            let mut shares = Shares::new(limit, 50);
            for (number, key) in asks {
                let tenant = if key == 0 { host(number) } else { keyed(number, key) };
                if let Err(exceeded) = shares.check(&tenant) {
                    let Some((holder, ())) = shares.evict(&tenant, exceeded, |()| Use::Unused) else {
                        prop_assert!(shares.held_by(&tenant) > 0);
                        continue;
                    };
                    shares.release(&holder, 1);
                }
                shares.charge(&tenant, 1);
                shares.list(&tenant, (), |()| false);
                prop_assert!(shares.total() <= limit);
            }
            let newcomer = host(99);
            if let Err(exceeded) = shares.check(&newcomer) {
                prop_assert!(shares.evict(&newcomer, exceeded, |()| Use::Unused).is_some());
            }
        }
    }
}
