//! Files in the Hugging Face layout: checkpoints, tokenizers, chat templates, adapters and the hub.
//!
//! Everything here works on bytes and text in host memory; nothing knows a device or a tensor library. Shapes are those on
//! disk: a linear layer's weight is `[out, in]`, and turning it into `x W` order is the model loader's work.
//!
//! | module | what it holds |
//! | --- | --- |
//! | [`checkpoint`] | reads `model.safetensors` or shards with an index, memory-mapped, checked against a list of expected tensors |
//! | [`mod@write`] | writes the same files, each one atomically |
//! | [`dtype`] | element types and conversions between them |
//! | [`hub`] | `base_model` as a folder or a hub id, downloaded into the shared cache |
//! | [`tokenizer`] | `tokenizer.json`: encode, decode, special ids |
//! | [`chat`] | the model's chat template, and which bytes of the rendered text the assistant wrote |
//! | [`peft`] | adapter folders: `adapter_config.json` and the tensor names, in PEFT's form and our own |

pub mod chat;
mod chat_json;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod hub;
pub mod peft;
pub mod tokenizer;
pub mod write;

#[cfg(test)]
mod tests;

pub use chat::{AssistantSpan, ChatTemplate, RenderedChat};
pub use checkpoint::{Checkpoint, TensorView};
pub use dtype::Dtype;
pub use error::HfError;
pub use hub::{resolve_dataset_files, resolve_model};
pub use peft::AdapterConfig;
pub use tokenizer::Tokenizer;
pub use write::{OutTensor, sync_dir, write_bytes_atomic, write_safetensors, write_sharded, write_text_atomic};

use std::path::Path;

/// Reads a text file.
pub(crate) fn read_text(path: &Path) -> Result<String, HfError> {
    std::fs::read_to_string(path).map_err(|source| HfError::io("read", path, source))
}

/// Reads and parses a JSON file; the error names the file, line and column.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, HfError> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|error| {
        HfError::bad_file(
            path,
            format!("not valid JSON: {error}"),
            "download or write the file again; it may be truncated",
        )
    })
}

/// Like [`read_json`], but `None` where the file does not exist.
pub(crate) fn read_json_if_there(path: &Path) -> Result<Option<serde_json::Value>, HfError> {
    match path.exists() {
        true => read_json(path).map(Some),
        false => Ok(None),
    }
}

/// The names of the files in a folder, sorted; empty where the folder cannot be read. For error messages.
pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}
