//! Checks the options of a run and derives its messages, its verification and its route from them.

use std::fs;

use anyhow::{Context, Result, ensure};
use bytesize::ByteSize;

use super::flags;
use penstock_testbed::publish::Source;
use penstock_testbed::settings::{Mode, Profile, Route, Workload};

/// Room in the ring beyond an even share: brokers do not get exactly the same, and segments end
/// with a gap.
const VERIFY_HEADROOM: u64 = 2;
/// Most memory that rings of all brokers take to hold a run for verification.
const VERIFY_MEMORY: u64 = 4 << 30;
/// Smallest ring that is chosen for verification.
const VERIFY_RING_MIN: u64 = 256 << 20;
/// Below the average line of nearly every file, bytes; should one be shorter still, verification
/// says that the ring was too small.
const SHORT_LINE: u64 = 8;
/// Largest MTU with `--faults`: an Ethernet frame of it fits in what the injector keeps of one.
const MAX_FAULTY_MTU: u32 = 9000;
/// Framing of a message in a batch, bytes.
const MESSAGE_OVERHEAD: u64 = penstock_wire::message::OVERHEAD as u64;

pub fn source_of(options: &flags::Throughput) -> Result<Source> {
    let Some(path) = &options.input else {
        ensure!(
            options.total_size.as_u64() >= options.workload.message_size.as_u64(),
            "--total-size is smaller than one message"
        );
        return Ok(Source::Synthetic(options.total_size));
    };
    if path.as_os_str() != "-" {
        fs::File::open(path).with_context(|| format!("cannot read --input {}", path.display()))?;
    }
    Ok(Source::Lines(path.clone()))
}

/// How contents are verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verification {
    No,
    /// Subscribers read everything after the run: the rings hold it all.
    Behind,
    /// Subscribers follow during the run, and brokers wait for them.
    Along,
}

/// How the run is verified, and the workload with the rings that this needs.
pub fn verification_of(
    options: &flags::Throughput,
    source: &Source,
) -> Result<(Verification, Workload)> {
    let mut workload = options.workload.clone();
    if !options.verify {
        return Ok((Verification::No, workload));
    }
    let typical_message = match source {
        Source::Synthetic(_) => workload.message_size.as_u64().max(1),
        Source::Lines(_) => SHORT_LINE,
    };
    let brokers = u64::from(options.brokers);
    let share = source.expected_bytes().map(|payload| {
        let framed = payload + payload.div_ceil(typical_message) * MESSAGE_OVERHEAD;
        framed.div_ceil(brokers)
    });
    let ring = share.map(|share| {
        let wanted = (share * VERIFY_HEADROOM).max(VERIFY_RING_MIN);
        wanted.next_multiple_of(VERIFY_RING_MIN)
    });
    match (workload.ring_size, share, ring) {
        (Some(given), Some(share), _) if given.as_u64() >= share => {
            return Ok((Verification::Behind, workload));
        }
        (None, _, Some(ring)) if ring * brokers <= VERIFY_MEMORY => {
            workload.ring_size = Some(ByteSize(ring));
            return Ok((Verification::Behind, workload));
        }
        _ => {}
    }
    ensure!(
        workload.full.as_deref() != Some("overwrite"),
        "--verify cannot read everything back, because the rings do not hold it, and with --full \
         overwrite brokers do not wait for readers: raise --ring-size, lower --total-size or give \
         --full block"
    );
    workload.full = Some("block".to_owned());
    Ok((Verification::Along, workload))
}

pub fn check_faults(options: &flags::Throughput) -> Result<()> {
    let Some(plan) = &options.faults else {
        return Ok(());
    };
    ensure!(
        options.profile == Profile::Wire,
        "--faults needs --profile wire: with segmentation offloads a fault would not meet one packet \
         but up to 64 KiB of them"
    );
    ensure!(
        options.mtu <= MAX_FAULTY_MTU,
        "--faults takes an --mtu of at most {MAX_FAULTY_MTU}, the largest packet that can come late"
    );
    ensure!(
        options.route.xdp_mode.as_deref() != Some("generic"),
        "--faults does not go with --xdp-mode generic: the kernel keeps packets that another program \
         redirected away from a generic XDP program"
    );
    ensure!(
        options.route.mode != Mode::Tcp || plan.treats_tcp(),
        "--faults treats udp only, and --mode tcp sends none: add protocol=tcp to --faults"
    );
    Ok(())
}

/// How brokers receive: as asked, but in native mode rather than in what suits the MTU if there are
/// faults, see [`check_faults`].
pub fn route_of(options: &flags::Throughput) -> Route {
    let mut route = options.route.clone();
    if options.faults.is_some() && route.mode != Mode::Tcp {
        route.xdp_mode = Some("native".to_owned());
    }
    route
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn options(arguments: &[&str]) -> flags::Throughput {
        let line = ["penstock-lab", "throughput"].iter().chain(arguments);
        match crate::cli::Cli::parse_from(line).command {
            crate::cli::Command::Throughput(options) => options,
            _ => unreachable!("throughput was asked for"),
        }
    }

    fn verified(arguments: &[&str]) -> Result<(Verification, Option<u64>)> {
        let options = options(arguments);
        let source = source_of(&options)?;
        let (verification, workload) = verification_of(&options, &source)?;
        Ok((verification, workload.ring_size.map(|size| size.as_u64())))
    }

    #[test]
    fn what_the_rings_hold_is_verified_behind_and_else_along() {
        let given = ["--verify", "--total-size", "1GiB", "--brokers", "2"];
        let (verification, ring) = verified(&given).unwrap();
        assert_eq!(verification, Verification::Behind);
        assert!(ring.unwrap() > 512 << 20);
        let given = ["--verify", "--total-size", "4GiB", "--ring-size", "2GiB"];
        let wanted = (Verification::Behind, Some(2 << 30));
        assert_eq!(verified(&given).unwrap(), wanted);
        let given = ["--verify", "--total-size", "4GiB", "--ring-size", "256MiB"];
        let wanted = (Verification::Along, Some(256 << 20));
        assert_eq!(verified(&given).unwrap(), wanted);
        let wanted = (Verification::Along, None);
        assert_eq!(
            verified(&["--verify", "--total-size", "10GiB"]).unwrap(),
            wanted
        );
        assert_eq!(verified(&["--verify", "--input", "-"]).unwrap(), wanted);
        let wanted = (Verification::No, None);
        assert_eq!(verified(&["--total-size", "10GiB"]).unwrap(), wanted);
    }

    #[test]
    fn brokers_that_overwrite_cannot_be_verified_along() {
        let small = ["--verify", "--ring-size", "256MiB", "--full", "overwrite"];
        let error = verified(&small).unwrap_err().to_string();
        assert!(error.contains("--ring-size"), "{error}");
    }

    #[test]
    fn faults_meet_packets_that_are_there_and_are_single() {
        for (arguments, wanted) in [
            (
                &["--profile", "offload", "--mode", "xdp"][..],
                "--profile wire",
            ),
            (&["--mtu", "9001", "--mode", "xdp"][..], "9000"),
            (&["--mode", "tcp"][..], "protocol=tcp"),
            (&["--mode", "xdp", "--xdp-mode", "generic"][..], "generic"),
        ] {
            let arguments = [arguments, &["--faults", "loss=1%"]].concat();
            let error = check_faults(&options(&arguments)).unwrap_err();
            assert!(error.to_string().contains(wanted), "{error}");
        }
        let tcp = ["--mode", "tcp", "--faults", "loss=1%,protocol=both"];
        check_faults(&options(&tcp)).unwrap();
        let jumbo = ["--mode", "xdp", "--mtu", "9000", "--faults", "loss=1%"];
        let mode = |arguments: &[&str]| route_of(&options(arguments)).xdp_mode;
        assert_eq!(mode(&jumbo).as_deref(), Some("native"));
        assert_eq!(mode(&jumbo[..4]), None);
        assert_eq!(mode(&tcp), None);
    }
}
