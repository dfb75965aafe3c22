//! Runs the tests of a file: in parallel unless a test needs the machine to itself, each with a bed of its
//! own; skips those that cannot run here and says why.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::{PoisonError, RwLock};

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::unistd::geteuid;
use thiserror::Error;

use crate::bed::{Bed, binaries};
use crate::{cleanup, loads};

/// Tests share it; one that needs the machine to itself holds it alone.
static MACHINE: RwLock<()> = RwLock::new(());

thread_local! {
    /// Message and place of the last panic of a test's thread; `None` outside of tests.
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// A test and how to run it.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    name: &'static str,
    test: fn(&Bed) -> Result<()>,
    is_alone: bool,
    is_long: bool,
    may_be_wrong_once: bool,
    brokers: usize,
}

/// Lists test functions as [`Case`]s, under the functions' names.
#[macro_export]
macro_rules! cases {
    ($($test:ident),* $(,)?) => { [$($crate::Case::new(stringify!($test), $test)),*] };
}

impl Case {
    /// A test that runs beside others.
    #[must_use]
    pub fn new(name: &'static str, test: fn(&Bed) -> Result<()>) -> Self {
        Self {
            name,
            test,
            is_alone: false,
            is_long: false,
            may_be_wrong_once: false,
            brokers: 1,
        }
    }

    /// The bed has links to this number of brokers.
    #[must_use]
    pub fn brokers(mut self, brokers: usize) -> Self {
        self.brokers = brokers;
        self
    }

    /// No other test runs meanwhile: it depends on how much CPU time its programs get.
    #[must_use]
    pub fn alone(mut self) -> Self {
        self.is_alone = true;
        self
    }

    /// A quick run (`PENSTOCK_QUICK=1`) skips it.
    #[must_use]
    pub fn long(mut self) -> Self {
        self.is_long = true;
        self
    }

    /// Other programs on the machine may mislead it once: then it must pass twice. With
    /// `PENSTOCK_REPEAT=N` it runs N times and must pass nine of ten.
    #[must_use]
    pub fn two_of_three(mut self) -> Self {
        self.may_be_wrong_once = true;
        self
    }

    fn trial(self) -> Trial {
        Trial::ignorable_test(self.name, move || self.run())
    }

    fn run(self) -> Result<Completion, Failed> {
        if self.is_long && std::env::var("PENSTOCK_QUICK").is_ok_and(|quick| quick == "1") {
            return Ok(Completion::ignored_with("not in a quick run"));
        }
        if let Some(reason) = cannot_run() {
            return Ok(Completion::ignored_with(reason));
        }
        let (shared, alone);
        if self.is_alone {
            alone = MACHINE.write().unwrap_or_else(PoisonError::into_inner);
            let _held = alone;
            self.attempts()
        } else {
            shared = MACHINE.read().unwrap_or_else(PoisonError::into_inner);
            let _held = shared;
            self.attempts()
        }
    }

    fn attempts(self) -> Result<Completion, Failed> {
        if !self.may_be_wrong_once {
            return self.attempt();
        }
        if let Some(count) = repetitions() {
            return self.repeat(count);
        }
        self.attempt().or_else(|failed| {
            let message = failed.message().unwrap_or_default();
            crate::say(&format!(
                "{}: wrong once, must be right twice now: {message}",
                self.name
            ));
            self.attempt()?;
            self.attempt()
        })
    }

    fn repeat(self, count: usize) -> Result<Completion, Failed> {
        let outcomes: Vec<_> = (0..count).map(|_| self.attempt()).collect();
        let wrong = outcomes.iter().filter(|outcome| outcome.is_err()).count();
        let last = outcomes
            .into_iter()
            .rev()
            .find(|outcome| outcome.is_err() == (wrong > 0));
        match last {
            Some(Err(_)) if wrong * 10 <= count => Ok(Completion::Completed),
            Some(outcome) => outcome,
            None => Ok(Completion::ignored_with("no repetition was asked for")),
        }
    }

    fn attempt(self) -> Result<Completion, Failed> {
        let bed =
            Bed::new(self.name, self.brokers).map_err(|error| format!("no bed: {error:#}"))?;
        PANIC.set(Some(String::new()));
        let outcome = panic::catch_unwind(AssertUnwindSafe(|| (self.test)(&bed)));
        let place = PANIC.take().unwrap_or_default();
        let failure = match outcome {
            Ok(Ok(())) => return Ok(Completion::Completed),
            Ok(Err(error)) => match error.downcast::<Skipped>() {
                Ok(Skipped(reason)) => return Ok(Completion::ignored_with(reason)),
                Err(error) => describe(&error),
            },
            Err(panic) if place.is_empty() => message_of(&*panic),
            Err(_) => place,
        };
        Err(format!("{failure}\n{}", bed.output()).into())
    }
}

/// The test cannot run on this machine.
#[derive(Debug, Error)]
#[error("skipped: {0}")]
struct Skipped(String);

/// An error that marks the test as skipped, for this reason.
#[must_use]
pub fn skip(reason: &str) -> anyhow::Error {
    Skipped(reason.to_owned()).into()
}

/// Runs the tests that the command line selects.
pub fn run(cases: impl IntoIterator<Item = Case>) -> ExitCode {
    if let Some(code) = loads::run_as_load() {
        return code;
    }
    let arguments = Arguments::from_args();
    if !arguments.list && cannot_run().is_none() {
        if let Err(error) = cleanup::install() {
            crate::say(&format!("cannot prepare the machine: {error:#}"));
            return ExitCode::FAILURE;
        }
        keep_panics_of_tests();
    }
    let trials = cases.into_iter().map(Case::trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Why no test can run here, if so.
fn cannot_run() -> Option<String> {
    if !geteuid().is_root() {
        return Some("network namespaces need root; run as root".to_owned());
    }
    binaries().err().map(|error| format!("{error:#}"))
}

/// `PENSTOCK_REPEAT`, if it asks for more than one run.
fn repetitions() -> Option<usize> {
    let count = std::env::var("PENSTOCK_REPEAT").ok()?.parse().ok()?;
    (count > 1).then_some(count)
}

/// Tests report their own panics, with their place.
fn keep_panics_of_tests() {
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let kept = PANIC
            .with_borrow_mut(|kept| kept.as_mut().map(|kept| *kept = info.to_string()).is_some());
        if !kept {
            default(info);
        }
    }));
}

/// An error, and with `RUST_BACKTRACE=1` the lines of the test that it passed.
fn describe(error: &anyhow::Error) -> String {
    let backtrace = error.backtrace().to_string();
    let is_of_test = |line: &&str| line.trim_start().starts_with("at ./tests/");
    let lines = backtrace.lines().filter(is_of_test);
    let lines: String = lines
        .map(|line| format!("\n  {}", line.trim_start()))
        .collect();
    format!("{error:#}{lines}")
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    format!("panicked: {}", text.unwrap_or("without a message"))
}
