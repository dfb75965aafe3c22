//! Makes a report from the results of a run.

use super::flags;
use crate::measure::environment::Environment;
use crate::report::model::{Broker, Diagnosed, Limit, Publisher, Throughput, Timeline, limit_of};
use penstock_testbed::settings::Workload;
use penstock_testbed::verify::StreamCheck;
use penstock_testbed::{cluster, program_reports};

/// The results of a run, before they become a report.
pub struct Outcome {
    pub publisher: program_reports::Publisher,
    pub publisher_succeeded: bool,
    pub brokers: Vec<program_reports::Broker>,
    pub limits: Option<Vec<Limit>>,
    pub verification: Option<Vec<StreamCheck>>,
    pub timeline: Timeline,
    pub diagnosis: Option<Diagnosed>,
    pub not_diagnosed: Option<String>,
    pub problems: Vec<String>,
}

/// The report of a run.
pub fn report(
    options: &flags::Throughput,
    workload: &Workload,
    outcome: Outcome,
    environment: Environment,
) -> Throughput {
    let synthetic = options.input.is_none();
    let publisher = outcome.publisher;
    let mode = outcome
        .brokers
        .first()
        .and_then(program_reports::Broker::xdp_mode);
    let best = outcome
        .limits
        .as_ref()
        .zip(publisher.path())
        .and_then(|(limits, path)| limit_of(limits, path, mode));
    let percent_of_limit = best.map(|best| 100.0 * publisher.bandwidth_mb_per_s / best);
    let in_order = outcome.brokers.into_iter().enumerate();
    let brokers: Vec<_> = in_order
        .map(|(i, output)| Broker::from_output(i, cluster::address(i), &workload.topic, output))
        .collect();
    let mut report = Throughput {
        kind: "throughput".to_owned(),
        mode: options.route.mode.name().to_owned(),
        profile: options.profile,
        mtu: options.mtu,
        num_brokers: options.brokers,
        message_size: synthetic.then_some(workload.message_size.as_u64()),
        ack: workload.ack.number(),
        order: workload.order.number(),
        threads_per_broker: workload.threads_per_broker,
        input: options
            .input
            .as_ref()
            .map(|path| path.display().to_string()),
        messages_sent: publisher.messages_sent,
        messages_acked: publisher.messages_acked,
        messages_in_logs: brokers.iter().map(|b| b.messages_in_log).sum(),
        payload_bytes: publisher.payload_bytes,
        seconds: publisher.seconds,
        bandwidth_mb_per_s: publisher.bandwidth_mb_per_s,
        limits: outcome.limits,
        percent_of_limit,
        problems: outcome.problems,
        publisher: Publisher::from_output(publisher),
        brokers,
        verification: outcome.verification,
        faults: None,
        delay: None,
        timeline: Some(outcome.timeline),
        diagnosis: outcome.diagnosis,
        not_diagnosed: outcome.not_diagnosed,
        rerun: None,
        host_load: None,
        warnings: Vec::new(),
        environment,
    };
    let counted = count_problems(&report, outcome.publisher_succeeded);
    report.problems.extend(counted);
    report
}

/// What keeps a run from being a success, apart from verification.
fn count_problems(report: &Throughput, publisher_succeeded: bool) -> Vec<String> {
    let mut problems = Vec::new();
    let (sent, acked, held) = (
        report.messages_sent,
        report.messages_acked,
        report.messages_in_logs,
    );
    if !publisher_succeeded {
        problems.push("the publisher reported a failure; see publisher.log".to_owned());
    }
    if sent == 0 && report.input.is_none() {
        problems.push("nothing was sent".to_owned());
    }
    if acked != sent {
        problems.push(format!("{sent} messages sent, {acked} acked"));
    }
    if held != sent {
        problems.push(format!("{sent} messages sent, {held} in the brokers' logs"));
    }
    problems
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::text::tests::example;

    #[test]
    fn a_complete_run_is_a_success_and_each_shortfall_is_not() {
        let complete = example();
        assert!(count_problems(&complete, true).is_empty());
        assert_eq!(count_problems(&complete, false).len(), 1);
        let mut lost = complete.clone();
        lost.messages_in_logs -= 1;
        assert_eq!(count_problems(&lost, true).len(), 1);
        let mut unacked = complete.clone();
        unacked.messages_acked -= 1;
        assert_eq!(count_problems(&unacked, true).len(), 1);
    }
}
