//! `eval` and `merge` of classifiers.

use std::path::{Path, PathBuf};

use lowrank_models::hf::{Checkpoint, Dtype as FileDtype};
use lowrank_models::{Network as _, adapters, classifier};
use serde_json::json;

use super::{Written, deliver, written};
use crate::attach;
use crate::classification::{ClassifierSession, SHARD_BYTES, Source, stored_classes};
use crate::cli::{EvalArgs, ModelArgs};
use crate::config::{Dtype, Init, ProgressStyle, RunConfig};
use crate::data::{DataConfig, Paths, ValSetSize};
use crate::device;
use crate::error::Problem;
use crate::evaluate;
use crate::progress::Phase;
use crate::session::file_dtype;
use crate::task::data_problem;

/// Base model and adapter that a command works on: `--model` and `--adapter`, else what the run of the configuration wrote, else
/// its base.
fn chosen(config: &RunConfig, model: &ModelArgs) -> (String, Option<PathBuf>) {
    let base = || model.model.clone().unwrap_or_else(|| config.base_model.clone());
    match (&model.model, &model.adapter) {
        (_, Some(adapter)) => (base(), Some(adapter.clone())),
        (Some(_), None) => (base(), None),
        (None, None) => match written(config) {
            Written::Adapter(folder) => (base(), Some(folder)),
            Written::Model(folder) => (folder.to_string_lossy().into_owned(), None),
            Written::Nothing => {
                tracing::info!("the run of this configuration has written nothing yet: using its base model");
                (base(), None)
            }
        },
    }
}

/// Loss and scores as JSON.
///
/// # Errors
/// A model, adapter or data file that cannot be used.
pub fn evaluate(config: &RunConfig, args: &EvalArgs, paths: &Paths) -> anyhow::Result<()> {
    let (base_model, adapter) = chosen(config, &args.model);
    let data =
        DataConfig { train: paths.clone(), eval: None, val_set_size: ValSetSize::Count(0), ..config.data.clone() };
    let source = Source {
        base_model: &base_model,
        init: Init::Pretrained,
        adapter: adapter.as_deref(),
        device: args.device.device.as_deref().unwrap_or(&config.device),
        dtype: args.device.dtype.unwrap_or(config.dtype),
        quantization: None,
        data: &data,
    };
    let session = ClassifierSession::open_from(config, &source)?;
    let examples = session.all_examples(config)?;
    let chunk = config.training.head_chunk_tokens.unwrap_or_else(|| session.model.default_head_chunk());
    let phase = Phase::start(ProgressStyle::Auto, "evaluation");
    let evaluated = evaluate::classes(&session.model, &examples, chunk, |done, total| phase.update(done, total))
        .map_err(data_problem)?;
    phase.finish();
    let mut result = json!({ "loss": evaluated.loss, "examples": evaluated.count });
    for (name, score) in evaluated.scores {
        result[name] = score.into();
    }
    let text = serde_json::to_string_pretty(&result)? + "\n";
    Ok(deliver(&text, args.out.as_deref())?)
}

/// Adapter and base model to one folder.
///
/// # Errors
/// A model or adapter that cannot be used; a folder that cannot be written.
pub fn merge(model: &str, adapter: &Path, out: &Path, dtype: Option<Dtype>) -> Result<(), Problem> {
    let folder = lowrank_models::hf::resolve_model(model)
        .map_err(|error| Problem::config(format!("base_model = \"{model}\" cannot be used")).source(error))?;
    let failed = || Problem::run(format!("cannot load the model in {}", folder.display()));
    let (device, classes) = (device::choose("cpu")?, stored_classes(adapter)?);
    let count = classes.as_ref().map(Vec::len);
    // f32 throughout: the sum is rounded once, to the type that is written.
    let compute = device::compute_type(Dtype::F32, &device)?;
    let (mut merged, _) = classifier::load(&folder, compute, &device.device, count, 0, &mut |_, _, _| {})
        .map_err(|error| failed().source(error))?;
    classes.into_iter().for_each(|classes| merged.set_labels(classes));
    attach::stored(&mut merged, adapter, &folder)?;
    adapters::merge(&mut merged);
    let dtype = dtype.map_or_else(|| stored_dtype(&folder), file_dtype);
    classifier::save(&merged, &folder, out, dtype, SHARD_BYTES)
        .map_err(|error| Problem::run(format!("cannot write {}", out.display())).source(error))?;
    tracing::info!("wrote {} in {}", out.display(), dtype.name());
    Ok(())
}

/// The type the base model is stored in.
fn stored_dtype(folder: &Path) -> FileDtype {
    let first = || {
        let checkpoint = Checkpoint::open(folder).ok()?;
        let name = checkpoint.names().find(|name| name.ends_with(".weight"))?.to_owned();
        checkpoint.get(&name).ok().map(|view| view.dtype)
    };
    first().unwrap_or(FileDtype::F32)
}
