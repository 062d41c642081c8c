//! Adapters of training cases: the reference's own start, as files, and ours beside it.
//!
//! peft's folders of PiSSA, OLoRA and CorDA hold factors that fit only the changed base. Here they are rewritten as the folders
//! that this program writes: LoRA of twice the rank over the unchanged base, with the start subtracted.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::Tensor;
use lowrank_core::Delta;
use lowrank_models::Network;
use lowrank_models::adapters::{self, Attached, Fresh};
use lowrank_models::hf::peft::{CordaMethod, MethodConfig};
use lowrank_models::hf::{AdapterConfig, Dtype, HfError, OutTensor, write_safetensors};
use lowrank_models::save::host_values;
use lowrank_train::attach;
use lowrank_train::calibrate::{self, Measured, Plan};
use lowrank_train::config::ProgressStyle;
use lowrank_train::step::StepOptions;
use serde_json::{Map, Value};

use super::case::Case;
use super::checks::{Checks, distance, norm};
use super::subject::Subject;
use super::tensors::{self, Tensors, Values};
use super::{Stop, failed};

/// Puts the adapter of a case on its model, as the reference started it.
///
/// # Errors
/// Files that do not fit the model.
pub fn attach<M: Network>(case: &Case, model: &mut M) -> Result<(AdapterConfig, Attached), Stop> {
    let folder = case.folder.join("adapter_init");
    let Some(method) = residual_method(&case.method) else {
        return adapters::load_adapter(model, &folder).map_err(failed);
    };
    let rewritten = tempfile::tempdir().map_err(failed)?;
    rewrite(&folder, rewritten.path(), method)?;
    adapters::load_adapter(model, rewritten.path()).map_err(failed)
}

/// The method of a LoRA case whose start changes the base.
pub fn residual_method(method: &Map<String, Value>) -> Option<MethodConfig> {
    let start = method.get("init_lora_weights").and_then(Value::as_str)?;
    match start {
        "olora" => Some(MethodConfig::Olora),
        "pissa" => Some(MethodConfig::Pissa { niter: None }),
        "corda" => {
            let settings = method.get("corda_config").and_then(|settings| settings.get("corda_method"));
            let kpm = settings.and_then(Value::as_str) == Some("kpm");
            Some(MethodConfig::Corda { corda_method: if kpm { CordaMethod::Kpm } else { CordaMethod::Ipm } })
        }
        _ => Some(MethodConfig::Pissa { niter: Some(start.strip_prefix("pissa_niter_")?.parse().ok()?) }),
    }
}

fn rewrite(from: &Path, to: &Path, method: MethodConfig) -> Result<(), Stop> {
    let path = from.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).map_err(failed)?;
    let mut json: Value = serde_json::from_str(&text).map_err(failed)?;
    json["init_lora_weights"] = Value::Bool(true);
    let config = AdapterConfig { method, ..AdapterConfig::from_json(&json, &path).map_err(failed)? };
    let stored = tensors::read(&from.join("adapter_model.safetensors"))?;
    let doubled = stored.into_iter().map(|(key, values)| {
        let values = doubled(&key, values);
        OutTensor::from_f32(&key, Dtype::F32, &values.shape, values.data)
    });
    let metadata = config.file_metadata();
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, text)| (*key, text.as_str())).collect();
    write_safetensors(&to.join("adapter_model.safetensors"), doubled.collect(), &metadata).map_err(failed)?;
    let text = serde_json::to_string(&config.to_json()).map_err(failed)?;
    std::fs::write(to.join("adapter_config.json"), text).map_err(failed)
}

/// `[A; A]` or `[B, -B]`.
fn doubled(key: &str, values: Values) -> Values {
    let Values { shape, data } = values;
    let (rows, cols) = (shape[0], shape[1]);
    if key.contains("lora_A") {
        return Values { shape: vec![2 * rows, cols], data: [data.clone(), data].concat() };
    }
    let twice = |row: &[f32]| row.iter().copied().chain(row.iter().map(|value| -value)).collect::<Vec<f32>>();
    Values { shape: vec![rows, 2 * cols], data: data.chunks(cols).flat_map(twice).collect() }
}

/// The trained halves of tensors of a doubled adapter, as peft has them before it converts.
pub fn first_halves(tensors: &Tensors) -> Tensors {
    let half = |(key, values): (&String, &Values)| {
        let Values { shape, data } = values;
        let (rows, cols) = (shape[0], shape[1]);
        let half = match key.contains("lora_A") {
            true => Values { shape: vec![rows / 2, cols], data: data[..rows / 2 * cols].to_vec() },
            false => {
                let data = data.chunks(cols).flat_map(|row| row[..cols / 2].to_vec()).collect();
                Values { shape: vec![rows, cols / 2], data }
            }
        };
        (key.clone(), half)
    };
    tensors.iter().map(half).collect()
}

/// What our own start makes of the same base (and the same calibration data) against the reference's, module by module: the
/// products of the factors, which do not depend on the signs of singular vectors.
///
/// # Errors
/// Files that cannot be used; a start that fails.
pub fn check_own<M: Subject>(
    case: &Case,
    config: &AdapterConfig,
    base: M,
    reference: &M,
    options: StepOptions,
    checks: &mut Checks,
) -> Result<(), Stop> {
    if !attach::starts_from_base(&config.method) {
        return Ok(());
    }
    let mut own = base;
    let measured = measured(case, config, &mut own, options)?;
    let fresh = Fresh {
        seed: 0,
        statistics: &measured,
        original: &mut |module| {
            let (origin, reason) = (case.folder.clone(), "no case asks for a start over a quantised base".to_owned());
            Err(HfError::Adapter { origin, key: module.to_owned(), reason, hint: String::new() })
        },
        progress: &mut |_, _, _| {},
    };
    adapters::attach(&mut own, config, fresh).map_err(failed)?;
    let mut expected = products(reference);
    for (module, got) in products(&own) {
        let Some(expected) = expected.remove(&module) else { continue };
        let size = norm(expected.iter().copied());
        let limit = start_limit(&config.method);
        checks.add("own start", distance(&got, &expected) / size, limit, || format!("{module}, norm {size:.3e}"));
    }
    Ok(())
}

/// Rounding of two decompositions in f32; the smallest triples of a product (kpm) are ill conditioned.
fn start_limit(method: &MethodConfig) -> f64 {
    match method {
        MethodConfig::Corda { corda_method: CordaMethod::Kpm } => 0.1,
        _ => 1e-3,
    }
}

/// The products of all deltas: with their core where the method's start sets it.
fn products<M: Network>(model: &M) -> BTreeMap<String, Vec<f32>> {
    let mut found = BTreeMap::new();
    model.clone().for_each_projection(&mut |module, projection| {
        if let Some(Delta::LowRank(delta)) = &projection.delta {
            let has_started_core = delta.core.is_some() && delta.core_start.is_none() && delta.start.is_none();
            let product: Tensor<2> =
                match has_started_core && largest(delta.core.as_ref().map(|core| core.val())) > 1e-4 {
                    true => delta.delta(),
                    false => delta.down.val().matmul(delta.up.val()),
                };
            found.insert(module.to_owned(), host_values(product));
        }
    });
    found
}

fn largest(core: Option<Tensor<2>>) -> f32 {
    core.map_or(0.0, |core| core.abs().max().into_scalar::<f32>())
}

fn measured<M: Subject>(
    case: &Case,
    config: &AdapterConfig,
    model: &mut M,
    options: StepOptions,
) -> Result<Measured, Stop> {
    let wanted = attach::wanted(model, config).map_err(failed)?;
    if wanted.is_empty() {
        return Ok(Measured::new());
    }
    let stored = tensors::read(&case.folder.join("init_batches.safetensors"))?;
    let shape = &tensors::get(&stored, "input_ids")?.shape;
    let samples: usize = shape[..shape.len() - 1].iter().product();
    let batches = (0..samples).map(|sample| M::batch(&stored, sample, 1)).collect::<Result<Vec<_>, _>>()?;
    let sequences = model.sequences();
    let style = ProgressStyle::None;
    let plan = Plan { wanted: &wanted, batches: &batches, sequences: sequences.as_ref(), options, repair: None, style };
    calibrate::measure(model, &plan).map_err(failed)
}
