//! Batches for training, without end, and for evaluation, once through.
//!
//! Which documents make up batch `i` of epoch `e` is a function of the data, the settings and the seed, so the
//! position of a loader is two numbers, and a resumed loader goes on with exactly the batches that would have come.
//! Streamed data has its own position ([`StreamPosition`]) and is packed on the way ([`super::stream`]).

use std::sync::Arc;

use lowrank_models::{Batch, IGNORE};
use serde::{Deserialize, Serialize};

use super::TrainingData;
use super::corpus::{Corpus, StreamPosition};
use super::error::DataError;
use super::packing::{Random, Row, batch_by_length, batch_in_order, pack_best_fit, pack_in_order};
use super::store::Dataset;
use super::stream::Stream;

/// How batches are made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderConfig {
    /// Rows of a batch, at least 1; the last batch of an epoch may have fewer.
    pub micro_batch_size: usize,
    /// Columns of a packed row; no row is longer.
    pub max_seq_length: usize,
    /// Several documents in a row; otherwise one, padded to the longest of the batch.
    pub packing: bool,
    /// A new random order in every epoch.
    pub shuffle: bool,
    /// Seed of that order.
    pub seed: u64,
    /// The id in padded positions.
    pub pad_id: u32,
    /// Without packing: columns are a multiple of this, at least 1.
    pub pad_to_multiple_of: usize,
}

/// A position between two batches, and what it is a position in. Part of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoaderState {
    /// Epoch of the batch that was given out last, from 0.
    pub epoch: u64,
    /// Batches of that epoch given out so far; of streamed data, batches of the whole run.
    pub position: usize,
    /// [`Dataset::fingerprint`] or [`Corpus::fingerprint`] of the data.
    pub dataset: String,
    /// The settings that decide the batches.
    pub config: LoaderConfig,
    /// Where the next batch begins, of streamed data only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stream: Option<StreamPosition>,
}

/// Batches of the training data, epoch after epoch.
#[derive(Debug)]
pub struct Loader {
    config: LoaderConfig,
    /// Batches given out so far: of the epoch, or of the whole stream.
    position: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Planned { dataset: Arc<Dataset>, epoch: u64, plan: Vec<Vec<Row>> },
    Streamed(Stream),
}

impl Loader {
    /// A loader of either kind of data that stands before the first batch, or where another one stood.
    ///
    /// # Errors
    /// As [`Loader::new`] and [`Loader::resume`]; for streamed data, as [`Loader::stream`].
    pub fn open(data: &TrainingData, config: LoaderConfig, state: Option<&LoaderState>) -> Result<Self, DataError> {
        match (data, state) {
            (TrainingData::Tokenised(dataset), None) => Self::new(dataset.clone(), config),
            (TrainingData::Tokenised(dataset), Some(state)) => Self::resume(dataset.clone(), config, state),
            (TrainingData::Streamed(corpus), state) => Self::stream(corpus, config, state),
        }
    }

    /// A loader that stands before the first batch.
    ///
    /// # Errors
    /// A size in the settings is 0.
    pub fn new(dataset: Arc<Dataset>, config: LoaderConfig) -> Result<Self, DataError> {
        check(&config, &dataset)?;
        let plan = plan_epoch(&dataset, &config, 0);
        Ok(Self { config, position: 0, source: Source::Planned { dataset, epoch: 0, plan } })
    }

    /// A loader that goes on where another one stood.
    ///
    /// # Errors
    /// The data or a setting that decides the batches differs from that of the saved position; all differences are
    /// listed.
    pub fn resume(dataset: Arc<Dataset>, config: LoaderConfig, state: &LoaderState) -> Result<Self, DataError> {
        check(&config, &dataset)?;
        check_same(state, dataset.fingerprint(), false, &config)?;
        let plan = plan_epoch(&dataset, &config, state.epoch);
        if state.position > plan.len() {
            let difference =
                format!("position: {} in the checkpoint, but the epoch has {} batches", state.position, plan.len());
            return Err(DataError::Resume { differences: vec![difference] });
        }
        Ok(Self { config, position: state.position, source: Source::Planned { dataset, epoch: state.epoch, plan } })
    }

    /// A loader of a corpus that is read while training, from its beginning or from where another loader stood. Rows
    /// are always packed; `shuffle` changes the order of the files in each pass.
    ///
    /// # Errors
    /// A size in the settings is 0; the data or a setting differs from that of the saved position.
    pub fn stream(corpus: &Corpus, config: LoaderConfig, state: Option<&LoaderState>) -> Result<Self, DataError> {
        check_sizes(&config)?;
        if let Some(state) = state {
            check_same(state, corpus.fingerprint(), true, &config)?;
        }
        let (position, from) = state.map_or((0, None), |state| (state.position, state.stream));
        let stream = Stream::start(corpus, &config, from.unwrap_or_default())?;
        Ok(Self { config, position, source: Source::Streamed(stream) })
    }

    /// The next batch; after the last one of an epoch, the first of the next.
    ///
    /// # Errors
    /// Streamed data cannot be read further. Tokenised data never fails.
    pub fn next_batch(&mut self) -> Result<Batch, DataError> {
        let batch = match &mut self.source {
            Source::Streamed(stream) => stream.next_batch()?,
            Source::Planned { dataset, epoch, plan } => {
                if self.position >= plan.len() {
                    *epoch += 1;
                    self.position = 0;
                    *plan = plan_epoch(dataset, &self.config, *epoch);
                }
                build(dataset, &self.config, &plan[self.position])
            }
        };
        self.position += 1;
        Ok(batch)
    }

    /// Epoch of the batch that was given out last, from 0.
    pub fn epoch(&self) -> u64 {
        match &self.source {
            Source::Planned { epoch, .. } => *epoch,
            Source::Streamed(stream) => stream.position().pass,
        }
    }

    /// Epochs done, with the share of the current one.
    pub fn progress(&self) -> f64 {
        match &self.source {
            Source::Planned { epoch, plan, .. } => *epoch as f64 + self.position as f64 / plan.len() as f64,
            Source::Streamed(stream) => stream.progress(),
        }
    }

    /// Number of batches of an epoch; under packing it may differ a little between epochs. `None` for streamed data,
    /// whose length in tokens nobody knows.
    pub fn batches_per_epoch(&self, epoch: u64) -> Option<usize> {
        match &self.source {
            Source::Planned { epoch: current, plan, .. } if epoch == *current => Some(plan.len()),
            Source::Planned { dataset, .. } => Some(plan_epoch(dataset, &self.config, epoch).len()),
            Source::Streamed(_) => None,
        }
    }

    /// Tokens of the current epoch over positions of its batches, in (0, 1]: 1 means no padding.
    pub fn efficiency(&self) -> f64 {
        match &self.source {
            Source::Planned { dataset, plan, .. } => efficiency(dataset, &self.config, plan),
            Source::Streamed(_) => 1.0,
        }
    }

    /// Where the loader stands, to be saved.
    pub fn state(&self) -> LoaderState {
        let (dataset, stream) = match &self.source {
            Source::Planned { dataset, .. } => (dataset.fingerprint(), None),
            Source::Streamed(stream) => (stream.corpus().fingerprint(), Some(stream.position())),
        };
        LoaderState {
            epoch: self.epoch(),
            position: self.position,
            dataset: dataset.to_owned(),
            config: self.config.clone(),
            stream,
        }
    }

    /// Where a record of a batch came from, as `train.jsonl:17`.
    pub fn describe_record(&self, record: u64) -> String {
        match &self.source {
            Source::Planned { dataset, .. } => dataset.describe_record(record),
            Source::Streamed(stream) => stream.corpus().text().describe_record(record),
        }
    }
}

/// Every batch of a data set once, in an order that depends on the data alone.
#[derive(Debug, Clone)]
pub struct Evaluation {
    dataset: Arc<Dataset>,
    config: LoaderConfig,
    plan: Vec<Vec<Row>>,
}

impl Evaluation {
    /// Plans a pass; `shuffle` and `seed` of the settings play no part.
    ///
    /// # Errors
    /// A size in the settings is 0.
    pub fn new(dataset: Arc<Dataset>, config: LoaderConfig) -> Result<Self, DataError> {
        check(&config, &dataset)?;
        let order: Vec<usize> = (0..dataset.documents().len()).collect();
        let plan = plan(&dataset, &config, &order, false);
        Ok(Self { dataset, config, plan })
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        self.plan.len()
    }

    /// Whether there is no batch (there always is one).
    pub fn is_empty(&self) -> bool {
        self.plan.is_empty()
    }

    /// The batches in order, made one at a time.
    pub fn batches(&self) -> impl Iterator<Item = Batch> + '_ {
        self.plan.iter().map(|rows| build(&self.dataset, &self.config, rows))
    }
}

pub(super) fn check_sizes(config: &LoaderConfig) -> Result<(), DataError> {
    let sizes = [
        ("micro_batch_size", config.micro_batch_size),
        ("max_seq_length", config.max_seq_length),
        ("pad_to_multiple_of", config.pad_to_multiple_of),
    ];
    if let Some((key, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
        return Err(DataError::Config { key, reason: "is 0, must be at least 1".to_owned() });
    }
    Ok(())
}

fn check(config: &LoaderConfig, dataset: &Dataset) -> Result<(), DataError> {
    check_sizes(config)?;
    let longest = dataset.statistics().longest;
    if longest > config.max_seq_length as u64 {
        let reason = format!(
            "is {} for batches, but the data was tokenised into documents of up to {longest} tokens",
            config.max_seq_length
        );
        return Err(DataError::Config { key: "max_seq_length", reason });
    }
    Ok(())
}

/// Refuses a saved position of other data or settings, with one line for each thing that decides the batches and
/// differs.
pub(super) fn check_same(
    state: &LoaderState,
    data: &str,
    streaming: bool,
    config: &LoaderConfig,
) -> Result<(), DataError> {
    let LoaderConfig { micro_batch_size, max_seq_length, packing, shuffle, seed, pad_id, pad_to_multiple_of } =
        &state.config;
    let short = |fingerprint: &str| fingerprint.chars().take(12).collect::<String>();
    let values = [
        ("streaming", state.stream.is_some().to_string(), streaming.to_string()),
        ("content of the data", short(&state.dataset), short(data)),
        ("micro_batch_size", micro_batch_size.to_string(), config.micro_batch_size.to_string()),
        ("max_seq_length", max_seq_length.to_string(), config.max_seq_length.to_string()),
        ("packing", packing.to_string(), config.packing.to_string()),
        ("shuffle", shuffle.to_string(), config.shuffle.to_string()),
        ("seed", seed.to_string(), config.seed.to_string()),
        ("pad_id", pad_id.to_string(), config.pad_id.to_string()),
        ("pad_to_multiple_of", pad_to_multiple_of.to_string(), config.pad_to_multiple_of.to_string()),
    ];
    let differing = values.into_iter().filter(|(_, then, now)| then != now);
    let differences: Vec<String> =
        differing.map(|(name, then, now)| format!("{name}: {then} in the checkpoint, {now} now")).collect();
    match differences.is_empty() {
        true => Ok(()),
        false => Err(DataError::Resume { differences }),
    }
}

/// The batches of an epoch.
fn plan_epoch(dataset: &Dataset, config: &LoaderConfig, epoch: u64) -> Vec<Vec<Row>> {
    let mut order: Vec<usize> = (0..dataset.documents().len()).collect();
    if !config.shuffle {
        return plan(dataset, config, &order, true);
    }
    let mut random = Random::new(&[config.seed, epoch]);
    random.shuffle(&mut order);
    let mut batches = plan(dataset, config, &order, false);
    if !config.packing {
        random.shuffle(&mut batches);
        return batches;
    }
    // Packing put long documents first: mix whole rows again.
    let mut rows: Vec<Row> = batches.into_iter().flatten().collect();
    random.shuffle(&mut rows);
    in_batches(rows, config.micro_batch_size)
}

fn plan(dataset: &Dataset, config: &LoaderConfig, order: &[usize], keep_order: bool) -> Vec<Vec<Row>> {
    let length_of = |document: usize| dataset.length_of(document);
    match (config.packing, keep_order) {
        (true, true) => in_batches(pack_in_order(order, length_of, config.max_seq_length), config.micro_batch_size),
        (true, false) => in_batches(pack_best_fit(order, length_of, config.max_seq_length), config.micro_batch_size),
        (false, true) => batch_in_order(order, config.micro_batch_size),
        (false, false) => batch_by_length(order, length_of, config.micro_batch_size),
    }
}

fn in_batches(rows: Vec<Row>, rows_per_batch: usize) -> Vec<Vec<Row>> {
    let mut rows = rows.into_iter().peekable();
    let mut batches = Vec::new();
    while rows.peek().is_some() {
        batches.push(rows.by_ref().take(rows_per_batch).collect());
    }
    batches
}

/// Columns of a batch: a full row under packing (one shape for the whole run), else the longest row rounded up.
fn columns(dataset: &Dataset, config: &LoaderConfig, rows: &[Row]) -> usize {
    if config.packing {
        return config.max_seq_length;
    }
    let longest = rows.iter().map(|row| row_length(dataset, row)).max().unwrap_or(0);
    let rounded = longest.next_multiple_of(config.pad_to_multiple_of);
    rounded.min(config.max_seq_length).max(longest)
}

fn row_length(dataset: &Dataset, row: &Row) -> usize {
    row.iter().map(|document| dataset.length_of(*document)).sum()
}

fn efficiency(dataset: &Dataset, config: &LoaderConfig, plan: &[Vec<Row>]) -> f64 {
    let positions: usize = plan.iter().map(|rows| rows.len() * columns(dataset, config, rows)).sum();
    dataset.statistics().tokens as f64 / positions.max(1) as f64
}

fn build(dataset: &Dataset, config: &LoaderConfig, rows: &[Row]) -> Batch {
    let cols = columns(dataset, config, rows);
    let size = rows.len() * cols;
    let own_column = (0..size).map(|index| (index % cols) as i32).collect();
    let mut batch = Batch {
        rows: rows.len(),
        cols,
        input_ids: vec![config.pad_id as i32; size],
        targets: vec![IGNORE; size],
        positions: vec![0; size],
        first_key: own_column,
        records: Vec::new(),
    };
    for (row, documents) in rows.iter().enumerate() {
        let mut column = 0;
        for &document in documents {
            place(&mut batch, row * cols, column, dataset.tokens_of(document));
            batch.records.push(dataset.documents()[document].record);
            column += dataset.length_of(document);
        }
    }
    // Pieces of one text may have come together.
    batch.records.sort_unstable();
    batch.records.dedup();
    batch
}

/// Writes a document into the row that begins at index `row_start`, from `column` on.
fn place(batch: &mut Batch, row_start: usize, column: usize, (ids, counted): (&[u32], &[bool])) {
    for (offset, id) in ids.iter().enumerate() {
        let index = row_start + column + offset;
        batch.input_ids[index] = *id as i32;
        batch.positions[index] = offset as i32;
        batch.first_key[index] = column as i32;
        // The last token of a document predicts nothing: what follows is another document.
        if counted.get(offset + 1) == Some(&true) {
            batch.targets[index] = ids[offset + 1] as i32;
        }
    }
}
