//! Colours only on terminals that support them, for users who want them (no-color.org).

use anyhow::Result;
use penstock_e2e::bed::{Bed, program};
use penstock_e2e::commands::command;
use penstock_e2e::{Case, cases};

pub fn cases() -> impl IntoIterator<Item = Case> {
    cases![colours_of_help, colours_of_doctor,]
}

/// Escape characters that a command line sends to a terminal.
fn escapes(bed: &Bed, environment: &str, line: &str) -> Result<usize> {
    let line = format!("env -u NO_COLOR {environment} {line}");
    let mut script = command("script", &["-qec", &line, "/dev/null"]);
    Ok(count(&bed.run("script", &mut script)?.stdout))
}

fn count(text: &str) -> usize {
    text.matches('\u{1b}').count()
}

fn colours_of_help(bed: &Bed) -> Result<()> {
    for name in ["broker", "publisher", "subscriber", "lab"] {
        let path = program(name).display().to_string();
        let help = format!("{path} --help");
        assert!(
            escapes(bed, "TERM=xterm", &help)? > 0,
            "{name} has no colours"
        );
        assert_eq!(
            escapes(bed, "TERM=xterm NO_COLOR=1", &help)?,
            0,
            "{name} with NO_COLOR"
        );
        assert_eq!(
            escapes(bed, "TERM=dumb", &help)?,
            0,
            "{name} on a dumb terminal"
        );
        let wrong = format!("{path} --nope");
        assert_eq!(
            escapes(bed, "TERM=dumb", &wrong)?,
            0,
            "{name} with a wrong flag"
        );
        let piped = bed
            .run("help", &mut command(&path, &["--help"]))?
            .success()?
            .stdout;
        assert_eq!(count(&piped), 0, "{name} in a pipe");
    }
    Ok(())
}

fn colours_of_doctor(bed: &Bed) -> Result<()> {
    let doctor = format!("{} doctor", program("lab").display());
    assert!(
        escapes(bed, "TERM=xterm", &doctor)? > 0,
        "doctor has no colours"
    );
    assert_eq!(
        escapes(bed, "TERM=xterm NO_COLOR=1", &doctor)?,
        0,
        "doctor with NO_COLOR"
    );
    let piped = bed.run("doctor", &mut bed.lab(&["doctor"]))?.stdout;
    let long: Vec<_> = piped
        .lines()
        .filter(|line| line.chars().count() > 80)
        .collect();
    assert!(long.is_empty(), "lines that are too long: {long:?}");
    Ok(())
}
