//! Runs short helper commands (`ip`, `ethtool`) and turns their failures into advice.

use std::io::ErrorKind;
use std::process::{Command, Output};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use penstock_process::child;

/// Time limit for a helper program: at most, `ip` waits for other changes of the network.
const LIMIT: Duration = Duration::from_secs(60);

/// Runs `line` (program, then arguments) to its end and returns what it printed on stdout.
pub fn run(line: &[&str]) -> Result<String> {
    let (program, arguments) = line.split_first().context("empty command line")?;
    let output =
        child::output(Command::new(program).args(arguments), LIMIT).map_err(|error| match error
            .kind()
        {
            ErrorKind::NotFound => anyhow!("`{program}` not found; {}", how_to_install(program)),
            ErrorKind::TimedOut => anyhow!("`{}` did not end within {LIMIT:?}", line.join(" ")),
            _ => anyhow!(error).context(format!("cannot run `{}`", line.join(" "))),
        })?;
    check(&line.join(" "), &output)?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn check(line: &str, output: &Output) -> Result<()> {
    if output.status.success() {
        return Ok(());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    bail!(
        "`{line}` failed ({}): {}{}",
        output.status,
        stderr.trim(),
        advice(&stderr)
    );
}

/// What to do about a failure, from what the command said about it.
fn advice(stderr: &str) -> &'static str {
    if stderr.contains("Operation not permitted") || stderr.contains("Permission denied") {
        "; network namespaces need root: run with sudo"
    } else if stderr.contains("exec of \"ethtool\" failed") {
        "; install it: apt-get install ethtool"
    } else {
        ""
    }
}

/// The line that installs `program` on a Debian-like system.
pub fn how_to_install(program: &str) -> String {
    let package = match program {
        "ip" => "iproute2",
        other => other,
    };
    format!("install it: apt-get install {package}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_carry_stderr_and_advice() {
        let error = run(&[
            "sh",
            "-c",
            "echo mount: Operation not permitted >&2; exit 3",
        ]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("exit status: 3"), "{text}");
        assert!(text.contains("run with sudo"), "{text}");
    }

    #[test]
    fn a_missing_program_names_its_package() {
        let text = run(&["penstock-no-such-program"]).unwrap_err().to_string();
        assert!(
            text.contains("apt-get install penstock-no-such-program"),
            "{text}"
        );
        assert!(how_to_install("ip").ends_with("iproute2"));
    }

    #[test]
    fn stdout_comes_back() {
        assert_eq!(run(&["echo", "a", "b"]).unwrap(), "a b\n");
    }
}
