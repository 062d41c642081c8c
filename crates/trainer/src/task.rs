//! What a run needs of its task. The loop, the steps and the checkpoints are the same for all of them.
//!
//! | task | model | data | evaluation |
//! | --- | --- | --- | --- |
//! | `causal_lm` ([`crate::causal`]) | [`Decoder`](lowrank_models::Decoder) | documents | loss, generated answers |
//! | `sequence_classification`, `image_classification` ([`crate::classification`]) | [`Classifier`](lowrank_models::Classifier) | labelled texts, images | loss, [`crate::scores`] |

use std::collections::BTreeMap;
use std::path::Path;

use lowrank_models::Network;
use lowrank_models::adapters::AdapterError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::config::RunConfig;
use crate::data::DataError;
use crate::device::ChosenDevice;
use crate::error::{Kind, Problem};
use crate::plan::Plan;
use crate::plan::advice::Suggestion;
use crate::session::Adapter;

/// Training batches without end, with a position that can be saved.
pub trait Batches {
    /// A micro batch.
    type Batch;
    /// A position between two batches, and what it is a position in.
    type State: Serialize + DeserializeOwned;

    /// The next batch; after the last one of an epoch, the first of the next.
    ///
    /// # Errors
    /// The data cannot be read further.
    fn next_batch(&mut self) -> Result<Self::Batch, DataError>;

    /// Epochs done, with the share of the current one.
    fn progress(&self) -> f64;

    /// Batches of an epoch; `None` where nobody knows.
    fn batches_per_epoch(&self, epoch: u64) -> Option<usize>;

    /// Where the loader stands.
    fn state(&self) -> Self::State;

    /// Where a record of a batch came from, as `train.jsonl:17`.
    fn describe_record(&self, record: u64) -> String;
}

/// A position of a task's training data.
pub type LoaderStateOf<T> = <<T as TrainingTask>::Loader as Batches>::State;

/// A model to be trained, with an adapter or whole, and how to come by its data.
pub trait TrainingTask: Sized {
    /// The model.
    type Model: Network;
    /// What was read of the files.
    type Data;
    /// Training batches.
    type Loader: Batches<Batch = <Self::Model as Network>::Batch>;
    /// Held-out data.
    type Evaluation;

    /// Loads the model and attaches the adapter; that of a checkpoint, where the run goes on from one and the adapter's start
    /// looked at the weights.
    ///
    /// # Errors
    /// No such device, model or adapter; files that do not fit.
    fn open(config: &RunConfig, checkpoint: Option<&Path>) -> Result<Self, Problem>;

    /// Where the model is.
    fn device(&self) -> &ChosenDevice;

    /// The model with its adapter.
    fn model(&self) -> &Self::Model;

    /// The model, to be trained.
    fn model_mut(&mut self) -> &mut Self::Model;

    /// The adapter; none trains the whole model.
    fn adapter(&self) -> Option<&Adapter>;

    /// Reads the data of the run.
    ///
    /// # Errors
    /// Wrong settings, unreadable files, bad records.
    fn read(&self, config: &RunConfig) -> Result<Self::Data, Problem>;

    /// The training batches, from the start or from a saved position.
    ///
    /// # Errors
    /// A setting that makes no batches; a position of other data or settings.
    fn loader(
        &self,
        config: &RunConfig,
        data: &Self::Data,
        state: Option<&LoaderStateOf<Self>>,
    ) -> Result<Self::Loader, Problem>;

    /// What is evaluated on, if anything.
    ///
    /// # Errors
    /// As [`TrainingTask::loader`]; unreadable files.
    fn evaluation(&self, config: &RunConfig, data: &Self::Data) -> Result<Option<Self::Evaluation>, Problem>;

    /// Evaluates the model. `head_chunk`: rows whose logits exist at the same time.
    ///
    /// # Errors
    /// An output that cannot be judged.
    fn evaluate(
        &self,
        config: &RunConfig,
        evaluation: &Self::Evaluation,
        head_chunk: usize,
    ) -> Result<Evaluated, Problem>;

    /// How much memory the run is expected to need, where that can be told.
    fn predicted(&self, config: &RunConfig) -> Option<Result<Plan, Problem>> {
        let _ = config;
        None
    }

    /// Changes of the configuration that save memory, the one that saves most first.
    ///
    /// # Errors
    /// As the prediction.
    fn savings(&self, config: &RunConfig, plan: &Plan) -> Result<Vec<Suggestion>, Problem> {
        let _ = (config, plan);
        Ok(vec![])
    }

    /// Writes the whole model as a Hugging Face folder.
    ///
    /// # Errors
    /// Anything the disk refuses.
    fn save_model(&self, config: &RunConfig, folder: &Path) -> Result<(), Problem>;

    /// Writes the adapter as a PEFT folder.
    ///
    /// # Errors
    /// Anything the disk refuses.
    fn save_adapter(&self, adapter: &Adapter, base_model: &str, folder: &Path) -> Result<(), AdapterError>;
}

/// What an evaluation found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluated {
    /// Mean loss.
    pub loss: f64,
    /// Losses it is the mean of.
    pub count: u64,
    /// `exp(loss)`, of language models.
    pub perplexity: Option<f64>,
    /// Share of generated answers that equal the reference, and how many were generated.
    pub exact_match: Option<(f64, u64)>,
    /// Scores by name, such as `accuracy`.
    pub scores: BTreeMap<String, f64>,
}

/// A data error with its hint.
pub fn data_problem(error: DataError) -> Problem {
    let hint = error.hint();
    let problem = match (&error, error.kind()) {
        (DataError::Config { .. }, _) => Problem::config("the [data] table cannot be used"),
        (_, Kind::Config) => Problem::config("cannot read the data"),
        _ => Problem::run("cannot read the data"),
    };
    let problem = problem.source(error);
    match hint {
        Some(hint) => problem.hint(hint),
        None => problem,
    }
}
