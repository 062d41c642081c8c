//! Adapter folders: the parameters of a model's adapters under the keys and shapes of the tensor file, and back.
//!
//! A file holds linear factors with their axes swapped, as torch stores them; one-dimensional parts are vectors. What two methods
//! do with the same file key is in [`FileForm`]: the folders of PiSSA, OLoRA and CorDA are plain LoRA of twice the rank over the
//! unchanged base, `[A | A_0]` and `[B; -B_0]`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::{FloatDType, Tensor, TensorData};
use lowrank_core::lowrank::cast;

use super::{AdapterError, Attached, attach_empty, layers, start};
use crate::hf::peft::{AdapterTensor, KeyForm, MethodConfig, Part};
use crate::hf::{AdapterConfig, Checkpoint, Dtype, HfError, OutTensor, write_safetensors, write_text_atomic};
use crate::network::Network;
use crate::parameters;
use crate::save::host_values;

use super::start::{Original, Shared};

/// How the parameters of one model with one adapter configuration lie in a file.
#[derive(Clone, Debug)]
pub struct FileForm<'a> {
    config: &'a AdapterConfig,
    /// Names of the linear layers.
    linear: BTreeSet<String>,
    /// Module name of the embedding.
    embedding: Option<String>,
}

/// A tensor of a file.
struct Stored {
    key: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl<'a> FileForm<'a> {
    /// For a model.
    pub fn new<M: Network>(model: &M, config: &'a AdapterConfig) -> Self {
        let linear =
            layers(model).into_iter().filter(|(_, sizes)| !sizes.is_conv()).map(|(module, _)| module).collect();
        Self { config, linear, embedding: model.embedding_name().map(str::to_owned) }
    }

    fn key_form(&self) -> KeyForm {
        self.config.method.key_form()
    }

    /// What a parameter is in the file; none for one that is not stored, or not by itself.
    pub fn tensor(&self, parameter: &str) -> Option<AdapterTensor> {
        let Some((module, field)) = parameter.split_once(".delta.") else {
            return Some(AdapterTensor::new(parameter, Part::Saved));
        };
        let is_embedding = self.embedding.as_deref() == Some(module);
        let part = match (field.trim_start_matches("lowrank."), &self.config.method) {
            ("down" | "up", MethodConfig::Vera { .. }) => return None,
            ("down", _) if is_embedding => Part::EmbeddingA,
            ("up", _) if is_embedding => Part::EmbeddingB,
            ("down", _) => Part::A,
            ("up", _) => Part::B,
            ("core", MethodConfig::Vera { .. }) => Part::VeraD,
            ("core", MethodConfig::Svfit) => Part::Sigma,
            ("core", _) => Part::Core,
            ("rows", _) => Part::Rows,
            ("columns", _) => Part::Columns,
            ("out_scale", _) => Part::VeraB,
            ("magnitude", _) => Part::Magnitude,
            ("lambda", _) => Part::RandLambda,
            ("gamma", _) => Part::RandGamma,
            ("vectors", _) => Part::HraU,
            ("weight", MethodConfig::Oft { .. }) => Part::OftR,
            _ => return None,
        };
        Some(AdapterTensor::new(module, part))
    }

    /// The key of a parameter in the file.
    pub fn key(&self, parameter: &str) -> Option<String> {
        self.tensor(parameter).map(|tensor| tensor.key(self.key_form()))
    }

    /// Whether a matrix lies in the file with its axes swapped. Nothing of a convolution does.
    pub fn is_flipped(&self, parameter: &str) -> bool {
        let Some(AdapterTensor { module, part }) = self.tensor(parameter) else { return false };
        match part {
            Part::EmbeddingA | Part::EmbeddingB => true,
            Part::A | Part::B | Part::Core => self.linear.contains(&module),
            Part::Saved => module.strip_suffix(".weight").is_some_and(|module| self.linear.contains(module)),
            _ => false,
        }
    }

    /// Shape and values of a parameter (or of its gradient) as the file has them.
    pub fn value(&self, parameter: &str, dims: &[usize], value: Tensor<2>) -> (Vec<usize>, Tensor<2>) {
        let is_vector = dims.len() == 1 || (dims[0] == 1 && self.is_vector(parameter));
        match (is_vector, self.is_flipped(parameter)) {
            (true, _) => (vec![dims.iter().product()], value),
            (false, true) => (vec![dims[1], dims[0]], value.transpose()),
            (false, false) => (dims.to_vec(), value),
        }
    }

    /// Parts that are rows here and vectors in the file.
    fn is_vector(&self, parameter: &str) -> bool {
        matches!(self.tensor(parameter).map(|tensor| tensor.part), Some(Part::VeraD | Part::VeraB | Part::Sigma))
    }
}

/// Every tensor of the adapter under its key and shape, in f32.
pub fn adapter_tensors<M: Network>(model: &M, config: &AdapterConfig, attached: &Attached) -> Vec<OutTensor<'static>> {
    let form = FileForm::new(model, config);
    let mut starts: BTreeMap<String, Tensor<2>> = BTreeMap::new();
    parameters::visit(model, "", |entry| {
        if entry.name.contains(".delta.start.") {
            starts.insert(entry.name.replace(".delta.start.", ".delta."), (entry.value)());
        }
    });
    let mut out = vec![];
    parameters::visit(model, "", |entry| {
        if !entry.trained && !entry.name.contains(".delta.") {
            return;
        }
        let Some(key) = form.key(entry.name) else { return };
        let mut value = (entry.value)();
        let mut dims = entry.dims.to_vec();
        if let Some(start) = starts.remove(entry.name) {
            let is_down = entry.name.ends_with(".down");
            value = if is_down { Tensor::cat(vec![value, start], 1) } else { Tensor::cat(vec![value, start.neg()], 0) };
            dims = value.dims().to_vec();
        }
        let (shape, value) = form.value(entry.name, &dims, value);
        out.push(in_f32(&key, &shape, value));
    });
    for (module, part, shape, value) in attached.shared.tensors(&attached.modules) {
        out.push(in_f32(&AdapterTensor::new(module, part).key(form.key_form()), &shape, value));
    }
    out
}

fn in_f32(key: &str, shape: &[usize], value: Tensor<2>) -> OutTensor<'static> {
    OutTensor::new(key, Dtype::F32, shape, move || crate::hf::dtype::from_f32(&host_values(value), Dtype::F32))
}

/// Writes `adapter_model.safetensors` and `adapter_config.json`, each atomically, the configuration last.
///
/// # Errors
/// Anything the disk refuses.
pub fn save_adapter<M: Network>(
    model: &M,
    config: &AdapterConfig,
    attached: &Attached,
    base_model: &str,
    folder: &Path,
) -> Result<(), AdapterError> {
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("create", folder, source))?;
    let mut all: Vec<String> = layers(model).into_iter().map(|(module, _)| module).collect();
    all.extend(["lm_head".to_owned()]);
    all.extend(model.embedding_name().map(str::to_owned));
    let mut config = config.with_names(&attached.modules, &all);
    config.base_model_name_or_path = Some(base_model.to_owned());
    let metadata = config.file_metadata();
    let metadata: Vec<(&str, &str)> = metadata.iter().map(|(key, value)| (*key, value.as_str())).collect();
    write_safetensors(&folder.join("adapter_model.safetensors"), adapter_tensors(model, &config, attached), &metadata)?;
    let text = serde_json::to_string_pretty(&config.to_json()).unwrap_or_default() + "\n";
    write_text_atomic(&folder.join("adapter_config.json"), &text)?;
    Ok(())
}

/// Attaches the adapter stored in a folder, trained or not.
///
/// # Errors
/// As [`super::attach`]; tensors that are missing, left over or of another shape (all in one message).
pub fn load_adapter<M: Network>(model: &mut M, folder: &Path) -> Result<(AdapterConfig, Attached), AdapterError> {
    load_adapter_over(model, folder, &mut |module| {
        let reason = format!("the weight of {module} at full precision is needed, and the base is quantised");
        Err(HfError::bad_file(folder, reason, "load the adapter over the checkpoint that was quantised"))
    })
}

/// The same over a quantised base; `original` gives its weights at full precision, for adapters that took a part out of them.
///
/// # Errors
/// As [`load_adapter`].
pub fn load_adapter_over<M: Network>(
    model: &mut M,
    folder: &Path,
    original: Original<'_>,
) -> Result<(AdapterConfig, Attached), AdapterError> {
    let config = AdapterConfig::from_folder(folder)?;
    let checkpoint = Checkpoint::open_file(&folder.join("adapter_model.safetensors"))?;
    let (mut stored, mut problems) = read(&checkpoint, config.method.key_form())?;
    let device = model.device();
    let shared = Shared::from_file(&config, &device, &mut |part| {
        let at = stored.keys().find(|tensor| tensor.part == part)?.clone();
        let Stored { shape, values, .. } = stored.remove(&at)?;
        stored.retain(|tensor, _| tensor.part != part); // peft repeats them in every module
        Some((shape, values))
    });
    let shared = shared
        .map_err(|problem| AdapterError::Mismatch { origin: folder.display().to_string(), problems: vec![problem] })?;
    let attached = attach_empty(model, &config, shared)?;
    fill(model, &config, &attached, stored, &mut problems);
    match problems.is_empty() {
        true => {
            start::finish_loaded(model, &config, original)?;
            Ok((config, attached))
        }
        false => Err(AdapterError::Mismatch { origin: folder.display().to_string(), problems }),
    }
}

type Tensors = BTreeMap<AdapterTensor, Stored>;

fn read(checkpoint: &Checkpoint, form: KeyForm) -> Result<(Tensors, Vec<String>), AdapterError> {
    let (mut stored, mut problems) = (Tensors::new(), vec![]);
    for name in checkpoint.names() {
        match AdapterTensor::from_key(name, form) {
            Some(AdapterTensor { part: Part::BaseCopy, .. }) => {}
            Some(tensor) => {
                let view = checkpoint.get(name)?;
                let value = Stored { key: name.to_owned(), shape: view.shape.to_vec(), values: view.to_f32() };
                stored.insert(tensor, value);
            }
            None => problems.push(format!("{name}: not a tensor of this method")),
        }
    }
    Ok((stored, problems))
}

/// Puts the tensors of the file in place of the empty adapter's.
fn fill<M: Network>(
    model: &mut M,
    config: &AdapterConfig,
    attached: &Attached,
    stored: Tensors,
    problems: &mut Vec<String>,
) {
    let form = FileForm::new(model, config);
    let device = model.device();
    let mut used = BTreeSet::new();
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    parameters::visit(model, "", |entry| drop(shapes.insert(entry.name.to_owned(), entry.dims.to_vec())));
    model.map_parameters(&mut |name, old| {
        let is_wanted = attached.saved.iter().any(|saved| saved == name) || name.contains(".delta.");
        let is_start = name.contains(".delta.start.");
        let own = name.replace(".delta.start.", ".delta.");
        let Some(tensor) = form.tensor(&own).filter(|_| is_wanted) else { return old };
        let Some(Stored { key, shape, values }) = stored.get(&tensor) else {
            problems.push(format!("{}: missing from the file", tensor.key(form.key_form())));
            return old;
        };
        used.insert(tensor.clone());
        let (mut dims, mut full) = (old.dims(), shapes.get(name).cloned().unwrap_or_default());
        let doubled = config.method.doubles_rank() && name.contains(".delta.");
        let axis = usize::from(own.ends_with(".down")); // the axis of r
        if doubled {
            dims[axis] *= 2;
            full[axis] *= 2;
        }
        let (expected, _) = form.value(&own, &full, old.clone());
        if *shape != expected {
            problems.push(format!("{key}: expected shape {expected:?}, got {shape:?}"));
            return old;
        }
        let value = stored_matrix(values, dims, form.is_flipped(&own), !name.contains(".delta."), &device);
        match (doubled, is_start) {
            (false, _) => value,
            (true, is_start) => {
                let half = dims[axis] / 2;
                let part = value.narrow(axis, if is_start { half } else { 0 }, half);
                if is_start && axis == 0 { part.neg() } else { part }
            }
        }
    });
    let left = stored.into_iter().filter(|(tensor, _)| !used.contains(tensor));
    problems.extend(left.map(|(_, Stored { key, shape, .. })| format!("{key} {shape:?}: no such module is adapted")));
}

/// A matrix of a file on the device, `dims` being those it has here. A weight stays as it lies on disk and is a view; a factor
/// lies as a fresh one does, so that a resumed run adds up in the same order.
fn stored_matrix(
    values: &[f32],
    [rows, cols]: [usize; 2],
    is_flipped: bool,
    as_view: bool,
    device: &burn::tensor::Device,
) -> Tensor<2> {
    match (is_flipped, as_view) {
        (false, _) => matrix(values.to_vec(), [rows, cols], device),
        (true, true) => matrix(values.to_vec(), [cols, rows], device).transpose(),
        (true, false) => {
            let turned = (0..rows * cols).map(|at| values[(at % cols) * rows + at / cols]).collect();
            matrix(turned, [rows, cols], device)
        }
    }
}

/// A tensor of a file as a matrix on the device.
pub(super) fn matrix(values: Vec<f32>, dims: [usize; 2], device: &burn::tensor::Device) -> Tensor<2> {
    cast(Tensor::from_data(TensorData::new(values, dims), device), FloatDType::F32)
}
