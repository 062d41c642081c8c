//! The tasks `sequence_classification` and `image_classification`: a text or an image to its class, or to a number.

mod task;

use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use lowrank_models::classifier::{self, Classifier, ClassifierConfig, Input};
use lowrank_models::hf::peft::ModulePattern;
use lowrank_models::hf::{self, Tokenizer};
use lowrank_models::{ClassifierBatch, Network as _};

use crate::attach;
use crate::calibrate::{self, Measured, Plan};
use crate::config::{AdapterConfig, ClassificationConfig, Dtype, Init, QuantizationConfig, RunConfig, Task};
use crate::data::{
    DataConfig, ImageRules, LabelRules, LabelledData, LabelledEvaluation, LoaderConfig, prepare_images, prepare_texts,
};
use crate::device::{self, ChosenDevice};
use crate::error::Problem;
use crate::progress::Phase;
use crate::session::{Adapter, Packing, announce_quantised};
use crate::step::StepOptions;
use crate::task::data_problem;

/// Shards of a written model hold at most this.
pub const SHARD_BYTES: u64 = 5 << 30;

/// Beside an adapter: the names of the classes, which PEFT's files have no place for.
const CLASSES_FILE: &str = "classes.json";

/// What turns records into inputs.
#[derive(Debug)]
enum Reader {
    Texts(Box<Tokenizer>),
    Images(ImageRules),
}

/// Where a model comes from and what it is to read.
#[derive(Clone, Debug)]
pub struct Source<'a> {
    /// Folder or hub id.
    pub base_model: &'a str,
    /// Whether its weights are read.
    pub init: Init,
    /// An adapter that is put on it.
    pub adapter: Option<&'a Path>,
    /// As in the configuration.
    pub device: &'a str,
    /// As in the configuration.
    pub dtype: Dtype,
    /// How linear layers of blocks are held; none holds them as they are.
    pub quantization: Option<&'a QuantizationConfig>,
    /// The data.
    pub data: &'a DataConfig,
}

/// A classifier with everything around it.
#[derive(Debug)]
pub struct ClassifierSession {
    /// Where it runs.
    pub device: ChosenDevice,
    /// Folder of the base model.
    pub folder: PathBuf,
    /// The model, with the adapter attached.
    pub model: Classifier,
    /// The adapter; none trains the whole model.
    pub adapter: Option<Adapter>,
    reader: Reader,
    /// Read before the model: it says which classes there are.
    data: LabelledData,
    /// Parameters that the checkpoint does not have.
    fresh: Vec<String>,
}

impl ClassifierSession {
    /// Reads the data, then the model with a head for its classes, and puts a stored adapter on it.
    ///
    /// # Errors
    /// No such device or model; files that do not fit; data that cannot be read.
    pub fn open_from(config: &RunConfig, source: &Source<'_>) -> Result<Self, Problem> {
        let device = device::choose(source.device)?;
        let compute = device::compute_type(source.dtype, &device)?;
        let folder = hf::resolve_model(source.base_model).map_err(|error| {
            Problem::config(format!("base_model = \"{}\" cannot be used", source.base_model)).source(error)
        })?;
        let failed = || Problem::run(format!("cannot load the model in {}", folder.display()));
        let read = ClassifierConfig::read(&folder, None).map_err(|error| failed().source(error))?;
        if let (Some(quantization), None) = (source.quantization, read.encoder()) {
            let (key, model) = (quantization.key(), read.family.model_type);
            let what = format!("[quantization.{key}] packs the linear layers of blocks, of which a {model} has none");
            return Err(Problem::config(what).hint("leave the table out: convolutions are not quantised"));
        }
        let reader = reader(config.task, &folder, &read)?;
        let table = config.classification.clone().unwrap_or_default();
        let rules =
            LabelRules { regression: table.regression, classes: known_classes(&table, source, &folder, &read)? };
        let data = read_data(config, source, &table, &reader, &read, &rules)?;
        let classes = data.train.classes().to_vec();
        let (mut model, fresh) = load_model(config, source, &folder, compute, &device, classes.len())?;
        model.set_labels(classes);
        if model.config.unused_dropout > 0.0 {
            tracing::info!("the model's dropout of attention weights ({}) is not applied", model.config.unused_dropout);
        }
        let mut session = Self { device, folder, model, adapter: None, reader, data, fresh };
        match source.adapter {
            Some(folder) => session.adapter = Some(attach::stored(&mut session.model, folder, &session.folder)?),
            None if session.fresh.is_empty() => {}
            None => tracing::info!("not in the checkpoint, so they start afresh: {}", session.fresh.join(", ")),
        }
        Ok(session)
    }

    /// The held-out examples of a session that was opened on them alone.
    ///
    /// # Errors
    /// A size in the settings is 0.
    pub fn all_examples(&self, config: &RunConfig) -> Result<LabelledEvaluation, Problem> {
        LabelledEvaluation::new(self.data.train.clone(), self.loader_config(config)).map_err(data_problem)
    }

    /// A session with a fresh adapter, or that of a checkpoint. A calibration measures the model at full precision, which is dropped
    /// before a quantised one is read.
    fn adapted(
        config: &RunConfig,
        source: &Source<'_>,
        wanted: &AdapterConfig,
        checkpoint: Option<&Path>,
    ) -> Result<Self, Problem> {
        let mut settings = attach::settings(config, wanted)?;
        let stored = checkpoint.filter(|_| attach::starts_from_base(&settings.method));
        let measures = stored.is_none() && attach::needs_calibration(&settings.method);
        let full = Source { quantization: source.quantization.filter(|_| !measures), ..source.clone() };
        let mut session = Self::open_from(config, &full)?;
        // peft has a class for texts, and none for images.
        settings.task_type = (config.task == Task::SequenceClassification).then(|| "SEQ_CLS".to_owned());
        save_whole(&mut settings, &session.model.config, &session.fresh)?;
        let measured = if measures { session.measure(config, &settings)? } else { Measured::new() };
        if measures && source.quantization.is_some() {
            drop(session);
            session = Self::open_from(config, source)?;
        }
        let (model, folder, style) = (&mut session.model, &session.folder, config.logging.progress);
        session.adapter = Some(match stored {
            Some(checkpoint) => attach::resumed(model, &settings, checkpoint, folder)?,
            None => attach::fresh(model, settings, &measured, folder, config.seed, style)?,
        });
        Ok(session)
    }

    /// Runs the calibration pass of an adapter's start on the first training examples.
    fn measure(&mut self, config: &RunConfig, settings: &hf::AdapterConfig) -> Result<Measured, Problem> {
        let wanted = attach::wanted(&self.model, settings)?;
        let (table, loading) = (config.calibration.clone().unwrap_or_default(), self.loader_config(config));
        let examples: Vec<usize> = (0..self.data.train.len().min(table.samples)).collect();
        let chunks = examples.chunks(table.batch_size.max(1));
        let batches = chunks.map(|chunk| self.data.train.batch(chunk, &loading, None)).collect::<Result<Vec<_>, _>>();
        let repair = attach::repair(config, settings)?;
        let plan = Plan {
            wanted: &wanted,
            batches: &batches.map_err(data_problem)?,
            sequences: &sequences(self.model.config.columns()),
            options: StepOptions {
                checkpointing: config.training.gradient_checkpointing,
                head_chunk_tokens: self.model.default_head_chunk(),
                seed: config.seed,
            },
            repair: repair.as_ref().map(|repair| repair as calibrate::Repair<'_>),
            style: config.logging.progress,
        };
        calibrate::measure(&mut self.model, &plan)
    }

    fn loader_config(&self, config: &RunConfig) -> LoaderConfig {
        let pad_id = match &self.reader {
            Reader::Texts(tokenizer) => tokenizer.pad_id(),
            Reader::Images(_) => 0,
        };
        LoaderConfig {
            micro_batch_size: config.training.micro_batch_size,
            max_seq_length: config.data.max_seq_length,
            packing: false,
            shuffle: config.data.shuffle,
            seed: config.seed,
            pad_id,
            pad_to_multiple_of: config.data.pad_to_multiple_of,
        }
    }
}

/// Reads the model with a head for so many classes. Returns with it the parameters that the checkpoint does not have.
fn load_model(
    config: &RunConfig,
    source: &Source<'_>,
    folder: &Path,
    compute: FloatDType,
    device: &ChosenDevice,
    classes: usize,
) -> Result<(Classifier, Vec<String>), Problem> {
    let packing = source.quantization.map(Packing::frozen).transpose()?.unwrap_or_default();
    let quantise = |module: &str| packing.of(module);
    let (count, seed, at) = (Some(classes), config.seed, &device.device);
    let phase = Phase::start(config.logging.progress, format!("loading {}", folder.display()));
    let mut update = |_: &str, done: usize, total: usize| phase.update(done as u64, total as u64);
    let loaded = match source.init {
        Init::Pretrained => classifier::load_quantised(folder, compute, &quantise, at, count, seed, &mut update),
        Init::Random => {
            classifier::random_quantised(folder, compute, &quantise, seed, count, at).map(|model| (model, vec![]))
        }
    };
    phase.finish();
    let loaded =
        loaded.map_err(|error| Problem::run(format!("cannot load the model in {}", folder.display())).source(error))?;
    if let Some(key) = packing.frozen_as {
        announce_quantised(&loaded.0, key)?;
        let dense = loaded.0.head.linear.iter().map(|(name, _)| name).filter(|name| packing.of(name).is_some());
        let dense: Vec<&str> = dense.collect();
        if !dense.is_empty() {
            tracing::info!("not held in {key}, as part of the head: {}", dense.join(", "));
        }
    }
    Ok(loaded)
}

/// Adds to the modules that are trained whole: the head, as peft does, and all that the base's checkpoint does not have (`fresh`
/// parameters), which nobody could read again.
///
/// # Errors
/// A name that is no regular expression.
pub fn save_whole(settings: &mut hf::AdapterConfig, model: &ClassifierConfig, fresh: &[String]) -> Result<(), Problem> {
    let layout = model.layout();
    let head = layout.head.parts.last().map(|part| part.name.split('.').next().unwrap_or(&part.name));
    let fresh = fresh.iter().filter_map(|name| Some(name.rsplit_once('.')?.0));
    for module in head.into_iter().chain(fresh) {
        if !settings.saves(module) {
            let pattern = ModulePattern::part(module)
                .map_err(|reason| Problem::run(format!("cannot save {module} whole: {reason}")))?;
            settings.modules_to_save.push(pattern);
        }
    }
    Ok(())
}

/// Tells of a batch the rows of its hidden states, and which of them are the tokens of each sample, without padding.
/// `columns`: hidden states of an image.
pub fn sequences(columns: usize) -> impl Fn(&ClassifierBatch) -> (usize, Vec<Range<usize>>) {
    move |batch| match &batch.input {
        Input::Text { rows, cols, mask, .. } => {
            let tokens = |row: usize| {
                let mask = &mask[row * cols..][..*cols];
                let first = mask.iter().position(|&is_token| is_token != 0).unwrap_or(0);
                let end = mask.iter().rposition(|&is_token| is_token != 0).map_or(first, |last| last + 1);
                row * cols + first..row * cols + end
            };
            (rows * cols, (0..*rows).map(tokens).collect())
        }
        Input::Image { rows, .. } => {
            (rows * columns, (0..*rows).map(|row| row * columns..(row + 1) * columns).collect())
        }
    }
}

/// The tokenizer of a text model, or how an image model wants its images.
fn reader(task: Task, folder: &Path, model: &ClassifierConfig) -> Result<Reader, Problem> {
    let wrong = |holds: &str, task: &str| {
        let what = format!("{} holds a model of {holds} ({})", folder.display(), model.family.model_type);
        Problem::config(what).hint(format!("set task = \"{task}\", or choose another base_model"))
    };
    match (task, model.image()) {
        (Task::ImageClassification, Some((channels, size))) => {
            ImageRules::read(folder, channels, size).map(Reader::Images).map_err(data_problem)
        }
        (Task::ImageClassification, None) => Err(wrong("texts", Task::SequenceClassification.name())),
        (_, Some(_)) => Err(wrong("images", Task::ImageClassification.name())),
        (_, None) => {
            let tokenizer = Tokenizer::from_folder(folder)
                .map_err(|error| Problem::run("cannot load the tokenizer").source(error))?;
            Ok(Reader::Texts(Box::new(tokenizer)))
        }
    }
}

/// Names of the classes that were written beside an adapter.
///
/// # Errors
/// The file is damaged.
pub fn stored_classes(adapter: &Path) -> Result<Option<Vec<String>>, Problem> {
    let path = adapter.join(CLASSES_FILE);
    if !path.is_file() {
        return Ok(None);
    }
    let failed = || Problem::run(format!("cannot read {}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|error| failed().source(error))?;
    let names: Vec<String> = serde_json::from_str(&text).map_err(|error| failed().source(error))?;
    match names.is_empty() {
        true => Err(failed().hint("it holds no names of classes")),
        false => Ok(Some(names)),
    }
}

/// Names of the classes in order, where something else than the data tells them: the configuration, the adapter, or a
/// checkpoint that has a head.
fn known_classes(
    table: &ClassificationConfig,
    source: &Source<'_>,
    folder: &Path,
    model: &ClassifierConfig,
) -> Result<Vec<String>, Problem> {
    if !table.labels.is_empty() {
        return Ok(table.labels.clone());
    }
    let failed = |path: &Path| Problem::run(format!("cannot read {}", path.display()));
    if let Some(classes) = source.adapter.map(stored_classes).transpose()?.flatten() {
        return Ok(classes);
    }
    let path = folder.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|error| failed(&path).source(error))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| failed(&path).source(error))?;
    let has_head = json["architectures"][0].as_str() == model.family.architectures.first().copied();
    Ok(if has_head { model.labels.clone() } else { vec![] })
}

fn read_data(
    config: &RunConfig,
    source: &Source<'_>,
    table: &ClassificationConfig,
    reader: &Reader,
    model: &ClassifierConfig,
    rules: &LabelRules,
) -> Result<LabelledData, Problem> {
    match reader {
        Reader::Texts(tokenizer) => {
            let longest = source.data.max_seq_length;
            if let Some(most) = model.max_tokens().filter(|&most| longest > most) {
                let what = format!("data.max_seq_length is {longest}, but the model has positions for {most} tokens");
                return Err(Problem::config(what).hint(format!("set data.max_seq_length = {most}, or less")));
            }
            prepare_texts(source.data, tokenizer, rules, config.seed)
        }
        Reader::Images(images) => prepare_images(source.data, images, rules, config.seed, table.random_flip),
    }
    .map_err(data_problem)
}
