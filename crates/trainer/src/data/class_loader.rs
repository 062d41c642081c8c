//! Batches of labelled examples: for training without end, and for evaluation once through.
//!
//! As for language models, batch `i` of epoch `e` is a function of the data, the settings and the seed, and the position of a
//! loader is two numbers. Images are decoded by a thread of their own, a few batches ahead.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};

use lowrank_models::ClassifierBatch;

use super::error::DataError;
use super::examples::Examples;
use super::loader::{LoaderConfig, LoaderState, check_same, check_sizes};
use super::packing::{Random, batch_by_length, batch_in_order};

/// Batches that are made before they are needed.
const AHEAD: usize = 3;

/// Batches of the training examples, epoch after epoch.
#[derive(Debug)]
pub struct LabelledLoader {
    examples: Arc<Examples>,
    config: LoaderConfig,
    epoch: u64,
    /// Batches of the epoch given out so far.
    position: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    /// The batches of the current epoch.
    Planned(Vec<Vec<usize>>),
    /// A thread that makes them.
    Ahead(Receiver<Result<ClassifierBatch, DataError>>),
}

impl LabelledLoader {
    /// A loader that stands before the first batch, or where another one stood. Of the settings, `packing` plays no part.
    ///
    /// # Errors
    /// A size in the settings is 0; the data or a setting that decides the batches differs from that of the saved position.
    pub fn open(examples: Arc<Examples>, config: LoaderConfig, state: Option<&LoaderState>) -> Result<Self, DataError> {
        check_sizes(&config)?;
        let (mut epoch, mut position) = (0, 0);
        if let Some(state) = state {
            check_same(state, examples.fingerprint(), false, &config)?;
            (epoch, position) = (state.epoch, state.position);
        }
        let batches = examples.len().div_ceil(config.micro_batch_size);
        if position > batches {
            let difference = format!("position: {position} in the checkpoint, but the epoch has {batches} batches");
            return Err(DataError::Resume { differences: vec![difference] });
        }
        let source = match examples.is_slow() {
            true => Source::Ahead(in_background(examples.clone(), config.clone(), epoch, position)?),
            false => Source::Planned(plan_epoch(&examples, &config, epoch)),
        };
        Ok(Self { examples, config, epoch, position, source })
    }

    /// The next batch; after the last one of an epoch, the first of the next.
    ///
    /// # Errors
    /// An image cannot be read.
    pub fn next_batch(&mut self) -> Result<ClassifierBatch, DataError> {
        let starts_epoch = self.position >= self.epoch_length();
        if starts_epoch {
            self.epoch += 1;
            self.position = 0;
        }
        let batch = match &mut self.source {
            Source::Ahead(batches) => batches.recv().unwrap_or_else(|_| {
                Err(DataError::Stream { reason: "the thread that decodes images has stopped".to_owned() })
            })?,
            Source::Planned(plan) => {
                if starts_epoch {
                    *plan = plan_epoch(&self.examples, &self.config, self.epoch);
                }
                self.examples.batch(&plan[self.position], &self.config, Some(self.epoch))?
            }
        };
        self.position += 1;
        Ok(batch)
    }

    fn epoch_length(&self) -> usize {
        self.examples.len().div_ceil(self.config.micro_batch_size)
    }

    /// Epoch of the batch that was given out last, from 0.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Epochs done, with the share of the current one.
    pub fn progress(&self) -> f64 {
        self.epoch as f64 + self.position as f64 / self.epoch_length() as f64
    }

    /// Number of batches of an epoch, the same for all.
    pub fn batches_per_epoch(&self, _epoch: u64) -> Option<usize> {
        Some(self.epoch_length())
    }

    /// Where the loader stands, to be saved.
    pub fn state(&self) -> LoaderState {
        LoaderState {
            epoch: self.epoch,
            position: self.position,
            dataset: self.examples.fingerprint().to_owned(),
            config: self.config.clone(),
            stream: None,
        }
    }

    /// Where a record of a batch came from, as `train.tsv:17`.
    pub fn describe_record(&self, record: u64) -> String {
        self.examples.describe_record(record)
    }
}

/// Makes the batches from a position on; ends when nobody takes them any more.
fn in_background(
    examples: Arc<Examples>,
    config: LoaderConfig,
    epoch: u64,
    position: usize,
) -> Result<Receiver<Result<ClassifierBatch, DataError>>, DataError> {
    let (sender, receiver) = sync_channel(AHEAD);
    let work = move || {
        let mut skipped = position;
        for epoch in epoch.. {
            for rows in plan_epoch(&examples, &config, epoch).into_iter().skip(std::mem::take(&mut skipped)) {
                if sender.send(examples.batch(&rows, &config, Some(epoch))).is_err() {
                    return;
                }
            }
        }
    };
    spawn(work)?;
    Ok(receiver)
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<(), DataError> {
    let thread = std::thread::Builder::new().name("images".to_owned()).spawn(work);
    thread.map(drop).map_err(|error| DataError::Stream { reason: format!("cannot start a thread: {error}") })
}

/// The batches of an epoch.
fn plan_epoch(examples: &Examples, config: &LoaderConfig, epoch: u64) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..examples.len()).collect();
    if !config.shuffle {
        return flat(batch_in_order(&order, config.micro_batch_size));
    }
    let mut random = Random::new(&[config.seed, epoch]);
    random.shuffle(&mut order);
    let mut batches = batch_by_length(&order, |example| examples.length_of(example), config.micro_batch_size);
    random.shuffle(&mut batches);
    flat(batches)
}

/// One example a row.
fn flat(batches: Vec<Vec<Vec<usize>>>) -> Vec<Vec<usize>> {
    batches.into_iter().map(|rows| rows.concat()).collect()
}

/// Every example once, in an order that depends on the data alone.
#[derive(Debug, Clone)]
pub struct LabelledEvaluation {
    examples: Arc<Examples>,
    config: LoaderConfig,
    plan: Vec<Vec<usize>>,
}

impl LabelledEvaluation {
    /// Plans a pass; `shuffle` and `seed` of the settings play no part.
    ///
    /// # Errors
    /// A size in the settings is 0.
    pub fn new(examples: Arc<Examples>, config: LoaderConfig) -> Result<Self, DataError> {
        check_sizes(&config)?;
        let order: Vec<usize> = (0..examples.len()).collect();
        let plan = flat(batch_by_length(&order, |example| examples.length_of(example), config.micro_batch_size));
        Ok(Self { examples, config, plan })
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.plan.len()
    }

    /// Whether there is no batch (there always is one).
    pub fn is_empty(&self) -> bool {
        self.plan.is_empty()
    }

    /// What is evaluated on.
    pub fn examples(&self) -> &Arc<Examples> {
        &self.examples
    }

    /// The batches in order, made one at a time; those of images a few ahead of need.
    ///
    /// # Errors
    /// Each item: an image cannot be read. The whole: no thread can be started.
    pub fn batches(&self) -> Result<Box<dyn Iterator<Item = Result<ClassifierBatch, DataError>> + '_>, DataError> {
        if !self.examples.is_slow() {
            let batches = self.plan.iter().map(|rows| self.examples.batch(rows, &self.config, None));
            return Ok(Box::new(batches));
        }
        let (sender, receiver) = sync_channel(AHEAD);
        let Self { examples, config, plan } = self.clone();
        spawn(move || {
            for rows in plan {
                if sender.send(examples.batch(&rows, &config, None)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Box::new(receiver.into_iter()))
    }
}
