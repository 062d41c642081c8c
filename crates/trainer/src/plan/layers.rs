//! One segment of a model on the tape: what its layers keep, and the leaves that get gradients.

use std::collections::BTreeMap;

use super::ledger::{Buffer, Category};
use super::model::{Format, Linear, Parameter};
use super::operations::{Machine, Operations, Read, Shape};
use super::tape::{Gradients, Tape, Value};

/// Values of a packed weight that are dequantised at the same time on the CPU, and elsewhere.
const PANEL: usize = 1 << 19;
const GPU_PANEL: usize = 1 << 26;

/// What the backward pass makes of the gradient of a weight.
#[derive(Clone, Debug)]
pub enum Collect {
    /// `P^T dW Q`, with an update that is not yet in W.
    Projected {
        /// P.
        left: Option<Directions>,
        /// Q.
        right: Option<Directions>,
        /// An update that is pending, in the coordinates of P.
        pending: Option<Buffer>,
    },
    /// x and dy, where the pending update has so many columns.
    Factors {
        /// r of the pending update.
        pending: Option<usize>,
    },
}

/// A basis as a layer gets it.
#[derive(Clone, Debug)]
pub struct Directions {
    /// What is held.
    pub held: Buffer,
    /// Its columns.
    pub columns: usize,
    /// Bytes of the values that a layer makes of it: another type, or no codes any more; 0 where it takes what is held.
    pub made: usize,
    /// Bytes that exist beside these while they are made.
    pub making: usize,
}

/// The memory of all parameters by name.
pub type Held = BTreeMap<String, Buffer>;

/// A segment that was lifted onto the tape.
#[derive(Debug)]
pub struct Segment<'a> {
    /// Makes memory.
    pub at: &'a Operations,
    /// Its operations.
    pub tape: Tape,
    /// Trained parameters.
    pub leaves: Vec<(String, Value)>,
    /// Placeholders that receive x and dy of a weight.
    pub slots: Vec<(String, [Value; 2])>,
    held: &'a Held,
    collects: &'a BTreeMap<String, Collect>,
    pub(super) shape: Shape,
    /// Whether gradients are wanted at all.
    pub(super) lifts: bool,
}

impl<'a> Segment<'a> {
    /// An empty segment; without `lifts` nothing is kept for a backward pass.
    pub fn new(
        at: &'a Operations,
        held: &'a Held,
        collects: &'a BTreeMap<String, Collect>,
        shape: Shape,
        lifts: bool,
    ) -> Self {
        let tape = Tape::new(&at.ledger);
        Self { at, tape, leaves: vec![], slots: vec![], held, collects, shape, lifts }
    }

    /// A parameter: a leaf where it is trained.
    pub fn parameter(&mut self, parameter: &Parameter) -> Value {
        let buffer = match self.held.get(&parameter.name) {
            Some(buffer) => buffer.clone(),
            None => unreachable!("every parameter has memory"),
        };
        if !(parameter.trained && self.lifts) {
            return Value::constant(buffer);
        }
        let leaf = self.tape.leaf(buffer);
        self.leaves.push((parameter.name.clone(), leaf.clone()));
        leaf
    }

    /// The same in the type of the activations.
    pub(super) fn operand(&mut self, parameter: &Parameter) -> Value {
        let value = self.parameter(parameter);
        match parameter.format.width() {
            Some(width) => self.at.cast(&mut self.tape, &value, parameter.values(), width),
            None => value,
        }
    }

    /// The panel of a packed weight that is dequantised at the same time, and the scales of all of it.
    pub(super) fn unpacked(at: &Operations, weight: &Parameter) -> Option<Buffer> {
        let Format::Packed { group, .. } = weight.format else { return None };
        let values = weight.values();
        Some(at.scratch(match at.machine {
            Machine::Cpu { .. } => 4 * values.min(PANEL) + 8 * values.div_ceil(group),
            Machine::Gpu => at.width * values.min(GPU_PANEL),
        }))
    }

    /// A linear layer.
    pub fn linear(&mut self, x: Value, layer: &Linear, tokens: usize) -> Value {
        let y = match (&layer.adapter, self.collects.get(&layer.weight.name)) {
            (Some(adapter), _) => {
                let biased = layer.bias.as_ref().is_some_and(|bias| !(bias.trained && self.lifts));
                self.adapted(x, &layer.weight, adapter, biased, tokens)
            }
            (None, Some(collect)) if self.lifts => self.collected(x, &layer.weight, collect.clone(), tokens),
            (None, _) => self.dense(x, &layer.weight, tokens),
        };
        match &layer.bias {
            Some(bias) if bias.trained && self.lifts => self.biased(y, bias),
            _ => y,
        }
    }

    /// A trained bias is added on the tape.
    fn biased(&mut self, y: Value, bias: &Parameter) -> Value {
        let (leaf, bytes) = (self.parameter(bias), 4 * bias.values());
        let (at, nodes) = (self.at.clone(), [y.node, leaf.node]);
        self.tape.operation(&nodes, y.buffer, move |dy, gradients| {
            gradients.register(nodes[1], at.ledger.take(Category::Gradients, bytes));
            gradients.register(nodes[0], dy);
        })
    }

    /// `x W`.
    pub fn dense(&mut self, x: Value, weight: &Parameter, t: usize) -> Value {
        let [m, n] = weight.dims;
        let w = self.operand(weight);
        let y = {
            let _values = Self::unpacked(self.at, weight);
            self.at.product([t, m, n], Read::Plain, Category::Activations)
        };
        let (at, nodes, weight) = (self.at.clone(), [x.node, w.node], weight.clone());
        let (kept, w) = (w.node.map(|_| x.buffer), w.buffer);
        self.tape.operation(&nodes, y, move |dy, gradients| {
            if nodes[1].is_some() {
                gradients.register(nodes[1], at.product([m, t, n], Read::Transposed, Category::Gradients));
                drop(kept);
            }
            input_gradient(&at, gradients, nodes[0], dy, &weight, t);
            drop(w);
        })
    }

    /// `x W` whose gradient arrives projected, or as its factors.
    fn collected(&mut self, x: Value, weight: &Parameter, collect: Collect, t: usize) -> Value {
        match collect {
            Collect::Projected { left, right, pending } => self.projected(x, weight, [left, right], pending, t),
            Collect::Factors { pending } => self.factored(x, weight, pending, t),
        }
    }

    fn projected(
        &mut self,
        x: Value,
        weight: &Parameter,
        [left, right]: [Option<Directions>; 2],
        pending: Option<Buffer>,
        t: usize,
    ) -> Value {
        let [m, n] = weight.dims;
        let w = self.operand(weight);
        let columns = |side: &Option<Directions>| side.as_ref().map(|side| side.columns);
        let (p, q) = (columns(&left), columns(&right));
        let made = |side: &Option<Directions>| {
            side.as_ref().map(|side| {
                let _making = self.at.scratch(side.making);
                self.at.scratch(side.made)
            })
        };
        let (left_values, right_values) = (made(&left), made(&right));
        let thin = p.map(|p| self.at.product([t, m, p], Read::Plain, Category::Activations));
        // Kept for the backward step of an update that is pending; else P has done its part.
        let left_values = left_values.filter(|_| pending.is_some());
        let y = {
            let _values = Self::unpacked(self.at, weight);
            self.at.product([t, m, n], Read::Plain, Category::Activations)
        };
        let y = match (p, &pending) {
            (Some(p), Some(_)) => self.at.accumulate([t, p, n], Read::Plain, y),
            _ => y,
        };
        let kept = w.node.map(|_| thin.unwrap_or_else(|| x.buffer.clone()));
        let bases = (left, right, w.buffer, left_values, right_values);
        let (at, nodes, weight) = (self.at.clone(), [x.node, w.node], weight.clone());
        self.tape.operation(&nodes, y, move |dy, gradients| {
            let thin_dy = q.map(|q| at.product([t, n, q], Read::Plain, Category::Workspace));
            let dims = [p.unwrap_or(m), t, q.unwrap_or(n)];
            gradients.register(nodes[1], at.product(dims, Read::Transposed, Category::Gradients));
            drop((kept, thin_dy, bases));
            let _thin =
                p.filter(|_| pending.is_some()).map(|p| at.product([t, n, p], Read::Plain, Category::Workspace));
            input_gradient(&at, gradients, nodes[0], dy, &weight, t);
        })
    }

    fn factored(&mut self, x: Value, weight: &Parameter, pending: Option<usize>, t: usize) -> Value {
        let [m, n] = weight.dims;
        let value = self.parameter(weight);
        let w = match weight.format.width() {
            Some(width) => self.at.cast(&mut self.tape, &Value::constant(value.buffer), m * n, width),
            None => value,
        };
        let slots = [(), ()].map(|()| self.tape.leaf(self.at.scratch(0)));
        let nodes = [x.node, slots[0].node, slots[1].node];
        self.slots.push((weight.name.clone(), slots));
        let thin = pending.map(|r| self.at.product([t, m, r], Read::Plain, Category::Workspace));
        let y = {
            let _values = Self::unpacked(self.at, weight);
            self.at.product([t, m, n], Read::Plain, Category::Activations)
        };
        drop(thin);
        let (at, weight, kept, w) = (self.at.clone(), weight.clone(), x.buffer, w.buffer);
        self.tape.operation(&nodes, y, move |dy, gradients| {
            gradients.register(nodes[1], kept);
            gradients.register(nodes[2], dy.clone());
            input_gradient(&at, gradients, nodes[0], dy, &weight, t);
            drop(w);
        })
    }
}

/// `dy W^T`.
pub(super) fn backward_product(at: &Operations, weight: &Parameter, t: usize) -> Buffer {
    let [m, n] = weight.dims;
    let _values = Segment::unpacked(at, weight);
    at.product([t, n, m], Read::Plain, Category::Workspace)
}

fn input_gradient(
    at: &Operations,
    gradients: &mut Gradients,
    node: Option<usize>,
    dy: Buffer,
    weight: &Parameter,
    t: usize,
) {
    if node.is_some() {
        let dx = backward_product(at, weight, t);
        drop(dy);
        gradients.register(node, dx);
    }
}
