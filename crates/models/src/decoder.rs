//! A causal language model as a sequence of segments: embedding, blocks, head.
//!
//! The trainer runs the segments one at a time (activation checkpointing, per-layer updates); evaluation and generation run
//! them in a row with [`Decoder::hidden`] and [`Decoder::logits`].

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Gradients, Tensor};
use lowrank_core::lowrank::cast;
use lowrank_core::{Layer, LowRank, Projection};
use lowrank_kernels as kernels;

use crate::batch::Batch;
use crate::block::{Block, KeyValueCache, Norm};
use crate::config::DecoderConfig;
use crate::inputs::Inputs;
use crate::network::{self, Network, NetworkBatch, Replace};
use crate::parameters::{self, Named};

/// Module name of the token embedding.
const EMBEDDING: &str = "model.embed_tokens";

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

    /// [`Network::map_parameters`].
    pub fn map_parameters(&mut self, replace: Replace<'_>) {
        Network::map_parameters(self, replace);
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

impl NetworkBatch for Batch {
    fn target_count(&self) -> usize {
        Batch::target_count(self)
    }

    fn token_count(&self) -> usize {
        Batch::token_count(self)
    }

    fn records(&self) -> &[u64] {
        &self.records
    }
}

impl Network for Decoder {
    type Stem = Embedding;
    type Block = Block;
    type Head = Head;
    type Batch = Batch;
    type Inputs = Inputs;

    fn device(&self) -> Device {
        Decoder::device(self)
    }

    fn hidden_size(&self) -> usize {
        self.config.hidden_size
    }

    fn inputs(&self, batch: &Batch) -> Inputs {
        Inputs::new(batch, &self.config, 0, &self.device())
    }

    fn stem(&self) -> &Embedding {
        &self.model.embed_tokens
    }

    fn run_stem(&self, stem: &Embedding, inputs: &Inputs, _training: bool) -> Tensor<2> {
        stem.forward(inputs, &self.config, self.compute)
    }

    fn blocks(&self) -> &[Block] {
        &self.model.layers
    }

    fn run_block(&self, index: usize, block: &Block, x: Tensor<2>, inputs: &Inputs, training: bool) -> Tensor<2> {
        block.forward(x, inputs, &self.config, self.config.layers[index], training, None)
    }

    fn head(&self) -> Head {
        Decoder::head(self)
    }

    fn counted(&self, batch: &Batch) -> Vec<i32> {
        (0..batch.targets.len() as i32).filter(|&row| batch.targets[row as usize] >= 0).collect()
    }

    fn losses(&self, head: &Head, x: Tensor<2>, rows: &[i32], batch: &Batch, training: bool) -> Tensor<1> {
        let targets: Vec<i32> = rows.iter().map(|&row| batch.targets[row as usize]).collect();
        let targets = network::integers(&targets, &self.device());
        let softcap = self.config.final_softcap.unwrap_or(0.0);
        kernels::cross_entropy(head.forward(x, &self.config, training), targets, softcap)
    }

    fn default_head_chunk(&self) -> usize {
        network::head_chunk(self.config.vocab_size)
    }

    fn stem_name(&self) -> String {
        "model.embed_tokens".to_owned()
    }

    fn block_name(&self, index: usize) -> String {
        format!("model.layers.{index}")
    }

    fn map_stem(&mut self, replace: Replace<'_>) {
        let empty = Embedding { weight: Param::from_tensor(Tensor::zeros([1, 1], &self.device())), delta: None };
        let embedding = std::mem::replace(&mut self.model.embed_tokens, empty);
        self.model.embed_tokens = parameters::map(embedding, &self.stem_name(), replace);
    }

    fn map_block(&mut self, index: usize, replace: Replace<'_>) {
        let block = self.model.layers.remove(index);
        self.model.layers.insert(index, parameters::map(block, &self.block_name(index), replace));
    }

    fn map_head(&mut self, replace: Replace<'_>) {
        let empty = Norm::frozen(Tensor::zeros([1], &self.device()));
        let norm = std::mem::replace(&mut self.model.norm, empty);
        self.model.norm = parameters::map(norm, "model.norm", &mut *replace);
        self.lm_head = self.lm_head.take().map(|head| parameters::map(head, "lm_head", replace));
    }

    fn projections(block: &Block) -> Vec<(String, &Projection)> {
        block.projections().into_iter().map(|(name, projection)| (name.to_owned(), projection)).collect()
    }

    fn projections_mut(block: &mut Block) -> Vec<(String, &mut Projection)> {
        block.projections_mut().into_iter().map(|(name, projection)| (name.to_owned(), projection)).collect()
    }

    fn head_projections(head: &Head) -> Vec<(String, &Projection)> {
        head.lm_head.iter().map(|head| ("lm_head".to_owned(), head)).collect()
    }

    fn head_projections_mut(head: &mut Head) -> Vec<(String, &mut Projection)> {
        head.lm_head.iter_mut().map(|head| ("lm_head".to_owned(), head)).collect()
    }

    fn take_head_gradients(head: &Head, gradients: &mut Gradients, into: &mut Named) {
        parameters::take_gradients(&head.norm, "model.norm", gradients, into);
        if let Some(head) = &head.lm_head {
            parameters::take_gradients(head, "lm_head", gradients, into);
        }
        if let Some(tied) = &head.tied {
            parameters::take_gradients(tied, "model.embed_tokens.weight", gradients, into);
        }
    }

    fn for_each_layer(&mut self, change: &mut dyn FnMut(&str, Layer<'_>)) {
        for (index, block) in self.model.layers.iter_mut().enumerate() {
            for (name, projection) in block.projections_mut() {
                change(&format!("model.layers.{index}.{name}"), Layer::Linear(projection));
            }
        }
        if let Some(head) = &mut self.lm_head {
            change("lm_head", Layer::Linear(head));
        }
    }

    fn embedding(&mut self) -> Option<(&'static str, &mut Embedding)> {
        Some((EMBEDDING, &mut self.model.embed_tokens))
    }

    fn embedding_name(&self) -> Option<&'static str> {
        Some(EMBEDDING)
    }

    fn untie_head(&mut self) {
        if self.lm_head.is_none() {
            self.lm_head = Some(Projection::frozen(self.model.embed_tokens.weight.val().transpose(), None));
        }
    }
}
