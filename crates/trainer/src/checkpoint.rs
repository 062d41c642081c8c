//! Everything a resume needs, as safetensors and JSON: trained parameters, optimiser moments, loader position, counters.
//!
//! | file | content |
//! | --- | --- |
//! | `parameters.safetensors` | trained parameters by name, f32, as matrices; of weights that are held as codes `<name>:codes`, `:scale`, `:zero` |
//! | `optimizer.safetensors` | `<name>:<part>`: moments, bases, 8-bit codes |
//! | `state.json` | step, tokens, loader position, best evaluation, parts and counters of each parameter's state |
//! | `config.toml` | the resolved configuration |
//! | `adapter/` | the adapter so far in PEFT's format (adapter methods) |
//!
//! Dropout masks, the sketches of low-rank methods and the order of the data are functions of the seed and the position, so no generator state is kept.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Tensor, TensorData};
use lowrank_core::Base;
use lowrank_core::base::PackedBase;
use lowrank_core::lowrank::cast;
use lowrank_core::optim::{self, Optimizer};
use lowrank_core::quant::Groups;
use lowrank_core::quant::packed::{from_groups, to_groups};
use lowrank_models::adapters::AdapterError;
use lowrank_models::hf::{Checkpoint, Dtype, OutTensor, write_safetensors};
use lowrank_models::save::host_values;
use lowrank_models::{Network, parameters};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Problem;
use crate::loss_scale::LossScale;

/// A number that a checkpoint brings back to the bit. It is stored as text: JSON has no NaN, which the loss of a step that
/// was left out may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, PartialOrd, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Exact(pub f64);

impl From<Exact> for String {
    fn from(number: Exact) -> Self {
        number.0.to_string()
    }
}

impl TryFrom<String> for Exact {
    type Error = std::num::ParseFloatError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

/// Counters of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Optimiser steps done.
    pub step: u64,
    /// Tokens seen, padding not counted.
    pub tokens: u64,
    /// Micro batches run, for dropout.
    pub micro_batches: u64,
    /// Loss of the last step.
    pub train_loss: Exact,
    /// Loss of the last evaluation.
    pub eval_loss: Option<Exact>,
    /// Exact match of the last evaluation.
    pub exact_match: Option<Exact>,
    /// Other scores of the last evaluation.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub scores: BTreeMap<String, Exact>,
    /// Lowest evaluation loss and its step.
    pub best: Option<(Exact, u64)>,
    /// Evaluations since the lowest.
    pub evaluations_since_best: u64,
    /// The loss scale of a run in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
}

#[derive(Serialize, Deserialize)]
struct State<L> {
    version: u32,
    counters: Counters,
    loader: L,
    /// The optimiser's state of each parameter, but for the values.
    optimizer: BTreeMap<String, Parts>,
}

/// The parts of one parameter's state.
#[derive(Serialize, Deserialize)]
struct Parts {
    /// Matrices and their shapes.
    tensors: BTreeMap<String, [usize; 2]>,
    /// Lists of bytes.
    bytes: Vec<String>,
    numbers: BTreeMap<String, u64>,
}

const VERSION: u32 = 2;

fn cannot(doing: &str, folder: &Path) -> Problem {
    Problem::run(format!("cannot {doing} the checkpoint in {}", folder.display()))
}

fn matrix(name: String, value: Tensor<2>) -> OutTensor<'static> {
    let dims = value.dims();
    OutTensor::new(name, Dtype::F32, &dims, move || {
        lowrank_models::hf::dtype::from_f32(&host_values(value), Dtype::F32)
    })
}

fn list(name: String, bytes: Vec<u8>) -> OutTensor<'static> {
    OutTensor::new(name, Dtype::U8, &[bytes.len()], move || bytes)
}

/// A weight that is held as codes.
fn of_groups(name: &str, groups: Groups) -> [OutTensor<'static>; 3] {
    let Groups { codes, scale, zero, .. } = groups;
    let scales = OutTensor::new(format!("{name}:scale"), Dtype::F32, &[scale.len()], move || {
        lowrank_models::hf::dtype::from_f32(&scale, Dtype::F32)
    });
    [list(format!("{name}:codes"), codes), scales, list(format!("{name}:zero"), zero)]
}

/// The codes of a weight like those in `base`.
fn read_codes(file: &Checkpoint, name: &str, base: &PackedBase, folder: &Path) -> Result<PackedBase, Problem> {
    let layout = base.weight.layout();
    let bits = layout.format.bits();
    let part = |key: &str, shape: usize| {
        let view = file.get(&format!("{name}:{key}")).map_err(|error| cannot("read", folder).source(error))?;
        match view.shape == [shape] {
            true => Ok(view),
            false => Err(cannot("read", folder)
                .hint(format!("{name}:{key} has shape {:?}, the settings ask for [{shape}]", view.shape))),
        }
    };
    let groups = Groups {
        bits: bits as u8,
        codes: part("codes", (layout.len() * bits).div_ceil(8))?.bytes.to_vec(),
        scale: part("scale", layout.blocks())?.to_f32(),
        zero: part("zero", layout.blocks())?.bytes.to_vec(),
        group: layout.block,
        len: layout.len(),
    };
    let weight = from_groups(&groups, layout.dims, layout.order, &base.weight.device());
    Ok(PackedBase { weight, ..base.clone() })
}

/// Writes the adapter of the model into a folder.
pub type WriteAdapter<'a> = dyn Fn(&Path) -> Result<(), AdapterError> + 'a;

/// Writes all files into an open checkpoint folder.
///
/// # Errors
/// Anything the disk refuses.
pub fn write<M: Network, L: Serialize>(
    folder: &Path,
    model: &M,
    write_adapter: Option<&WriteAdapter<'_>>,
    optimizer: &Optimizer,
    counters: &Counters,
    loader: L,
    config_text: &str,
) -> Result<(), Problem> {
    let failed = |error| cannot("write", folder).source(error);
    let mut values = vec![];
    parameters::visit(model, "", |entry| {
        if entry.trained {
            values.push(matrix(entry.name.to_owned(), (entry.value)()));
        }
    });
    model.visit_projections(&mut |module, projection| {
        let groups = projection.weight.trained_codes().and_then(|base| to_groups(&base.weight));
        values.extend(groups.into_iter().flat_map(|groups| of_groups(&format!("{module}.weight"), groups)));
    });
    write_safetensors(&folder.join("parameters.safetensors"), values, &[]).map_err(failed)?;
    let (mut values, mut parts) = (vec![], BTreeMap::new());
    for (name, optim::State { tensors, bytes, numbers }) in optimizer.save() {
        let shapes = tensors.iter().map(|(key, tensor)| (key.clone(), tensor.dims())).collect();
        parts.insert(name.clone(), Parts { tensors: shapes, bytes: bytes.keys().cloned().collect(), numbers });
        values.extend(tensors.into_iter().map(|(key, tensor)| matrix(format!("{name}:{key}"), tensor)));
        values.extend(bytes.into_iter().map(|(key, bytes)| list(format!("{name}:{key}"), bytes)));
    }
    write_safetensors(&folder.join("optimizer.safetensors"), values, &[]).map_err(failed)?;
    if let Some(write_adapter) = write_adapter {
        write_adapter(&folder.join("adapter")).map_err(|error| cannot("write", folder).source(error))?;
    }
    let state = State { version: VERSION, counters: counters.clone(), loader, optimizer: parts };
    let json = serde_json::to_vec_pretty(&state).map_err(|error| cannot("write", folder).source(error))?;
    let write = |name: &str, bytes: &[u8]| {
        std::fs::write(folder.join(name), bytes).map_err(|error| cannot("write", folder).source(error))
    };
    write("state.json", &json)?;
    write("config.toml", config_text.as_bytes())
}

/// Reads a complete checkpoint into the model and the optimiser; returns counters and loader position.
///
/// # Errors
/// A file is missing or does not fit the model.
pub fn read<M: Network, L: DeserializeOwned>(
    folder: &Path,
    model: &mut M,
    optimizer: &mut Optimizer,
) -> Result<(Counters, L), Problem> {
    let text =
        std::fs::read_to_string(folder.join("state.json")).map_err(|error| cannot("read", folder).source(error))?;
    let mut state: State<L> = serde_json::from_str(&text).map_err(|error| cannot("read", folder).source(error))?;
    if state.version != VERSION {
        return Err(
            cannot("read", folder).hint(format!("it has format {}, this program reads {VERSION}", state.version))
        );
    }
    let failed = |error| cannot("read", folder).source(error);
    let stored = Checkpoint::open_file(&folder.join("parameters.safetensors")).map_err(failed)?;
    let moments = Checkpoint::open_file(&folder.join("optimizer.safetensors")).map_err(failed)?;
    let device = model.device();
    let tensor = |file: &Checkpoint, name: &str, dims: [usize; 2]| -> Result<Tensor<2>, Problem> {
        let view = file.get(name).map_err(failed)?;
        if view.shape != dims {
            return Err(
                cannot("read", folder).hint(format!("{name} has shape {:?}, the model expects {dims:?}", view.shape))
            );
        }
        Ok(Tensor::from_data(TensorData::new(view.to_f32(), dims), &device))
    };
    let trained: BTreeMap<String, Vec<usize>> = parameters::trained(model).into_iter().collect();
    let mut problem = None;
    let mut restore = |name: &str, dims: [usize; 2]| -> Result<(), Problem> {
        if let Some(Parts { tensors, bytes, numbers }) = state.optimizer.remove(name) {
            let mut parts = optim::State { numbers, ..Default::default() };
            for (key, dims) in tensors {
                let value = tensor(&moments, &format!("{name}:{key}"), dims)?;
                parts.tensors.insert(key, value);
            }
            for key in bytes {
                let view = moments.get(&format!("{name}:{key}")).map_err(failed)?;
                parts.bytes.insert(key, view.bytes.to_vec());
            }
            optimizer.restore(name, dims, parts).map_err(|reason| {
                cannot("read", folder).hint(format!("the optimiser's state of {name} does not fit: {reason}"))
            })?;
        }
        Ok(())
    };
    model.map_parameters(&mut |name, value| {
        if !trained.contains_key(name) || problem.is_some() {
            return value;
        }
        let dims = value.dims();
        match restore(name, dims).and_then(|()| tensor(&stored, name, dims)) {
            Ok(stored) => cast(stored, value.dtype().into()),
            Err(error) => {
                problem = Some(error);
                value
            }
        }
    });
    model.for_each_projection(&mut |module, projection| {
        let Some(base) = projection.weight.trained_codes().filter(|_| problem.is_none()) else { return };
        let name = format!("{module}.weight");
        match restore(&name, base.weight.dims()).and_then(|()| read_codes(&stored, &name, base, folder)) {
            Ok(stored) => projection.weight = Base::Packed(stored),
            Err(error) => problem = Some(error),
        }
    });
    match problem {
        Some(problem) => Err(problem),
        None => Ok((state.counters, state.loader)),
    }
}
