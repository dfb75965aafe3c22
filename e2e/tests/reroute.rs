//! One broker of several is lost: the publisher goes on with the others, every acknowledged batch is in some log,
//! and each log has the batches of a stream in order.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::commands::{Background, assert_says, paths, text};
use penstock_e2e::numbered::Numbered;
use penstock_e2e::{Broker, cases, eventually, run};
use penstock_testbed::command;
use penstock_testbed::merged_logs::MergedLogs;
use penstock_testbed::netns::broker_address;
use penstock_testbed::program_reports;
use serde_json::Value;

const BROKERS: usize = 4;
const XDP: [&str; 4] = ["--mode", "xdp", "--iface", "eth0"];

fn main() -> ExitCode {
    let quick = cases![
        one_of_four_is_killed_for_good_over_tcp,
        one_of_four_is_killed_for_good_over_xdp,
        one_of_four_comes_back_over_tcp,
        one_of_four_loses_its_link_over_xdp,
        a_remote_subscriber_misses_nothing_of_one_that_comes_back,
    ];
    let long = cases![
        one_of_four_comes_back_over_xdp,
        one_of_four_loses_its_link_over_tcp,
        three_of_four_are_killed_one_after_the_other,
        one_of_four_is_down_at_the_start_and_comes,
        a_broker_that_is_back_with_an_empty_log,
        with_keys_and_authenticated_packets,
        a_broker_with_other_keys_takes_no_stream,
        a_publisher_that_is_to_wait_stays,
        a_broker_that_comes_and_goes,
        one_of_four_hangs_for_a_while_over_tcp,
        one_of_four_hangs_for_a_while_over_xdp,
        a_publisher_that_is_to_fail_fails,
    ];
    // It needs all cores.
    let alone = cases![two_of_four_are_killed_at_full_speed].map(|case| case.alone().long());
    let all = quick
        .into_iter()
        .chain(long.map(|case| case.long()))
        .chain(alone);
    run(all.map(|case| case.brokers(BROKERS)))
}

/// Brokers of a bed, and how they are started.
struct Cluster<'a> {
    bed: &'a Bed,
    options: Vec<String>,
    brokers: Vec<Option<Broker>>,
}

impl<'a> Cluster<'a> {
    fn start(bed: &'a Bed, mode: &str, options: &[&str]) -> Result<Self> {
        let path = if mode == "tcp" { &[][..] } else { &XDP };
        let common = ["--topic", "penstock"];
        let options = [&common[..], path, options].concat();
        let mut cluster = Self {
            bed,
            options: options.into_iter().map(str::to_owned).collect(),
            brokers: Vec::new(),
        };
        for number in 0..BROKERS {
            let broker = cluster.start_one(number)?;
            cluster.brokers.push(Some(broker));
        }
        Ok(cluster)
    }

    fn start_one(&self, number: usize) -> Result<Broker> {
        let options: Vec<_> = self.options.iter().map(String::as_str).collect();
        self.bed.broker_at(number, &options).start()
    }

    fn log(&self, number: usize) -> PathBuf {
        self.bed.buffer_dir_of(number).join("penstock.log")
    }

    fn messages(&self, number: usize) -> u64 {
        self.bed.messages_at(&self.log(number)).unwrap_or(0)
    }

    /// Waits until each of these brokers has got more messages.
    fn until_they_get_more(&self, numbers: &[usize]) {
        let before: Vec<_> = numbers
            .iter()
            .map(|number| self.messages(*number))
            .collect();
        for (number, before) in numbers.iter().zip(before) {
            eventually("messages at the broker", || self.messages(*number) > before);
        }
    }

    fn kill(&mut self, number: usize) -> Result<()> {
        let broker = self.brokers[number].take().expect("it runs");
        broker.end(libc::SIGKILL)?;
        Ok(())
    }

    fn restart(&mut self, number: usize) -> Result<()> {
        self.brokers[number] = Some(self.start_one(number)?);
        Ok(())
    }

    /// A publisher of numbered lines to all brokers.
    fn publish(&self, mode: &str, options: &[&str]) -> Result<Numbered> {
        let addresses = addresses();
        #[rustfmt::skip]
        let arguments = ["--brokers", &addresses, "--mode", mode, "--rate", "2MB",
                         "--batch-size", "2KiB", "--digest"];
        self.bed.start_numbered(&[&arguments[..], options].concat())
    }

    /// Ends the publisher, which must be successful, and merges all logs: nothing may be missing, and no
    /// batch differ or be doubled within a log. Returns the report.
    fn finish(self, publisher: Numbered) -> Result<(Value, MergedLogs)> {
        let (report, _) = publisher.finish()?;
        let mut merged = MergedLogs::default();
        for number in 0..BROKERS {
            merged.add(&self.log(number))?;
        }
        let sent = program_reports::parse("penstock-publisher", &report.to_string())?;
        let differences = merged.differences(&sent);
        assert!(differences.is_empty(), "{differences:?}");
        let longest = |key: &str| report[key].as_f64().map_or(-1.0, f64::round);
        penstock_e2e::say(&format!(
            "{}: {} reroutes, {} returns, {} doubles, detected after {} ms, recovered {} ms later",
            self.bed.test(),
            report["reroutes"],
            report["returns"],
            merged.doubles(),
            longest("detection_ms"),
            longest("recovery_ms"),
        ));
        Ok((report, merged))
    }
}

fn addresses() -> String {
    let addresses = (0..BROKERS).map(|number| format!("{}:1214", broker_address(number)));
    addresses.collect::<Vec<_>>().join(",")
}

/// What the report says of a broker's only stream.
fn stream(report: &Value, broker: usize) -> &Value {
    &report["brokers"][broker]["streams"][0]
}

fn until_it_says(publisher: &Background, text: &str) {
    eventually(text, || publisher.stderr().contains(text));
}

fn killed_for_good(bed: &Bed, mode: &str) -> Result<()> {
    let mut cluster = Cluster::start(bed, mode, &[])?;
    let publisher = cluster.publish(mode, &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(1)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.until_they_get_more(&[0, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), mode);
    assert_eq!(
        (&report["reroutes"], &report["returns"]),
        (&1.into(), &0.into())
    );
    assert_eq!(stream(&report, 1)["reroutes"], 1);
    let at = stream(&report, 1)["at"].as_str().expect("a broker");
    assert!(["10.214.0.2:1214", "10.214.2.2:1214", "10.214.3.2:1214"].contains(&at));
    Ok(())
}

fn one_of_four_is_killed_for_good_over_tcp(bed: &Bed) -> Result<()> {
    killed_for_good(bed, "tcp")
}

fn one_of_four_is_killed_for_good_over_xdp(bed: &Bed) -> Result<()> {
    killed_for_good(bed, "xdp")
}

fn comes_back(bed: &Bed, mode: &str) -> Result<()> {
    let mut cluster = Cluster::start(bed, mode, &[])?;
    let publisher = cluster.publish(mode, &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(2)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.until_they_get_more(&[0, 1, 3]);
    cluster.restart(2)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), mode);
    assert_eq!(
        (&report["reroutes"], &report["returns"]),
        (&1.into(), &1.into())
    );
    assert_eq!(stream(&report, 2)["at"], Value::Null);
    Ok(())
}

fn one_of_four_comes_back_over_tcp(bed: &Bed) -> Result<()> {
    comes_back(bed, "tcp")
}

fn one_of_four_comes_back_over_xdp(bed: &Bed) -> Result<()> {
    comes_back(bed, "xdp")
}

/// It reads all four over the network, from another namespace: every line once, and each stream in order.
fn a_remote_subscriber_misses_nothing_of_one_that_comes_back(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "xdp", &["--remote-subscribers", "any"])?;
    let publisher = cluster.publish("xdp", &[])?;
    let addresses = addresses();
    #[rustfmt::skip]
    let arguments = ["--brokers", &addresses, "--topic", "penstock", "--follow", "--until-idle", "3s", "--verify"];
    let mut command = bed.in_publisher_ns(program("subscriber"), &arguments);
    let subscriber = bed.background("subscriber", &mut command)?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(2)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.until_they_get_more(&[0, 1, 3]);
    cluster.restart(2)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let input = publisher.input().to_owned();
    publisher.finish()?;
    let read = subscriber.wait()?.success()?;
    let lines = |text: &str| {
        let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    assert!(lines(&read.stdout) == lines(&text(&input)), "other lines");
    Ok(())
}

/// Nothing ends the connections, and the broker itself lives: it must take up what continued elsewhere.
fn loses_its_link(bed: &Bed, mode: &str) -> Result<()> {
    let cluster = Cluster::start(bed, mode, &[])?;
    let publisher = cluster.publish(mode, &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let link = |state| {
        command::run(&[
            "ip",
            "-n",
            bed.namespace_of(3),
            "link",
            "set",
            "eth0",
            state,
        ])
    };
    link("down")?;
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.until_they_get_more(&[0, 1, 2]);
    link("up")?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), mode);
    assert_eq!(stream(&report, 3)["at"], Value::Null);
    Ok(())
}

fn one_of_four_loses_its_link_over_tcp(bed: &Bed) -> Result<()> {
    loses_its_link(bed, "tcp")
}

fn one_of_four_loses_its_link_over_xdp(bed: &Bed) -> Result<()> {
    loses_its_link(bed, "xdp")
}

fn three_of_four_are_killed_one_after_the_other(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "tcp", &[])?;
    let publisher = cluster.publish("tcp", &["--threads-per-broker", "3"])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    for (killed, left) in [(0, &[1, 2, 3][..]), (1, &[2, 3]), (2, &[3])] {
        cluster.kill(killed)?;
        cluster.until_they_get_more(left);
    }
    let (report, _) = cluster.finish(publisher)?;
    assert!(report["reroutes"].as_u64() >= Some(9));
    Ok(())
}

/// Its kernel accepts connections all the while. What it had received, but not acknowledged, it may commit later: then
/// two logs have it.
fn hangs_for_a_while(bed: &Bed, mode: &str) -> Result<()> {
    let cluster = Cluster::start(bed, mode, &[])?;
    let publisher = cluster.publish(mode, &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let hung = cluster.brokers[1].as_ref().expect("it runs");
    hung.signal(libc::SIGSTOP);
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.until_they_get_more(&[0, 2, 3]);
    until_it_says(publisher.publisher(), "the broker answers, but is not back");
    hung.signal(libc::SIGCONT);
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), mode);
    assert_eq!(stream(&report, 1)["at"], Value::Null);
    Ok(())
}

fn one_of_four_hangs_for_a_while_over_tcp(bed: &Bed) -> Result<()> {
    hangs_for_a_while(bed, "tcp")
}

fn one_of_four_hangs_for_a_while_over_xdp(bed: &Bed) -> Result<()> {
    hangs_for_a_while(bed, "xdp")
}

/// Each time the streams stay away a little longer.
fn a_broker_that_comes_and_goes(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "auto", &[])?;
    let publisher = cluster.publish("auto", &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    for times in 1..=3 {
        let have_come = |text| publisher.publisher().stderr().matches(text).count() == times;
        cluster.kill(1)?;
        eventually("reroutes", || have_come("continues at another broker"));
        cluster.restart(1)?;
        eventually("returns", || have_come("the stream returns"));
        cluster.until_they_get_more(&[0, 1, 2, 3]);
    }
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), "xdp");
    assert_eq!(
        (&report["reroutes"], &report["returns"]),
        (&3.into(), &3.into())
    );
    Ok(())
}

/// One comes back, one does not, and windows are full.
fn two_of_four_are_killed_at_full_speed(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "xdp", &["--ring-size", "1GiB"])?;
    let addresses = addresses();
    #[rustfmt::skip]
    let publisher = bed.start_numbered(&[
        "--brokers", &addresses, "--mode", "xdp", "--rate", "100MB", "--threads-per-broker", "2",
        "--digest"])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(0)?;
    cluster.until_they_get_more(&[1, 2, 3]);
    cluster.kill(2)?;
    cluster.restart(0)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert!(report["reroutes"].as_u64() >= Some(4) && report["returns"].as_u64() >= Some(1));
    Ok(())
}

fn one_of_four_is_down_at_the_start_and_comes(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "tcp", &[])?;
    cluster.kill(0)?;
    let publisher = cluster.publish("tcp", &["--connect-timeout", "0"])?;
    cluster.until_they_get_more(&[1, 2, 3]);
    cluster.restart(0)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(
        (&report["reroutes"], &report["returns"]),
        (&1.into(), &1.into())
    );
    Ok(())
}

fn a_broker_that_is_back_with_an_empty_log(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "tcp", &[])?;
    let publisher = cluster.publish("tcp", &[])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(0)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    // What it had is kept, but not for the broker.
    let (log, kept) = (cluster.log(0), bed.file("kept"));
    std::fs::copy(&log, &kept)?;
    std::fs::remove_dir_all(bed.buffer_dir_of(0))?;
    cluster.restart(0)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0]);
    let (report, _) = publisher.finish()?;
    let mut merged = MergedLogs::default();
    merged.add(&kept)?;
    for number in 0..BROKERS {
        merged.add(&cluster.log(number))?;
    }
    let sent = program_reports::parse("penstock-publisher", &report.to_string())?;
    assert_eq!(merged.differences(&sent), Vec::<String>::new());
    Ok(())
}

/// Makes a key, whose file is also one of a broker that accepts only this key.
fn key(bed: &Bed, name: &str) -> Result<String> {
    let file = bed.file(&format!("{name}.key")).display().to_string();
    let mut command = bed.broker(&["--keygen", &file]).command_without_dir();
    bed.run("keygen", &mut command)?.success()?;
    Ok(file)
}

fn with_keys_and_authenticated_packets(bed: &Bed) -> Result<()> {
    let key = key(bed, "eu")?;
    let mut cluster = Cluster::start(bed, "xdp", &["--auth-keys", &key])?;
    let publisher = cluster.publish("xdp", &["--auth-key", &key, "--packet-auth"])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(1)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    cluster.restart(1)?;
    until_it_says(publisher.publisher(), "the stream returns");
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(paths(&report), "xdp");
    Ok(())
}

/// The broker that comes back does not accept the publisher's key: its streams stay away, and it says why.
fn a_broker_with_other_keys_takes_no_stream(bed: &Bed) -> Result<()> {
    let [accepted, other] = [key(bed, "eu")?, key(bed, "us")?];
    let mut cluster = Cluster::start(bed, "tcp", &["--auth-keys", &accepted])?;
    let publisher = cluster.publish("tcp", &["--auth-key", &accepted])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(1)?;
    until_it_says(publisher.publisher(), "continues at another broker");
    for option in &mut cluster.options {
        if *option == accepted {
            option.clone_from(&other);
        }
    }
    cluster.restart(1)?;
    until_it_says(publisher.publisher(), "the broker answers, but is not back");
    cluster.until_they_get_more(&[0, 2, 3]);
    let said = publisher.publisher().stderr();
    assert_says(&said, "10.214.1.2:1214.*refused the stream.*key");
    let (report, _) = cluster.finish(publisher)?;
    assert_eq!(
        (&report["reroutes"], &report["returns"]),
        (&1.into(), &0.into())
    );
    Ok(())
}

fn a_publisher_that_is_to_wait_stays(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "tcp", &[])?;
    let publisher = cluster.publish("tcp", &["--on-broker-loss", "wait"])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(1)?;
    cluster.until_they_get_more(&[0, 2, 3]);
    cluster.restart(1)?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    let (report, merged) = cluster.finish(publisher)?;
    assert_eq!(report["reroutes"], 0);
    assert_eq!(stream(&report, 1)["moves"], 1);
    assert_eq!(merged.doubles(), 0);
    Ok(())
}

fn a_publisher_that_is_to_fail_fails(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, "xdp", &[])?;
    let publisher = cluster.publish("xdp", &["--on-broker-loss", "fail"])?;
    cluster.until_they_get_more(&[0, 1, 2, 3]);
    cluster.kill(1)?;
    let ended = publisher.ends()?;
    assert_eq!(ended.status.code(), Some(1));
    assert_says(
        &ended.stderr,
        "10.214.1.2:1214 is lost.*--on-broker-loss wait",
    );
    Ok(())
}
