//! A [`Decoder`] as a Hugging Face folder, adapters merged: config, tensors, tokenizer and chat template.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};
use lowrank_core::{Base, Projection};
use serde_json::{Map, Value};

use crate::decoder::Decoder;
use crate::hf::{Dtype, HfError, OutTensor, write, write_sharded, write_text_atomic};
use crate::network::Network;
use crate::parameters;

/// Values of a matrix in row-major order, in f32 on the host.
pub fn host_values(tensor: Tensor<2>) -> Vec<f32> {
    let data = tensor.cast(FloatDType::F32).into_data();
    data.try_to_vec::<f32>().unwrap_or_else(|_| unreachable!("cast to f32 just before"))
}

/// Writes the model to `folder` in `dtype`, with the configuration and companion files of `origin` carried along.
///
/// Deltas must be merged before ([`merge`](crate::adapters::merge())). Shards hold at most `max_shard_bytes`.
///
/// # Errors
/// Anything the disk refuses; files that were there before are then unchanged.
pub fn save_model(
    decoder: &Decoder,
    origin: &Path,
    folder: &Path,
    dtype: Dtype,
    max_shard_bytes: u64,
) -> Result<(), HfError> {
    let place = Place { origin, folder, dtype, max_shard_bytes };
    write_folder(&place, tensors(decoder, dtype), |config| {
        config.insert("tie_word_embeddings".to_owned(), decoder.lm_head.is_none().into());
    })
}

/// Where a model is written to, and how.
pub(crate) struct Place<'a> {
    /// The folder whose configuration and companion files are carried along.
    pub origin: &'a Path,
    /// The folder that is written.
    pub folder: &'a Path,
    /// Type of the tensors.
    pub dtype: Dtype,
    /// Shards hold at most so many.
    pub max_shard_bytes: u64,
}

/// Writes tensors, the `config.json` of the origin with the written type and what `change` makes of it, and companion files.
pub(crate) fn write_folder(
    place: &Place<'_>,
    tensors: Vec<OutTensor<'static>>,
    change: impl FnOnce(&mut Map<String, Value>),
) -> Result<(), HfError> {
    let Place { origin, folder, dtype, max_shard_bytes } = *place;
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("create", folder, source))?;
    write_sharded(folder, tensors, max_shard_bytes)?;
    let mut config = crate::hf::read_json(&origin.join("config.json"))?;
    if let Some(map) = config.as_object_mut() {
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.to_owned(), dtype.torch_name().into());
        change(map);
    }
    let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
    write_text_atomic(&folder.join("config.json"), &text)?;
    write::copy_companion_files(origin, folder)?;
    Ok(())
}

/// Every parameter under its name and shape on disk; bytes are produced when the writer asks. Packed weights are written as the
/// values that their codes stand for.
pub fn tensors(decoder: &Decoder, dtype: Dtype) -> Vec<OutTensor<'static>> {
    let mut out = vec![];
    parameters::visit(decoder, "", |entry| {
        if entry.name.contains(".delta.") {
            return;
        }
        let value = (entry.value)();
        let is_linear = entry.dims.len() == 2 && entry.name != "model.embed_tokens.weight";
        let shape = if is_linear { vec![entry.dims[1], entry.dims[0]] } else { entry.dims.to_vec() };
        out.push(OutTensor::new(entry.name, dtype, &shape, move || {
            let value = if is_linear { value.transpose() } else { value };
            crate::hf::dtype::from_f32(&host_values(value), dtype)
        }));
    });
    decoder.visit_projections(&mut |module, projection| {
        out.extend(packed(&format!("{module}.weight"), projection, dtype));
    });
    out
}

/// A packed weight as the values that its codes stand for, `[d_out, d_in]`.
pub(crate) fn packed(name: &str, projection: &Projection, dtype: Dtype) -> Option<OutTensor<'static>> {
    let Base::Packed(base) = &projection.weight else { return None };
    let (weight, [d_in, d_out]) = (base.weight.clone(), projection.dims());
    Some(OutTensor::new(name, dtype, &[d_out, d_in], move || {
        crate::hf::dtype::from_f32(&host_values(weight.dense(FloatDType::F32).transpose()), dtype)
    }))
}

/// Number of parameters of a model.
pub fn parameter_count(decoder: &Decoder) -> usize {
    decoder.num_params() + held(decoder).packed
}

/// How many numbers of a model are trained, and how many there are, packed weights included.
pub fn parameter_counts<M: Network>(model: &M) -> (usize, usize) {
    let held = held(model);
    let trained = parameters::trained(model);
    let dense: usize = trained.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    (dense + held.trained, model.num_params() + held.packed)
}

/// What the weights of a model's linear layers cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Values of packed weights.
    pub packed: usize,
    /// Bytes of packed weights.
    pub packed_bytes: usize,
    /// Values of packed weights that are trained.
    pub trained: usize,
    /// Values of dense weights.
    pub dense: usize,
    /// Bytes of dense weights.
    pub dense_bytes: usize,
}

impl std::fmt::Display for Held {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bytes_each = |bytes: usize, values: usize| bytes as f64 / values.max(1) as f64;
        let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
        write!(
            out,
            "linear layers: {} weights{} packed in {:.1} MiB, {:.3} bytes each; {} dense in {:.1} MiB; {:.3} bytes on average",
            self.packed,
            if self.trained > 0 { ", trained," } else { "" },
            mib(self.packed_bytes),
            bytes_each(self.packed_bytes, self.packed),
            self.dense,
            mib(self.dense_bytes),
            bytes_each(self.packed_bytes + self.dense_bytes, self.packed + self.dense),
        )
    }
}

/// Counts the weights of the linear layers by how they are held.
pub fn held<M: Network>(model: &M) -> Held {
    let mut held = Held::default();
    model.visit_projections(&mut |_, projection| {
        let (values, bytes) = (projection.dims().iter().product::<usize>(), projection.weight.bytes());
        match &projection.weight {
            Base::Packed(base) => {
                (held.packed, held.packed_bytes) = (held.packed + values, held.packed_bytes + bytes);
                held.trained += if base.trained { values } else { 0 };
            }
            Base::Dense(_) => (held.dense, held.dense_bytes) = (held.dense + values, held.dense_bytes + bytes),
        }
    });
    held
}
