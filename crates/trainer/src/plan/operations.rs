//! The memory of each operation of a model: its result, what it keeps for the backward pass, its scratch.
//!
//! | operation | keeps | scratch on the CPU |
//! | --- | --- | --- |
//! | product `[m, k] [k, n]` | | operands packed by the `gemm` crate, at most 512 deep |
//! | linear, W trained | x | |
//! | linear, W frozen | | |
//! | low-rank linear | h `[t, r]`, the dropout mask, x where A is trained | the dropped x |
//! | projected linear | `x P` instead of x | |
//! | RMS norm | x | |
//! | layer norm | the centred x, in f32 | |
//! | rotary | | |
//! | attention | q, k, v, the output, one f32 a row and head | score tiles of 64 rows, one a thread (two in the backward) |
//! | gated activation | gate and up | |
//! | sum | | in place, in the operand that nothing else holds |
//! | cross-entropy | the gradient, in the memory of the logits | |
//!
//! With 16-bit activations the CPU computes in f32: every operand is widened for the time of the operation, and the result is
//! narrowed after it. On a graphics card the operations are Burn's: attention there holds whole score matrices.

use super::ledger::{Buffer, Category, Ledger};
use super::tape::{Tape, Value, sum};

/// Rows of a score tile on the CPU.
const QUERY_ROWS: usize = 64;
/// Whole score matrices that live at the same time where attention runs in plain operations: forward and backward. An estimate:
/// fusion may save some of them.
const SCORE_MATRICES: [usize; 2] = [3, 5];

/// Where the arithmetic happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// Our own loops on so many threads.
    Cpu {
        /// Threads of the pool.
        threads: usize,
    },
    /// Plain operations on a graphics card.
    Gpu,
}

/// Sizes of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences.
    pub rows: usize,
    /// Tokens of a sequence.
    pub cols: usize,
}

impl Shape {
    /// t.
    pub fn tokens(self) -> usize {
        self.rows * self.cols
    }
}

/// A product's operand: packed by rows where it is read along its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Read {
    /// `[m, k]` along its rows.
    Plain,
    /// The transpose of what lies in memory.
    Transposed,
}

/// Makes the memory of operations.
#[derive(Clone, Debug)]
pub struct Operations {
    /// The account.
    pub ledger: Ledger,
    /// Where they run.
    pub machine: Machine,
    /// Bytes of an activation.
    pub width: usize,
}

impl Operations {
    /// A result or something kept, in the type of the activations.
    pub fn activation(&self, values: usize) -> Buffer {
        self.ledger.take(Category::Activations, values * self.width)
    }

    /// Something that does not stay.
    pub fn scratch(&self, bytes: usize) -> Buffer {
        self.ledger.take(Category::Workspace, bytes)
    }

    /// Whether operands are widened to f32.
    fn widens(&self) -> bool {
        self.width < 4 && matches!(self.machine, Machine::Cpu { .. })
    }

    /// Operands in f32, where the machine needs them so.
    fn widened(&self, values: usize) -> Option<Buffer> {
        self.widens().then(|| self.scratch(4 * values))
    }

    /// A result in the type of the activations, from one in f32 where the machine computes so.
    fn result(&self, category: Category, values: usize) -> Buffer {
        let wide = self.widened(values);
        let result = self.ledger.take(category, self.width * values);
        drop(wide);
        result
    }

    /// `[m, k] [k, n]` into a new buffer.
    pub fn product(&self, [m, k, n]: [usize; 3], left: Read, category: Category) -> Buffer {
        let _operands = self.widened(m * k + k * n);
        let _packed = self.packed([m, k, n], left);
        self.result(category, m * n)
    }

    /// `[m, k] [k, n]` added to what is in a buffer: in place on the CPU in f32.
    pub fn accumulate(&self, [m, k, n]: [usize; 3], left: Read, into: Buffer) -> Buffer {
        let _operands = self.widened(m * k + k * n + m * n);
        let _packed = self.packed([m, k, n], left);
        let _product = (self.machine == Machine::Gpu).then(|| self.scratch(self.width * m * n));
        match into.is_unique() && !self.widens() {
            true => into,
            false => self.ledger.take(into.category(), into.bytes()),
        }
    }

    /// A product in f32 whatever the activations are.
    pub fn product_f32(&self, [m, k, n]: [usize; 3], left: Read, category: Category) -> Buffer {
        let _packed = self.packed([m, k, n], left);
        self.ledger.take(category, 4 * m * n)
    }

    /// What the `gemm` crate copies of its operands: the left one where its rows are not contiguous, or where the result is so
    /// wide that reading it in place costs more.
    fn packed(&self, [m, k, n]: [usize; 3], left: Read) -> Option<Buffer> {
        const DEPTH: usize = 512;
        const PANEL: usize = 48;
        let Machine::Cpu { .. } = self.machine else { return None };
        let packs = if left == Read::Transposed { n > 2 * PANEL } else { n > 128 * PANEL };
        let depth = k.div_ceil(k.div_ceil(DEPTH).max(1));
        packs.then(|| self.scratch(4 * depth * m.next_multiple_of(8)))
    }

    /// `x / rms(x) * gamma`, over rows of `width` values.
    pub fn rms_norm(&self, tape: &mut Tape, x: Value, gamma: &Value, values: usize) -> Value {
        let _wide = self.widened(values);
        let y = self.result(Category::Activations, values);
        let (at, kept, nodes) = (self.clone(), x.buffer, [x.node, gamma.node]);
        let gamma_bytes = gamma.buffer.bytes();
        tape.operation(&nodes, y, move |dy, gradients| {
            let _wide = at.widened(2 * values);
            let dx = at.result(Category::Workspace, values);
            gradients.register(nodes[0], dx);
            gradients.register(nodes[1], at.scratch(gamma_bytes));
            drop((dy, kept));
        })
    }

    /// The same of the centred x, in f32 on every machine, and a shift.
    pub fn layer_norm(&self, tape: &mut Tape, x: Value, [gamma, beta]: [&Value; 2], values: usize) -> Value {
        let wide = |category| self.ledger.take(category, 4 * values);
        let is_narrow = self.width < 4;
        let (node, held) = match is_narrow {
            true => (x.node, wide(Category::Activations)),
            false => (x.node, x.buffer.clone()),
        };
        drop(x);
        let centred = if held.is_unique() { held } else { wide(Category::Activations) };
        let normed = wide(Category::Activations);
        let y = if is_narrow { self.activation(values) } else { normed.clone() };
        let (at, nodes, bytes) = (self.clone(), [node, gamma.node, beta.node], gamma.buffer.bytes());
        drop(normed);
        tape.operation(&nodes, y, move |dy, gradients| {
            let dy = if is_narrow { at.scratch(4 * values) } else { dy };
            gradients.register(nodes[2], at.scratch(bytes));
            let dx = at.scratch(4 * values);
            gradients.register(nodes[1], at.scratch(bytes));
            drop((dy, centred));
            drop(at.scratch(4 * values)); // through the mean
            let dx = if is_narrow { at.scratch(at.width * values) } else { dx };
            gradients.register(nodes[0], dx);
        })
    }

    /// Some values dropped, by a mask that is drawn in f32.
    pub fn dropped(&self, tape: &mut Tape, x: Value, values: usize) -> Value {
        let drawn = self.ledger.take(Category::Activations, 4 * values);
        let mask = if self.width < 4 { self.activation(values) } else { drawn.clone() };
        drop(drawn);
        let y = if x.buffer.is_unique() { x.buffer } else { self.activation(values) };
        let (at, node) = (self.clone(), x.node);
        tape.operation(&[node], y, move |dy, gradients| {
            let dx = if dy.is_unique() { dy } else { at.scratch(at.width * values) };
            drop(mask);
            gradients.register(node, dx);
        })
    }

    /// Heads turned by the angles of their tokens.
    pub fn rotary(&self, tape: &mut Tape, x: Value, values: usize) -> Value {
        let wide = self.widened(values);
        let y = self.result(Category::Activations, values);
        drop(wide);
        let (at, node) = (self.clone(), x.node);
        tape.operation(&[node], y, move |dy, gradients| {
            let _wide = at.widened(values);
            let dx = at.result(Category::Workspace, values);
            drop(dy);
            gradients.register(node, dx);
        })
    }

    /// Softmax attention of `heads` query heads over `groups` key heads of `width` values.
    pub fn attention(&self, tape: &mut Tape, [q, k, v]: [Value; 3], shape: Shape, [h, g, d]: [usize; 3]) -> Value {
        let t = shape.tokens();
        let (queries, keys) = (t * h * d, t * g * d);
        let scores = self.scores(shape, h, false);
        let wide = self.widened(queries + 2 * keys);
        let out = self.result(Category::Activations, queries);
        let lse = self.ledger.take(Category::Activations, 4 * t * h);
        drop((scores, wide));
        let (at, nodes) = (self.clone(), [q.node, k.node, v.node]);
        let kept = (q.buffer, k.buffer, v.buffer, out.clone(), lse);
        tape.operation(&nodes, out, move |dy, gradients| {
            let scores = at.scores(shape, h, true);
            let wide = at.widened(2 * queries + 2 * keys);
            let [dq, dk, dv] = [queries, keys, keys].map(|values| at.result(Category::Workspace, values));
            drop((scores, wide, dy, kept));
            gradients.register(nodes[0], dq);
            gradients.register(nodes[1], dk);
            gradients.register(nodes[2], dv);
        })
    }

    /// Scores that exist at the same time.
    fn scores(&self, shape: Shape, heads: usize, backward: bool) -> Buffer {
        self.scratch(match self.machine {
            Machine::Cpu { threads } => {
                let tiles = threads.min(shape.rows * heads) * if backward { 2 } else { 1 };
                4 * tiles * QUERY_ROWS.min(shape.cols) * shape.cols
            }
            Machine::Gpu => 4 * SCORE_MATRICES[usize::from(backward)] * shape.tokens() * heads * shape.cols,
        })
    }

    /// `act(gate) * up`.
    pub fn gated(&self, tape: &mut Tape, gate: Value, up: Value, values: usize) -> Value {
        let wide = self.widened(2 * values);
        let y = self.result(Category::Activations, values);
        drop(wide);
        let (at, nodes, kept) = (self.clone(), [gate.node, up.node], (gate.buffer, up.buffer));
        tape.operation(&nodes, y, move |dy, gradients| {
            let wide = at.widened(3 * values);
            let [d_gate, d_up] = [(), ()].map(|()| at.result(Category::Workspace, values));
            drop((wide, dy, kept));
            gradients.register(nodes[0], d_gate);
            gradients.register(nodes[1], d_up);
        })
    }

    /// `a + b`.
    pub fn add(&self, tape: &mut Tape, a: Value, b: Value) -> Value {
        let nodes = [a.node, b.node];
        let result = sum(&self.ledger, a.buffer, b.buffer);
        result.refile(Category::Activations);
        tape.operation(&nodes, result, move |dy, gradients| {
            gradients.register(nodes[0], dy.clone());
            gradients.register(nodes[1], dy);
        })
    }

    /// A parameter in the type of the activations: itself, or a copy whose gradient is widened again.
    pub fn cast(&self, tape: &mut Tape, parameter: &Value, values: usize, stored: usize) -> Value {
        if stored == self.width {
            return parameter.clone();
        }
        let (at, node) = (self.clone(), parameter.node);
        tape.operation(&[node], self.activation(values), move |dy, gradients| {
            let wide = at.scratch(dy.bytes() / at.width * stored); // of the size that arrives: a projected one is smaller
            drop(dy);
            gradients.register(node, wide);
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn operations(width: usize) -> Operations {
        Operations { ledger: Ledger::default(), machine: Machine::Cpu { threads: 2 }, width }
    }

    #[test]
    fn attention_keeps_q_k_v_the_output_and_one_number_a_row() {
        let at = operations(4);
        let mut tape = Tape::new(&at.ledger);
        let shape = Shape { rows: 2, cols: 100 };
        let (h, g, d) = (4, 2, 8);
        let [q, k, v] = [h, g, g].map(|heads| tape.leaf(at.activation(shape.tokens() * heads * d)));
        let out = at.attention(&mut tape, [q, k, v], shape, [h, g, d]);
        let kept = 200 * (2 * h * d + 2 * g * d) * 4 + 4 * 200 * h;
        assert_eq!(at.ledger.live()[Category::Activations as usize], kept as u64);
        let tiles = 2 * 64 * 100 * 4;
        assert_eq!(at.ledger.peak().0.iter().sum::<u64>(), (kept + tiles) as u64);
        drop(out);
        assert_eq!(at.ledger.live()[Category::Activations as usize], kept as u64, "the tape holds the output too");
        drop(tape);
        assert_eq!(at.ledger.live(), [0; 8]);
    }

    #[test]
    fn sixteen_bit_products_are_made_in_f32_on_the_cpu_alone() {
        for (machine, peak) in [(Machine::Cpu { threads: 1 }, 4 * (6 + 12 + 8) + 2 * 8), (Machine::Gpu, 2 * 8)] {
            let at = Operations { machine, ..operations(2) };
            let y = at.product([2, 3, 4], Read::Plain, Category::Activations);
            assert_eq!((y.bytes(), at.ledger.peak().0.iter().sum::<u64>()), (16, peak));
        }
    }
}
