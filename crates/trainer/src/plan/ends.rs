//! The two ends of a pass: the embedding, and the head with its loss.

use std::collections::BTreeMap;

use super::layers::{Collect, Held, Segment};
use super::ledger::{Buffer, Category};
use super::model::Parameter;
use super::operations::{Machine, Read};
use super::pass::Run;
use super::tape::Value;

impl Run<'_> {
    /// The rows of the batch's tokens.
    pub(super) fn embed(&self, segment: &mut Segment<'_>) -> Value {
        let (model, t, at) = (&self.setup.model, self.setup.shape.tokens(), self.at);
        let weight = segment.parameter(&model.embedding);
        let stored = model.embedding.format.width().unwrap_or(at.width);
        let rows = at.ledger.take(Category::Activations, stored * t * model.hidden);
        let x = if stored == at.width { rows } else { at.activation(t * model.hidden) };
        let (book, node, whole) = (at.clone(), weight.node, 4 * model.embedding.values());
        let mut x = segment.tape.operation(&[node], x, move |dy, gradients| {
            let gradient = book.ledger.take(Category::Gradients, whole);
            drop(dy);
            gradients.register(node, gradient);
        });
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
        let needs_gradient = self.first_trained() < model.blocks.len() || model.embedding_is_trained();
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
            let logits = self.logits(&mut segment, x.clone(), chunk);
            let Some(root) = logits.node else { continue };
            // The loss and its gradient take the place of the logits.
            let seed = logits.buffer;
            let Segment { tape, leaves, slots, .. } = segment;
            let mut gradients = tape.backward(root, seed);
            // A tied head's gradients arrive transposed; two such matrices are not added in place.
            number += 1;
            let transposed = number == 2 && model.head.is_none() && model.embedding.trained;
            let sum = transposed.then(|| at.ledger.take(Category::Gradients, 4 * model.embedding.values()));
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
        let gamma = segment.parameter(&model.norm);
        let normed = at.rms_norm(&mut segment.tape, x, &gamma, chunk * model.hidden);
        let logits = match &model.head {
            Some(head) => segment.linear(normed, head, chunk),
            None => {
                let [vocab, hidden] = model.embedding.dims;
                let tied = Parameter { dims: [hidden, vocab], ..model.embedding.clone() };
                segment.dense(normed, &tied, chunk)
            }
        };
        logits.buffer.refile(Category::Logits);
        if at.width < 4 && matches!(at.machine, Machine::Cpu { .. }) {
            drop(at.ledger.take(Category::Logits, 4 * chunk * model.vocab)); // the loss is computed in f32
        }
        logits
    }

    /// Backward through the embedding.
    pub(super) fn backward_embedding(&mut self, gradient: Buffer, held: &Held, collects: &BTreeMap<String, Collect>) {
        let mut segment = self.segment(held, collects, true);
        let Some(root) = self.embed(&mut segment).node else { return };
        let Segment { tape, leaves, .. } = segment;
        let mut gradients = tape.backward(root, gradient);
        self.take_gradients(&leaves, &mut gradients);
    }
}
