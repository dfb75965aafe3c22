//! Fair shares of a limited resource, per host, and per key or IPv6 site.
//!
//! A tenant may hold at most a percentage of what others leave free, so each new tenant finds room, no
//! matter how much the earlier ones hold (the dynamic thresholds of shared-memory switches: Choudhury
//! and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998). Things that are held but unused go to
//! the next tenant that asks: first the tenant's own, else those of the tenant with most.
//!
//! An entry counts as unused until a request checks it. A request does not check entries in use again
//! before [`Shares::refresh`]. So each request costs O(log n), apart from the checks that listing the
//! entries has paid for, and a refused peer cannot make the broker search.

use std::collections::{BTreeSet, HashMap, VecDeque};

use crate::session::peer::{Group, Tenant};

/// Default maximum, in percent of what others leave free, that one host may hold.
pub const DEFAULT_PERCENT: u8 = 50;

/// A request checks entries in use again only if the tenant has at most this many.
const MAX_RECHECKS: usize = 64;
/// Groups that one request searches for an unused entry.
const MAX_GROUPS: usize = 64;

/// What tenants hold, oldest first; `T` identifies one thing that can be revoked.
#[derive(Debug)]
pub struct Shares<T> {
    limit: usize,
    percent: u8,
    total: usize,
    by_tenant: HashMap<Tenant, Held<T>>,
    by_group: HashMap<Group, Members>,
    /// Groups with members in their ranking, by how much the group holds.
    ranking: BTreeSet<(usize, Group)>,
}

/// What one tenant holds.
#[derive(Debug)]
struct Held<T> {
    count: usize,
    /// Unused as far as known.
    unused: VecDeque<T>,
    /// Revoked only if nothing is unused.
    spare: VecDeque<T>,
    /// In use at the last check.
    in_use: VecDeque<T>,
}

/// What all tenants of a group hold.
#[derive(Debug, Default)]
struct Members {
    count: usize,
    /// Tenants with something that may be unused, by how much they hold.
    ranking: BTreeSet<(usize, Tenant)>,
}

impl<T> Default for Held<T> {
    fn default() -> Self {
        Self {
            count: 0,
            unused: VecDeque::new(),
            spare: VecDeque::new(),
            in_use: VecDeque::new(),
        }
    }
}

impl<T> Held<T> {
    fn items(&self) -> impl Iterator<Item = &T> {
        self.unused.iter().chain(&self.spare).chain(&self.in_use)
    }

    fn listed(&self) -> usize {
        self.unused.len() + self.spare.len() + self.in_use.len()
    }

    fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for list in [&mut self.unused, &mut self.spare, &mut self.in_use] {
            list.retain(&mut keep);
        }
    }

    /// The tenant's place in the ranking, if something may be revoked from it.
    fn rank(&self) -> Option<usize> {
        (!self.unused.is_empty() || !self.spare.is_empty()).then_some(self.count)
    }

    fn file(&mut self, item: T, state: Use) {
        match state {
            Use::Unused => self.unused.push_back(item),
            Use::Spare => self.spare.push_back(item),
            Use::InUse => self.in_use.push_back(item),
            Use::Gone => {}
        }
    }

    /// Takes the first entry that is unused, else the first spare one.
    fn take(&mut self, check_use: &mut impl FnMut(&T) -> Use) -> Option<T> {
        while let Some(item) = self.unused.pop_front() {
            match check_use(&item) {
                Use::Unused => return Some(item),
                state => self.file(item, state),
            }
        }
        while let Some(item) = self.spare.pop_front() {
            match check_use(&item) {
                Use::Unused | Use::Spare => return Some(item),
                state => self.file(item, state),
            }
        }
        if self.in_use.len() > MAX_RECHECKS {
            return None;
        }
        for _ in 0..self.in_use.len() {
            let item = self.in_use.pop_front()?;
            match check_use(&item) {
                Use::Unused => return Some(item),
                state => self.file(item, state),
            }
        }
        self.spare.pop_front()
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
    /// Its IPv6 site has reached its share, over all hosts without a key.
    Site {
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
    /// Revoked only if the tenant has nothing unused.
    Spare,
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
            by_tenant: HashMap::new(),
            by_group: HashMap::new(),
            ranking: BTreeSet::new(),
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
        self.by_tenant.values().flat_map(Held::items)
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
        let group = tenant.group();
        let held = self.by_group.get(&group).map_or(0, |group| group.count);
        // A group leaves something to other groups, but may hold more than one host alone.
        if held >= self.share(held, self.percent.midpoint(100)) {
            return Err(match group {
                Group::Key(_) => Exceeded::Key { held },
                Group::Site(_) => Exceeded::Site { held },
            });
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

    /// Charges a tenant for this many more.
    pub fn charge(&mut self, tenant: &Tenant, count: usize) {
        self.total += count;
        self.change(tenant, |held| held.count += count);
    }

    /// Releases this many of what a tenant was charged for.
    ///
    /// # Panics
    /// If the tenant was not charged for them.
    pub fn release(&mut self, tenant: &Tenant, count: usize) {
        self.total -= count;
        self.change(tenant, |held| {
            held.count = held
                .count
                .checked_sub(count)
                .expect("the tenant was charged");
        });
    }

    /// Lists something that a tenant was charged for, so that it can be revoked. Occasionally drops
    /// entries for which `is_gone` returns true.
    pub fn list(&mut self, tenant: &Tenant, item: T, is_gone: impl Fn(&T) -> bool) {
        self.change(tenant, |held| {
            held.unused.push_back(item);
            if held.listed() > 2 * held.count + 16 {
                held.retain(|item| !is_gone(item));
            }
        });
    }

    /// Removes an entry that a tenant no longer holds.
    pub fn unlist(&mut self, tenant: &Tenant, is_gone: impl Fn(&T) -> bool) {
        self.change(tenant, |held| held.retain(|item| !is_gone(item)));
    }

    /// Checks again what was in use; to be called about once a second.
    pub fn refresh(&mut self, mut check_use: impl FnMut(&T) -> Use) {
        let has_any =
            |(tenant, held): (&Tenant, &Held<T>)| (!held.in_use.is_empty()).then_some(*tenant);
        let tenants: Vec<_> = self.by_tenant.iter().filter_map(has_any).collect();
        for tenant in tenants {
            self.change(&tenant, |held| {
                for item in std::mem::take(&mut held.in_use) {
                    let state = check_use(&item);
                    held.file(item, state);
                }
            });
        }
    }

    /// Finds something to revoke, so that a tenant may hold one more: something of its own if it has
    /// reached its share, else of the group and host with most. Checks the oldest entry first.
    pub fn evict(
        &mut self,
        tenant: &Tenant,
        exceeded: Exceeded,
        mut check_use: impl FnMut(&T) -> Use,
    ) -> Option<(Tenant, T)> {
        let held = self.held_by(tenant);
        let others = match exceeded {
            Exceeded::Host { .. } => None,
            Exceeded::Key { .. } | Exceeded::Site { .. } => {
                self.take_from_group(&tenant.group(), held, &mut check_use)
            }
            Exceeded::Total => self.take_from_all(held, &mut check_use),
        };
        others.or_else(|| self.take_from(tenant, &mut check_use))
    }

    /// Takes an entry of a tenant that holds more than `held`, in the group with most.
    fn take_from_all(
        &mut self,
        held: usize,
        check_use: &mut impl FnMut(&T) -> Use,
    ) -> Option<(Tenant, T)> {
        let mut next = self.ranking.last().copied();
        for _ in 0..MAX_GROUPS {
            let (_, group) = next.filter(|(count, _)| *count > held)?;
            let found = self.take_from_group(&group, held, check_use);
            if found.is_some() {
                return found;
            }
            next = self.ranking.range(..next?).next_back().copied();
        }
        None
    }

    /// Takes an entry of the tenant with most in a group, if it holds more than `held`.
    fn take_from_group(
        &mut self,
        group: &Group,
        held: usize,
        check_use: &mut impl FnMut(&T) -> Use,
    ) -> Option<(Tenant, T)> {
        loop {
            let (count, holder) = *self.by_group.get(group)?.ranking.last()?;
            if count <= held {
                return None;
            }
            // A tenant that has nothing to revoke leaves the ranking.
            let found = self.take_from(&holder, check_use);
            if found.is_some() {
                return found;
            }
        }
    }

    fn take_from(
        &mut self,
        tenant: &Tenant,
        check_use: &mut impl FnMut(&T) -> Use,
    ) -> Option<(Tenant, T)> {
        let item = self.change(tenant, |held| held.take(check_use))?;
        Some((*tenant, item))
    }

    /// Changes what a tenant holds, and updates the rankings.
    fn change<R>(&mut self, tenant: &Tenant, change: impl FnOnce(&mut Held<T>) -> R) -> R {
        let key = tenant.group();
        let held = self.by_tenant.entry(*tenant).or_default();
        let (count, rank) = (held.count, held.rank());
        let result = change(held);
        let (new_count, new_rank) = (held.count, held.rank().filter(|_| held.count > 0));
        if new_count == 0 {
            self.by_tenant.remove(tenant);
        }
        if (new_count, new_rank) == (count, rank) && new_count > 0 {
            return result;
        }
        let group = self.by_group.entry(key).or_default();
        if !group.ranking.is_empty() {
            self.ranking.remove(&(group.count, key));
        }
        if let Some(count) = rank {
            group.ranking.remove(&(count, *tenant));
        }
        if let Some(count) = new_rank {
            group.ranking.insert((count, *tenant));
        }
        group.count = group.count + new_count - count;
        if !group.ranking.is_empty() {
            self.ranking.insert((group.count, key));
        }
        if group.count == 0 {
            self.by_group.remove(&key);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::test_support::{network, tenant};
    use proptest::prelude::*;

    fn host(number: u8) -> Tenant {
        tenant(number, None)
    }

    fn keyed(number: u8, key: u8) -> Tenant {
        tenant(number, Some(key))
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
    fn each_new_host_finds_room() {
        let mut shares = Shares::new(4096, 50);
        let got: Vec<_> = (1..=12).map(|n| take_all(&mut shares, &host(n))).collect();
        assert_eq!(got, [2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1]);
        // What one gives back, others may have.
        shares.release(&host(1), 2048);
        assert!(shares.check(&host(2)).is_ok());
        // With trusted publishers, one host may have everything.
        let mut shares = Shares::new(4096, 100);
        assert_eq!(take_all(&mut shares, &host(1)), 4096);
        assert_eq!(shares.check(&host(2)), Err(Exceeded::Total));
    }

    #[test]
    fn the_last_slot_can_be_taken() {
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
    fn the_owner_of_many_ipv6_networks_leaves_room_for_other_sites() {
        let mut shares = Shares::new(1000, 50);
        let got: usize = (0..5000)
            .map(|n| take_all(&mut shares, &network(1, n)))
            .sum();
        assert_eq!(got, 750);
        let exceeded = shares.check(&network(1, 5000)).unwrap_err();
        assert_eq!(exceeded, Exceeded::Site { held: 750 });
        assert_eq!(take_all(&mut shares, &network(2, 0)), 125);
        assert_eq!(take_all(&mut shares, &host(1)), 63);
        // It may replace what another network of its own does not use, if that has more.
        let evicted = shares.evict(&network(1, 5000), exceeded, |_| Use::Unused);
        assert_eq!(evicted.map(|(tenant, _)| tenant), Some(network(1, 0)));
    }

    #[test]
    fn a_request_that_is_refused_costs_no_search() {
        let mut shares = Shares::new(100_000, 50);
        let tenants: Vec<_> = (0..1000).map(|n| network(n, n)).collect();
        for tenant in [host(1)].iter().chain(&tenants) {
            let count = if *tenant == host(1) { 50_000 } else { 20 };
            for item in 0..count {
                shares.charge(tenant, 1);
                shares.list(tenant, item, |_| false);
            }
        }
        let checks = std::cell::Cell::new(0);
        let check_use = |_: &u32| {
            checks.set(checks.get() + 1);
            Use::InUse
        };
        for (asker, exceeded) in [
            (host(1), Exceeded::Host { held: 50_000 }),
            (host(2), Exceeded::Total),
        ] {
            // The first one checks each entry once.
            assert_eq!(shares.evict(&asker, exceeded, check_use), None);
            checks.set(0);
            (0..1000).for_each(|_| assert_eq!(shares.evict(&asker, exceeded, check_use), None));
            assert!(checks.get() <= 1000 * MAX_RECHECKS, "{asker:?}: {checks:?}");
        }
        // What is not used any more is found again.
        shares.refresh(|item| if *item == 7 { Use::Unused } else { Use::InUse });
        checks.set(0);
        let found = shares.evict(&host(2), Exceeded::Total, |_| Use::Unused);
        assert_eq!(found, Some((host(1), 7)));
    }

    #[test]
    fn spare_entries_are_evicted_when_none_is_unused() {
        let mut shares = Shares::new(100, 50);
        for item in 0..4 {
            shares.charge(&host(1), 1);
            shares.list(&host(1), item, |_| false);
        }
        let check_use =
            |item: &u32| [Use::InUse, Use::Spare, Use::Unused, Use::Spare][*item as usize];
        let own = Exceeded::Host { held: 4 };
        let order: Vec<_> = (0..4)
            .map_while(|_| shares.evict(&host(1), own, check_use))
            .map(|(_, item)| item)
            .collect();
        assert_eq!(order, [2, 1, 3]);
    }

    #[test]
    fn the_largest_holder_loses_its_oldest_unused_entry() {
        let mut shares = Shares::new(10, 100);
        for (tenant, items) in [(host(1), 0..7), (host(2), 10..13)] {
            for item in items {
                shares.charge(&tenant, 1);
                shares.list(&tenant, item, |_| false);
            }
        }
        let pending = host(3);
        let exceeded = shares.check(&pending).unwrap_err();
        assert_eq!(exceeded, Exceeded::Total);
        // Entries 0 and 1 are in use, 2 is gone.
        let check_use = |item: &i32| match item {
            0 | 1 => Use::InUse,
            2 => Use::Gone,
            _ => Use::Unused,
        };
        let evicted = shares.evict(&pending, exceeded, check_use);
        assert_eq!(evicted, Some((host(1), 3)));
        // If the tenant with most has nothing unused, the next one gives way.
        let check_use = |item: &i32| if *item < 10 { Use::InUse } else { Use::Unused };
        let evicted = shares.evict(&pending, exceeded, check_use);
        assert_eq!(evicted, Some((host(2), 10)));
        assert_eq!(shares.evict(&pending, exceeded, |_| Use::InUse), None);
        // A tenant takes nothing from one that holds less.
        assert_eq!(
            shares.evict(&host(1), Exceeded::Total, check_use),
            None,
            "host 2 has less"
        );
        // A tenant at its share gives up something of its own.
        let own = shares.evict(&host(2), Exceeded::Host { held: 3 }, check_use);
        assert_eq!(own, Some((host(2), 11)));
    }

    #[test]
    fn entries_that_are_gone_are_dropped() {
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
        assert!(held.count == 1 && held.listed() <= 20, "{held:?}");
        shares.release(&host(1), 1);
        assert!(shares.by_tenant.is_empty() && shares.by_group.is_empty());
        assert!(shares.ranking.is_empty());
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
            let pending = host(99);
            if let Err(exceeded) = shares.check(&pending) {
                prop_assert!(shares.evict(&pending, exceeded, |()| Use::Unused).is_some());
            }
        }
    }
}
