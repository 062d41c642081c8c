//! One forward and backward pass, segment by segment.
//!
//! The model is run as stem, blocks, head ([`Network`]); each segment is lifted onto the tape alone. Going forward, a block keeps its
//! graph (`gradient_checkpointing = "none"`) or only its input (`"block"`, rebuilt on the way back). The head runs over chunks
//! of the counted rows, so `[tokens, vocab]` logits never exist, and rows that are not trained on cost nothing there.
//! Segments below the lowest trained parameter are never differentiated.
//!
//! The loss of a step is the sum over all counted tokens of all its micro batches divided by their number, whatever the split.

use burn::module::Module;
use burn::tensor::{FloatDType, Gradients, Tensor};
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::optim::{Optimizer, Update};
use lowrank_core::random::Stream;
use lowrank_core::{Base, Projection};
use lowrank_kernels as kernels;
use lowrank_models::network::{Network, Segment, integers};
use lowrank_models::parameters::{self, Named};

use crate::config::GradientCheckpointing;

/// What does not change from step to step.
#[derive(Clone, Copy, Debug)]
pub struct StepOptions {
    /// What a block keeps between forward and backward.
    pub checkpointing: GradientCheckpointing,
    /// Rows whose logits exist at the same time.
    pub head_chunk_tokens: usize,
    /// Seed of dropout masks; each (step, micro batch, segment) has its own.
    pub seed: u64,
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
    /// Squares of the norms of all gradients of the step, in parts.
    pub fn squares(&self, optimizer: &Optimizer) -> Vec<Tensor<1>> {
        let mut parts = optimizer.squared_norms(&self.gradients);
        parts.extend(self.applied_squares.iter().cloned());
        parts
    }

    /// Global 2-norm of all gradients of the step (one read from the device).
    pub fn norm(&self, optimizer: &Optimizer) -> f64 {
        let parts = self.squares(optimizer);
        let squares = if parts.is_empty() { vec![] } else { host(Tensor::cat(parts, 0)) };
        squares.iter().map(|&square| f64::from(square)).sum::<f64>().sqrt()
    }

    /// Notes how much there is now.
    fn weigh(&mut self) {
        let bytes = self.gradients.values().map(|gradient| 4 * gradient.shape().num_elements()).sum();
        self.peak_bytes = self.peak_bytes.max(bytes);
    }
}

/// The losses of the counted rows of one micro batch, chunk by chunk: on the device until they are read.
#[derive(Clone, Debug, Default)]
pub struct Losses(Vec<Tensor<1>>);

impl Losses {
    /// Their sum, read from the device and added up in f64.
    pub fn read(self) -> f64 {
        self.0.into_iter().map(|chunk| host(chunk).iter().map(|&loss| f64::from(loss)).sum::<f64>()).sum()
    }

    /// Their sum on the device, `[1]`; `None` where nothing is counted.
    pub fn sum(self) -> Option<Tensor<1>> {
        self.0.into_iter().map(|chunk| chunk.cast(FloatDType::F32).sum()).reduce(|sum, chunk| sum + chunk)
    }
}

/// f32 values of a small tensor.
pub(crate) fn host(tensor: Tensor<1>) -> Vec<f32> {
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

/// The same for all weights that are held as codes and have a gradient.
fn update_codes_now<M: Network>(
    model: &mut M,
    optimizer: &mut Optimizer,
    rules: Rules<'_>,
    gradients: &mut Named,
    mut note: impl FnMut(Tensor<1>),
) {
    model.for_each_projection(&mut |module, projection| {
        let Some(base) = projection.weight.trained_codes() else { return };
        let name = format!("{module}.weight");
        let Some(gradient) = gradients.remove(&name) else { return };
        note(optimizer.squared_norm(&name, &gradient));
        projection.weight = Base::Packed(optimizer.step_packed(&name, base, gradient, rules(&name)));
    });
}

/// Updates every parameter that has a gradient and removes the gradient. Those without a low-rank method are taken out of the
/// model and updated together.
pub fn apply<M: Network>(model: &mut M, accumulated: &mut Accumulated, optimizer: &mut Optimizer, rules: Rules<'_>) {
    update_codes_now(model, optimizer, rules, &mut accumulated.gradients, |_| {});
    // no copy of a parameter stays in the model while it is updated, so that it can change in place
    let (mut updates, stand_in) = (vec![], Tensor::<2>::empty([1, 1], &model.device()));
    model.map_parameters(&mut |name, parameter| match accumulated.gradients.remove(name) {
        None => parameter,
        Some(gradient) if optimizer.manages(name) => optimizer.step(name, parameter, gradient, rules(name)),
        Some(gradient) => {
            let is_vector = parameter.dims()[0] == 1; // which keeps its length
            let left = if is_vector { parameter.zeros_like() } else { stand_in.clone() };
            updates.push(Update { name: name.to_owned(), parameter, gradient, rule: rules(name) });
            left
        }
    });
    let names: Vec<String> = updates.iter().map(|update| update.name.clone()).collect();
    let mut updated: Named = names.into_iter().zip(optimizer.step_plain(updates)).collect();
    if !updated.is_empty() {
        model.map_parameters(&mut |name, value| updated.remove(name).unwrap_or(value));
    }
}

/// Whether a segment has parameters or codes that are trained.
fn is_trained<S: Module>(segment: &S, projections: &[(String, &Projection)]) -> bool {
    let has_codes = projections.iter().any(|(_, projection)| projection.weight.trained_codes().is_some());
    has_codes || !parameters::trained(segment).is_empty()
}

/// A block between forward and backward.
struct Pending<B> {
    /// The block's input: on the tape with a graph, plain without.
    input: Tensor<2>,
    /// The block on the tape and its output, unless they are rebuilt.
    graph: Option<(B, Tensor<2>)>,
}

/// The state of one pass over a model.
pub struct Pass<'a, M: Network> {
    model: &'a mut M,
    options: StepOptions,
    /// Lowest block that is trained or has trained parameters below it.
    first_trained: usize,
    /// Whether the stem is trained.
    stem_is_trained: bool,
}

impl<'a, M: Network> Pass<'a, M> {
    /// Looks up which segments need a backward pass.
    pub fn new(model: &'a mut M, options: StepOptions) -> Self {
        let stem_is_trained = !parameters::trained(model.stem()).is_empty();
        let blocks = model.blocks();
        let first = blocks.iter().position(|block| is_trained(block, &M::projections(block))).unwrap_or(blocks.len());
        let first_trained = if stem_is_trained { 0 } else { first };
        Self { model, options, first_trained, stem_is_trained }
    }

    /// Runs one micro batch forward and backward and returns its losses, unread: nothing here waits for the device.
    ///
    /// Gradients are those of `sum / denominator`; they are added to `into`, or applied at once where `immediate` gives the
    /// rates. `key` numbers the micro batch within the run, for dropout. The optimiser was told of the step before
    /// ([`Optimizer::begin`]); it sees the factors of the gradients it asked for.
    pub fn run(
        &mut self,
        batch: &M::Batch,
        denominator: f64,
        key: u64,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
        immediate: Option<Rules<'_>>,
    ) -> Losses {
        let inputs = self.model.inputs(batch);
        let (mut pending, hidden) = self.forward(&inputs, key);
        let (losses, d_hidden) = self.head(batch, hidden, denominator, key, into, optimizer);
        if let Some(rules) = immediate {
            self.model.map_head(&mut |name, value| update_now(name, value, optimizer, rules, into));
            self.update_codes(optimizer, rules, into);
        }
        let mut gradient = d_hidden;
        for index in (self.first_trained..self.model.blocks().len()).rev() {
            let (Some(block), Some(from)) = (pending.pop(), gradient.take()) else { break };
            gradient = self.backward_block(index, block, from, &inputs, key, into, optimizer);
            if let Some(rules) = immediate {
                self.model.map_block(index, &mut |name, value| update_now(name, value, optimizer, rules, into));
                self.update_codes(optimizer, rules, into);
            }
        }
        if let (true, Some(gradient)) = (self.stem_is_trained, gradient) {
            self.backward_stem(&inputs, gradient, key, into);
        }
        // The stem last: a tied head has added to its gradient.
        if let Some(rules) = immediate {
            self.model.map_stem(&mut |name, value| update_now(name, value, optimizer, rules, into));
        }
        losses
    }

    /// [`update_now`] for codes. Only those of the last segment have a gradient.
    fn update_codes(&mut self, optimizer: &mut Optimizer, rules: Rules<'_>, into: &mut Accumulated) {
        let Accumulated { gradients, applied_squares, .. } = into;
        update_codes_now(self.model, optimizer, rules, gradients, |square| applied_squares.push(square));
    }

    /// Forward through stem and blocks; blocks that need a backward pass leave what it needs.
    fn forward(&self, inputs: &M::Inputs, key: u64) -> (Vec<Pending<M::Block>>, Tensor<2>) {
        self.seed_dropout(key, Segment::Stem);
        let mut x = self.model.run_stem(self.model.stem(), inputs, true);
        let mut pending = vec![];
        for (index, block) in self.model.blocks().iter().enumerate() {
            self.seed_dropout(key, Segment::Block(index));
            let keeps_graph = self.options.checkpointing == GradientCheckpointing::None && index >= self.first_trained;
            if keeps_graph {
                let lifted = self.lifted(index);
                let input = self.lift(x, index);
                let out = self.model.run_block(index, &lifted, input.clone(), inputs, true);
                x = out.clone().inner();
                pending.push(Pending { input, graph: Some((lifted, out)) });
            } else {
                if index >= self.first_trained {
                    pending.push(Pending { input: x.clone(), graph: None });
                }
                x = self.model.run_block(index, block, x, inputs, true);
            }
        }
        (pending, x)
    }

    /// A block on the tape, with placeholders where its gradients leave as factors.
    fn lifted(&self, index: usize) -> M::Block {
        let mut lifted = self.model.blocks()[index].clone().train();
        for (_, projection) in M::projections_mut(&mut lifted) {
            projection.lift_slots();
        }
        lifted
    }

    /// A block's input on the tape; tracked only where something below it is trained.
    fn lift(&self, x: Tensor<2>, index: usize) -> Tensor<2> {
        let x = Tensor::from_inner(x);
        if index > self.first_trained || self.stem_is_trained { x.require_grad() } else { x }
    }

    /// Restarts the device's generator for one segment of one micro batch, so that a segment that is run again draws the
    /// same masks.
    fn seed_dropout(&self, key: u64, segment: Segment) {
        if self.model.has_dropout(segment) {
            let number = match segment {
                Segment::Stem => 0xffff,
                Segment::Block(index) => index as u64,
                Segment::Head => 0xfffe,
            };
            let seed = Stream::new(self.options.seed, "dropout").bits((key << 16) | number);
            self.model.device().seed(seed);
        }
    }

    /// Losses of the counted rows chunk by chunk; returns them with the gradient of the last hidden state, `[t, hidden]`, where
    /// anything below the head is trained.
    fn head(
        &self,
        batch: &M::Batch,
        hidden: Tensor<2>,
        denominator: f64,
        key: u64,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
    ) -> (Losses, Option<Tensor<2>>) {
        let device = self.model.device();
        let counted = self.model.counted(batch);
        let needs_gradient = self.first_trained < self.model.blocks().len() || self.stem_is_trained;
        let all_rows = counted.len() == hidden.dims()[0];
        let mut lifted = self.model.head().train();
        M::head_projections_mut(&mut lifted).into_iter().for_each(|(_, projection)| projection.lift_slots());
        let head_is_trained = is_trained(&lifted, &M::head_projections(&lifted));
        let mut d_hidden = (needs_gradient && !all_rows).then(|| hidden.zeros_like());
        let mut pieces = vec![];
        let mut all = Losses::default();
        self.seed_dropout(key, Segment::Head);
        for chunk in counted.chunks(self.options.head_chunk_tokens.max(1)) {
            let rows = integers(chunk, &device);
            let x = Tensor::from_inner(hidden.clone().select(0, rows.clone()));
            let x = if needs_gradient { x.require_grad() } else { x };
            let losses = self.model.losses(&lifted, x.clone(), chunk, batch, true);
            all.0.push(losses.clone().inner());
            if !(needs_gradient || head_is_trained) {
                continue;
            }
            let weight = Tensor::<1>::full([chunk.len()], 1.0 / denominator, &device);
            let mut gradients = kernels::backward_from(losses, Tensor::from_inner(weight));
            take_head_gradients::<M>(&lifted, &mut gradients, into, optimizer);
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
        (all, d_hidden)
    }

    /// Backward through one block; returns the gradient of its input where something below needs it.
    fn backward_block(
        &self,
        index: usize,
        pending: Pending<M::Block>,
        gradient: Tensor<2>,
        inputs: &M::Inputs,
        key: u64,
        into: &mut Accumulated,
        optimizer: &mut Optimizer,
    ) -> Option<Tensor<2>> {
        let Pending { input, graph } = pending;
        let (lifted, input, out) = match graph {
            Some((lifted, out)) => (lifted, input, out),
            None => {
                self.seed_dropout(key, Segment::Block(index));
                let lifted = self.lifted(index);
                let input = self.lift(input, index);
                let out = self.model.run_block(index, &lifted, input.clone(), inputs, true);
                (lifted, input, out)
            }
        };
        let mut gradients = kernels::backward_from(out, Tensor::from_inner(gradient));
        let block = self.model.block_name(index);
        parameters::take_gradients(&lifted, &block, &mut gradients, &mut into.gradients);
        for (name, projection) in M::projections(&lifted) {
            take_slots(projection, &format!("{block}.{name}"), &mut gradients, into, optimizer);
        }
        into.weigh();
        input.grad_remove(&mut gradients)
    }

    fn backward_stem(&self, inputs: &M::Inputs, gradient: Tensor<2>, key: u64, into: &mut Accumulated) {
        self.seed_dropout(key, Segment::Stem);
        let lifted = self.model.stem().clone().train();
        let out = self.model.run_stem(&lifted, inputs, true);
        let mut gradients = kernels::backward_from(out, Tensor::from_inner(gradient));
        parameters::take_gradients(&lifted, &self.model.stem_name(), &mut gradients, &mut into.gradients);
        into.weigh();
    }
}

/// Takes what does not arrive as the gradient of a parameter: that of trained codes, and factors, which are shown to the optimiser
/// that asked for them and replaced by what it makes of them.
fn take_slots(
    projection: &Projection,
    module: &str,
    gradients: &mut Gradients,
    into: &mut Accumulated,
    optimizer: &mut Optimizer,
) {
    let name = format!("{module}.weight");
    if let Some(gradient) = projection.take_gradient(gradients) {
        parameters::add(&mut into.gradients, name, gradient);
    } else if let Some((x, dy)) = projection.take_factors(gradients) {
        let collected = optimizer.observe(&name, x, dy);
        parameters::add(&mut into.gradients, name, collected);
    }
}

/// The head's gradients under the names of its parameters.
fn take_head_gradients<M: Network>(
    lifted: &M::Head,
    gradients: &mut Gradients,
    into: &mut Accumulated,
    optimizer: &mut Optimizer,
) {
    M::take_head_gradients(lifted, gradients, &mut into.gradients);
    for (module, projection) in M::head_projections(lifted) {
        take_slots(projection, &module, gradients, into, optimizer);
    }
    into.weigh();
}
