//! The adapter of a run on its model: settings, calibration, start, or what a checkpoint holds.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::base::{Base, PackedBase};
use lowrank_core::calibration::{Covariance, Wanted};
use lowrank_models::adapters::{self, AdapterError, Fresh, Shared, start};
use lowrank_models::hf::peft::MethodConfig;
use lowrank_models::hf::{self, Checkpoint, HfError};
use lowrank_models::network::Network;

use crate::adapter::{first_step, peft_config};
use crate::calibrate::Measured;
use crate::config::{AdapterConfig, ProgressStyle, RunConfig};
use crate::error::Problem;
use crate::progress::Phase;
use crate::session::{Adapter, Packing};

/// The settings of a run's fresh adapter: shared random bases follow from the run's seed, and LoRA-SB's first step from the
/// learning rate where none is given.
///
/// # Errors
/// A pattern that is no regular expression.
pub fn settings(config: &RunConfig, adapter: &AdapterConfig) -> Result<hf::AdapterConfig, Problem> {
    let mut settings = peft_config(adapter)?;
    match &mut settings.method {
        MethodConfig::Vera { projection_prng_key, .. } | MethodConfig::RandLora { projection_prng_key, .. } => {
            *projection_prng_key = config.seed;
        }
        MethodConfig::LoraSb { eta: eta @ None } => {
            let warmup = config.training.max_steps.map_or(0, |steps| config.training.warmup(steps));
            *eta = Some(first_step(config.optimizer.common().learning_rate, warmup));
        }
        _ => {}
    }
    Ok(settings)
}

/// What a calibration pass must measure for this adapter, by module; nothing for most methods.
///
/// # Errors
/// The method has no form for one of the layers.
pub fn wanted<M: Network>(model: &M, settings: &hf::AdapterConfig) -> Result<BTreeMap<String, Wanted>, Problem> {
    let wanted = match &settings.method {
        MethodConfig::Corda { .. } => Wanted { covariance: Some(Covariance::MeanOfSequences), gradient: false },
        MethodConfig::Eora { .. } => Wanted { covariance: Some(Covariance::Sum), gradient: false },
        MethodConfig::LoraSb { .. } => Wanted { covariance: None, gradient: true },
        _ => return Ok(BTreeMap::new()),
    };
    let targets = adapters::targets(model, settings).map_err(|error| does_not_fit(settings, error))?;
    Ok(targets.into_iter().map(|(module, _)| (module, wanted)).collect())
}

fn does_not_fit(settings: &hf::AdapterConfig, error: AdapterError) -> Problem {
    Problem::config(format!("[adapter.{}] does not fit the model", settings.method.name())).source(error)
}

/// Whether a fresh start needs a calibration pass.
pub fn needs_calibration(method: &MethodConfig) -> bool {
    matches!(method, MethodConfig::Corda { .. } | MethodConfig::Eora { .. } | MethodConfig::LoraSb { .. })
}

/// Whether a fresh start depends on the weights of the base: a resumed run then takes the adapter of its checkpoint instead of
/// decomposing (and calibrating) again.
pub fn starts_from_base(method: &MethodConfig) -> bool {
    use MethodConfig as M;
    match method {
        M::Pissa { .. } | M::Olora | M::Corda { .. } | M::Eora { .. } | M::LoraXs | M::LoraSb { .. } | M::Svfit => true,
        M::Lora | M::Dora | M::Vera { .. } | M::RandLora { .. } | M::Tucker { .. } | M::Hra { .. } | M::Oft { .. } => {
            false
        }
    }
}

/// What [`fresh`] will make of a linear layer over this run's quantised base, where the adapter is a repair that is measured block
/// by block; none for other methods.
///
/// # Errors
/// A pattern that is no regular expression.
pub fn repair(
    config: &RunConfig,
    settings: &hf::AdapterConfig,
) -> Result<Option<impl Fn(&str, &Projection, &Measured) -> Result<Projection, Problem>>, Problem> {
    let is_sequential = config.calibration.as_ref().and_then(|table| table.sequential).unwrap_or(true);
    let Some(quantization) = &config.quantization else { return Ok(None) };
    if !matches!(settings.method, MethodConfig::Eora { .. }) || !is_sequential {
        return Ok(None);
    }
    let (packing, settings, seed) = (Packing::frozen(quantization)?, settings.clone(), config.seed);
    Ok(Some(move |module: &str, projection: &Projection, measured: &Measured| {
        let Some(form) = packing.of(module) else { return Ok(projection.clone()) };
        let full = projection.weight.values();
        let weight = PackedBase::frozen(form.pack_tensor(full.clone()), form, projection.weight.dtype());
        let mut repaired = Projection { weight: Base::Packed(weight), ..projection.clone() };
        if measured.contains_key(module) {
            let mut fresh =
                Fresh { seed, statistics: measured, original: &mut |_| Ok(full.clone()), progress: &mut |_, _, _| {} };
            start::attach(&settings, module, &mut repaired, &mut fresh, &Shared::Nothing)
                .map_err(|error| does_not_fit(&settings, error))?;
        }
        Ok(repaired)
    }))
}

/// Attaches a fresh adapter. `folder` holds the checkpoint of the base model.
///
/// # Errors
/// The adapter does not fit the model, or cannot start on one of its layers.
pub fn fresh<M: Network>(
    model: &mut M,
    settings: hf::AdapterConfig,
    measured: &Measured,
    folder: &Path,
    seed: u64,
    style: ProgressStyle,
) -> Result<Adapter, Problem> {
    let name = settings.method.name();
    let (device, names) = (model.device(), model.names_on_disk());
    let phase =
        starts_from_base(&settings.method).then(|| Phase::start(style, format!("starting {name} from the weights")));
    let fresh = Fresh {
        seed,
        statistics: measured,
        original: &mut |module| original(folder, module, &names, &device),
        progress: &mut |_, done, total| phase.iter().for_each(|phase| phase.update(done as u64, total as u64)),
    };
    let attached = adapters::attach(model, &settings, fresh);
    if let Some(phase) = phase {
        phase.finish();
    }
    let attached = attached.map_err(|error| does_not_fit(&settings, error))?;
    Ok(Adapter { config: settings, attached })
}

/// Attaches the adapter of a checkpoint that a run with these settings goes on from.
///
/// # Errors
/// The folder does not fit the model, or holds another adapter than the run asks for.
pub fn resumed<M: Network>(
    model: &mut M,
    settings: &hf::AdapterConfig,
    checkpoint: &Path,
    base: &Path,
) -> Result<Adapter, Problem> {
    let folder = checkpoint.join("adapter");
    let adapter = stored(model, &folder, base)?;
    let held = &adapter.config;
    let of = |config: &hf::AdapterConfig| (config.method.name(), config.r, config.lora_alpha, config.use_rslora);
    match of(held) == of(settings) {
        true => Ok(Adapter {
            // Names instead of patterns are the only difference: the run's own words are kept.
            config: hf::AdapterConfig { method: held.method.clone(), ..settings.clone() },
            attached: adapter.attached,
        }),
        false => Err(Problem::config(format!(
            "{} holds a {} adapter with r = {} and alpha = {}, but the run asks for {} with r = {} and alpha = {}",
            folder.display(),
            held.method.name(),
            held.r,
            held.lora_alpha,
            settings.method.name(),
            settings.r,
            settings.lora_alpha
        ))
        .hint("an adapter cannot change its start between two steps: begin another run in another output_dir")),
    }
}

/// Attaches the adapter of a folder.
///
/// # Errors
/// It is missing, damaged, or does not fit.
pub fn stored<M: Network>(model: &mut M, folder: &Path, base: &Path) -> Result<Adapter, Problem> {
    let (device, names) = (model.device(), model.names_on_disk());
    let loaded = adapters::load_adapter_over(model, folder, &mut |module| original(base, module, &names, &device));
    let (config, attached) = loaded.map_err(|error: AdapterError| {
        let what = format!("cannot use the adapter {}", folder.display());
        match folder.join("adapter_config.json").is_file() {
            true => Problem::run(what).source(error),
            false => Problem::config(what).source(error), // the folder was named wrongly
        }
    })?;
    Ok(Adapter { config, attached })
}

/// The weight of a module as the checkpoint holds it, `[d_in, d_out]` in f32.
fn original(
    folder: &Path,
    module: &str,
    names: &dyn Fn(&str) -> Vec<String>,
    device: &Device,
) -> Result<Tensor<2>, HfError> {
    let (checkpoint, name) = (Checkpoint::open(folder)?, format!("{module}.weight"));
    let held = names(&name).into_iter().find(|name| checkpoint.contains(name));
    let view = checkpoint.get(&held.unwrap_or(name))?;
    let [d_out, d_in] = [0, 1].map(|axis| view.shape.get(axis).copied().unwrap_or(1));
    Ok(Tensor::<2>::from_data(TensorData::new(view.to_f32(), [d_out, d_in]), device).transpose())
}
