//! A [`ClassifierSession`] as the training loop sees it.

use std::path::Path;

use lowrank_models::adapters::{self, AdapterError};
use lowrank_models::classifier::{self, Classifier};
use lowrank_models::hf::write_text_atomic;
use lowrank_models::{ClassifierBatch, parameters};

use super::{CLASSES_FILE, ClassifierSession, SHARD_BYTES, Source};
use crate::config::RunConfig;
use crate::data::{DataError, LabelledData, LabelledEvaluation, LabelledLoader, LoaderState};
use crate::device::ChosenDevice;
use crate::error::Problem;
use crate::evaluate;
use crate::plan;
use crate::plan::advice::{Suggestion, suggestions};
use crate::session::{Adapter, check_method, file_dtype, set_dropout};
use crate::task::{Batches, Evaluated, TrainingTask, data_problem};

impl Batches for LabelledLoader {
    type Batch = ClassifierBatch;
    type State = LoaderState;

    fn next_batch(&mut self) -> Result<ClassifierBatch, DataError> {
        LabelledLoader::next_batch(self)
    }

    fn progress(&self) -> f64 {
        LabelledLoader::progress(self)
    }

    fn batches_per_epoch(&self, epoch: u64) -> Option<usize> {
        LabelledLoader::batches_per_epoch(self, epoch)
    }

    fn state(&self) -> LoaderState {
        LabelledLoader::state(self)
    }

    fn describe_record(&self, record: u64) -> String {
        LabelledLoader::describe_record(self, record)
    }
}

impl ClassifierSession {
    fn subject(&self) -> plan::Subject<'_> {
        plan::Subject::Classifier { config: &self.model.config, fresh: &self.fresh }
    }
}

impl TrainingTask for ClassifierSession {
    type Model = Classifier;
    type Data = LabelledData;
    type Loader = LabelledLoader;
    type Evaluation = LabelledEvaluation;

    fn open(config: &RunConfig, checkpoint: Option<&Path>) -> Result<Self, Problem> {
        let source = Source {
            base_model: &config.base_model,
            init: config.init,
            adapter: config.init_adapter.as_deref(),
            device: &config.device,
            dtype: config.dtype,
            quantization: config.quantization.as_ref(),
            data: &config.data,
        };
        if let (None, Some(wanted)) = (source.adapter, &config.adapter) {
            return Self::adapted(config, &source, wanted, checkpoint);
        }
        let mut session = Self::open_from(config, &source)?;
        match (&mut session.adapter, &config.adapter) {
            (Some(adapter), Some(wanted)) => {
                check_method(source.adapter.unwrap_or(&session.folder), wanted, &adapter.config)?;
                if let Some((_, dropout)) = wanted.common().dropout {
                    adapter.config.lora_dropout = dropout;
                    set_dropout(&mut session.model, dropout);
                }
            }
            (Some(_), None) => {}
            (None, _) => session.model = parameters::set_trained(session.model, |_| Some(true)),
        }
        Ok(session)
    }

    fn device(&self) -> &ChosenDevice {
        &self.device
    }

    fn model(&self) -> &Classifier {
        &self.model
    }

    fn model_mut(&mut self) -> &mut Classifier {
        &mut self.model
    }

    fn adapter(&self) -> Option<&Adapter> {
        self.adapter.as_ref()
    }

    fn read(&self, _config: &RunConfig) -> Result<LabelledData, Problem> {
        Ok(self.data.clone())
    }

    fn loader(
        &self,
        config: &RunConfig,
        data: &LabelledData,
        state: Option<&LoaderState>,
    ) -> Result<LabelledLoader, Problem> {
        LabelledLoader::open(data.train.clone(), self.loader_config(config), state).map_err(data_problem)
    }

    fn evaluation(&self, config: &RunConfig, data: &LabelledData) -> Result<Option<LabelledEvaluation>, Problem> {
        let held_out = data.eval.clone();
        let made = held_out.map(|examples| LabelledEvaluation::new(examples, self.loader_config(config)));
        made.transpose().map_err(data_problem)
    }

    fn evaluate(
        &self,
        _config: &RunConfig,
        evaluation: &LabelledEvaluation,
        head_chunk: usize,
    ) -> Result<Evaluated, Problem> {
        evaluate::classes(&self.model, evaluation, head_chunk, |_, _| {}).map_err(data_problem)
    }

    fn predicted(&self, config: &RunConfig) -> Option<Result<plan::Plan, Problem>> {
        if self.model.config.encoder().is_none() {
            tracing::info!("the memory of convolution nets is not predicted; the run logs its peak");
            return None;
        }
        Some(plan::predict(config, self.subject(), plan::machine_of(&self.device.description)))
    }

    fn savings(&self, config: &RunConfig, plan: &plan::Plan) -> Result<Vec<Suggestion>, Problem> {
        suggestions(config, self.subject(), plan::machine_of(&self.device.description), plan)
    }

    fn save_model(&self, config: &RunConfig, folder: &Path) -> Result<(), Problem> {
        classifier::save(&self.model, &self.folder, folder, file_dtype(config.dtype), SHARD_BYTES)
            .map_err(|error| Problem::run(format!("cannot write the result: {error}")))
    }

    fn save_adapter(&self, adapter: &Adapter, base_model: &str, folder: &Path) -> Result<(), AdapterError> {
        adapters::save_adapter(&self.model, &adapter.config, &adapter.attached, base_model, folder)?;
        let names = serde_json::to_string_pretty(&self.model.config.labels).unwrap_or_default() + "\n";
        write_text_atomic(&folder.join(CLASSES_FILE), &names)?;
        Ok(())
    }
}
