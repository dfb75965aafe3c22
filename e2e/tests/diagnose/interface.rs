//! What a person gets, with and without privileges, and what is refused.

use std::path::Path;

use anyhow::Result;
use penstock_e2e::bed::{Bed, binaries, program, root};
use penstock_e2e::commands::{command, read_json, text, unwrapped};
use penstock_e2e::loads::{Load, Serve};
use penstock_e2e::{Case, cases};
use penstock_testbed::netns::file_names;
use serde_json::{Value, json};

use crate::bench::{Ends, PORT, diagnose_as_text, names, publish, settle};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![
        in_a_pid_namespace,
        by_port,
        unprivileged,
        wrong_input,
        original_arguments,
    ]
}

/// In a PID namespace the kernel's tracing does not know the process numbers that the lab sees.
fn in_a_pid_namespace(bed: &Bed) -> Result<()> {
    let load = Load::Serve(Serve {
        port: PORT,
        ..Serve::default()
    });
    let load = load.command(bed.broker_ns(), "127.0.0.1")?;
    // The script runs in the network namespace already.
    let words = load
        .get_args()
        .skip(3)
        .map(|word| word.to_string_lossy().into_owned());
    let server = words.collect::<Vec<_>>().join(" ");
    let lab = program("lab");
    let script = format!(
        "{server} & server=$!
         until ss -Hltn 'sport = :{PORT}' | grep -q .; do sleep 0.1; done
         {} diagnose --pid \"$server\" --duration 1 --format json
         code=$?; kill -KILL \"$server\"; exit $code",
        lab.display()
    );
    #[rustfmt::skip]
    let mut command = bed.in_broker_ns(
        "unshare", &["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &script]);
    let diagnosis = bed.run("diagnose", &mut command)?.success()?.json()?;
    let unavailable = diagnosis["unavailable"]
        .as_array()
        .expect("what is missing");
    let text = |part: &Value, name: &str| part[name].as_str().unwrap_or_default().to_owned();
    let calls = unavailable
        .iter()
        .find(|part| text(part, "what").starts_with("system calls"));
    let why = text(calls.expect("system calls are missing"), "why");
    assert!(why.contains("PID namespace"), "{why}");
    Ok(())
}

/// By process and port, and as text.
fn by_port(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let publisher = publish(bed, &["--rate", "20MB"])?;
    settle();
    let pid = broker.pid_text();
    let diagnosis = names(
        bed,
        "sender-application-limited",
        &["--pid", &pid, "--port", "1214"],
    );
    let text = diagnose_as_text(bed, &["--pid", &pid])?;
    let first = "1. sender-application-limited";
    assert!(text.lines().any(|line| line.starts_with(first)), "{text}");
    assert!(
        unwrapped(&text).contains("window scale"),
        "no figures of the connections: {text}"
    );
    let keys: Vec<_> = diagnosis["verdicts"][0]
        .as_object()
        .expect("a verdict")
        .keys()
        .collect();
    #[rustfmt::skip]
    assert_eq!(keys, ["cause", "confidence", "evidence_against", "evidence_for", "next_command", "title"]);
    let sample = &diagnosis["sample"];
    let calls = sample["syscalls"].as_array().expect("system calls");
    let is_receive = |call: &Value| {
        call["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("recv"))
    };
    assert!(calls.iter().any(is_receive), "{calls:?}");
    let connection = &sample["connections"][0];
    assert_eq!(connection["peer"]["pid"], publisher.pid());
    assert_eq!(connection["end"]["receive_buffer_set"], true);
    // The broker's own figures.
    assert_eq!(
        sample["broker"]["workers"].as_array().map(Vec::len),
        Some(1)
    );
    let _server = Ends::of(bed).serve(bed, Serve::default())?;
    names(
        bed,
        "idle-or-offered-slower-than-capacity",
        &["--port", &PORT.to_string()],
    );
    Ok(())
}

/// Without privileges: less, with what is missing and how to get it.
fn unprivileged(bed: &Bed) -> Result<()> {
    let broker = bed.start_broker(&[])?;
    let publisher = publish(bed, &["--rate", "20MB"])?;
    settle();
    // Inside the namespace, which nobody else may enter, as a user who may do nothing.
    let lab = program("lab");
    let lab = lab.to_str().expect("a plain path");
    let nobody = |arguments: &[&str]| {
        #[rustfmt::skip]
        let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs", lab, "diagnose"];
        bed.in_broker_ns("setpriv", &[&user, arguments].concat())
    };
    let arguments = ["--port", "1214", "--duration", "2", "--format", "json"];
    let ended = bed.run("diagnose", &mut nobody(&arguments))?.success()?;
    assert_eq!(ended.stderr, "");
    let diagnosis = ended.json()?;
    assert_eq!(
        diagnosis["sample"]["connections"].as_array().map(Vec::len),
        Some(1)
    );
    assert!(
        !diagnosis["verdicts"]
            .as_array()
            .expect("verdicts")
            .is_empty()
    );
    let unavailable = diagnosis["unavailable"]
        .as_array()
        .expect("what is missing");
    assert!(unavailable.len() >= 2, "{unavailable:?}");
    for part in unavailable {
        for field in ["what", "why", "how"] {
            assert_ne!(part[field], json!(""), "{part}");
        }
    }
    bed.refuses("run with sudo", &mut nobody(&["--pid", &broker.pid_text()]));
    bed.refuses(
        "run with sudo",
        &mut nobody(&["--pid", &publisher.pid().to_string()]),
    );
    Ok(())
}

fn wrong_input(bed: &Bed) -> Result<()> {
    let refuses = |regex: &str, arguments: &[&str]| {
        bed.refuses(regex, bed.lab(&["diagnose"]).args(arguments));
    };
    refuses("nothing listens on TCP port 5999", &["--port", "5999"]);
    refuses("there is no process", &["--pid", "4194304"]);
    refuses("--pid", &[]);
    refuses("the nearest is 500ms", &["--port", "1", "--duration", "0"]);
    let causes = bed.run("causes", &mut bed.lab(&["diagnose", "--list-causes"]))?;
    let causes = causes.success()?.stdout;
    for cause in [
        "shared-buffer-full",
        "receive-window-limited",
        "credit-limited",
        "nic-drops",
    ] {
        let start = format!("{cause} ");
        assert!(
            causes.lines().any(|line| line.starts_with(&start)),
            "{cause}: {causes}"
        );
    }
    Ok(())
}

/// The script with the original's arguments, which are all optional.
fn original_arguments(bed: &Bed) -> Result<()> {
    let script = root().join("scripts/diagnose_recv_bottleneck.sh");
    let bin = binaries()?;
    let target = bin.parent().expect("a target directory");
    let with = |arguments: &[&str]| {
        let mut command = command(&script, arguments);
        command
            .env("RESULTS", bed.file("results"))
            .env("CARGO_TARGET_DIR", target);
        command
    };
    let server = Ends::of(bed).serve(bed, Serve::default())?;
    let (pid, port) = (server.pid().to_string(), PORT.to_string());
    let ended = bed
        .run("script", &mut with(&[&pid, &port, "0.5", "1"]))?
        .success()?;
    let folder = Path::new(ended.stdout.lines().last().expect("a folder"));
    let mut kept = file_names(folder)?;
    kept.sort();
    assert_eq!(kept, ["diagnosis.json", "diagnosis.txt"]);
    assert_eq!(
        read_json(&folder.join("diagnosis.json"))?["sample"]["pid"],
        server.pid()
    );
    let said = text(&folder.join("diagnosis.txt"));
    assert!(
        said.lines().any(|line| line.starts_with("1. idle")),
        "{said}"
    );
    bed.refuses("BROKER_PID is one number", &mut with(&["12 13"]));
    bed.refuses("at most four", &mut with(&["1", "2", "3", "4", "5"]));
    bed.refuses("there is no process", &mut with(&["4194304"]));
    let help = bed.run("help", &mut with(&["--help"]))?.success()?.stdout;
    assert!(help.contains("BROKER_PORT"), "{help}");
    Ok(())
}
