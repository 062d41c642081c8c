//! What a calibration pass measured, on disk: the next run with the same model, samples and wishes starts at once.
//!
//! The name of a file is a hash of everything that decides its content ([`Identity`], what is measured at which module, and the
//! version of this format). A file is written under a temporary name and renamed; a damaged one is noticed by its checksum and
//! measured again. It is a safetensors file: `covariance.MODULE`, `gradient.MODULE` in f32, and `about`, the bytes of a JSON
//! object with the version, the number of samples by module and the checksum of the tensors.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_core::adapters::Statistics;
use lowrank_core::calibration::{Covariance, Wanted};
use lowrank_core::linalg;
use lowrank_models::Network;
use lowrank_models::hf::{Checkpoint, Dtype, OutTensor, write_safetensors};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Measured, Plan, measure_own, own, share};
use crate::data::store::hexadecimal;
use crate::error::Problem;
use crate::progress::bytes_text;

/// Counts up whenever the same pass would measure other values, or the layout changes.
const VERSION: u32 = 1;
/// More than this is measured again rather than kept: it would fill a disk unasked.
const MOST_BYTES: usize = 8 << 30;
const ABOUT: &str = "about";

/// What decides the result beside the plan's wishes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Identity {
    /// The base model: names and hashes of its files, from [`hash_model`]; or the seed and the configuration of random weights.
    pub base: Vec<(String, String)>,
    /// The samples in their order, as a hash or a fingerprint; the tokenizer is part of it.
    pub samples: String,
    /// Everything else: type of the run, size of the batches, kind of device.
    pub settings: String,
}

/// Names and sha256 of the files that make a model what it is: `config.json` and the weights.
///
/// # Errors
/// A file cannot be read.
pub fn hash_model(folder: &Path) -> Result<Vec<(String, String)>, Problem> {
    let failed = |error| Problem::run(format!("cannot read the model in {}", folder.display())).source(error);
    let entries = std::fs::read_dir(folder).map_err(failed)?.collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let names = entries.into_iter().map(|entry| entry.file_name().to_string_lossy().into_owned());
    let mut names: Vec<String> = names.filter(|name| name == "config.json" || name.ends_with(".safetensors")).collect();
    names.sort();
    let hash = |name: String| -> std::io::Result<(String, String)> {
        let mut file = std::fs::File::open(folder.join(&name))?;
        let mut hash = Sha256::new();
        std::io::copy(&mut file, &mut hash)?;
        Ok((name, hexadecimal(&hash.finalize())))
    };
    names.into_par_iter().map(hash).collect::<std::io::Result<Vec<_>>>().map_err(failed)
}

/// As [`super::measure`], or what it returned before, from the folder. A folder that cannot be read or written costs a warning,
/// not the run.
///
/// # Errors
/// As [`super::measure`].
pub fn measure_cached<M: Network>(
    model: &mut M,
    plan: &Plan<'_, M::Batch>,
    identity: &Identity,
    folder: Option<&Path>,
) -> Result<Measured, Problem> {
    let own = own(plan.wanted);
    let Some(folder) = folder else {
        return Ok(share(plan.wanted, measure_own(model, plan, &own)?));
    };
    let path = folder.join(format!("{}.safetensors", key(identity, &own)));
    if path.exists() {
        match read(&path, &own, &model.device()) {
            Ok(measured) => {
                tracing::info!("calibration from the cache: {}", path.display());
                return Ok(share(plan.wanted, measured));
            }
            Err(reason) => {
                tracing::warn!("cache file {} is unusable and will be made again: {reason}", path.display())
            }
        }
    }
    let measured = measure_own(model, plan, &own)?;
    if let Err(reason) = write(&path, &measured) {
        tracing::warn!("cannot keep the calibration for the next run: {reason}");
    }
    Ok(share(plan.wanted, measured))
}

fn key(identity: &Identity, own: &BTreeMap<String, Wanted>) -> String {
    let covariance = |wanted: &Wanted| match wanted.covariance {
        None => "none",
        Some(Covariance::Sum) => "sum",
        Some(Covariance::MeanOfSequences) => "mean_of_sequences",
    };
    let wanted: BTreeMap<&str, (&str, bool)> =
        own.iter().map(|(module, wanted)| (module.as_str(), (covariance(wanted), wanted.gradient))).collect();
    // Strings, numbers and lists always have a JSON form.
    let text = serde_json::to_string(&(VERSION, identity, wanted)).unwrap_or_default();
    hexadecimal(&Sha256::digest(text.as_bytes()))
}

#[derive(Serialize, Deserialize)]
struct About {
    version: u32,
    samples: BTreeMap<String, usize>,
    sha256: String,
}

/// The tensors by their names in the file.
fn tensors(measured: &Measured) -> BTreeMap<String, &Tensor<2>> {
    let parts = measured.iter().flat_map(|(module, found)| {
        let kinds = [("covariance", &found.covariance), ("gradient", &found.gradient)];
        kinds.map(|(kind, tensor)| (format!("{kind}.{module}"), tensor.as_ref()))
    });
    parts.filter_map(|(name, tensor)| Some((name, tensor?))).collect()
}

/// Checksum of the tensors in the order of their names.
struct Checksum(Sha256);

impl Checksum {
    fn new() -> Self {
        Self(Sha256::new())
    }

    fn add(&mut self, name: &str, dims: &[usize], bytes: &[u8]) {
        self.0.update(format!("{name} {dims:?} "));
        self.0.update(bytes);
    }

    fn finish(self) -> String {
        hexadecimal(&self.0.finalize())
    }
}

fn write(path: &Path, measured: &Measured) -> Result<(), String> {
    let tensors = tensors(measured);
    let bytes: usize = tensors.values().map(|tensor| 4 * tensor.shape().num_elements()).sum();
    if bytes > MOST_BYTES {
        return Err(format!("it is {}, more than {}", bytes_text(bytes as u64), bytes_text(MOST_BYTES as u64)));
    }
    let mut checksum = Checksum::new();
    let mut out = vec![];
    for (name, tensor) in tensors {
        let dims = tensor.dims();
        let bytes: Vec<u8> = linalg::host(tensor.clone()).into_iter().flat_map(f32::to_le_bytes).collect();
        checksum.add(&name, &dims, &bytes);
        out.push(OutTensor::new(name, Dtype::F32, &dims, move || bytes));
    }
    let samples = measured.iter().map(|(module, found)| (module.clone(), found.samples)).collect();
    let about = About { version: VERSION, samples, sha256: checksum.finish() };
    let about = serde_json::to_vec(&about).map_err(|error| error.to_string())?;
    out.push(OutTensor::new(ABOUT, Dtype::U8, &[about.len()], move || about));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|error| format!("cannot create {}: {error}", folder.display()))?;
    }
    write_safetensors(path, out, &[]).map_err(|error| error.to_string())
}

fn read(path: &Path, own: &BTreeMap<String, Wanted>, device: &Device) -> Result<Measured, String> {
    let text = |error: lowrank_models::hf::HfError| error.to_string();
    let file = Checkpoint::open_file(path).map_err(text)?;
    let about: About =
        serde_json::from_slice(file.get(ABOUT).map_err(text)?.bytes).map_err(|error| error.to_string())?;
    if about.version != VERSION || !about.samples.keys().eq(own.keys()) {
        return Err("it is of another version".to_owned());
    }
    let mut measured: Measured = about
        .samples
        .into_iter()
        .map(|(module, samples)| (module, Statistics { samples, ..Statistics::default() }))
        .collect();
    let mut names: Vec<&str> = file.names().filter(|name| *name != ABOUT).collect();
    names.sort_unstable();
    let mut checksum = Checksum::new();
    for name in names {
        let view = file.get(name).map_err(text)?;
        checksum.add(name, view.shape, view.bytes);
        let &[rows, cols] = view.shape else { return Err(format!("{name} is no matrix")) };
        let tensor = Tensor::<2>::from_data(TensorData::new(view.to_f32(), [rows, cols]), device);
        let (kind, module) = name.split_once('.').ok_or_else(|| format!("{name} is not known"))?;
        let found = measured.get_mut(module).ok_or_else(|| format!("{module} was not measured"))?;
        match kind {
            "covariance" => found.covariance = Some(tensor),
            _ => found.gradient = Some(tensor),
        }
    }
    let has = |module: &String, wanted: &Wanted| {
        let found = measured.get(module);
        found.is_some_and(|found| {
            found.covariance.is_some() == wanted.covariance.is_some() && found.gradient.is_some() == wanted.gradient
        })
    };
    match checksum.finish() == about.sha256 && own.iter().all(|(module, wanted)| has(module, wanted)) {
        true => Ok(measured),
        false => Err("its checksum does not match its content".to_owned()),
    }
}
