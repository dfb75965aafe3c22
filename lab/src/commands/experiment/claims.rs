//! What has been said about receive buffers, each saying with the test that the measured rows are put
//! to.

use crate::report::model::{Claim, RcvbufRow};

/// Share of the time at and above which a sender that waits for the window is limited by it, percent:
/// as in the decision table of `diagnose`.
const LIMITED: f64 = 20.0;
/// Below this it is not.
const FREE: f64 = 10.0;
/// First values of `rcv_space` are ten segments, so at most this where a segment is no larger.
const SMALL_SPACE: u64 = 65_536;

/// `diagnosis` or `kernel`, what was said, and its test.
type Saying = (&'static str, &'static str, fn(&Rows<'_>) -> Finding);
/// Whether it holds, unless the rows do not tell, and what was seen.
type Finding = (Option<bool>, String);

const SAYINGS: &[Saying] = &[
    (
        "diagnosis",
        "a small rcv_space (43,690) on a socket shows that the window limits it",
        small_space,
    ),
    (
        "diagnosis",
        "SO_RCVBUF on each accepted socket is faster than setting nothing, whatever rmem_max is",
        faster_when_accepted,
    ),
    (
        "kernel",
        "an accepted socket inherits SO_RCVBUF from its listener",
        inherited,
    ),
    (
        "kernel",
        "the listener's buffer fixes the window scale; one set after accept does not change it",
        scale,
    ),
    (
        "kernel",
        "set after accept, the first window is that of a default buffer; set on the listener, it is not",
        first_window,
    ),
    (
        "kernel",
        "SO_RCVBUF is capped at rmem_max, then doubled; SO_RCVBUFFORCE is not capped",
        capped,
    ),
    (
        "kernel",
        "setting SO_RCVBUF switches autotuning off",
        autotuning,
    ),
    (
        "kernel",
        "rwnd_limited at the sender tells a window limit: where it is high the transfer is slow",
        rwnd_limited,
    ),
];

/// Every saying with what these rows say to it.
pub fn of(rows: &[RcvbufRow]) -> Vec<Claim> {
    let rows = Rows(rows);
    let claims = SAYINGS.iter().map(|(of, claim, test)| {
        let (holds, evidence) = test(&rows);
        Claim {
            claim: (*claim).to_owned(),
            of: (*of).to_owned(),
            holds,
            evidence,
        }
    });
    claims.collect()
}

struct Rows<'a>(&'a [RcvbufRow]);

impl<'a> Rows<'a> {
    fn of_case(&self, case: &str) -> impl Iterator<Item = &'a RcvbufRow> {
        self.0.iter().filter(move |row| row.case == case)
    }

    /// A case and another one at the same rmem_max.
    fn pairs(&self, one: &str, other: &str) -> Vec<(&'a RcvbufRow, &'a RcvbufRow)> {
        let ones = self.of_case(one);
        let pair = |row: &'a RcvbufRow| {
            let mut others = self.of_case(other);
            Some((row, others.find(|o| o.rmem_max == row.rmem_max)?))
        };
        ones.filter_map(pair).collect()
    }

    /// Whether a test holds for all rows of a kind, and a word on each.
    fn all<T>(rows: Vec<T>, holds: impl Fn(&T) -> bool, say: impl Fn(&T) -> String) -> Finding {
        let said: Vec<String> = rows.iter().map(say).collect();
        let verdict = (!rows.is_empty()).then(|| rows.iter().all(holds));
        (verdict, said.join("; "))
    }
}

fn small_space(rows: &Rows<'_>) -> Finding {
    let small = rows.0.iter().filter(|r| r.rcv_space_first <= SMALL_SPACE);
    let small: Vec<_> = small.collect();
    let range = |of: fn(&RcvbufRow) -> f64| {
        let values = || small.iter().map(|row| of(row));
        let (least, most) = (
            values().fold(f64::INFINITY, f64::min),
            values().fold(0.0, f64::max),
        );
        format!("{least:.0}..{most:.0}")
    };
    let holds = (!small.is_empty()).then(|| {
        small
            .iter()
            .all(|row| row.rwnd_limited_percent.median >= FREE)
    });
    let said = format!(
        "rcv_space begins at {} bytes in {} of {} cases; the sender waited for the window {} % of the time in them",
        range(|row| row.rcv_space_first as f64),
        small.len(),
        rows.0.len(),
        range(|row| row.rwnd_limited_percent.median),
    );
    (holds, said)
}

fn faster_when_accepted(rows: &Rows<'_>) -> Finding {
    Rows::all(
        rows.pairs("accepted", "none"),
        |(accepted, none)| accepted.mb_per_s.min > none.mb_per_s.max,
        |(accepted, none)| {
            let (a, n) = (&accepted.mb_per_s, &none.mb_per_s);
            format!(
                "rmem_max {}: {:.0} ({:.0}..{:.0}) MB/s against {:.0} ({:.0}..{:.0}) without",
                accepted.rmem_max, a.median, a.min, a.max, n.median, n.min, n.max
            )
        },
    )
}

fn inherited(rows: &Rows<'_>) -> Finding {
    Rows::all(
        rows.pairs("listener", "accepted"),
        |(listener, accepted)| listener.rcvbuf_effective == accepted.rcvbuf_effective,
        |(listener, accepted)| {
            format!(
                "rmem_max {}: {} from the listener, {} set after accept",
                listener.rmem_max, listener.rcvbuf_effective, accepted.rcvbuf_effective
            )
        },
    )
}

fn scale(rows: &Rows<'_>) -> Finding {
    let unchanged = rows.pairs("accepted", "none");
    let unchanged = unchanged
        .iter()
        .all(|(a, n)| a.window_scale == n.window_scale);
    let pairs = rows.pairs("listener", "accepted");
    let differs = pairs.iter().any(|(l, a)| l.window_scale != a.window_scale);
    let (seen, said) = Rows::all(
        pairs,
        |_| unchanged,
        |(listener, accepted)| {
            format!(
                "rmem_max {}: scale {} set on the listener, {} after accept",
                listener.rmem_max, listener.window_scale, accepted.window_scale
            )
        },
    );
    // Where both come to the same scale nothing is shown, unless one set later did change it.
    (seen.filter(|holds| differs || !holds), said)
}

fn first_window(rows: &Rows<'_>) -> Finding {
    let pairs = rows.pairs("accepted", "none");
    let default = pairs
        .iter()
        .all(|(a, n)| a.rcv_ssthresh_first == n.rcv_ssthresh_first);
    Rows::all(
        rows.pairs("listener", "accepted"),
        |(listener, accepted)| default && listener.rcv_ssthresh_first > accepted.rcv_ssthresh_first,
        |(listener, accepted)| {
            format!(
                "rmem_max {}: first rcv_ssthresh {} from the listener, {} after accept",
                listener.rmem_max, listener.rcv_ssthresh_first, accepted.rcv_ssthresh_first
            )
        },
    )
}

fn capped(rows: &Rows<'_>) -> Finding {
    let expected = |row: &RcvbufRow| {
        let asked = row.rcvbuf_requested.unwrap_or(0);
        match row.case.as_str() {
            "force" => 2 * asked,
            _ => 2 * asked.min(row.rmem_max),
        }
    };
    let set = rows.0.iter().filter(|row| row.rcvbuf_requested.is_some());
    Rows::all(
        set.collect(),
        |row| row.rcvbuf_effective == expected(row),
        |row| {
            let RcvbufRow {
                case,
                rmem_max,
                rcvbuf_effective,
                ..
            } = row;
            format!("{case} at {rmem_max}: {rcvbuf_effective}")
        },
    )
}

fn autotuning(rows: &Rows<'_>) -> Finding {
    let (set, tuned): (Vec<_>, Vec<_>) = rows.0.iter().partition(|r| r.rcvbuf_requested.is_some());
    let fixed = set.iter().all(|r| r.rcvbuf_final == r.rcvbuf_effective);
    let grown = |row: &&RcvbufRow| row.rcvbuf_final > row.rcvbuf_effective;
    let grew = tuned.iter().any(grown);
    let (_, said) = Rows::all(tuned, grown, |row| {
        format!(
            "none at {}: from {} to {}",
            row.rmem_max, row.rcvbuf_effective, row.rcvbuf_final
        )
    });
    let stayed = if fixed { "stayed" } else { "did not stay" };
    // If even what is left alone did not grow, nothing is shown.
    let holds = if fixed {
        grew.then_some(true)
    } else {
        Some(false)
    };
    (
        holds,
        format!("{said}; where it was set it {stayed} as it was"),
    )
}

fn rwnd_limited(rows: &Rows<'_>) -> Finding {
    let rates = |wanted: &dyn Fn(f64) -> bool| -> Vec<f64> {
        let rows = rows.0.iter();
        let rows = rows.filter(|row| wanted(row.rwnd_limited_percent.median));
        rows.map(|row| row.mb_per_s.median).collect()
    };
    let (limited, free) = (
        rates(&|share| share >= LIMITED),
        rates(&|share| share < FREE),
    );
    let fastest = limited.iter().copied().fold(0.0, f64::max);
    let slowest = free.iter().copied().fold(f64::INFINITY, f64::min);
    let (count, others) = (limited.len(), free.len());
    if limited.is_empty() || free.is_empty() {
        let said = format!("{count} cases at or above {LIMITED} %, {others} below {FREE} %");
        return (None, said);
    }
    let said = format!(
        "{count} cases at or above {LIMITED} %: at most {fastest:.0} MB/s; {others} below {FREE} %: at least {slowest:.0} MB/s"
    );
    (Some(fastest < slowest), said)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::model::RcvbufRun;

    fn row(case: &str, rmem_max: u64, change: impl Fn(&mut RcvbufRun)) -> RcvbufRow {
        let set = case != "none";
        let mut run = RcvbufRun {
            rcvbuf_requested: set.then_some(1000),
            rcvbuf_effective: if set { 2 * rmem_max.min(1000) } else { 131_072 },
            rcv_space_first: 65_483,
            rcv_ssthresh_first: 65_483,
            window_scale: 7,
            mb_per_s: 100.0,
            ..RcvbufRun::default()
        };
        run.rcvbuf_final = run.rcvbuf_effective;
        change(&mut run);
        RcvbufRow::of(case, rmem_max, &[run])
    }

    fn rows() -> Vec<RcvbufRow> {
        vec![
            row("none", 500, |run| run.rcvbuf_final = 400_000),
            row("accepted", 500, |run| {
                run.mb_per_s = 10.0;
                run.rwnd_limited_percent = 90.0;
            }),
            row("listener", 500, |run| {
                run.window_scale = 2;
                run.rcv_ssthresh_first = 70_000;
            }),
            row("force", 500, |run| {
                run.rcvbuf_effective = 2000;
                run.rcvbuf_final = 2000;
            }),
        ]
    }

    fn verdicts(rows: &[RcvbufRow]) -> Vec<Option<bool>> {
        of(rows).into_iter().map(|claim| claim.holds).collect()
    }

    #[test]
    fn rows_as_linux_has_them_bear_out_the_kernels_claims_and_not_the_diagnosis() {
        let wanted = [
            Some(false),
            Some(false),
            Some(true),
            Some(true),
            Some(true),
            Some(true),
            Some(true),
            Some(true),
        ];
        assert_eq!(verdicts(&rows()), wanted);
    }

    #[test]
    fn each_kernel_claim_can_fail() {
        // The row, what is wrong with it, and the claim that this breaks.
        type Broken = (usize, fn(&mut RcvbufRow), usize);
        let broken: [Broken; 6] = [
            (2, |row| row.rcvbuf_effective = 131_072, 2),
            (1, |row| row.window_scale = 9, 3),
            (2, |row| row.rcv_ssthresh_first = 65_483, 4),
            (3, |row| row.rcvbuf_effective = 1000, 5),
            (1, |row| row.rcvbuf_final = 5000, 6),
            (1, |row| row.mb_per_s.median = 200.0, 7),
        ];
        for (index, change, claim) in broken {
            let mut rows = rows();
            change(&mut rows[index]);
            assert_eq!(verdicts(&rows)[claim], Some(false), "claim {claim}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_decided() {
        assert_eq!(verdicts(&[]), [None; 8]);
        let mut same = rows();
        same[2].window_scale = 7;
        assert_eq!(verdicts(&same)[3], None, "both ways come to one scale");
    }
}
