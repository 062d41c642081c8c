//! An encoder for classification on the tape, in the order of [`lowrank_models::encoder`] and [`lowrank_models::classifier`].

use super::layers::Segment;
use super::ledger::Category;
use super::model::{Block, Encoder, Linear, Parameter};
use super::operations::Machine;
use super::pass::Run;
use super::tape::Value;

impl Segment<'_> {
    /// A block on hidden states; `sizes` are heads, key heads, width of a head, inner width.
    pub(super) fn encoder_block(
        &mut self,
        x: Value,
        block: &Block,
        sizes @ [h, _, d, _]: [usize; 4],
        encoder: Encoder,
    ) -> Value {
        let values = self.shape.tokens() * h * d;
        let [first, second] = [0, 2].map(|index| [&block.norms[index], &block.norms[index + 1]]);
        if encoder.norms_first {
            let normed = self.layer_norm(x.clone(), first, values);
            let attended = self.encoder_attention(normed, block, sizes, encoder);
            let x = self.at.add(&mut self.tape, x, attended);
            let normed = self.layer_norm(x.clone(), second, values);
            let out = self.feed_forward(normed, block, sizes, encoder);
            return self.at.add(&mut self.tape, x, out);
        }
        let attended = self.encoder_attention(x.clone(), block, sizes, encoder);
        let sum = self.at.add(&mut self.tape, x, attended);
        let x = self.layer_norm(sum, first, values);
        let out = self.feed_forward(x.clone(), block, sizes, encoder);
        let sum = self.at.add(&mut self.tape, x, out);
        self.layer_norm(sum, second, values)
    }

    pub(super) fn layer_norm(&mut self, x: Value, [gamma, beta]: [&Parameter; 2], values: usize) -> Value {
        let (gamma, beta) = (self.parameter(gamma), self.parameter(beta));
        self.at.layer_norm(&mut self.tape, x, [&gamma, &beta], values)
    }

    fn encoder_attention(&mut self, x: Value, block: &Block, [h, g, d, _]: [usize; 4], encoder: Encoder) -> Value {
        let t = self.shape.tokens();
        let [q, k, v] = [0, 1, 2].map(|index| self.linear(x.clone(), &block.linears[index], t));
        drop(x);
        let attended = self.at.attention(&mut self.tape, [q, k, v], self.shape, [h, g, d]);
        let out = self.linear(attended, &block.linears[3], t);
        self.perhaps_dropped(out, encoder.drops, t * h * d)
    }

    fn feed_forward(&mut self, x: Value, block: &Block, [h, _, d, inner]: [usize; 4], encoder: Encoder) -> Value {
        let t = self.shape.tokens();
        let up = self.linear(x, &block.linears[4], t);
        // The activation is a gated one whose other factor is 1.
        let ones = Value::constant(self.at.activation(t * inner));
        let product = self.at.gated(&mut self.tape, up, ones, t * inner);
        let out = self.linear(product, &block.linears[5], t);
        self.perhaps_dropped(out, encoder.drops, t * h * d)
    }

    fn perhaps_dropped(&mut self, x: Value, drops: bool, values: usize) -> Value {
        if drops { self.at.dropped(&mut self.tape, x, values) } else { x }
    }
}

impl Run<'_> {
    /// Tokens, positions and token types, summed and normed.
    pub(super) fn texts(&self, segment: &mut Segment<'_>, norm: &[Parameter; 2], encoder: Encoder) -> Value {
        let (model, at) = (&self.setup.model, self.at);
        let values = self.setup.shape.tokens() * model.hidden;
        let x = self.tokens(segment);
        let rest: Vec<Value> = model.tables[1..].iter().map(|table| self.rows_of(segment, table)).collect();
        // Token types are added before positions.
        let sum = rest.into_iter().rev().fold(x, |sum, rows| at.add(&mut segment.tape, sum, rows));
        let x = segment.layer_norm(sum, [&norm[0], &norm[1]], values);
        segment.perhaps_dropped(x, encoder.drops, values)
    }

    /// Patches behind a class token, and positions.
    pub(super) fn patches(
        &self,
        segment: &mut Segment<'_>,
        linear: &Linear,
        patches: usize,
        encoder: Encoder,
    ) -> Value {
        let (model, shape, at) = (&self.setup.model, self.setup.shape, self.at);
        let rows = shape.rows * patches;
        let pixels = Value::constant(at.activation(rows * linear.weight.dims[0]));
        let x = segment.linear(pixels, linear, rows);
        let values = shape.tokens() * model.hidden;
        let tokens: Vec<Value> = model.tables.iter().map(|table| segment.parameter(table)).collect();
        let nodes: Vec<_> = [x.node].into_iter().chain(tokens.iter().map(|token| token.node)).collect();
        let out = at.activation(values);
        drop(x);
        let (book, width) = (at.clone(), at.width * rows * model.hidden);
        let bytes: Vec<usize> = tokens.iter().map(|token| token.buffer.bytes()).collect();
        let x = segment.tape.operation(&nodes.clone(), out, move |dy, gradients| {
            for (node, bytes) in nodes[1..].iter().zip(bytes) {
                gradients.register(*node, book.ledger.take(Category::Gradients, bytes));
            }
            let piece = nodes[0].map(|_| book.scratch(width));
            drop(dy);
            if let Some(piece) = piece {
                gradients.register(nodes[0], piece);
            }
        });
        segment.perhaps_dropped(x, encoder.drops, values)
    }

    /// The logits of some sequences, in f32 for the loss.
    pub(super) fn classes(&self, segment: &mut Segment<'_>, x: Value, chunk: usize, encoder: Encoder) -> Value {
        let (at, model) = (self.at, &self.setup.model);
        let mut x = match model.norm.as_slice() {
            [gamma, beta] => segment.layer_norm(x, [gamma, beta], chunk * model.hidden),
            _ => x,
        };
        let last = model.head.len().saturating_sub(1);
        for (index, linear) in model.head.iter().enumerate() {
            x = segment.perhaps_dropped(x, encoder.head_drops, chunk * linear.weight.dims[0]);
            x = segment.linear(x, linear, chunk);
            if index < last {
                x = self.tanh(segment, x, chunk * linear.weight.dims[1]);
            }
        }
        x.buffer.refile(Category::Logits);
        if at.width < 4 && matches!(at.machine, Machine::Cpu { .. }) {
            drop(at.ledger.take(Category::Logits, 4 * chunk * model.vocab)); // the loss is computed in f32
        }
        x
    }

    /// Keeps its output.
    fn tanh(&self, segment: &mut Segment<'_>, x: Value, values: usize) -> Value {
        let (at, node) = (self.at.clone(), x.node);
        let y = self.at.activation(values);
        let kept = y.clone();
        segment.tape.operation(&[node], y, move |dy, gradients| {
            let dx = at.scratch(at.width * values);
            drop((dy, kept));
            gradients.register(node, dx);
        })
    }
}
