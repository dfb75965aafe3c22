//! From runs to rows: which mode of the XDP program was better, medians, ratios.

use std::collections::BTreeMap;

use super::contender::Contender;
use super::host_time::HostCpuTimes;
use super::trial::Trial;
use crate::measure::stats::Spread;
use crate::report::model::{Limit, PercentOfLimit, Row, limit_of, ratio, ratio_of_pairs};
use penstock_testbed::settings::XdpMode;

/// Links that a row is about, and what they can do at best.
pub struct Case<'a> {
    pub profile: &'static str,
    pub mtu: u32,
    pub limits: &'a [Limit],
}

/// All runs of one load, by contender.
pub struct Measured(Vec<(Contender, Vec<Trial>)>);

type Figure = fn(&Trial) -> Option<f64>;

/// What a run at full speed tells.
const THROUGHPUT: [(&str, Figure); 6] = [
    ("payload_mb_per_s", |trial| Some(trial.payload_mb_per_s)),
    ("host_cpu_s_per_gb", |trial| Some(trial.host_cpu_s_per_gb)),
    ("broker_cpu_s_per_gb", |trial| trial.broker_cpu_s_per_gb),
    ("publisher_cpu_s_per_gb", |trial| {
        Some(trial.publisher_cpu_s_per_gb)
    }),
    ("drops", |trial| Some(trial.drops as f64)),
    ("retransmits", |trial| Some(trial.retransmits as f64)),
];

type HostFigure = fn(&HostCpuTimes) -> f64;

/// What a run tells whose kernel work is attributed to hosts.
const HOSTS: [(&str, HostFigure); 3] = [
    ("sending_host_cpu_s_per_gb", |run| run.sending),
    ("receiving_host_cpu_s_per_gb", |run| run.receiving),
    ("receiving_host_without_conversion_cpu_s_per_gb", |run| {
        run.receiving_without_conversion
    }),
];

/// What a run at a rate tells.
const LATENCY: [(&str, Figure); 3] = [
    ("ack_latency_us_p50", |trial| Some(trial.ack_latency_us.p50)),
    ("ack_latency_us_p99", |trial| Some(trial.ack_latency_us.p99)),
    ("ack_latency_us_p999", |trial| {
        Some(trial.ack_latency_us.p999)
    }),
];

impl Measured {
    pub fn of(contenders: &[Contender]) -> Self {
        Self(
            contenders
                .iter()
                .map(|&contender| (contender, Vec::new()))
                .collect(),
        )
    }

    /// One more run of the contender with this number.
    pub fn push(&mut self, index: usize, trial: Trial) {
        self.0[index].1.push(trial);
    }

    /// Median payload of the path that moves less, xdp in its better mode, MB/s.
    pub fn slower_path(&self) -> f64 {
        let rate = |contender| {
            let figure = self.spread(contender, |trial| Some(trial.payload_mb_per_s));
            figure.map_or(0.0, |spread| spread.median)
        };
        rate(Contender::Tcp).min(rate(self.best_xdp(|trial| trial.payload_mb_per_s)))
    }

    /// The mode of xdp that moved most.
    pub fn best_mode(&self) -> Option<XdpMode> {
        mode_of(self.best_xdp(|trial| trial.payload_mb_per_s))
    }

    /// The xdp contender with the highest median.
    fn best_xdp(&self, figure: impl Fn(&Trial) -> f64 + Copy) -> Contender {
        let xdp = self
            .0
            .iter()
            .filter(|(contender, _)| *contender != Contender::Tcp);
        let medians = xdp.map(|(contender, trials)| {
            let median = Spread::of(trials.iter().map(figure).collect()).median;
            (*contender, median)
        });
        medians
            .max_by(|a, b| a.1.total_cmp(&b.1))
            .map_or(Contender::Xdp(None), |(contender, _)| contender)
    }

    /// None if no run tells.
    fn spread(
        &self,
        contender: Contender,
        figure: impl Fn(&Trial) -> Option<f64>,
    ) -> Option<Spread> {
        let (_, trials) = self.0.iter().find(|(other, _)| *other == contender)?;
        let figures: Vec<_> = trials.iter().filter_map(figure).collect();
        (!figures.is_empty()).then(|| Spread::of(figures))
    }

    fn by_mode(&self, figure: Figure) -> BTreeMap<String, Spread> {
        let modes = self.0.iter().filter_map(|(contender, _)| match contender {
            Contender::Xdp(Some(mode)) => {
                Some((mode.name().to_owned(), self.spread(*contender, figure)?))
            }
            _ => None,
        });
        modes.collect()
    }
}

impl Case<'_> {
    /// Full speed; the better mode is the one that moves more.
    pub fn rows_of_throughput(&self, measured: &Measured) -> Vec<Row> {
        let best = measured.best_xdp(|trial| trial.payload_mb_per_s);
        let rows = THROUGHPUT.iter().filter_map(|(metric, figure)| {
            let mut row = self.row(measured, best, metric, *figure)?;
            row.poll = row.xdp_mode.map(|_| "adaptive".to_owned());
            if *metric == "payload_mb_per_s" {
                row.percent_of_limit = self.percent_of_limit(&row);
            }
            Some(row)
        });
        rows.collect()
    }

    /// At a rate; the better mode is the one whose p99 is lower.
    pub fn rows_of_latency(&self, measured: &Measured, rate: u32, batch: u64) -> Vec<Row> {
        let best = measured.best_xdp(|trial| -trial.ack_latency_us.p99);
        let rows = LATENCY.iter().filter_map(|(metric, figure)| {
            let mut row = self.row(measured, best, metric, *figure)?;
            row.poll = row.xdp_mode.map(|_| "busy".to_owned());
            (row.rate, row.batch_bytes) = (Some(rate), Some(batch));
            Some(row)
        });
        rows.collect()
    }

    /// CPU time of each host, from runs in pairs; the mode of xdp is given.
    pub fn rows_of_hosts(
        &self,
        mode: Option<XdpMode>,
        xdp: &[HostCpuTimes],
        tcp: &[HostCpuTimes],
    ) -> Vec<Row> {
        if xdp.is_empty() || tcp.is_empty() {
            return Vec::new();
        }
        let rows = HOSTS.iter().map(|(metric, figure)| {
            let spread = |runs: &[HostCpuTimes]| Spread::of(runs.iter().map(figure).collect());
            let (xdp, tcp) = (spread(xdp), spread(tcp));
            Row {
                profile: self.profile.to_owned(),
                mtu: self.mtu,
                metric: (*metric).to_owned(),
                rate: None,
                batch_bytes: None,
                poll: mode.map(|_| "adaptive".to_owned()),
                xdp_mode: mode,
                ratio: ratio(xdp.median, tcp.median),
                ratio_of_pairs: ratio_of_pairs(&xdp, &tcp),
                xdp,
                tcp,
                xdp_by_mode: BTreeMap::new(),
                percent_of_limit: None,
            }
        });
        rows.collect()
    }

    fn row(
        &self,
        measured: &Measured,
        best: Contender,
        metric: &str,
        figure: Figure,
    ) -> Option<Row> {
        let xdp = measured.spread(best, figure)?;
        let tcp = measured.spread(Contender::Tcp, figure)?;
        Some(Row {
            profile: self.profile.to_owned(),
            mtu: self.mtu,
            metric: metric.to_owned(),
            rate: None,
            batch_bytes: None,
            poll: None,
            xdp_mode: mode_of(best),
            ratio: ratio(xdp.median, tcp.median),
            ratio_of_pairs: ratio_of_pairs(&xdp, &tcp),
            xdp,
            tcp,
            xdp_by_mode: measured.by_mode(figure),
            percent_of_limit: None,
        })
    }

    fn percent_of_limit(&self, row: &Row) -> Option<PercentOfLimit> {
        let percent = |path, spread: &Spread| {
            let best = limit_of(self.limits, path, row.xdp_mode)?;
            Some(100.0 * spread.median / best)
        };
        let percent = PercentOfLimit {
            xdp: percent("xdp", &row.xdp),
            tcp: percent("tcp", &row.tcp),
        };
        (percent.xdp.is_some() || percent.tcp.is_some()).then_some(percent)
    }
}

fn mode_of(contender: Contender) -> Option<XdpMode> {
    match contender {
        Contender::Xdp(mode) => mode,
        Contender::Tcp => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_testbed::program_reports::AckLatency;
    use penstock_testbed::settings::Profile;

    const NATIVE: Contender = Contender::Xdp(Some(XdpMode::Native));
    const GENERIC: Contender = Contender::Xdp(Some(XdpMode::Generic));

    fn trial(payload_mb_per_s: f64, p99: f64) -> Trial {
        Trial {
            payload_mb_per_s,
            messages_per_s: 1e6,
            publisher_cores: 0.9,
            broker_cores: Some(0.5),
            host_busy: 0.8,
            other_cores: 0.1,
            host_cpu_s_per_gb: 2.0,
            broker_cpu_s_per_gb: Some(1.0),
            publisher_cpu_s_per_gb: 1.0,
            ack_latency_us: AckLatency {
                p50: p99 / 2.0,
                p99,
                p999: p99 * 2.0,
                max: p99 * 3.0,
                count: 100,
            },
            drops: 0,
            retransmits: 3,
        }
    }

    fn measured(runs: &[(Contender, &[(f64, f64)])]) -> Measured {
        let contenders: Vec<_> = runs.iter().map(|run| run.0).collect();
        let mut measured = Measured::of(&contenders);
        for (index, (_, figures)) in runs.iter().enumerate() {
            for &(rate, p99) in *figures {
                measured.push(index, trial(rate, p99));
            }
        }
        measured
    }

    fn limits() -> Vec<Limit> {
        let raw = Spread::of(vec![1600.0]);
        let mut raw = Limit::of_link("raw_af_xdp_generic", Profile::Wire, 9000, raw);
        raw.mode = Some(XdpMode::Generic);
        let iperf3 = Spread::of(vec![1000.0]);
        vec![raw, Limit::of_link("iperf3_1", Profile::Wire, 9000, iperf3)]
    }

    fn example() -> Measured {
        measured(&[
            (
                Contender::Tcp,
                &[(800.0, 100.0), (700.0, 200.0), (900.0, 300.0)],
            ),
            (NATIVE, &[(1000.0, 50.0), (1000.0, 50.0), (1000.0, 50.0)]),
            (
                GENERIC,
                &[(1200.0, 150.0), (1100.0, 150.0), (1300.0, 150.0)],
            ),
        ])
    }

    fn row<'a>(rows: &'a [Row], metric: &str) -> &'a Row {
        rows.iter().find(|row| row.metric == metric).unwrap()
    }

    #[test]
    fn the_mode_that_moves_more_counts_at_full_speed() {
        let limits = limits();
        let case = Case {
            profile: "wire",
            mtu: 9000,
            limits: &limits,
        };
        let rows = case.rows_of_throughput(&example());
        let payload = row(&rows, "payload_mb_per_s");
        assert_eq!(payload.xdp_mode, Some(XdpMode::Generic));
        assert_eq!((payload.xdp.median, payload.tcp.median), (1200.0, 800.0));
        assert_eq!(payload.ratio, Some(1.5));
        assert_eq!(payload.xdp_by_mode["native"].median, 1000.0);
        let percent = payload.percent_of_limit.unwrap();
        assert_eq!((percent.xdp, percent.tcp), (Some(75.0), Some(80.0)));
        assert_eq!(row(&rows, "drops").ratio, None);
        assert_eq!(row(&rows, "retransmits").ratio, Some(1.0));
        assert!(
            rows.iter()
                .all(|row| row.poll.as_deref() == Some("adaptive"))
        );
    }

    #[test]
    fn the_mode_with_the_lower_p99_counts_at_a_rate() {
        let case = Case {
            profile: "wire",
            mtu: 1500,
            limits: &[],
        };
        let rows = case.rows_of_latency(&example(), 1000, 1024);
        let metrics: Vec<_> = rows.iter().map(|row| row.metric.as_str()).collect();
        assert_eq!(
            metrics,
            [
                "ack_latency_us_p50",
                "ack_latency_us_p99",
                "ack_latency_us_p999"
            ]
        );
        let p99 = row(&rows, "ack_latency_us_p99");
        assert_eq!(p99.xdp_mode, Some(XdpMode::Native));
        assert_eq!(
            (p99.xdp.median, p99.tcp.median, p99.ratio),
            (50.0, 200.0, Some(0.25))
        );
        assert_eq!(p99.ratio_of_pairs, Some(0.25));
        assert_eq!((p99.rate, p99.batch_bytes), (Some(1000), Some(1024)));
        assert_eq!(p99.percent_of_limit, None);
    }

    #[test]
    fn cpu_time_of_hosts_is_compared_run_by_run() {
        let run = |receiving: f64| HostCpuTimes {
            sending: 1.0,
            receiving,
            receiving_without_conversion: receiving / 2.0,
            both: 3.0,
            payload_mb_per_s: 500.0,
            probe_overhead: 0.1,
        };
        let case = Case {
            profile: "wire",
            mtu: 1500,
            limits: &[],
        };
        let mode = Some(XdpMode::Native);
        let rows = case.rows_of_hosts(mode, &[run(1.0), run(2.0)], &[run(2.0), run(2.0)]);
        let bare = row(&rows, "receiving_host_without_conversion_cpu_s_per_gb");
        assert_eq!((bare.xdp.median, bare.ratio), (0.75, Some(0.75)));
        assert_eq!(row(&rows, "sending_host_cpu_s_per_gb").ratio, Some(1.0));
        assert!(case.rows_of_hosts(mode, &[], &[run(1.0)]).is_empty());
    }

    #[test]
    fn the_slower_path_is_that_of_the_better_mode() {
        assert_eq!(example().slower_path(), 800.0);
        let slow = measured(&[(Contender::Tcp, &[(800.0, 1.0)]), (NATIVE, &[(300.0, 1.0)])]);
        assert_eq!(slow.slower_path(), 300.0);
    }

    #[test]
    fn what_a_remote_broker_does_not_tell_is_left_out() {
        let mut remote = Measured::of(&[Contender::Tcp, Contender::Xdp(None)]);
        for index in 0..2 {
            remote.push(
                index,
                Trial {
                    broker_cpu_s_per_gb: None,
                    ..trial(100.0, 10.0)
                },
            );
        }
        let case = Case {
            profile: "remote",
            mtu: 1500,
            limits: &[],
        };
        let rows = case.rows_of_throughput(&remote);
        assert!(rows.iter().all(|row| row.metric != "broker_cpu_s_per_gb"));
        assert_eq!(row(&rows, "payload_mb_per_s").xdp_mode, None);
    }
}
