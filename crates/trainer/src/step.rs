//! One forward and backward pass, segment by segment.
//!
//! The model is run as embedding, blocks, head; each segment is lifted onto the tape alone. Going forward, a block keeps its
//! graph (`gradient_checkpointing = "none"`) or only its input (`"block"`, rebuilt on the way back). The head runs over chunks
//! of the counted tokens, so `[tokens, vocab]` logits never exist, and rows that are not trained on cost nothing there.
//! Segments below the lowest trained parameter are never differentiated.
//!
//! The loss of a step is the sum over all counted tokens of all its micro batches divided by their number, whatever the split.

use burn::module::Module as _;
use burn::tensor::{Device, FloatDType, Gradients, Int, Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::optim::Optimizer;
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::random::Stream;
use lowrank_kernels as kernels;
use lowrank_models::block::Block;
use lowrank_models::decoder::Decoder;
use lowrank_models::parameters::{self, Named};
use lowrank_models::{Batch, Inputs};

use crate::config::GradientCheckpointing;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// What a block keeps between forward and backward.
    pub checkpointing: GradientCheckpointing,
    /// Tokens whose logits exist at the same time.
    pub head_chunk_tokens: usize,
    /// Seed of dropout masks; each (step, micro batch, block) has its own.
    pub seed: u64,
}

/// Tokens of a head chunk: logits of at most 64 MiB in f32, between 64 and 4096 tokens.
pub fn default_head_chunk(vocab: usize) -> usize {
    ((64 << 20) / (4 * vocab.max(1))).clamp(64, 4096)
}

/// Per-parameter learning rate and weight decay of one step, by parameter name.
pub type Rules<'a> = &'a dyn Fn(&str) -> StepRule;

/// Gradients of a step, with the sum of squares of those already applied.
#[derive(Debug, Default)]
pub struct Accumulated {
    /// By parameter name, in f32.
    pub gradients: Named,
    /// Sums of squares of gradients that an immediate update consumed.
    applied_squares: Vec<Tensor<1>>,
    /// Most bytes of gradients that existed at the same time.
    pub peak_bytes: usize,
}

impl Accumulated {
    /// Global 2-norm of all gradients of the step (one read from the device).
    pub fn norm(&self, optimizer: &Optimizer) -> f64 {
        let mut parts: Vec<Tensor<1>> =
            self.gradients.iter().map(|(name, gradient)| optimizer.squared_norm(name, gradient)).collect();
        parts.extend(self.applied_squares.iter().cloned());
        if parts.is_empty() {
            return 0.0;
        }
        let squares = host(Tensor::cat(parts, 0));
        squares.iter().map(|&square| f64::from(square)).sum::<f64>().sqrt()
    }

    /// Notes how much there is now.
    fn weigh(&mut self) {
        let bytes = self.gradients.values().map(|gradient| 4 * gradient.shape().num_elements()).sum();
        self.peak_bytes = self.peak_bytes.max(bytes);
    }
}

/// f32 values of a small tensor.
fn host(tensor: Tensor<1>) -> Vec<f32> {
    let data = tensor.cast(FloatDType::F32).into_data();
    data.try_to_vec::<f32>().unwrap_or_else(|_| unreachable!("cast to f32 just before"))
}

/// The new value of one parameter, if it has a gradient, as soon as its gradient is complete, so that they never all exist at
/// once. The gradient's square is noted and the gradient dropped.
fn update_now(
    name: &str,
    value: Tensor<2>,
    optimizer: &mut Optimizer,
    rules: Rules<'_>,
    into: &mut Accumulated,
) -> Tensor<2> {
    let Some(gradient) = into.gradients.remove(name) else { return value };
    into.applied_squares.push(optimizer.squared_norm(name, &gradient));
    optimizer.step(name, value, gradient, rules(name))
}

/// Updates every parameter that has a gradient and removes the gradient.
pub fn apply(decoder: &mut Decoder, accumulated: &mut Accumulated, optimizer: &mut Optimizer, rules: Rules<'_>) {
    decoder.map_parameters(&mut |name, value| match accumulated.gradients.remove(name) {
        Some(gradient) => optimizer.step(name, value, gradient, rules(name)),
        None => value,
    });
}

/// A block between forward and backward.
struct Pending {
    /// The block's input: on the tape with a graph, plain without.
    input: Tensor<2>,
    /// The block on the tape and its output, unless they are rebuilt.
    graph: Option<(Block, Tensor<2>)>,
}

/// The state of one pass over a model.
pub struct Pass<'a> {
    decoder: &'a mut Decoder,
    options: StepOptions,
    /// Lowest block that is trained or has trained parameters below it.
    first_trained: usize,
    /// Whether the embedding is trained.
    embedding_is_trained: bool,
}

impl<'a> Pass<'a> {
    /// Looks up which segments need a backward pass.
    pub fn new(decoder: &'a mut Decoder, options: StepOptions) -> Self {
        let embedding_is_trained = !parameters::trained(&decoder.model.embed_tokens).is_empty();
        let blocks = &decoder.model.layers;
        let first = blocks.iter().position(|block| !parameters::trained(block).is_empty()).unwrap_or(blocks.len());
        let first_trained = if embedding_is_trained { 0 } else { first };
        Self { decoder, options, first_trained, embedding_is_trained }
    }

    /// Runs one micro batch forward and backward and returns its summed loss.
    ///
    /// Gradients are those of `sum / denominator`; they are added to `into`, or applied at once where `immediate` gives the
    /// rates. `key` numbers the micro batch within the run, for dropout. The optimiser was told of the step before
    /// ([`Optimizer::begin`]); it sees the factors of the gradients it asked for.
    pub fn run(
        &mut self,
        batch: &Batch,
        denominator: f64,
        key: u64,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
        immediate: Option<Rules<'_>>,
    ) -> f64 {
        let device = self.decoder.device();
        let inputs = Inputs::new(batch, &self.decoder.config, 0, &device);
        let (mut pending, hidden) = self.forward(&inputs, key);
        let (loss, d_hidden) = self.head(batch, hidden, denominator, &device, into, optimizer);
        if let Some(rules) = immediate {
            self.decoder.map_head(&mut |name, value| update_now(name, value, optimizer, rules, into));
        }
        let mut gradient = d_hidden;
        for index in (self.first_trained..self.decoder.model.layers.len()).rev() {
            let (Some(block), Some(from)) = (pending.pop(), gradient.take()) else { break };
            gradient = self.backward_block(index, block, from, &inputs, key, into, optimizer);
            if let Some(rules) = immediate {
                self.decoder.map_block(index, &mut |name, value| update_now(name, value, optimizer, rules, into));
            }
        }
        if let (true, Some(gradient)) = (self.embedding_is_trained, gradient) {
            self.backward_embedding(&inputs, gradient, into);
        }
        // The embedding last: a tied head has added to its gradient.
        if let Some(rules) = immediate {
            self.decoder.map_embedding(&mut |name, value| update_now(name, value, optimizer, rules, into));
        }
        loss
    }

    /// Forward through embedding and blocks; blocks that need a backward pass leave what it needs.
    fn forward(&self, inputs: &Inputs, key: u64) -> (Vec<Pending>, Tensor<2>) {
        let config = self.decoder.config.clone();
        let mut x = self.decoder.model.embed_tokens.forward(inputs, &config, self.decoder.compute);
        let mut pending = vec![];
        for (index, block) in self.decoder.model.layers.iter().enumerate() {
            self.seed_dropout(key, index);
            let layer = config.layers[index];
            let keeps_graph = self.options.checkpointing == GradientCheckpointing::None && index >= self.first_trained;
            if keeps_graph {
                let lifted = self.lifted(index);
                let input = self.lift(x, index);
                let out = lifted.forward(input.clone(), inputs, &config, layer, true, None);
                x = out.clone().inner();
                pending.push(Pending { input, graph: Some((lifted, out)) });
            } else {
                if index >= self.first_trained {
                    pending.push(Pending { input: x.clone(), graph: None });
                }
                x = block.forward(x, inputs, &config, layer, true, None);
            }
        }
        (pending, x)
    }

    /// A block on the tape, with placeholders where its gradients leave as factors.
    fn lifted(&self, index: usize) -> Block {
        let mut lifted = self.decoder.model.layers[index].clone().train();
        for (_, projection) in lifted.projections_mut() {
            projection.lift_slots();
        }
        lifted
    }

    /// A block's input on the tape; tracked only where something below it is trained.
    fn lift(&self, x: Tensor<2>, index: usize) -> Tensor<2> {
        let x = Tensor::from_inner(x);
        if index > self.first_trained || self.embedding_is_trained { x.require_grad() } else { x }
    }

    /// Restarts the device's generator for one block of one micro batch, so that a rebuilt block draws the same masks.
    fn seed_dropout(&self, key: u64, index: usize) {
        if self.block_has_dropout(index) {
            let seed = Stream::new(self.options.seed, "dropout").bits((key << 16) | index as u64);
            self.decoder.device().seed(seed);
        }
    }

    fn block_has_dropout(&self, index: usize) -> bool {
        self.decoder.model.layers[index]
            .projections()
            .iter()
            .any(|(_, projection)| projection.delta.as_ref().is_some_and(|delta| delta.dropout > 0.0))
    }

    /// Loss of the counted tokens chunk by chunk; returns it with the gradient of the residual stream, `[t, hidden]`, where
    /// anything below the head is trained.
    fn head(
        &self,
        batch: &Batch,
        hidden: Tensor<2>,
        denominator: f64,
        device: &Device,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
    ) -> (f64, Option<Tensor<2>>) {
        let config = self.decoder.config.clone();
        let counted: Vec<i32> = (0..batch.targets.len() as i32).filter(|&i| batch.targets[i as usize] >= 0).collect();
        let needs_gradient = self.first_trained < self.decoder.model.layers.len() || self.embedding_is_trained;
        let all_rows = counted.len() == batch.targets.len();
        let mut lifted = self.decoder.head().train();
        lifted.lm_head.as_mut().into_iter().for_each(|head| head.lift_slots());
        let head_is_trained = !parameters::trained(&lifted).is_empty();
        let softcap = config.final_softcap.unwrap_or(0.0);
        let mut d_hidden = (needs_gradient && !all_rows).then(|| hidden.zeros_like());
        let mut pieces = vec![];
        let mut loss = 0.0f64;
        for chunk in counted.chunks(self.options.head_chunk_tokens.max(1)) {
            let rows = Tensor::<1, Int>::from_data(TensorData::new(chunk.to_vec(), [chunk.len()]), device);
            let x = Tensor::from_inner(hidden.clone().select(0, rows.clone()));
            let x = if needs_gradient { x.require_grad() } else { x };
            let targets: Vec<i32> = chunk.iter().map(|&row| batch.targets[row as usize]).collect();
            let targets = Tensor::<1, Int>::from_data(TensorData::new(targets, [chunk.len()]), device);
            let losses = kernels::cross_entropy(lifted.forward(x.clone(), &config, true), targets, softcap);
            loss += host(losses.clone().inner()).iter().map(|&loss| f64::from(loss)).sum::<f64>();
            if !(needs_gradient || head_is_trained) {
                continue;
            }
            let weight = Tensor::<1>::full([chunk.len()], 1.0 / denominator, device);
            let mut gradients = kernels::backward_from(losses, Tensor::from_inner(weight));
            take_head_gradients(&lifted, &mut gradients, into, optimizer);
            if let Some(piece) = x.grad_remove(&mut gradients) {
                match d_hidden.take() {
                    Some(d) => d_hidden = Some(d.select_assign(0, rows, piece, burn::tensor::IndexingUpdateOp::Add)),
                    None => pieces.push(piece),
                }
            }
        }
        let d_hidden = match (needs_gradient, all_rows && !pieces.is_empty()) {
            (true, true) => Some(Tensor::cat(pieces, 0)),
            (true, false) => d_hidden.or_else(|| Some(hidden.zeros_like())),
            (false, _) => None,
        };
        (loss, d_hidden)
    }

    /// Backward through one block; returns the gradient of its input where something below needs it.
    fn backward_block(
        &self,
        index: usize,
        pending: Pending,
        gradient: Tensor<2>,
        inputs: &Inputs,
        key: u64,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
    ) -> Option<Tensor<2>> {
        let Pending { input, graph } = pending;
        let (lifted, input, out) = match graph {
            Some((lifted, out)) => (lifted, input, out),
            None => {
                self.seed_dropout(key, index);
                let config = &self.decoder.config;
                let lifted = self.lifted(index);
                let input = self.lift(input, index);
                let out = lifted.forward(input.clone(), inputs, config, config.layers[index], true, None);
                (lifted, input, out)
            }
        };
        let mut gradients = kernels::backward_from(out, Tensor::from_inner(gradient));
        let block = format!("model.layers.{index}");
        parameters::take_gradients(&lifted, &block, &mut gradients, &mut into.gradients);
        for (name, projection) in lifted.projections() {
            take_factors(projection, &format!("{block}.{name}"), &mut gradients, into, optimizer);
        }
        into.weigh();
        input.grad_remove(&mut gradients)
    }

    fn backward_embedding(&self, inputs: &Inputs, gradient: Tensor<2>, into: &mut Accumulated) {
        let lifted = self.decoder.model.embed_tokens.clone().train();
        let out = lifted.forward(inputs, &self.decoder.config, self.decoder.compute);
        let mut gradients = kernels::backward_from(out, Tensor::from_inner(gradient));
        parameters::take_gradients(&lifted, "model.embed_tokens", &mut gradients, &mut into.gradients);
        into.weigh();
    }
}

/// Shows the optimiser the factors of a gradient where it asked for them, and adds what it makes of them.
fn take_factors(
    projection: &Projection,
    module: &str,
    gradients: &mut Gradients,
    into: &mut Accumulated,
    optimizer: &mut Optimizer,
) {
    if let Some((x, dy)) = projection.take_factors(gradients) {
        let name = format!("{module}.weight");
        let collected = optimizer.observe(&name, x, dy);
        parameters::add(&mut into.gradients, name, collected);
    }
}

/// The head's parameters under their checkpoint names.
fn take_head_gradients(
    lifted: &lowrank_models::decoder::Head,
    gradients: &mut Gradients,
    into: &mut Accumulated,
    optimizer: &mut Optimizer,
) {
    parameters::take_gradients(&lifted.norm, "model.norm", gradients, &mut into.gradients);
    if let Some(head) = &lifted.lm_head {
        parameters::take_gradients(head, "lm_head", gradients, &mut into.gradients);
        take_factors(head, "lm_head", gradients, into, optimizer);
    }
    if let Some(tied) = &lifted.tied {
        parameters::take_gradients(tied, "model.embed_tokens.weight", gradients, &mut into.gradients);
    }
    into.weigh();
}
