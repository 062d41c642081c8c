//! The task `causal_lm`: a decoder that predicts the next token.

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_core::calibration::Wanted;
use lowrank_models::adapters::{self, AdapterError};
use lowrank_models::hf;
use lowrank_models::{Batch, Decoder, Network as _, save};
use sha2::{Digest, Sha256};

use crate::attach;
use crate::calibrate::{self, Identity, Measured, Plan, Repair};
use crate::config::{Init, RunConfig};
use crate::data::store::hexadecimal;
use crate::data::{self, DataConfig, DataError, Evaluation, Loader, LoaderConfig, LoaderState, Prepared, ValSetSize};
use crate::device::ChosenDevice;
use crate::error::Problem;
use crate::evaluate::{self, Question};
use crate::plan;
use crate::plan::advice::{Suggestion, suggestions};
use crate::session::{Adapter, Session, file_dtype};
use crate::step::StepOptions;
use crate::task::{Batches, Evaluated, TrainingTask, data_problem};

/// Shards of a written model hold at most this.
const SHARD_BYTES: u64 = 5 << 30;

/// Held-out data.
#[derive(Debug)]
pub struct HeldOut {
    batches: Evaluation,
    /// For exact match of generated answers; empty where nothing is generated.
    questions: Vec<Question>,
}

impl Batches for Loader {
    type Batch = Batch;
    type State = LoaderState;

    fn next_batch(&mut self) -> Result<Batch, DataError> {
        Loader::next_batch(self)
    }

    fn progress(&self) -> f64 {
        Loader::progress(self)
    }

    fn batches_per_epoch(&self, epoch: u64) -> Option<usize> {
        Loader::batches_per_epoch(self, epoch)
    }

    fn state(&self) -> LoaderState {
        Loader::state(self)
    }

    fn describe_record(&self, record: u64) -> String {
        Loader::describe_record(self, record)
    }
}

impl Session {
    fn subject(&self) -> plan::Subject<'_> {
        plan::Subject::Decoder(&self.decoder.config)
    }
}

impl TrainingTask for Session {
    type Model = Decoder;
    type Data = Prepared;
    type Loader = Loader;
    type Evaluation = HeldOut;

    fn open(config: &RunConfig, checkpoint: Option<&Path>) -> Result<Self, Problem> {
        Session::for_training(config, checkpoint)
    }

    fn device(&self) -> &ChosenDevice {
        &self.device
    }

    fn model(&self) -> &Decoder {
        &self.decoder
    }

    fn model_mut(&mut self) -> &mut Decoder {
        &mut self.decoder
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    fn read(&self, config: &RunConfig) -> Result<Prepared, Problem> {
        let cache = data::default_cache_folder();
        data::prepare(&config.data, &self.encoder(), config.seed, cache.as_deref()).map_err(data_problem)
    }

    fn loader(&self, config: &RunConfig, data: &Prepared, state: Option<&LoaderState>) -> Result<Loader, Problem> {
        Loader::open(&data.train, loader_config(config, self), state).map_err(data_problem)
    }

    fn evaluation(&self, config: &RunConfig, data: &Prepared) -> Result<Option<HeldOut>, Problem> {
        let Some(dataset) = data.eval.clone() else { return Ok(None) };
        let batches = Evaluation::new(dataset, loader_config(config, self)).map_err(data_problem)?;
        let questions = match (&config.data.eval, config.evaluation.generate) {
            (Some(paths), true) => evaluate::questions(self, paths.entries(), &config.data)?,
            _ => vec![],
        };
        Ok(Some(HeldOut { batches, questions }))
    }

    fn evaluate(&self, config: &RunConfig, held_out: &HeldOut, head_chunk: usize) -> Result<Evaluated, Problem> {
        let (loss, count) = evaluate::loss(&self.decoder, &held_out.batches, head_chunk, |_, _| {});
        let answers = match config.evaluation.generate && !held_out.questions.is_empty() {
            true => Some(evaluate::exact_match(self, &held_out.questions, &config.evaluation, |_, _| {})?),
            false => None,
        };
        let exact_match = answers.map(|answers| (answers.exact_match(), answers.total));
        Ok(Evaluated { loss, count, perplexity: Some(loss.exp()), exact_match, ..Evaluated::default() })
    }

    fn predicted(&self, config: &RunConfig) -> Option<Result<plan::Plan, Problem>> {
        Some(plan::predict(config, self.subject(), plan::machine_of(&self.device.description)))
    }

    fn savings(&self, config: &RunConfig, plan: &plan::Plan) -> Result<Vec<Suggestion>, Problem> {
        suggestions(config, self.subject(), plan::machine_of(&self.device.description), plan)
    }

    fn save_model(&self, config: &RunConfig, folder: &Path) -> Result<(), Problem> {
        save::save_model(&self.decoder, &self.folder, folder, file_dtype(config.dtype), SHARD_BYTES)
            .map_err(|error| Problem::run(format!("cannot write the result: {error}")))
    }

    fn save_adapter(&self, adapter: &Adapter, base_model: &str, folder: &Path) -> Result<(), AdapterError> {
        adapters::save_adapter(&self.decoder, &adapter.config, &adapter.attached, base_model, folder)
    }
}

/// Runs the calibration pass of an adapter's start on the base model of a session.
///
/// # Errors
/// Data that cannot be read; a loss that is not finite.
pub fn calibrate(
    session: &mut Session,
    config: &RunConfig,
    settings: &hf::AdapterConfig,
    wanted: &BTreeMap<String, Wanted>,
) -> Result<Measured, Problem> {
    let table = &config.calibration.clone().unwrap_or_default();
    let source = match &table.data {
        Some(paths) => {
            DataConfig { train: paths.clone(), eval: None, val_set_size: ValSetSize::Count(0), ..config.data.clone() }
        }
        None => config.data.clone(),
    };
    let cache = data::default_cache_folder();
    let prepared = data::prepare(&source, &session.encoder(), config.seed, cache.as_deref()).map_err(data_problem)?;
    let loading = loader_config(config, session);
    let batches = calibrate::first_batches(&prepared.train, &loading, table).map_err(data_problem)?;
    let options = StepOptions {
        checkpointing: config.training.gradient_checkpointing,
        head_chunk_tokens: config.training.head_chunk_tokens.unwrap_or(session.decoder.default_head_chunk()),
        seed: config.seed,
    };
    let repair = attach::repair(config, settings)?;
    let plan = Plan {
        wanted,
        batches: &batches,
        sequences: &calibrate::decoder_sequences,
        options,
        repair: repair.as_ref().map(|repair| repair as Repair<'_>),
        style: config.logging.progress,
    };
    let base = match config.init {
        Init::Pretrained => calibrate::hash_model(&session.folder)?,
        Init::Random => vec![("random weights".to_owned(), format!("{:?} {}", session.decoder.config, config.seed))],
    };
    // What is measured behind a repair depends on the repair.
    let behind = match &repair {
        Some(_) => format!(", {:?}, {:?}, {}", config.quantization, settings, config.seed),
        None => String::new(),
    };
    let (checkpointing, device) = (plan.options.checkpointing, &session.device.description);
    let identity = Identity {
        base,
        samples: sample_hash(&batches),
        settings: format!("{:?}, {checkpointing:?}, {device}{behind}", config.dtype),
    };
    let folder = table.cache.then(calibrate::default_cache_folder).flatten();
    calibrate::measure_cached(&mut session.decoder, &plan, &identity, folder.as_deref())
}

/// The content of batches as a hash.
fn sample_hash(batches: &[Batch]) -> String {
    let mut hash = Sha256::new();
    for batch in batches {
        hash.update([batch.rows as u64, batch.cols as u64].map(u64::to_le_bytes).concat());
        for values in [&batch.input_ids, &batch.targets, &batch.positions, &batch.first_key] {
            values.iter().for_each(|value| hash.update(value.to_le_bytes()));
        }
    }
    hexadecimal(&hash.finalize())
}

fn loader_config(config: &RunConfig, session: &Session) -> LoaderConfig {
    LoaderConfig {
        micro_batch_size: config.training.micro_batch_size,
        max_seq_length: config.data.max_seq_length,
        packing: config.data.packing,
        shuffle: config.data.shuffle,
        seed: config.seed,
        pad_id: session.tokenizer.pad_id(),
        pad_to_multiple_of: config.data.pad_to_multiple_of,
    }
}
