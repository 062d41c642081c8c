//! The two ends of a pass: what comes before the blocks, and the head with its loss.

use std::collections::BTreeMap;

use super::layers::{Collect, Held, Segment};
use super::ledger::{Buffer, Category};
use super::model::{Parameter, Stem};
use super::operations::{Machine, Read};
use super::pass::Run;
use super::tape::Value;

impl Run<'_> {
    /// The first hidden state.
    pub(super) fn stem(&self, segment: &mut Segment<'_>) -> Value {
        match (&self.setup.model.stem, self.setup.model.encoder) {
            (Stem::Texts(norm), Some(encoder)) => self.texts(segment, norm, encoder),
            (Stem::Patches(linear, patches), Some(encoder)) => self.patches(segment, linear, *patches, encoder),
            _ => self.tokens(segment),
        }
    }

    /// The rows of the batch's tokens in one table.
    pub(super) fn rows_of(&self, segment: &mut Segment<'_>, table: &Parameter) -> Value {
        let (model, t, at) = (&self.setup.model, self.setup.shape.tokens(), self.at);
        let weight = segment.parameter(table);
        let stored = table.format.width().unwrap_or(at.width);
        let rows = at.ledger.take(Category::Activations, stored * t * model.hidden);
        let x = if stored == at.width { rows } else { at.activation(t * model.hidden) };
        let (book, node, whole) = (at.clone(), weight.node, 4 * table.values());
        segment.tape.operation(&[node], x, move |dy, gradients| {
            let gradient = book.ledger.take(Category::Gradients, whole);
            drop(dy);
            gradients.register(node, gradient);
        })
    }

    /// The rows of the batch's tokens, with an adapter's part.
    pub(super) fn tokens(&self, segment: &mut Segment<'_>) -> Value {
        let (model, t, at) = (&self.setup.model, self.setup.shape.tokens(), self.at);
        let mut x = self.rows_of(segment, &model.tables[0]);
        if let [down, up] = model.embedding_adapter.as_slice() {
            let (a, b) = (segment.parameter(down), segment.parameter(up));
            let r = down.dims[1];
            let rows = at.activation(t * r);
            let delta = at.product([t, r, model.hidden], Read::Plain, Category::Activations);
            let (book, nodes, whole) = (at.clone(), [a.node, b.node], [4 * down.values(), 4 * up.values()]);
            let delta = segment.tape.operation(&nodes, delta, move |dy, gradients| {
                let thin = book.scratch(book.width * t * r);
                gradients.register(nodes[1], book.ledger.take(Category::Gradients, whole[1]));
                drop((dy, rows));
                gradients.register(nodes[0], book.ledger.take(Category::Gradients, whole[0]));
                drop(thin);
            });
            x = at.add(&mut segment.tape, x, delta);
        }
        x
    }

    /// Loss and its gradient, chunk by chunk; returns the gradient of the last hidden state.
    pub(super) fn head(&mut self, hidden: Buffer, held: &Held, collects: &BTreeMap<String, Collect>) -> Option<Buffer> {
        let (at, setup) = (self.at, self.setup);
        let model = &setup.model;
        let needs_gradient = self.first_trained() < model.blocks.len() || model.stem_is_trained();
        let is_scattered = setup.counted < setup.shape.tokens();
        let scattered = (needs_gradient && is_scattered).then(|| at.scratch(hidden.bytes()));
        let mut pieces = vec![];
        let (mut left, mut number) = (setup.counted, 0);
        while left > 0 {
            let chunk = left.min(setup.head_chunk.max(1));
            left -= chunk;
            let mut segment = self.segment(held, collects, true);
            let rows = at.activation(chunk * model.hidden);
            let x = if needs_gradient { segment.tape.leaf(rows) } else { Value::constant(rows) };
            let logits = match model.encoder {
                None => self.logits(&mut segment, x.clone(), chunk),
                Some(encoder) => self.classes(&mut segment, x.clone(), chunk, encoder),
            };
            let Some(root) = logits.node else { continue };
            // The loss and its gradient take the place of the logits.
            let seed = logits.buffer;
            let Segment { tape, leaves, slots, .. } = segment;
            let mut gradients = tape.backward(root, seed);
            // A tied head's gradients arrive transposed; two such matrices are not added in place.
            number += 1;
            let transposed = number == 2 && model.head.is_empty() && model.tables[0].trained;
            let sum = transposed.then(|| at.ledger.take(Category::Gradients, 4 * model.tables[0].values()));
            self.take_gradients(&leaves, &mut gradients);
            drop(sum);
            self.take_factors(&slots, &mut gradients, chunk);
            if !is_scattered {
                pieces.extend(gradients.remove(&x));
            }
        }
        match needs_gradient {
            true if is_scattered => scattered,
            true => Some(if pieces.len() == 1 { pieces.remove(0) } else { at.scratch(hidden.bytes()) }),
            false => None,
        }
    }

    /// The logits of a chunk, in f32 for the loss.
    fn logits(&self, segment: &mut Segment<'_>, x: Value, chunk: usize) -> Value {
        let (at, model) = (self.at, &self.setup.model);
        let gamma = segment.parameter(&model.norm[0]);
        let normed = at.rms_norm(&mut segment.tape, x, &gamma, chunk * model.hidden);
        let logits = match model.head.first() {
            Some(head) => segment.linear(normed, head, chunk),
            None => {
                let [vocab, hidden] = model.tables[0].dims;
                let tied = Parameter { dims: [hidden, vocab], ..model.tables[0].clone() };
                segment.dense(normed, &tied, chunk)
            }
        };
        logits.buffer.refile(Category::Logits);
        if at.width < 4 && matches!(at.machine, Machine::Cpu { .. }) {
            drop(at.ledger.take(Category::Logits, 4 * chunk * model.vocab)); // the loss is computed in f32
        }
        logits
    }

    /// Backward through what comes before the blocks.
    pub(super) fn backward_stem(&mut self, gradient: Buffer, held: &Held, collects: &BTreeMap<String, Collect>) {
        let mut segment = self.segment(held, collects, true);
        let Some(root) = self.stem(&mut segment).node else { return };
        let Segment { tape, leaves, .. } = segment;
        let mut gradients = tape.backward(root, gradient);
        self.take_gradients(&leaves, &mut gradients);
    }
}
