//! What a user sees when something goes wrong: one sentence, its causes, a hint, and the exit code of the process.

use std::error::Error;
use std::fmt;

/// Who has to act, which decides the exit code of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line or the configuration is wrong: exit code 2.
    Config,
    /// The run failed: exit code 1.
    Run,
    /// The user stopped the run and a checkpoint was written: exit code 130.
    Interrupted,
}

impl Kind {
    /// Exit code of a process that ends with a problem of this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            Kind::Config => 2,
            Kind::Run => 1,
            Kind::Interrupted => 130,
        }
    }
}

/// An error meant for the user of the program.
///
/// `what` says what failed, where, what was expected and what was found. `hint` says what to do about it.
///
/// ```
/// use lowrank_train::error::{Problem, report};
///
/// let problem = Problem::config("training.max_steps is 0, must be at least 1").hint("use num_epochs to count in epochs");
/// let (text, exit_code) = report(&problem.into());
/// assert_eq!(text, "error: training.max_steps is 0, must be at least 1\n\nhint: use num_epochs to count in epochs");
/// assert_eq!(exit_code, 2);
/// ```
#[derive(Debug)]
pub struct Problem {
    /// Who has to act.
    pub kind: Kind,
    /// What failed, where, expected and got.
    pub what: String,
    /// What the user can do.
    pub hint: Option<String>,
    /// The error below this one.
    pub source: Option<Box<dyn Error + Send + Sync>>,
}

impl Problem {
    /// A wrong command line or configuration (exit code 2).
    pub fn config(what: impl Into<String>) -> Self {
        Self::new(Kind::Config, what.into())
    }

    /// A run that failed (exit code 1).
    pub fn run(what: impl Into<String>) -> Self {
        Self::new(Kind::Run, what.into())
    }

    /// A run that the user stopped (exit code 130).
    pub fn interrupted(what: impl Into<String>) -> Self {
        Self::new(Kind::Interrupted, what.into())
    }

    fn new(kind: Kind, what: String) -> Self {
        Self { kind, what, hint: None, source: None }
    }

    /// Adds what the user can do about it.
    pub fn hint(mut self, text: impl Into<String>) -> Self {
        self.hint = Some(text.into());
        self
    }

    /// Adds the error that caused this one.
    pub fn source(mut self, error: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.source = Some(error.into());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.what)
    }
}

impl Error for Problem {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn Error + 'static))
    }
}

/// The text to print for an error and the exit code to end with.
///
/// The text has one `error:` line, a `caused by:` line for every deeper error that the one above does not repeat, then a
/// blank line and the first hint of the chain. An error that is no [`Problem`] ends with code 1. There is no newline at the end.
pub fn report(error: &anyhow::Error) -> (String, i32) {
    let mut text = format!("error: {error}");
    let mut above = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Some errors show the one below in their own text already.
        if !above.contains(&cause) {
            text.push_str(&format!("\n  caused by: {cause}"));
        }
        above = cause;
    }
    let problems = || error.chain().filter_map(|cause| cause.downcast_ref::<Problem>());
    if let Some(hint) = problems().find_map(|problem| problem.hint.as_ref()) {
        text.push_str(&format!("\n\nhint: {hint}"));
    }
    let kind = problems().next().map_or(Kind::Run, |problem| problem.kind);
    (text, kind.exit_code())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_is_printed_with_its_causes_and_the_first_hint() {
        let disk = std::io::Error::other("disk on fire");
        let inner = Problem::run("cannot write runs/demo/metrics.jsonl").hint("free some space").source(disk);
        let outer = Problem::run("step 7 failed").source(inner);
        let (text, code) = report(&outer.into());
        assert_eq!(
            text,
            "error: step 7 failed\n  caused by: cannot write runs/demo/metrics.jsonl\n  caused by: disk on fire\n\nhint: free some space"
        );
        assert_eq!(code, 1);
    }

    #[test]
    fn the_outermost_problem_decides_the_exit_code() {
        assert_eq!(report(&Problem::config("bad").source(Problem::run("worse")).into()).1, 2);
        assert_eq!(
            report(&Problem::interrupted("stopped at step 3").into()),
            ("error: stopped at step 3".to_owned(), 130)
        );
    }

    #[test]
    fn context_around_a_problem_keeps_its_kind_and_hint() {
        let error =
            anyhow::Error::new(Problem::config("bad key").hint("spell it right")).context("while reading run.toml");
        let (text, code) = report(&error);
        assert_eq!(text, "error: while reading run.toml\n  caused by: bad key\n\nhint: spell it right");
        assert_eq!(code, 2);
    }

    #[test]
    fn a_cause_that_the_error_above_repeats_is_printed_once() {
        let disk = std::io::Error::other("disk on fire");
        let inner = Problem::run("cannot read a.jsonl: disk on fire").source(disk);
        let (text, _) = report(&Problem::run("cannot read the data").source(inner).into());
        assert_eq!(text, "error: cannot read the data\n  caused by: cannot read a.jsonl: disk on fire");
    }

    #[test]
    fn a_foreign_error_ends_with_code_1() {
        assert_eq!(report(&anyhow::anyhow!("odd")), ("error: odd".to_owned(), 1));
    }
}
