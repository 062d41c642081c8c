//! A training step without values: the order of [`crate::step`] and of the update, with the life of every buffer.

use std::collections::{BTreeMap, BTreeSet};

use lowrank_core::optim::Side;

use super::layers::{Collect, Held, Segment};
use super::ledger::{Buffer, Bytes, Category, Ledger, Phase};
use super::matrices::Matrix;
use super::methods::{Kind, Method};
use super::model::{Block, Model, Parameter, Stem};
use super::operations::{Machine, Operations, Shape};
use super::tape::{Gradients, Value, sum};

/// All that decides the memory of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Setup {
    /// The model with its adapter.
    pub model: Model,
    /// Where it runs.
    pub machine: Machine,
    /// Bytes of an activation.
    pub width: usize,
    /// Sequences and tokens of a micro batch.
    pub shape: Shape,
    /// Tokens with a loss, or sequences.
    pub counted: usize,
    /// Bytes of a micro batch before it is embedded.
    pub inputs: usize,
    /// Tokens whose logits exist at the same time.
    pub head_chunk: usize,
    /// Micro batches of a step.
    pub micro_batches: usize,
    /// Steps of the run, if it says so.
    pub steps: Option<u64>,
    /// Blocks are rebuilt in the backward pass.
    pub rebuilds: bool,
    /// Parameters are updated as soon as their gradient is complete.
    pub immediate: bool,
    /// Low-rank methods by the name of the weight.
    pub methods: BTreeMap<String, Method>,
}

/// Steps that are run at most to find the one that needs most.
const MOST_STEPS: usize = 600;

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Needs {
    /// By category at the moment of the most.
    pub peak: Bytes,
    /// What is done at that moment.
    pub phase: Phase,
    /// The most of each phase.
    pub phases: Vec<(Phase, u64)>,
    /// Between two steps.
    pub rest: Bytes,
}

/// Runs the first steps, and every later step in which another subspace is chosen.
pub fn run(setup: &Setup) -> Needs {
    let ledger = Ledger::default();
    let at = Operations { ledger: ledger.clone(), machine: setup.machine, width: setup.width };
    let mut run = Run::new(setup, &at);
    let numbers = steps_of_interest(setup);
    let mut rest = ledger.live();
    for number in numbers {
        run.step(number);
        ledger.enter(Phase::Rest);
        rest = ledger.live();
    }
    let (peak, phase) = ledger.peak();
    let phases = Phase::ALL.iter().map(|&phase| (phase, ledger.most_of(phase))).collect();
    Needs { peak, phase, phases, rest }
}

fn steps_of_interest(setup: &Setup) -> Vec<u64> {
    let longest = setup.methods.values().map(|method| method.gap).filter(|&gap| gap < u64::MAX).max().unwrap_or(0);
    let end = setup.steps.unwrap_or(u64::MAX);
    let due = |number: &u64| setup.methods.values().any(|method| Matrix::refreshes_at(method, *number));
    let later = (2..=longest.saturating_add(1)).filter(due).take(MOST_STEPS);
    (0..2).chain(later).take_while(|number| *number < end.max(1)).collect()
}

/// A block between forward and backward.
struct Pending<'a> {
    input: Value,
    graph: Option<(Segment<'a>, Value)>,
}

/// A run with all it holds.
pub(super) struct Run<'a> {
    pub(super) setup: &'a Setup,
    pub(super) at: &'a Operations,
    held: Held,
    matrices: BTreeMap<String, Matrix>,
    /// Moments of AdamW.
    plain: BTreeMap<String, Buffer>,
    /// Cosine bases by size.
    cosines: BTreeMap<usize, Buffer>,
    /// Weights that still lie as on disk.
    strided: BTreeSet<String>,
    /// By parameter name.
    gradients: BTreeMap<String, Buffer>,
}

impl<'a> Run<'a> {
    fn new(setup: &'a Setup, at: &'a Operations) -> Self {
        let mut held = Held::new();
        for parameter in setup.model.parameters() {
            let shared = parameter.memory.as_ref().and_then(|name| held.get(name)).cloned();
            let buffer = shared.unwrap_or_else(|| at.ledger.take(parameter.category, parameter.bytes()));
            held.insert(parameter.name.clone(), buffer);
        }
        let matrix = |linear: &super::model::Linear| {
            let method = setup.methods.get(&linear.weight.name)?;
            Some((linear.weight.name.clone(), Matrix::new(method.clone(), linear.weight.dims, at)))
        };
        let matrices = setup.model.linears().filter_map(matrix).collect();
        let stem = if let Stem::Patches(linear, _) = &setup.model.stem { Some(linear) } else { None };
        let strided = setup.model.linears().chain(stem).map(|linear| linear.weight.name.clone()).collect();
        let (plain, cosines, gradients) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        Self { setup, at, held, matrices, plain, cosines, strided, gradients }
    }

    fn step(&mut self, number: u64) {
        let chunks = self.setup.counted.div_ceil(self.setup.head_chunk.max(1));
        let micro_batches = self.setup.micro_batches;
        let head: BTreeSet<&str> = self.setup.model.head.iter().map(|linear| linear.weight.name.as_str()).collect();
        let passes = |name: &str| if head.contains(name) { chunks * micro_batches } else { micro_batches };
        let collects: BTreeMap<String, Collect> = self
            .matrices
            .iter_mut()
            .filter_map(|(name, matrix)| Some((name.clone(), matrix.collect(number, passes(name))?)))
            .collect();
        self.make_cosines();
        // The second micro batch adds to the gradients of the first; further ones do the same.
        for _ in 0..micro_batches.min(2) {
            self.pass(&collects);
        }
        drop(collects);
        self.at.ledger.enter(Phase::Update);
        let names: Vec<String> = self.setup.model.parameters().iter().map(|p| p.name.clone()).collect();
        names.iter().for_each(|name| self.update(name));
    }

    fn make_cosines(&mut self) {
        for (name, method) in &self.setup.methods {
            let (Kind::Dct { .. }, Some(matrix)) = (method.kind, self.matrices.get(name)) else { continue };
            let [m, n] = matrix.dims();
            let d = if method.side == Side::Output { n } else { m };
            self.cosines.entry(d).or_insert_with(|| self.at.ledger.take(Category::Projector, 4 * d * d));
        }
    }

    /// The new value of a parameter that has a gradient.
    fn update(&mut self, name: &str) {
        let Some(gradient) = self.gradients.remove(name) else { return };
        let is_strided = self.strided.remove(name);
        if let Some(matrix) = self.matrices.get_mut(name) {
            return matrix.step(gradient, is_strided);
        }
        let bytes = self.held.get(name).map_or(0, Buffer::bytes); // f32, as every trained parameter
        let _copy = is_strided.then(|| self.at.scratch(bytes));
        let ledger = &self.at.ledger;
        self.plain.entry(name.to_owned()).or_insert_with(|| ledger.take(Category::Optimizer, 2 * bytes));
    }

    fn update_all(&mut self, parameters: Vec<&Parameter>) {
        if self.setup.immediate {
            let phase = self.at.ledger.enter(Phase::Update);
            parameters.into_iter().for_each(|parameter| self.update(&parameter.name));
            self.at.ledger.enter(phase);
        }
    }

    fn pass(&mut self, collects: &BTreeMap<String, Collect>) {
        let (setup, at) = (self.setup, self.at);
        let model = &setup.model;
        at.ledger.enter(Phase::Forward);
        let _inputs = self.inputs();
        let held = self.held.clone();
        let (mut pending, hidden) = self.forward(&held, collects);
        at.ledger.enter(Phase::Head);
        let mut gradient = self.head(hidden, &held, collects);
        self.update_all(model.head.iter().flat_map(|head| head.parameters()).chain(&model.norm).collect());
        at.ledger.enter(Phase::Backward);
        while let Some(block) = pending.pop() {
            let Some(from) = gradient.take() else { break };
            let index = self.first_trained() + pending.len();
            gradient = self.backward_block(index, block, from, &held, collects);
            self.update_all(model.blocks[index].parameters());
        }
        if let (true, Some(gradient)) = (model.stem_is_trained(), gradient) {
            self.backward_stem(gradient, &held, collects);
        }
        self.update_all(model.stem_parameters());
    }

    /// The lowest block that is trained or has trained parameters below it.
    pub(super) fn first_trained(&self) -> usize {
        let model = &self.setup.model;
        let first = model.blocks.iter().position(|block| block.is_trained()).unwrap_or(model.blocks.len());
        if model.stem_is_trained() { 0 } else { first }
    }

    /// Ids or pixels, rotary tables and ranges of keys.
    fn inputs(&self) -> Buffer {
        let (model, t) = (&self.setup.model, self.setup.shape.tokens());
        let tables = model.ropes * 2 * t * (model.heads[2] / 2) * 4;
        self.at.ledger.take(Category::Activations, tables + self.setup.inputs + model.windows * 8 * t)
    }

    fn block(&self, segment: &mut Segment<'_>, x: Value, block: &Block) -> Value {
        match self.setup.model.encoder {
            None => segment.block(x, block, self.sizes()),
            Some(encoder) => segment.encoder_block(x, block, self.sizes(), encoder),
        }
    }

    fn sizes(&self) -> [usize; 4] {
        let [h, g, d] = self.setup.model.heads;
        [h, g, d, self.setup.model.inner]
    }

    pub(super) fn segment<'b>(
        &self,
        held: &'b Held,
        collects: &'b BTreeMap<String, Collect>,
        lifts: bool,
    ) -> Segment<'b>
    where
        'a: 'b,
    {
        Segment::new(self.at, held, collects, self.setup.shape, lifts)
    }

    fn forward<'b>(&self, held: &'b Held, collects: &'b BTreeMap<String, Collect>) -> (Vec<Pending<'b>>, Buffer)
    where
        'a: 'b,
    {
        let mut plain = self.segment(held, collects, false);
        let mut x = self.stem(&mut plain).buffer;
        let mut pending = vec![];
        for (index, block) in self.setup.model.blocks.iter().enumerate() {
            let is_needed = index >= self.first_trained();
            if is_needed && !self.setup.rebuilds {
                let mut segment = self.segment(held, collects, true);
                let input = self.lift(&mut segment, x, index);
                let out = self.block(&mut segment, input.clone(), block);
                x = out.buffer.clone();
                pending.push(Pending { input, graph: Some((segment, out)) });
            } else {
                if is_needed {
                    pending.push(Pending { input: Value::constant(x.clone()), graph: None });
                }
                x = self.block(&mut plain, Value::constant(x), block).buffer;
            }
        }
        (pending, x)
    }

    fn lift(&self, segment: &mut Segment<'_>, x: Buffer, index: usize) -> Value {
        let is_tracked = index > self.first_trained() || self.setup.model.stem_is_trained();
        if is_tracked { segment.tape.leaf(x) } else { Value::constant(x) }
    }

    /// Moves the gradients of a segment's leaves to those of the step.
    pub(super) fn take_gradients(&mut self, leaves: &[(String, Value)], gradients: &mut Gradients) {
        for (name, leaf) in leaves {
            if let Some(gradient) = gradients.remove(leaf) {
                self.add_gradient(name, gradient);
            }
        }
    }

    fn add_gradient(&mut self, name: &str, gradient: Buffer) {
        let total = match self.gradients.remove(name) {
            Some(old) => sum(&self.at.ledger, old, gradient),
            None => gradient,
        };
        total.refile(Category::Gradients);
        self.gradients.insert(name.to_owned(), total);
    }

    /// Shows factors to the methods that asked for them.
    pub(super) fn take_factors(&mut self, slots: &[(String, [Value; 2])], gradients: &mut Gradients, tokens: usize) {
        for (name, [x_slot, dy_slot]) in slots {
            let (Some(x), Some(dy)) = (gradients.remove(x_slot), gradients.remove(dy_slot)) else { continue };
            let phase = self.at.ledger.enter(Phase::Refresh);
            let collected = self.matrices.get_mut(name).map(|matrix| matrix.observe(tokens, &x, &dy));
            drop((x, dy));
            if let Some(collected) = collected {
                self.add_gradient(name, collected);
            }
            self.at.ledger.enter(phase);
        }
    }

    fn backward_block(
        &mut self,
        index: usize,
        pending: Pending<'_>,
        gradient: Buffer,
        held: &Held,
        collects: &BTreeMap<String, Collect>,
    ) -> Option<Buffer> {
        let Pending { input, graph } = pending;
        let tokens = self.setup.shape.tokens();
        let (segment, input, out) = match graph {
            Some((segment, out)) => (segment, input, out),
            None => {
                let mut segment = self.segment(held, collects, true);
                let input = self.lift(&mut segment, input.buffer, index);
                let out = self.block(&mut segment, input.clone(), &self.setup.model.blocks[index]);
                (segment, input, out)
            }
        };
        let root = out.node?;
        drop(out);
        let Segment { tape, leaves, slots, .. } = segment;
        let mut gradients = tape.backward(root, gradient);
        self.take_gradients(&leaves, &mut gradients);
        self.take_factors(&slots, &mut gradients, tokens);
        gradients.remove(&input)
    }
}
