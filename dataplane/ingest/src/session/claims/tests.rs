use penstock_log::{Access, Geometry, LogOptions, RingFullPolicy};
use tempfile::TempDir;

use super::*;
use crate::session::test_support::{network, tenant};

const MIB: u32 = 1 << 20;

fn log(dir: &TempDir, name: &str) -> Arc<Log> {
    let options = LogOptions {
        geometry: Geometry::new(64 << 20, 16 << 20, 64).unwrap(),
        full: RingFullPolicy::Overwrite,
        access: Access::default(),
        writers: 1,
    };
    Arc::new(Log::open(&dir.path().join(name), &options).unwrap())
}

/// Takes claims of this size until none is left.
fn exhaust(claimant: &Claimant, len: u32) -> Vec<RingClaim> {
    std::iter::from_fn(|| claimant.claim(len, ClaimPriority::Next)).collect()
}

/// Completes all of these batches.
fn fill(claims: Vec<RingClaim>) {
    claims.into_iter().for_each(RingClaim::complete);
}

#[test]
fn unfilled_room_counts_until_it_decays() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let [a, b] = [1, 2].map(|host| claims.claimant(&log, &tenant(host, None)));
    // A publisher that claims and drops repeatedly moves the ring by no more than its share.
    let mut moved = 0;
    while let Some(claim) = a.claim(MIB, ClaimPriority::Next) {
        drop(claim);
        moved += 1;
    }
    assert!((16..20).contains(&moved), "{moved} MiB");
    assert!(b.claim(MIB, ClaimPriority::Next).is_some());
    // A publisher that fills what it claims may continue.
    for _ in 0..100 {
        fill(exhaust(&b, MIB));
    }
    // The forfeited room decays.
    let account = &a.ring.host;
    account.forfeited_at.store(0, Ordering::Relaxed);
    let long_ago = a.ring.start.checked_sub(Duration::from_secs(20)).unwrap();
    assert_eq!(account.forfeited(long_ago), 0);
}

#[test]
fn received_bytes_of_a_batch_that_leaves_the_ring_are_not_forfeited() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let claimant = claims.claimant(&log, &tenant(1, None));
    // Nearly complete batches, repeatedly: the received bytes may be claimed again at once.
    for _ in 0..1000 {
        let claim = claimant.claim(8 * MIB, ClaimPriority::Next);
        claim
            .expect("nothing is held")
            .release(u64::from(8 * MIB) - 1);
    }
    assert_eq!(claimant.ring.host.held.load(Ordering::Relaxed), 0);
    let forfeited = claimant.ring.host.forfeited.load(Ordering::Relaxed);
    assert!(forfeited <= 1000, "{forfeited} bytes for 1000");
    // Bytes received for one claim do not count for another.
    let mut moved = 0;
    while let Some(claim) = claimant.claim(MIB, ClaimPriority::Waiting) {
        claim
            .with_received_before(u64::from(MIB) - 1)
            .release(u64::from(MIB) - 1);
        moved += 1;
    }
    assert!((15..20).contains(&moved), "{moved} MiB");
    assert_eq!(claimant.ring.host.held.load(Ordering::Relaxed), 0);
}

#[test]
fn a_ring_is_shared_by_host_and_key_with_a_reserve_for_small_holders() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let [a, b, c, d] = [1, 2, 3, 4].map(|host| claims.claimant(&log, &tenant(host, None)));
    // A quarter of the ring, on however many streams.
    let a = [a, claims.claimant(&log, &tenant(1, None))];
    let held: Vec<_> = a.iter().flat_map(|a| exhaust(a, MIB)).collect();
    assert_eq!(held.len(), 16);
    assert!(
        a[0].pressure().ring,
        "its denied claims press the holders of its own host"
    );
    // Large holders together get three quarters of a half.
    let more = exhaust(&b, MIB);
    assert_eq!(more.len(), 8);
    // The rest is for small holders.
    let small = exhaust(&c, MIB);
    assert_eq!(small.len(), 4);
    fill(small);
    assert!(
        c.pressure().ring && b.pressure().ring,
        "all of them hold too much"
    );
    assert_eq!(exhaust(&d, 8 * MIB).len(), 0);
    fill(held);
    let largest = exhaust(&d, 8 * MIB);
    assert_eq!(largest.len(), 2, "the largest batch has room");
    fill(largest);
    fill(more);
    // One key from several hosts.
    let keyed: Vec<_> = (1..9)
        .map(|host| claims.claimant(&log, &tenant(host, Some(1))))
        .collect();
    let held: Vec<_> = keyed.iter().map(|k| exhaust(k, MIB)).collect();
    assert_eq!(held.iter().flatten().count(), 16);
    let other = claims.claimant(&log, &tenant(9, Some(2)));
    assert!(!exhaust(&other, MIB).is_empty());
}

#[test]
fn the_networks_of_an_ipv6_site_have_one_share_together() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let network = |site: u16, subnet: u16| claims.claimant(&log, &network(site, subnet));
    // Each holds little.
    let many: Vec<_> = (0..32).map(|subnet| network(1, subnet)).collect();
    let held: Vec<_> = many
        .iter()
        .filter_map(|one| one.claim(MIB, ClaimPriority::Next))
        .collect();
    assert_eq!(held.len(), 16);
    let spills = many.iter().map(|one| {
        let mut spill = one.spill();
        let reserved = spill.reserve(0, MIB, ClaimPriority::Next);
        (spill, reserved.is_ok())
    });
    let spills: Vec<_> = spills.collect();
    assert_eq!(spills.iter().filter(|(_, got)| *got).count(), 16);
    assert!(network(2, 0).claim(8 * MIB, ClaimPriority::Next).is_some());
    fill(held);
}

#[test]
fn rings_are_counted_per_log_and_memory_for_all_logs() {
    let dir = TempDir::new().unwrap();
    let (a, b) = (log(&dir, "a.log"), log(&dir, "b.log"));
    let claims = Claims::default();
    let (in_a, in_b) = (
        claims.claimant(&a, &tenant(1, None)),
        claims.claimant(&b, &tenant(1, None)),
    );
    let held = exhaust(&in_a, MIB);
    assert_eq!(exhaust(&in_b, MIB).len(), held.len());
    let mut spills = [in_a.spill(), in_b.spill()];
    assert_eq!(spills[0].reserve(0, 10 * MIB, ClaimPriority::Next), Ok(()));
    assert!(spills[1].reserve(0, 10 * MIB, ClaimPriority::Next).is_err());
    assert!(in_a.pressure().memory && in_b.pressure().memory);
    assert_eq!(spills[1].reserve(0, 6 * MIB, ClaimPriority::Next), Ok(()));
    assert!(in_b.charge(1).is_none());
    assert_eq!(claims.memory_held(), MEMORY / 2);
    // Other hosts have their own share.
    let other = claims.claimant(&a, &tenant(2, None));
    let charge = other.charge(8 << 20).unwrap();
    assert_eq!(claims.memory_held(), MEMORY * 3 / 4);
    drop((spills, charge));
    assert_eq!(claims.memory_held(), 0);
}

#[test]
fn later_batches_leave_room_for_the_next_one() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claimant = Claims::default().claimant(&log, &tenant(1, None));
    let later: Vec<_> = std::iter::from_fn(|| claimant.claim(MIB, ClaimPriority::Later)).collect();
    assert_eq!(later.len(), 12);
    assert_eq!(exhaust(&claimant, MIB).len(), 4);
}

#[test]
fn other_claims_of_the_host_yield_to_a_waiting_batch() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let [a, b] = [1, 1].map(|host| claims.claimant(&log, &tenant(host, None)));
    let other = claims.claimant(&log, &tenant(2, None));
    let waiting = a.wait();
    assert!(b.claim(1, ClaimPriority::Next).is_none());
    assert!(other.claim(1, ClaimPriority::Next).is_some());
    assert!(a.claim(1, ClaimPriority::Waiting).is_some());
    drop(waiting);
    assert!(b.claim(1, ClaimPriority::Next).is_some());
}

#[test]
fn memory_follows_what_arrives_and_returns() {
    let dir = TempDir::new().unwrap();
    let log = log(&dir, "a.log");
    let claims = Claims::default();
    let claimant = claims.claimant(&log, &tenant(1, None));
    let mut spill = claimant.spill();
    assert_eq!((spill.held(), claims.memory_held()), (0, 0));
    // One byte at the end of a large batch.
    spill.reserve(8 * MIB - 1, 1, ClaimPriority::Next).unwrap();
    spill.write(8 * MIB - 1, &[7]);
    assert_eq!(spill.held(), 4096);
    // Bytes that span pieces.
    let text: Vec<u8> = (0..10_000u32).map(|n| n as u8).collect();
    spill.reserve(4000, 10_000, ClaimPriority::Next).unwrap();
    spill.write(4000, &text);
    assert_eq!(claims.memory_held(), 5 * 4096);
    let mut read = vec![0; 8 << 20];
    for (offset, part) in spill.written_pieces(8 * MIB) {
        read[offset as usize..][..part.len()].copy_from_slice(part);
    }
    assert_eq!(read[4000..14_000], text);
    assert_eq!(read[8 * MIB as usize - 1], 7);
    spill.truncate(4001);
    assert_eq!(spill.held(), 4096);
    let parts: Vec<_> = spill
        .written_pieces(4001)
        .map(|(at, part)| (at, part.len()))
        .collect();
    assert_eq!(parts, [(0, 4001)]);
    drop(spill);
    assert_eq!(claims.memory_held(), 0);
    // The whole memory, repeatedly.
    for _ in 0..3 {
        let hosts: Vec<_> = (1..9)
            .map(|h| claims.claimant(&log, &tenant(h, None)))
            .collect();
        let spills: Vec<_> = hosts
            .iter()
            .map(|host| {
                let mut spill = host.spill();
                spill.reserve(0, 4 * MIB, ClaimPriority::Next).unwrap();
                spill.write(0, &vec![1; 4 << 20]);
                spill
            })
            .collect();
        assert_eq!(claims.memory_held(), MEMORY);
        let mut more = claims.claimant(&log, &tenant(9, None)).spill();
        assert!(more.reserve(0, 1, ClaimPriority::Next).is_err());
        drop(spills);
        assert_eq!(claims.memory_held(), 0);
        more.reserve(0, 1, ClaimPriority::Next).unwrap();
    }
}

#[test]
fn only_bytes_of_the_batch_extend_its_deadline() {
    let stall = Duration::from_secs(30);
    let after = Duration::from_secs;
    assert!(!is_overdue(after(30), 0, stall));
    assert!(is_overdue(after(31), 1000, stall));
    // One byte a second does not suffice; a slow but steady link does.
    assert!(is_overdue(after(500), 500, stall));
    assert!(!is_overdue(after(500), 8 << 20, stall));
    assert!(is_overdue(after(543), 8 << 20, stall));
    assert!(is_slow(Duration::from_millis(51), 1));
    assert!(!is_slow(Duration::from_millis(500), 8 << 20));
    assert!(is_stalling(after(2), 1000) && !is_stalling(after(2), 1 << 20));
}
