//! Runs of a study as processes of their own, so that peak memory and crashes belong to one run: what each run's folder says of
//! it, how it is started, watched and stopped, and what is kept of it.

use std::fs::OpenOptions;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::file::{Keep, Planned};
use super::read;
use crate::config::{Change, ProgressStyle, RunConfig, diff, resolved_value};
use crate::data::Paths;
use crate::error::Problem;
use crate::progress::Phase;
use crate::run_dir::write_atomically;

/// The configuration that a run was started with.
const CONFIG: &str = "run.toml";
/// What the program said.
const LOG: &str = "log.txt";
/// Why the run failed.
const FAILED: &str = "failed.json";
/// How often a running process is looked at.
const LOOK: Duration = Duration::from_millis(40);

/// What a folder says of the run that belongs there.
#[derive(Debug, PartialEq)]
pub enum State {
    /// It has not begun.
    Missing,
    /// It was interrupted and can go on.
    Unfinished,
    /// It reached its end.
    Finished,
    /// It failed, for this reason.
    Failed(String),
    /// Its folder holds a run with another configuration.
    Changed(Vec<Change>),
}

/// Looks at the folder of a run.
///
/// # Errors
/// A file of the folder cannot be read.
pub fn state(run: &Planned) -> Result<State, Problem> {
    let folder = &run.config.output_dir;
    let Ok(text) = std::fs::read_to_string(folder.join(CONFIG)) else { return Ok(State::Missing) };
    // Read as a configuration, so that a key that is new since then has its default.
    let old = toml::from_str::<RunConfig>(&text).map_err(|error| error.to_string());
    let changes = match old {
        Ok(old) => diff(&resolved_value(&old)?, &resolved_value(&run.config)?),
        Err(_) => diff(&toml::Value::Table(toml::Table::new()), &resolved_value(&run.config)?),
    };
    let changes: Vec<Change> = changes.into_iter().filter(|change| counts(&change.key, &run.config)).collect();
    if !changes.is_empty() {
        return Ok(State::Changed(changes));
    }
    if let Ok(text) = std::fs::read_to_string(folder.join(FAILED)) {
        let value: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        let reason = value.get("reason").and_then(|reason| reason.as_str()).unwrap_or("for an unknown reason");
        return Ok(State::Failed(reason.to_owned()));
    }
    Ok(if read::read(folder)?.finished { State::Finished } else { State::Unfinished })
}

/// Whether another value of a key makes another run. What is only recorded, kept or shown does not, but what is evaluated does.
fn counts(key: &str, config: &RunConfig) -> bool {
    match key {
        "output_dir" | "training.resume_from_checkpoint" | "training.save_steps" | "training.save_total_limit" => false,
        "data.cache" => false,
        "training.eval_steps" | "training.eval_at_start" => config.training.early_stopping_patience.is_some(),
        _ => !key.starts_with("logging."),
    }
}

/// Removes the folder of a run, so that it can be made again.
///
/// # Errors
/// The disk refuses.
pub fn forget(run: &Planned) -> Result<(), Problem> {
    remove(&run.config.output_dir)
}

/// Removes the record of a failure, so that the run is tried again from its last checkpoint.
///
/// # Errors
/// The disk refuses.
pub fn forget_failure(run: &Planned) -> Result<(), Problem> {
    remove(&run.config.output_dir.join(FAILED))
}

fn remove(path: &Path) -> Result<(), Problem> {
    let result = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Problem::run(format!("cannot remove {}", path.display())).source(error))
        }
        _ => Ok(()),
    }
}

/// How a process ended.
#[derive(Debug, PartialEq)]
pub enum Ended {
    /// It reached its end.
    Well,
    /// It failed, for this reason.
    Failed(String),
    /// The user stopped it.
    Interrupted,
}

/// Starts and watches the processes of a study.
#[derive(Debug)]
pub struct Runner {
    /// This program.
    pub program: PathBuf,
    /// Threads of a process, where several run at the same time.
    pub threads: Option<usize>,
    /// What is kept of a run.
    pub keep: Keep,
    /// Set by a signal.
    pub stop: Arc<AtomicBool>,
}

impl Runner {
    /// Trains a run to its end, from its last checkpoint if it has one. A failure is written down in its folder.
    ///
    /// # Errors
    /// The disk refuses, or this program cannot be started.
    pub fn train(&self, run: &Planned) -> Result<Ended, Problem> {
        let folder = &run.config.output_dir;
        std::fs::create_dir_all(folder)
            .map_err(|error| Problem::run(format!("cannot make {}", folder.display())).source(error))?;
        let failed = |error| Problem::run("the configuration of a run cannot be written").source(error);
        let text = toml::to_string(&run.config).map_err(failed)?;
        let config = folder.join(CONFIG);
        write_atomically(&config, text.as_bytes())?;
        let steps = run.config.training.max_steps;
        let label = format!("{}, rate {:e}, seed {}", run.variant, run.rate, run.seed);
        let mut command = Command::new(&self.program);
        command.arg("--config").arg(&config);
        let ended = self.watch(command, folder, &label, steps)?;
        match &ended {
            Ended::Failed(reason) => {
                let text = json!({ "reason": reason, "log": LOG }).to_string() + "\n";
                write_atomically(&folder.join(FAILED), text.as_bytes())?;
            }
            Ended::Well if self.keep != Keep::All => remove(&folder.join("checkpoints"))?,
            _ => {}
        }
        Ok(ended)
    }

    /// Scores the result of a finished run on test data.
    ///
    /// # Errors
    /// As [`Runner::train`].
    pub fn score(&self, run: &Planned, test: &Paths) -> Result<Ended, Problem> {
        let folder = &run.config.output_dir;
        if !has_result(folder) {
            let reason = "has no weights that could be scored; remove its folder to train it again".to_owned();
            return Ok(Ended::Failed(reason));
        }
        let unwritable = |error| Problem::run("data.test cannot be written as TOML").source(error);
        let value = toml::Value::try_from(test).map_err(unwritable)?;
        let scores = folder.join(".tmp-scores.json");
        let mut command = Command::new(&self.program);
        command.arg("eval").arg("--config").arg(folder.join(CONFIG)).arg("--out").arg(&scores);
        command.args(["--set", &format!("data.eval={value}"), "--set", "data.val_set_size=0"]);
        let label = format!("{}, rate {:e}, seed {}: test", run.variant, run.rate, run.seed);
        let ended = self.watch(command, folder, &label, None)?;
        let record = |what: &str, value: serde_json::Value| {
            let text = json!({ "data": test.entries(), what: value }).to_string() + "\n";
            write_atomically(&folder.join(read::TEST_FILE), text.as_bytes())
        };
        if let Ended::Failed(reason) = &ended {
            record("failed", reason.as_str().into())?;
        }
        if ended == Ended::Well {
            let unreadable = |error| Problem::run(format!("cannot read {}", scores.display())).source(error);
            let text = std::fs::read_to_string(&scores).map_err(unreadable)?;
            let measured: serde_json::Value = serde_json::from_str(&text)
                .map_err(|error| Problem::run(format!("{} is not valid JSON", scores.display())).source(error))?;
            record("scores", measured)?;
            remove(&scores)?;
        }
        Ok(ended)
    }

    /// Runs a command; what it says goes to the log of the run. On a terminal a bar shows its steps.
    fn watch(&self, mut command: Command, folder: &Path, label: &str, steps: Option<u64>) -> Result<Ended, Problem> {
        if let Some(threads) = self.threads {
            command.env("RAYON_NUM_THREADS", threads.to_string());
        }
        let path = folder.join(LOG);
        let unwritable = |error| Problem::run(format!("cannot write {}", path.display())).source(error);
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(unwritable)?;
        let before = log.metadata().map_or(0, |metadata| metadata.len());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let unstarted = |error| Problem::run(format!("cannot start {}", self.program.display())).source(error);
        alone(&mut command);
        let mut child = command.spawn().map_err(unstarted)?;
        let status = self.wait(&mut child, folder, label, steps);
        let status = status.map_err(|error| Problem::run(format!("cannot wait for the run {label}")).source(error))?;
        Ok(match status.code() {
            Some(0) => Ended::Well,
            _ if self.stop.load(Ordering::Relaxed) => Ended::Interrupted,
            Some(130) => Ended::Interrupted,
            _ => Ended::Failed(reason(&path, before, status)),
        })
    }

    fn wait(&self, child: &mut Child, folder: &Path, label: &str, steps: Option<u64>) -> std::io::Result<ExitStatus> {
        use std::io::IsTerminal;
        let style = if std::io::stderr().is_terminal() { ProgressStyle::Bar } else { ProgressStyle::None };
        let phase = Phase::start(style, label);
        let (mut told, mut looked) = (false, Instant::now());
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if self.stop.load(Ordering::Relaxed) && !told {
                ask_to_stop(child);
                told = true;
            }
            if let Some(steps) = steps
                && style == ProgressStyle::Bar
                && looked.elapsed() > Duration::from_secs(1)
            {
                // Only for the eye: a file that cannot be read now will be next time.
                phase.update(read::read(folder).map_or(0, |run| run.step), steps);
                looked = Instant::now();
            }
            std::thread::sleep(LOOK);
        };
        phase.clear();
        Ok(status)
    }
}

/// Puts a process out of reach of the terminal's interrupt: it is asked to stop once, by [`ask_to_stop`]. A second signal would
/// end it without a checkpoint.
#[cfg(unix)]
fn alone(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    command.process_group(0);
}

#[cfg(not(unix))]
fn alone(_command: &mut Command) {}

/// A run that is asked to stop finishes its step and writes a checkpoint.
#[cfg(unix)]
fn ask_to_stop(child: &mut Child) {
    if let Ok(id) = libc::pid_t::try_from(child.id()) {
        // SAFETY: kill takes no pointers; the child was not waited for, so its id is not reused.
        unsafe { libc::kill(id, libc::SIGTERM) };
    }
}

#[cfg(not(unix))]
fn ask_to_stop(child: &mut Child) {
    // There is no way to ask. Killed, the run goes on from its last checkpoint the next time.
    let _ = child.kill();
}

/// The error that a log ends with, from a byte on, as one line.
fn reason(log: &Path, from: u64, status: ExitStatus) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let said = bytes.get(usize::try_from(from).unwrap_or(usize::MAX)..).unwrap_or_default();
    let said = String::from_utf8_lossy(said);
    let error = said.lines().skip_while(|line| !line.starts_with("error: ")).take_while(|line| !line.is_empty());
    let text: Vec<&str> = error.map(|line| line.trim().trim_start_matches("error: ")).collect();
    match (text.is_empty(), status.code()) {
        (false, _) => text.join("; "),
        (true, Some(code)) => format!("ended with exit code {code}, see {}", log.display()),
        (true, None) => format!("was killed ({status}), perhaps for want of memory; see {}", log.display()),
    }
}

/// Whether a run has written something that can be scored.
pub fn has_result(folder: &Path) -> bool {
    folder.join("adapter/adapter_config.json").is_file() || folder.join("model/config.json").is_file()
}

/// Whether the result of a run was scored on these data; if not and it was tried, why.
///
/// # Errors
/// The scores cannot be read.
pub fn is_scored(folder: &Path, test: &Paths) -> Result<Result<(), Option<String>>, Problem> {
    let score = read::test_score(folder)?.filter(|score| score.data == json!(test.entries()));
    Ok(match score.map(|score| score.scores) {
        Some(Ok(_)) => Ok(()),
        Some(Err(reason)) => Err(Some(reason)),
        None => Err(None),
    })
}

/// Removes the weights of a run whose numbers are all that is kept.
///
/// # Errors
/// The disk refuses.
pub fn drop_weights(folder: &Path) -> Result<(), Problem> {
    remove(&folder.join("adapter"))?;
    remove(&folder.join("model"))
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
