//! Models of `lowrank`: decoder families, Hugging Face files, generation.
//!
//! A family (one file) turns a `config.json` into a [`DecoderConfig`](config::DecoderConfig); one [`Decoder`] runs them all. Its
//! fields are named as the tensors on disk, so a parameter's path is its name in a checkpoint. Models never name an adapter
//! method: every linear map is a [`Projection`](lowrank_core::Projection).

pub mod adapters;
pub mod batch;
pub mod block;
pub mod config;
pub mod decoder;
mod gemma;
pub mod generate;
pub mod hf;
pub mod inputs;
mod llama;
pub mod load;
mod mistral;
pub mod parameters;
mod qwen;
pub mod save;

pub use batch::{Batch, IGNORE};
pub use decoder::Decoder;
pub use inputs::Inputs;
