//! The study at work: three rounds of runs, one line for each, what is left, and the end at a signal.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::file::{Keep, Planned, Study, StudyVariant};
use super::plan::{Options, all_runs, chosen, picked, searched};
use super::read;
use super::report::rate_text;
use super::run::{self, Ended, Runner, State};
use crate::error::Problem;
use crate::progress::duration_text;

/// A piece of work: a training run, or a score of one.
enum Job {
    Train(Planned),
    Score(Planned),
}

/// How far the study is.
#[derive(Default)]
struct Done {
    /// Pieces of work that are done, with those of earlier calls.
    count: usize,
    /// Time of the training runs of this call, and their number; then of the scores.
    spent: [(Duration, u32); 2],
}

/// The study at work.
pub(super) struct Work<'a> {
    study: &'a Study,
    options: &'a Options,
    runner: Runner,
    total: usize,
    done: Mutex<Done>,
}

impl<'a> Work<'a> {
    /// Prepares the work of a study and listens for signals.
    ///
    /// # Errors
    /// This program or the signals cannot be had.
    pub fn new(study: &'a Study, options: &'a Options) -> Result<Self, Problem> {
        let program =
            std::env::current_exe().map_err(|error| Problem::run("cannot find this program").source(error))?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        if study.jobs > 1 {
            tracing::warn!("jobs = {}: runs share the machine, so their times cannot be compared", study.jobs);
        }
        let runner = Runner {
            program,
            threads: (study.jobs > 1).then(|| (cores / study.jobs).max(1)),
            keep: study.keep,
            stop: on_signals()?,
        };
        let mut work = Self { study, options, runner, total: 0, done: Mutex::default() };
        let variants = chosen(study, options);
        work.total = variants.iter().map(|variant| searched(study, variant).len() + work.after_search()).sum();
        Ok(work)
    }

    /// Runs and scores of a variant whose rate is found.
    fn after_search(&self) -> usize {
        let study = self.study;
        let seeds = study.seeds.iter().filter(|seed| **seed != study.grid_seed).count();
        seeds + if study.test.is_some() { study.seeds.len() } else { 0 }
    }

    /// The three rounds of the study.
    ///
    /// # Errors
    /// The user stopped it, or the disk refuses.
    pub fn everything(&self) -> Result<(), Problem> {
        let study = self.study;
        let variants = chosen(study, self.options);
        let mut search = vec![];
        for variant in &variants {
            for &rate in searched(study, variant) {
                search.push(Job::Train(study.run(variant, rate, study.grid_seed)?));
            }
        }
        self.round(search)?;
        let (mut repeat, mut score) = (vec![], vec![]);
        for variant in &variants {
            let runs = picked(study, variant)?;
            if runs.is_empty() {
                self.lock().count += self.after_search(); // no rate works: this is all
            }
            for planned in runs {
                if planned.seed != study.grid_seed {
                    repeat.push(Job::Train(planned.clone()));
                }
                score.push(Job::Score(planned));
            }
        }
        self.round(repeat)?;
        if study.test.is_some() {
            self.round(score)?;
        }
        if study.keep == Keep::Numbers {
            for variant in &variants {
                self.drop_weights(variant)?;
            }
        }
        Ok(())
    }

    /// Removes what the runs of a variant have trained, but for a run whose score failed and can be tried again.
    fn drop_weights(&self, variant: &StudyVariant) -> Result<(), Problem> {
        let picked = picked(self.study, variant)?;
        for planned in all_runs(self.study, variant)? {
            let folder = &planned.config.output_dir;
            let is_needed = match &self.study.test {
                Some(test) => picked.contains(&planned) && run::is_scored(folder, test)?.is_err(),
                None => false,
            };
            if !is_needed && run::state(&planned)? == State::Finished {
                run::drop_weights(folder)?;
            }
        }
        Ok(())
    }

    /// Does a list of jobs, several at a time. A run that fails is told and left behind.
    fn round(&self, jobs: Vec<Job>) -> Result<(), Problem> {
        let queue = Mutex::new(VecDeque::from(jobs));
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let work = || -> Result<(), Problem> {
            while let Some(job) = next() {
                self.job(&job)?;
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..self.study.jobs).map(|_| scope.spawn(work)).collect();
            let results = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err(Problem::run("a thread of the study ended unexpectedly")))
            });
            // All of them are waited for before the first error is reported.
            results.collect::<Vec<_>>().into_iter().collect()
        })
    }

    fn job(&self, job: &Job) -> Result<(), Problem> {
        if self.runner.stop.load(Ordering::Relaxed) {
            return Err(self.interrupted());
        }
        let started = Instant::now();
        let (planned, ended) = match job {
            Job::Train(planned) => (planned, self.train(planned)?),
            Job::Score(planned) => (planned, self.score(planned)?),
        };
        let Some(ended) = ended else {
            self.lock().count += 1;
            return Ok(());
        };
        let kind = usize::from(matches!(job, Job::Score(_)));
        let text = match ended {
            Ended::Interrupted => return Err(self.interrupted()),
            Ended::Failed(reason) => {
                let line = self.line(planned, kind, started, "failed");
                tracing::warn!("{line}: {reason}");
                return Ok(());
            }
            Ended::Well => self.result(planned, kind == 1)?,
        };
        let line = self.line(planned, kind, started, &text);
        tracing::info!("{line}");
        Ok(())
    }

    /// Trains unless that is done or has failed before.
    fn train(&self, planned: &Planned) -> Result<Option<Ended>, Problem> {
        match run::state(planned)? {
            State::Finished => Ok(None),
            State::Failed(reason) => {
                let run = name(planned);
                tracing::warn!("{run}: failed before ({reason}); --retry tries it again");
                Ok(None)
            }
            _ => self.runner.train(planned).map(Some),
        }
    }

    /// Scores a finished run unless that is done.
    fn score(&self, planned: &Planned) -> Result<Option<Ended>, Problem> {
        let Some(test) = &self.study.test else { return Ok(None) };
        let folder = &planned.config.output_dir;
        if run::state(planned)? != State::Finished || run::is_scored(folder, test)?.is_ok() {
            return Ok(None);
        }
        self.runner.score(planned, test).map(Some)
    }

    /// The metric that a run reached, as text.
    fn result(&self, planned: &Planned, on_test: bool) -> Result<String, Problem> {
        let metric = &self.study.metric;
        let found = read::read(&planned.config.output_dir)?;
        let value = match on_test {
            true => found.test.as_ref().and_then(|scores| scores.get(metric.key()).copied()),
            false => found.validation(metric.key()),
        };
        Ok(match value {
            Some(value) => format!("{} {}", metric.label(), metric.text(value, None)),
            None => format!("no {}", metric.label()),
        })
    }

    /// `[3/24] LoRA, rate 2e-3, seed 1: eval loss 0.512 (12s), 4m 10s left`.
    fn line(&self, planned: &Planned, kind: usize, started: Instant, text: &str) -> String {
        let mut done = self.lock();
        done.count += 1;
        done.spent[kind].0 += started.elapsed();
        done.spent[kind].1 += 1;
        let spent = duration_text(started.elapsed());
        let what = if kind == 1 { ", test" } else { "" };
        let head = format!("[{}/{}] {}{what}: {text} ({spent})", done.count, self.total, name(planned));
        match done.count < self.total {
            true => format!("{head}, about {} left", duration_text(self.left(&done))),
            false => head,
        }
    }

    /// Time for what is left, at the mean time of a training run of this call; a score is short beside it.
    fn left(&self, done: &Done) -> Duration {
        let left = self.total.saturating_sub(done.count);
        let (time, count) = if done.spent[0].1 > 0 { done.spent[0] } else { done.spent[1] };
        let scores =
            if self.study.test.is_some() { self.study.seeds.len() * chosen(self.study, self.options).len() } else { 0 };
        let trainings = left.saturating_sub(if done.spent[0].1 > 0 { scores } else { 0 });
        let each = time.checked_div(count.max(1)).unwrap_or_default();
        let jobs = u32::try_from(self.study.jobs).unwrap_or(1).max(1);
        each.saturating_mul(u32::try_from(trainings).unwrap_or(u32::MAX)) / jobs
    }

    fn lock(&self) -> MutexGuard<'_, Done> {
        self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn interrupted(&self) -> Problem {
        let count = self.lock().count;
        Problem::interrupted(format!("interrupted with {count} of {} runs and scores done", self.total))
            .hint("the same command goes on from here")
    }
}

fn name(planned: &Planned) -> String {
    format!("{}, rate {}, seed {}", planned.variant, rate_text(planned.rate), planned.seed)
}

/// The first SIGINT, SIGTERM or SIGHUP asks the study and its runs to stop; a second one ends the process at once.
fn on_signals() -> Result<Arc<AtomicBool>, Problem> {
    use signal_hook::consts;
    let stop = Arc::new(AtomicBool::new(false));
    let mut signals = vec![consts::SIGINT, consts::SIGTERM];
    #[cfg(unix)]
    signals.push(consts::SIGHUP);
    for signal in signals {
        signal_hook::flag::register_conditional_shutdown(signal, 130, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|error| Problem::run("cannot listen for signals").source(error))?;
    }
    Ok(stop)
}
