//! What a check says.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, but slower, or not for everything.
    Warn,
    /// The xdp path does not work.
    Fail,
}

impl Level {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "fail",
        }
    }
}

/// One check's verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was looked at; stable, for programs.
    pub name: &'static str,
    pub level: Level,
    /// What was found.
    pub found: String,
    /// Why it matters.
    pub why: &'static str,
    /// Commands to type, joined by `;` or an explanation in words where no command helps; none if
    /// nothing is to be done.
    pub fix: Option<String>,
}

/// A check's name and reason, from which its verdicts are made.
#[derive(Debug, Clone, Copy)]
pub struct Topic {
    pub name: &'static str,
    pub why: &'static str,
}

impl Topic {
    pub fn ok(self, found: impl Into<String>) -> Check {
        self.verdict(Level::Ok, found.into(), None)
    }

    pub fn warn(self, found: impl Into<String>, fix: impl Into<String>) -> Check {
        self.verdict(Level::Warn, found.into(), Some(fix.into()))
    }

    pub fn fail(self, found: impl Into<String>, fix: impl Into<String>) -> Check {
        self.verdict(Level::Fail, found.into(), Some(fix.into()))
    }

    fn verdict(self, level: Level, found: String, fix: Option<String>) -> Check {
        Check {
            name: self.name,
            level,
            found,
            why: self.why,
            fix,
        }
    }
}
