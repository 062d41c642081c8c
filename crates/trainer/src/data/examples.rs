//! What a classifier is trained on: examples with labels, texts or images, and batches of them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use lowrank_models::classifier::{ClassifierBatch, Input, Labels};
use lowrank_models::hf::Tokenizer;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::classes::LabelRules;
use super::error::DataError;
use super::images::{ImageFiles, read_images};
use super::labelled::{Texts, read_texts};
use super::loader::LoaderConfig;
use super::packing::Random;
use super::pictures::ImageRules;
use super::source::Numbering;
use super::store::{ReadReport, hexadecimal};
use super::{DataConfig, Paths};

/// Where an example came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file.
    pub path: Arc<Path>,
    /// How positions in it are counted.
    pub numbering: Numbering,
    /// Line, element or row.
    pub position: u64,
    /// Number over all files, from 0, skipped ones included.
    pub record: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.numbering.location(&self.path, self.position))
    }
}

/// What is classified.
#[derive(Debug, Clone)]
pub enum Content {
    /// Token ids, in memory.
    Texts(Arc<Texts>),
    /// Files, decoded when their turn comes.
    Images(Arc<ImageFiles>),
}

/// Examples with labels; at least one.
#[derive(Debug, Clone)]
pub struct Examples {
    content: Content,
    /// Which of the content, in file order.
    chosen: Vec<usize>,
    /// Of all of the content.
    places: Arc<[Place]>,
    /// Of all of the content.
    labels: Arc<Labels>,
    classes: Arc<[String]>,
    report: Arc<ReadReport>,
    fingerprint: String,
}

/// The labelled data of a run.
#[derive(Debug, Clone)]
pub struct LabelledData {
    /// What is trained on.
    pub train: Arc<Examples>,
    /// What is evaluated on, if anything.
    pub eval: Option<Arc<Examples>>,
}

/// Reads, tokenises and splits labelled texts.
///
/// `seed` decides which records `val_set_size` holds out.
///
/// # Errors
/// A wrong setting, an unreadable file, a bad record, a label that does not fit, or nothing left to train on.
pub fn prepare_texts(
    config: &DataConfig,
    tokenizer: &Tokenizer,
    rules: &LabelRules,
    seed: u64,
) -> Result<LabelledData, DataError> {
    prepare(config, rules, seed, |name, paths, rules| {
        let read = read_texts(paths.entries(), config, tokenizer, rules)?;
        let content = Content::Texts(Arc::new(read.texts));
        let examples =
            Examples::new(content, read.places, read.understood.labels, read.understood.classes, read.report);
        examples.log(name);
        Ok(examples)
    })
}

/// Finds and splits labelled images: folders of a folder for each class. `flip` mirrors half of the images in training, other
/// ones in each epoch.
///
/// # Errors
/// As [`prepare_texts`].
pub fn prepare_images(
    config: &DataConfig,
    images: &ImageRules,
    rules: &LabelRules,
    seed: u64,
    flip: bool,
) -> Result<LabelledData, DataError> {
    prepare(config, rules, seed, |name, paths, rules| {
        let (places, understood) = read_images(paths.entries(), rules)?;
        let paths = places.iter().map(|place| place.path.clone()).collect();
        let content = Content::Images(Arc::new(ImageFiles { rules: images.clone(), paths, flip, seed }));
        let report = ReadReport::default();
        let examples = Examples::new(content, places, understood.labels, understood.classes, report);
        examples.log(name);
        Ok(examples)
    })
}

fn prepare(
    config: &DataConfig,
    rules: &LabelRules,
    seed: u64,
    read: impl Fn(&str, &Paths, &LabelRules) -> Result<Examples, DataError>,
) -> Result<LabelledData, DataError> {
    config.check()?;
    if config.train.is_empty() {
        let reason = "is not set: give a path or a list of paths".to_owned();
        return Err(DataError::Config { key: "train", reason });
    }
    let train = read("train", &config.train, rules)?;
    if let Some(paths) = &config.eval {
        let rules = LabelRules { regression: rules.regression, classes: train.classes.to_vec() };
        let eval = read("eval", paths, &rules)?;
        if eval.classes != train.classes {
            let reason = format!("has the classes {:?}, but the training data has {:?}", eval.classes, train.classes);
            return Err(DataError::Config { key: "eval", reason });
        }
        return Ok(LabelledData { train: Arc::new(train), eval: Some(Arc::new(eval)) });
    }
    if !config.val_set_size.is_some() {
        return Ok(LabelledData { train: Arc::new(train), eval: None });
    }
    let total = train.len() as u64;
    let held_out = config.val_set_size.records_of(total);
    if held_out >= total {
        let reason = format!("holds out {held_out} of {total} records; nothing is left to train on");
        return Err(DataError::Config { key: "val_set_size", reason });
    }
    let (train, eval) = train.split(held_out as usize, seed);
    tracing::info!("held out {} of {total} records for evaluation", eval.len());
    Ok(LabelledData { train: Arc::new(train), eval: Some(Arc::new(eval)) })
}

impl Examples {
    fn new(content: Content, places: Vec<Place>, labels: Labels, classes: Vec<String>, report: ReadReport) -> Self {
        let chosen = (0..places.len()).collect();
        let (places, labels, report) = (places.into(), Arc::new(labels), Arc::new(report));
        Self { content, chosen, places, labels, classes: classes.into(), report, fingerprint: String::new() }.hashed()
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.chosen.len()
    }

    /// Whether there is none (there always is one).
    pub fn is_empty(&self) -> bool {
        self.chosen.is_empty()
    }

    /// Names of the classes in order; a single one for regression.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The labels in file order.
    pub fn labels(&self) -> Labels {
        self.labels_of(&self.chosen)
    }

    /// What was cut and skipped while the files were read; of a split, both halves have the report of the whole.
    pub fn report(&self) -> &ReadReport {
        &self.report
    }

    /// A hash of all content and labels, in hexadecimal. Of images: their names, sizes in bytes and how they are prepared.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Tokens of a text; 1 for an image.
    pub fn length_of(&self, example: usize) -> usize {
        match &self.content {
            Content::Texts(texts) => texts.text(self.chosen[example]).0.len(),
            Content::Images(_) => 1,
        }
    }

    /// Whether a batch takes so long to make that it should be made before it is needed.
    pub(super) fn is_slow(&self) -> bool {
        matches!(self.content, Content::Images(_))
    }

    /// Where a record came from, as `train.tsv:17`.
    pub fn describe_record(&self, record: u64) -> String {
        let place = self.places.iter().find(|place| place.record == record);
        place.map_or_else(|| format!("record {record}"), Place::to_string)
    }

    /// Two parts: without `held_out` examples chosen at random, and those; both in file order.
    fn split(&self, held_out: usize, seed: u64) -> (Self, Self) {
        let mut order = self.chosen.clone();
        Random::new(&[seed, 0x5b11]).shuffle(&mut order);
        let out: BTreeSet<usize> = order.into_iter().take(held_out).collect();
        let (eval, train): (Vec<usize>, Vec<usize>) = self.chosen.iter().partition(|index| out.contains(index));
        let part = |chosen| Self { chosen, ..self.clone() }.hashed();
        (part(train), part(eval))
    }

    fn labels_of(&self, chosen: &[usize]) -> Labels {
        match self.labels.as_ref() {
            Labels::Classes(classes) => Labels::Classes(chosen.iter().map(|&index| classes[index]).collect()),
            Labels::Values(values) => Labels::Values(chosen.iter().map(|&index| values[index]).collect()),
        }
    }

    fn hashed(mut self) -> Self {
        let mut hash = Sha256::new();
        for &index in &self.chosen {
            match &self.content {
                Content::Texts(texts) => {
                    let (ids, types) = texts.text(index);
                    hash.update((ids.len() as u64).to_le_bytes());
                    ids.iter().chain(types).for_each(|id| hash.update(id.to_le_bytes()));
                }
                Content::Images(files) => files.hash_into(index, &mut hash),
            }
            match self.labels.as_ref() {
                Labels::Classes(classes) => hash.update(classes[index].to_le_bytes()),
                Labels::Values(values) => hash.update(values[index].to_le_bytes()),
            }
        }
        self.fingerprint = hexadecimal(&hash.finalize());
        self
    }

    /// A batch of these examples. `epoch` is that of a training batch; evaluation changes no image.
    ///
    /// # Errors
    /// An image cannot be read.
    pub fn batch(
        &self,
        examples: &[usize],
        config: &LoaderConfig,
        epoch: Option<u64>,
    ) -> Result<ClassifierBatch, DataError> {
        let chosen: Vec<usize> = examples.iter().map(|&example| self.chosen[example]).collect();
        let input = match &self.content {
            Content::Texts(texts) => pad(texts, &chosen, config),
            Content::Images(files) => {
                let records = |index: usize| self.places[index].record;
                let pixels: Vec<Vec<f32>> = chosen
                    .par_iter()
                    .map(|&index| files.pixels(index, epoch.map(|epoch| (epoch, records(index)))))
                    .collect::<Result<_, _>>()?;
                let [height, width] = files.rules.size();
                let channels = files.rules.channels;
                Input::Image { rows: chosen.len(), channels, height, width, pixels: pixels.concat() }
            }
        };
        let records = chosen.iter().map(|&index| self.places[index].record).collect();
        Ok(ClassifierBatch { input, labels: self.labels_of(&chosen), records })
    }

    /// Tells the user what was read.
    fn log(&self, name: &str) {
        let what = match self.labels.as_ref() {
            Labels::Classes(_) => format!("{} classes", self.classes.len()),
            Labels::Values(_) => "values".to_owned(),
        };
        match &self.content {
            Content::Texts(texts) => {
                let longest = (0..self.len()).map(|example| self.length_of(example)).max().unwrap_or(0);
                let tokens = texts.ids.len();
                tracing::info!("{name} data: {} texts, {tokens} tokens, longest {longest}, {what}", self.len());
            }
            Content::Images(_) => tracing::info!("{name} data: {} images, {what}", self.len()),
        }
        if self.report.truncated > 0 {
            tracing::warn!(
                "{name} data: {} records were longer than max_seq_length and were cut",
                self.report.truncated
            );
        }
        if !self.report.skipped.is_empty() {
            let report = &self.report;
            tracing::warn!("{name} data: {} records were skipped: {}", report.skipped_count(), report.reasons());
        }
    }
}

/// Texts below each other, filled up on the right.
fn pad(texts: &Texts, chosen: &[usize], config: &LoaderConfig) -> Input {
    let rows = chosen.len();
    let longest = chosen.iter().map(|&index| texts.text(index).0.len()).max().unwrap_or(0);
    let cols = longest.next_multiple_of(config.pad_to_multiple_of).min(config.max_seq_length).max(longest);
    let mut ids = vec![config.pad_id as i32; rows * cols];
    let (mut types, mut mask) = (vec![0; rows * cols], vec![0; rows * cols]);
    for (row, &index) in chosen.iter().enumerate() {
        let (text_ids, text_types) = texts.text(index);
        for (offset, (id, kind)) in text_ids.iter().zip(text_types).enumerate() {
            let at = row * cols + offset;
            (ids[at], types[at], mask[at]) = (*id as i32, *kind as i32, 1);
        }
    }
    Input::Text { rows, cols, ids, types, mask }
}
