//! What a case takes from earlier ones: the better XDP mode and the slower path of the same link.

use super::flags;
use super::plan::{Case, Contender, Kind};
use crate::report::model::{BenchCase, bench_figures};

/// The mode that was better on a link of this kind, for a contender that takes the better one.
pub fn in_better_mode(contender: Contender, case: &Case, earlier: &[BenchCase]) -> Contender {
    let found = full_speed(case, earlier).and_then(|case| bench_figures::best(case, "xdp")?.mode);
    match contender.kind {
        Kind::Xdp(None) => Contender {
            kind: Kind::Xdp(found),
            ..contender
        },
        _ => contender,
    }
}

/// The case in which one broker took all it could on such a link.
fn full_speed<'a>(case: &Case, earlier: &'a [BenchCase]) -> Option<&'a BenchCase> {
    earlier.iter().find(|other| {
        other.group == flags::Group::Throughput.name()
            && (other.profile, other.mtu) == (case.profile, case.mtu)
    })
}

/// Median of the path that moved less, MB/s.
pub fn slower_path(case: &Case, earlier: &[BenchCase]) -> Option<f64> {
    let case = full_speed(case, earlier)?;
    let moved = |kind| bench_figures::best(case, kind)?.median(bench_figures::PAYLOAD);
    Some(moved("xdp")?.min(moved("tcp")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::bench::plan;
    use crate::commands::bench::tally::{Figures, Tally};
    use crate::report::model::BenchContender;
    use penstock_testbed::settings::{Profile, XdpMode};

    fn measured(kind: Kind, rates: &[f64]) -> BenchContender {
        let mut tally = Tally::new(None);
        for rate in rates {
            tally.add(Ok(Figures::from([(bench_figures::PAYLOAD, *rate)])));
        }
        tally.report(&Contender::of(kind))
    }

    fn full_speed_case() -> BenchCase {
        BenchCase {
            id: "full-speed-1500".to_owned(),
            group: "throughput".to_owned(),
            profile: Profile::Wire,
            mtu: 1500,
            message_size: 1024,
            rate: None,
            payload_bytes: 1,
            contenders: vec![
                measured(Kind::Xdp(Some(XdpMode::Native)), &[500.0, 510.0, 490.0]),
                measured(Kind::Xdp(Some(XdpMode::Generic)), &[400.0, 600.0, 410.0]),
                measured(Kind::Tcp, &[450.0]),
            ],
        }
    }

    #[test]
    fn later_cases_take_the_mode_that_was_better_and_half_of_the_slower_path() {
        let earlier = [full_speed_case()];
        let case = |mtu| {
            let mut cases = plan::cases(&[flags::Group::Latency]).into_iter();
            cases.find(|case| case.mtu == mtu).unwrap()
        };
        let chosen =
            |mtu| in_better_mode(Contender::of(Kind::Xdp(None)), &case(mtu), &earlier).kind;
        assert_eq!(chosen(1500), Kind::Xdp(Some(XdpMode::Native)));
        assert_eq!(chosen(9000), Kind::Xdp(None));
        assert_eq!(slower_path(&case(1500), &earlier), Some(450.0));
        assert_eq!(slower_path(&case(9000), &earlier), None);
    }
}
