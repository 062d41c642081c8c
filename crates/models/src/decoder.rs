//! A causal language model as a sequence of segments: embedding, blocks, head.
//!
//! The trainer runs the segments one at a time (activation checkpointing, per-layer updates); evaluation and generation run
//! them in a row with [`Decoder::hidden`] and [`Decoder::logits`].

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_core::lowrank::cast;
use lowrank_core::{LowRank, Projection};
use lowrank_kernels as kernels;

use crate::block::{Block, KeyValueCache, Norm};
use crate::config::DecoderConfig;
use crate::inputs::Inputs;
use crate::parameters;

/// Token embedding, `[vocab, hidden]`.
#[derive(Module, Debug)]
pub struct Embedding {
    /// One row a token.
    pub weight: Param<Tensor<2>>,
    /// What an adapter adds: `s A[ids] B`.
    pub delta: Option<LowRank>,
}

impl Embedding {
    /// The rows of the batch's tokens, `[t, hidden]`, in the compute type.
    pub fn forward(&self, inputs: &Inputs, config: &DecoderConfig, dtype: FloatDType) -> Tensor<2> {
        let mut x = cast(self.weight.val().select(0, inputs.ids.clone()), dtype);
        if let Some(delta) = &self.delta {
            let rows = cast(delta.down.val().select(0, inputs.ids.clone()), dtype);
            x = x + rows.matmul(cast(delta.up.val(), dtype)) * delta.scale;
        }
        match config.embedding_scale {
            Some(scale) => x * scale, // Burn rounds the factor to the type of x, as transformers does
            None => x,
        }
    }
}

/// The stem of the checkpoint's names: `model.*`.
#[derive(Module, Debug)]
pub struct Trunk {
    /// Token embedding.
    pub embed_tokens: Embedding,
    /// Blocks in order.
    pub layers: Vec<Block>,
    /// Norm before the head.
    pub norm: Norm,
}

/// A decoder with its configuration. Field names are the names in a checkpoint.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `model.*`
    pub model: Trunk,
    /// `lm_head`, absent where the head is the embedding.
    pub lm_head: Option<Projection>,
    /// Sizes and switches of the family.
    #[module(skip)]
    pub config: Arc<DecoderConfig>,
    /// Type of the activations.
    #[module(skip)]
    pub compute: FloatDType,
}

/// The last segment: norm and vocabulary projection.
#[derive(Module, Debug)]
pub struct Head {
    /// `model.norm`
    pub norm: Norm,
    /// `lm_head`, where there is one.
    pub lm_head: Option<Projection>,
    /// `model.embed_tokens.weight [vocab, hidden]`, where the head is tied.
    pub tied: Option<Param<Tensor<2>>>,
}

impl Head {
    /// Logits `[n, vocab]` before any capping, from the residual stream `[n, hidden]`.
    pub fn forward(&self, x: Tensor<2>, config: &DecoderConfig, training: bool) -> Tensor<2> {
        let x = self.norm.forward(x, config);
        match (&self.lm_head, &self.tied) {
            (Some(head), _) => head.forward(x, training),
            (None, Some(embedding)) => {
                let dtype = x.dtype().into();
                kernels::linear(x, cast(embedding.val(), dtype).transpose(), None)
            }
            (None, None) => unreachable!("a head is tied or its own"),
        }
    }
}

impl Decoder {
    /// The head with handles to the shared parameters.
    pub fn head(&self) -> Head {
        let tied = self.lm_head.is_none().then(|| self.model.embed_tokens.weight.clone());
        Head { norm: self.model.norm.clone(), lm_head: self.lm_head.clone(), tied }
    }

    /// Replaces every parameter by what `replace` makes of it and its name. Values are handed over, not copied, so an
    /// optimiser can change them in place.
    pub fn map_parameters(&mut self, replace: &mut dyn FnMut(&str, Tensor<2>) -> Tensor<2>) {
        self.map_embedding(replace);
        for index in 0..self.model.layers.len() {
            self.map_block(index, replace);
        }
        self.map_head(replace);
    }

    /// [`Decoder::map_parameters`] for the embedding alone.
    pub fn map_embedding(&mut self, replace: &mut dyn FnMut(&str, Tensor<2>) -> Tensor<2>) {
        let empty = Embedding { weight: Param::from_tensor(Tensor::zeros([1, 1], &self.device())), delta: None };
        let embedding = std::mem::replace(&mut self.model.embed_tokens, empty);
        self.model.embed_tokens = parameters::map(embedding, "model.embed_tokens", replace);
    }

    /// [`Decoder::map_parameters`] for one block alone.
    pub fn map_block(&mut self, index: usize, replace: &mut dyn FnMut(&str, Tensor<2>) -> Tensor<2>) {
        let block = self.model.layers.remove(index);
        self.model.layers.insert(index, parameters::map(block, &format!("model.layers.{index}"), replace));
    }

    /// [`Decoder::map_parameters`] for the last norm and an untied head alone.
    pub fn map_head(&mut self, replace: &mut dyn FnMut(&str, Tensor<2>) -> Tensor<2>) {
        let empty = Norm::frozen(Tensor::zeros([1], &self.device()));
        let norm = std::mem::replace(&mut self.model.norm, empty);
        self.model.norm = parameters::map(norm, "model.norm", &mut *replace);
        self.lm_head = self.lm_head.take().map(|head| parameters::map(head, "lm_head", replace));
    }

    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.model.norm.weight.device()
    }

    /// The residual stream after all blocks, `[t, hidden]`, without a tape. With caches (one a block) only the new tokens of
    /// `inputs` are run and the caches grow.
    pub fn hidden(&self, inputs: &Inputs, mut caches: Option<&mut Vec<KeyValueCache>>) -> Tensor<2> {
        let config = &self.config;
        let mut x = self.model.embed_tokens.forward(inputs, config, self.compute);
        for (index, block) in self.model.layers.iter().enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[index]);
            x = block.forward(x, inputs, config, config.layers[index], false, cache);
        }
        x
    }

    /// Logits of rows of the residual stream, capped as the family does, in f32: `[n, hidden]` to `[n, vocab]`.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        let logits = self.head().forward(x, &self.config, false).cast(FloatDType::F32);
        match self.config.final_softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Empty caches for generation.
    pub fn caches(&self, rows: usize, capacity: usize) -> Vec<KeyValueCache> {
        let device = self.device();
        (0..self.config.num_layers)
            .map(|_| KeyValueCache::new(rows, capacity, &self.config, self.compute, &device))
            .collect()
    }
}
