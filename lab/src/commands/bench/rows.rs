//! The targets, and whether the figures of the cases meet them.

use super::reasons;
use crate::measure::stats::Spread;
use crate::report::model::bench_figures::{
    HOST_CPU, IDLE_STREAM, MESSAGES, P50, P99, PAYLOAD, WITHOUT_CONVERSION, best,
};
use crate::report::model::{BenchCase, BenchContender, BenchRow, Side, Target, Verdict, ratio};

/// Everything that can be said about these cases, in the order of the README.
pub fn rows(cases: &[BenchCase]) -> Vec<BenchRow> {
    let mut rows: Vec<BenchRow> = cases.iter().flat_map(of_case).collect();
    // Both frame sizes of a row side by side.
    let order: Vec<String> = rows.iter().map(|row| stem(&row.id).to_owned()).collect();
    let first = |row: &BenchRow| order.iter().position(|other| other == stem(&row.id));
    rows.sort_by_key(first);
    rows
}

/// A row's id without the MTU at its end.
fn stem(id: &str) -> &str {
    id.strip_suffix("_1500")
        .or_else(|| id.strip_suffix("_9000"))
        .unwrap_or(id)
}

fn of_case(case: &BenchCase) -> Vec<BenchRow> {
    let id = case.id.as_str();
    match case.group.as_str() {
        "throughput" => throughput(case),
        "brokers" if id.starts_with("brokers-4") => vec![four_brokers(case)],
        "brokers" => cost(case, "brokers", 8, |contender| contender.brokers),
        "latency" => latency(case),
        "cpu" => vec![receiving_host(case)],
        "iperf3" => vec![against_iperf3(case)],
        "streams" => streams(case),
        "messages" => messages(case),
        "memory" => memory(case),
        "peers" => peers(case),
        _ => Vec::new(),
    }
}

/// Targets for MTU 1500, and for larger frames.
fn by_mtu(case: &BenchCase, small: f64, large: f64) -> f64 {
    if case.mtu <= 1500 { small } else { large }
}

fn at<'a>(
    case: &'a BenchCase,
    kind: &str,
    count: u32,
    of: fn(&BenchContender) -> u32,
) -> Option<&'a BenchContender> {
    let mut all = case.contenders.iter();
    all.find(|contender| contender.kind == kind && of(contender) == count)
}

/// What a row compares, before it is known how that went.
struct Question<'a> {
    case: &'a BenchCase,
    id: String,
    what: String,
    target: Target,
}

impl<'a> Question<'a> {
    fn new(case: &'a BenchCase, id: &str, what: &str, target: Target) -> Self {
        let mtu = case.mtu;
        Self {
            case,
            id: format!("{id}_{mtu}"),
            what: format!("{what}, MTU {mtu}"),
            target,
        }
    }

    /// The ratio of one figure of two contenders.
    fn ratio(
        self,
        ours: Option<&BenchContender>,
        theirs: Option<&BenchContender>,
        figure: &str,
    ) -> BenchRow {
        let sides = side(ours, figure).and_then(|ours| Ok((ours, side(theirs, figure)?)));
        let (ours_side, theirs_side) = match sides {
            Ok(sides) => sides,
            Err(why) => return self.not_measured(why),
        };
        let why = |value| {
            let (ours, theirs) = (ours?, theirs?);
            Some(reasons::of_ratio(
                self.case,
                ours,
                theirs,
                figure,
                self.target,
                value,
            ))
        };
        let value = ratio(ours_side.spread.median, theirs_side.spread.median);
        let rounds = rounds(&ours_side.spread, &theirs_side.spread);
        let sentence = value.and_then(why);
        self.row(
            "ratio",
            ours_side,
            Some(theirs_side),
            value,
            rounds,
            sentence,
        )
    }

    /// A figure by itself, in another unit.
    fn absolute(
        self,
        contender: Option<&BenchContender>,
        figure: &str,
        unit: &str,
        of: impl Fn(&BenchContender) -> Option<Spread>,
    ) -> BenchRow {
        let found = side(contender, figure);
        let spread = contender.and_then(of);
        let (side, contender, spread) = match (found, contender, spread) {
            (Ok(side), Some(contender), Some(spread)) => (side, contender, spread),
            (Err(why), _, _) => return self.not_measured(why),
            _ => return self.not_measured("a figure is missing".to_owned()),
        };
        let side = Side { spread, ..side };
        let value = side.spread.median;
        let sentence = reasons::of_absolute(self.case, contender, figure);
        self.row(unit, side, None, Some(value), None, Some(sentence))
    }

    fn row(
        self,
        unit: &str,
        ours: Side,
        theirs: Option<Side>,
        value: Option<f64>,
        of_rounds: Option<Spread>,
        sentence: Option<String>,
    ) -> BenchRow {
        let verdict = match value {
            Some(value) if self.target.is_met(value) => Verdict::Met,
            Some(_) => Verdict::Lost,
            None => Verdict::NotMeasured,
        };
        BenchRow {
            id: self.id,
            group: self.case.group.clone(),
            what: self.what,
            ours: Some(ours),
            theirs,
            value,
            of_rounds,
            unit: unit.to_owned(),
            target: self.target,
            sentence: match verdict {
                Verdict::Met => None,
                Verdict::Lost => sentence,
                Verdict::NotMeasured => Some("the median that it is divided by is 0".to_owned()),
            },
            verdict,
        }
    }

    fn not_measured(self, why: String) -> BenchRow {
        BenchRow {
            id: self.id,
            group: self.case.group.clone(),
            what: self.what,
            ours: None,
            theirs: None,
            value: None,
            of_rounds: None,
            unit: "ratio".to_owned(),
            target: self.target,
            verdict: Verdict::NotMeasured,
            sentence: Some(why),
        }
    }
}

/// A figure, or why there is none.
fn side(contender: Option<&BenchContender>, figure: &str) -> Result<Side, String> {
    let Some(contender) = contender else {
        return Err("it was not among the contenders".to_owned());
    };
    match contender.figure(figure) {
        Some(spread) => Ok(Side {
            name: contender.name(),
            figure: figure.to_owned(),
            spread: spread.clone(),
        }),
        None => {
            let why = contender.absent.clone();
            let why = why.or_else(|| contender.failures.last().cloned());
            let why = why.unwrap_or_else(|| format!("no run reported {figure}"));
            Err(format!("{}: {why}", contender.name()))
        }
    }
}

/// Ratios round by round; none if a run is missing, because then rounds do not match.
fn rounds(ours: &Spread, theirs: &Spread) -> Option<Spread> {
    if ours.runs.len() != theirs.runs.len() {
        return None;
    }
    let pairs = ours.runs.iter().zip(&theirs.runs);
    let ratios: Option<Vec<f64>> = pairs.map(|(a, b)| ratio(*a, *b)).collect();
    ratios.filter(|ratios| !ratios.is_empty()).map(Spread::of)
}

fn throughput(case: &BenchCase) -> Vec<BenchRow> {
    let ask = |id, what, target| Question::new(case, id, what, target);
    let [xdp, tcp, raw, iperf3] =
        ["xdp", "tcp", "raw_af_xdp", "iperf3"].map(|kind| best(case, kind));
    vec![
        ask("xdp_raw", "xdp / raw AF_XDP", Target::AtLeast(0.85)).ratio(xdp, raw, PAYLOAD),
        ask(
            "xdp_tcp",
            "xdp / tcp",
            Target::AtLeast(by_mtu(case, 1.0, 1.2)),
        )
        .ratio(xdp, tcp, PAYLOAD),
        both_limits(case, [xdp, tcp, raw, iperf3]),
        ask(
            "tcp_iperf3_wire_1",
            "tcp / iperf3, wire, 1 stream",
            Target::AtLeast(1.0),
        )
        .ratio(tcp, iperf3, PAYLOAD),
        ask(
            "ack_p50_full",
            "ack p50 at full speed, xdp / tcp",
            Target::AtMost(1.0),
        )
        .ratio(xdp, tcp, P50),
        ask(
            "ack_p99_full",
            "ack p99 at full speed, xdp / tcp",
            Target::AtMost(1.0),
        )
        .ratio(xdp, tcp, P99),
        ask(
            "cpu_both_hosts",
            "CPU s/GB of both hosts, xdp / tcp",
            Target::AtMost(by_mtu(case, 0.95, 0.8)),
        )
        .ratio(xdp, tcp, HOST_CPU),
    ]
}

/// xdp / tcp beside raw AF_XDP / iperf3: what each path makes of its limit.
fn both_limits(case: &BenchCase, contenders: [Option<&BenchContender>; 4]) -> BenchRow {
    let target = Target::AtLeast(0.9);
    let what = "(xdp / tcp) / (raw / iperf3)";
    let question = Question::new(case, "xdp_tcp_of_limits", what, target);
    let sides = contenders.map(|contender| side(contender, PAYLOAD));
    let [xdp, tcp, raw, iperf3] = match sides {
        [Ok(xdp), Ok(tcp), Ok(raw), Ok(iperf3)] => [xdp, tcp, raw, iperf3],
        sides => {
            let why = sides.into_iter().find_map(Result::err);
            return question.not_measured(why.unwrap_or_default());
        }
    };
    let quotient = |name: &str, above: &Side, below: &Side| {
        let of_medians = ratio(above.spread.median, below.spread.median)?;
        let rounds = rounds(&above.spread, &below.spread);
        let mut spread = rounds.unwrap_or_else(|| Spread::of(vec![of_medians]));
        spread.median = of_medians;
        Some(Side {
            name: name.to_owned(),
            figure: PAYLOAD.to_owned(),
            spread,
        })
    };
    let both = quotient("xdp / tcp", &xdp, &tcp).zip(quotient("raw / iperf3", &raw, &iperf3));
    let Some((ours, theirs)) = both else {
        return question.not_measured("a median is 0".to_owned());
    };
    let value = ratio(ours.spread.median, theirs.spread.median);
    let rounds = rounds(&ours.spread, &theirs.spread);
    let sentence = format!(
        "xdp reached {:.0} % of its limit ({:.0} of {:.0} MB/s), tcp {:.0} % of its own ({:.0} of {:.0}).",
        100.0 * xdp.spread.median / raw.spread.median,
        xdp.spread.median,
        raw.spread.median,
        100.0 * tcp.spread.median / iperf3.spread.median,
        tcp.spread.median,
        iperf3.spread.median,
    );
    question.row("ratio", ours, Some(theirs), value, rounds, Some(sentence))
}

fn four_brokers(case: &BenchCase) -> BenchRow {
    let target = Target::AtLeast(by_mtu(case, 1.0, 1.1));
    Question::new(case, "xdp_tcp_4_brokers", "xdp / tcp, 4 brokers", target).ratio(
        best(case, "xdp"),
        best(case, "tcp"),
        PAYLOAD,
    )
}

/// Cost of one GB with many streams or brokers, as a multiple of that with one.
fn cost(case: &BenchCase, what: &str, count: u32, of: fn(&BenchContender) -> u32) -> Vec<BenchRow> {
    let paths = ["xdp", "tcp"].map(|path| {
        let id = format!("cost_{count}_{what}_{path}");
        let title = format!("{path}: CPU s/GB, {count} {what} / 1");
        Question::new(case, &id, &title, Target::AtMost(1.15)).ratio(
            at(case, path, count, of),
            at(case, path, 1, of),
            HOST_CPU,
        )
    });
    paths.into()
}

fn latency(case: &BenchCase) -> Vec<BenchRow> {
    let (load, id, most) = match case.id.starts_with("half-load") {
        true => ("half load", "half_load", 1.0),
        false => ("1,000 batches/s", "low_rate", 0.7),
    };
    let quantiles = [("p50", P50), ("p99", P99)].map(|(name, figure)| {
        let what = format!("ack {name} at {load}, xdp / tcp");
        let id = format!("ack_{name}_{id}");
        Question::new(case, &id, &what, Target::AtMost(most)).ratio(
            best(case, "xdp"),
            best(case, "tcp"),
            figure,
        )
    });
    quantiles.into()
}

fn receiving_host(case: &BenchCase) -> BenchRow {
    let target = Target::AtMost(by_mtu(case, 0.6, 0.5));
    let what = "CPU s/GB of the receiving host, xdp without skb conversion / tcp";
    Question::new(case, "cpu_receiving_host", what, target).ratio(
        best(case, "xdp"),
        best(case, "tcp"),
        WITHOUT_CONVERSION,
    )
}

fn against_iperf3(case: &BenchCase) -> BenchRow {
    let (tcp, iperf3) = (best(case, "tcp"), best(case, "iperf3"));
    let streams = tcp.map_or(1, |contender| contender.streams);
    let profile = case.profile.name();
    let plural = if streams == 1 { "" } else { "s" };
    let what = format!("tcp / iperf3, {profile}, {streams} stream{plural}");
    let id = format!("tcp_iperf3_{profile}_{streams}");
    Question::new(case, &id, &what, Target::AtLeast(1.0)).ratio(tcp, iperf3, PAYLOAD)
}

fn streams(case: &BenchCase) -> Vec<BenchRow> {
    let mut rows = cost(case, "streams", 64, |contender| contender.streams);
    for path in ["xdp", "tcp"] {
        let contender = at(case, path, 64, |contender| contender.streams);
        let id = format!("in_flight_64_streams_{path}");
        let what = format!("{path}: MB in flight of 64 streams");
        rows.push(
            Question::new(case, &id, &what, Target::AtMost(8.0))
                .absolute(contender, PAYLOAD, "MB", in_flight),
        );
        let id = format!("ack_p50_64_streams_{path}");
        let what = format!("{path}: ack p50 of 64 streams, ms");
        rows.push(
            Question::new(case, &id, &what, Target::AtMost(15.0)).absolute(
                contender,
                P50,
                "ms",
                |contender| Some(scaled(contender.figure(P50)?, 1e-3)),
            ),
        );
    }
    rows
}

/// By Little's law: payload rate times median ack latency, run by run, MB.
fn in_flight(contender: &BenchContender) -> Option<Spread> {
    let (rate, wait) = (contender.figure(PAYLOAD)?, contender.figure(P50)?);
    let runs = rate.runs.iter().zip(&wait.runs);
    Some(Spread::of(
        runs.map(|(rate, wait)| rate * wait * 1e-6).collect(),
    ))
}

fn scaled(spread: &Spread, by: f64) -> Spread {
    Spread::of(spread.runs.iter().map(|run| run * by).collect())
}

fn messages(case: &BenchCase) -> Vec<BenchRow> {
    let paths = ["xdp", "tcp"].map(|path| {
        let id = format!("messages_64_bytes_{path}");
        let what = format!("{path}: 64-byte messages, M/s");
        Question::new(case, &id, &what, Target::AtLeast(15.0)).absolute(
            best(case, path),
            MESSAGES,
            "M/s",
            |contender| Some(scaled(contender.figure(MESSAGES)?, 1e-6)),
        )
    });
    paths.into()
}

fn memory(case: &BenchCase) -> Vec<BenchRow> {
    let paths = ["xdp", "tcp"].map(|path| {
        let id = format!("idle_stream_{path}");
        let what = format!("{path}: memory of an idle stream, KiB");
        Question::new(case, &id, &what, Target::AtMost(16.0)).absolute(
            best(case, path),
            IDLE_STREAM,
            "KiB",
            |contender| Some(scaled(contender.figure(IDLE_STREAM)?, 1.0 / 1024.0)),
        )
    });
    paths.into()
}

fn peers(case: &BenchCase) -> Vec<BenchRow> {
    let peers = [("aeron", "Aeron C", 6.0), ("nats", "nats-server", 1.2)];
    let rows = peers.map(|(kind, name, least)| {
        let id = format!("xdp_{kind}");
        let what = format!("xdp / {name}, 1 KiB");
        Question::new(case, &id, &what, Target::AtLeast(least)).ratio(
            best(case, "xdp"),
            best(case, kind),
            PAYLOAD,
        )
    });
    rows.into()
}

#[cfg(test)]
pub mod tests;
