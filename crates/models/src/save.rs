//! A [`Decoder`] as a Hugging Face folder, adapters merged: config, tensors, tokenizer and chat template.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};

use crate::decoder::Decoder;
use crate::hf::{Dtype, HfError, OutTensor, write, write_sharded, write_text_atomic};
use crate::parameters;

/// Values of a matrix in row-major order, in f32 on the host.
pub fn host_values(tensor: Tensor<2>) -> Vec<f32> {
    let data = tensor.cast(FloatDType::F32).into_data();
    data.try_to_vec::<f32>().unwrap_or_else(|_| unreachable!("cast to f32 just before"))
}

/// Writes the model to `folder` in `dtype`, with the configuration and companion files of `origin` carried along.
///
/// Deltas must be merged before ([`crate::adapters::merge`]). Shards hold at most `max_shard_bytes`.
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
    std::fs::create_dir_all(folder).map_err(|source| HfError::io("create", folder, source))?;
    write_sharded(folder, tensors(decoder, dtype), max_shard_bytes)?;
    write_config(decoder, origin, folder, dtype)?;
    write::copy_companion_files(origin, folder)?;
    Ok(())
}

/// Every parameter under its name and shape on disk; bytes are produced when the writer asks.
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
    out
}

/// `config.json` of the origin with the written type and the head's tying.
fn write_config(decoder: &Decoder, origin: &Path, folder: &Path, dtype: Dtype) -> Result<(), HfError> {
    let mut config = crate::hf::read_json(&origin.join("config.json"))?;
    if let Some(map) = config.as_object_mut() {
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.to_owned(), dtype.torch_name().into());
        map.insert("tie_word_embeddings".to_owned(), decoder.lm_head.is_none().into());
    }
    let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
    write_text_atomic(&folder.join("config.json"), &text)
}

/// Number of parameters of a model.
pub fn parameter_count(decoder: &Decoder) -> usize {
    decoder.num_params()
}
