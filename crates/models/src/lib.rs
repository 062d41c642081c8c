//! Models of `lowrank`: decoder families, classifiers, Hugging Face files, generation.
//!
//! A family (one file) turns a `config.json` into a [`DecoderConfig`](config::DecoderConfig); one [`Decoder`] runs them all. Its
//! fields are named as the tensors on disk, so a parameter's path is its name in a checkpoint. Models never name an adapter
//! method: every linear map is a [`Projection`](lowrank_core::Projection).

pub mod adapters;
pub mod batch;
pub mod bert;
pub mod block;
pub mod classifier;
pub mod config;
pub mod convnet;
pub mod decoder;
pub mod encoder;
pub mod export;
mod gemma;
pub mod generate;
pub mod hf;
pub mod inputs;
mod llama;
pub mod load;
mod mistral;
pub mod network;
pub mod parameters;
mod qwen;
pub mod save;
pub mod series;
pub mod vit;

pub use batch::{Batch, IGNORE};
pub use classifier::{Classifier, ClassifierBatch};
pub use decoder::Decoder;
pub use inputs::Inputs;
pub use network::{Network, NetworkBatch, Segment};
