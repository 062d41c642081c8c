//! What each kind of adapter keeps and needs.
//!
//! | adapter | keeps beside q, k, v and so on | scratch |
//! | --- | --- | --- |
//! | low-rank | h `[t, r]`, x where A is trained, the mask, `M B diag(c)` where there is M or c | the dropped x |
//! | the same where `W + s A B` is cheaper | x, and the sum where it is no larger than x | `[d_in, d_out]` |
//! | DoRA | as low-rank, and its output (before the scale on a GPU or beside a bias); with dropout the dropped x | `[r, d_out]` |
//! | the same where its weight is built | x and its output; with dropout the dropped x | `[d_in, d_out]` |
//! | RandLoRA | as above, and `[n r, m]` where the sum is not kept | `[d_in, d_out]` |
//! | HRA | x, `x V` `[t, r]` | |
//! | OFT | x, powers of Q: each `d_in b` values | |

use lowrank_core::adapters::dora::Form;
use lowrank_kernels::merged_linear::{Tracked, is_cheaper, keeps_sum};

use super::layers::{Segment, backward_product};
use super::ledger::{Buffer, Category};
use super::model::{Adapter, Format, LowRank, Parameter};
use super::operations::{Machine, Read};
use super::tape::Value;

impl Segment<'_> {
    /// An adapted linear layer, without a trained bias; `biased` tells of a frozen one.
    pub(super) fn adapted(&mut self, x: Value, weight: &Parameter, adapter: &Adapter, biased: bool, t: usize) -> Value {
        match adapter {
            Adapter::LowRank(delta) => {
                let mask = self.mask(delta.drops, t * weight.dims[0]);
                let down = self.operand(&delta.down);
                let up = self.folded_up(delta, weight.dims[1]);
                self.factors(x, weight, mask, [down, up], delta.rank(), t)
            }
            Adapter::Dora { delta, magnitude, .. } => self.dora(x, weight, delta, magnitude, biased, t),
            Adapter::RandLora { lambda, gamma, large, is_small_first, drops } => {
                let mask = self.mask(*drops, t * weight.dims[0]);
                let small = self.scaled_small(lambda, gamma);
                let large_value = self.operand(large);
                let pair = if *is_small_first { [small, large_value] } else { [large_value, small] };
                self.factors(x, weight, mask, pair, large.dims[1], t)
            }
            Adapter::Hra { vectors } => self.hra(x, weight, vectors, t),
            Adapter::Oft { weight: turn, block, powers } => self.oft(x, weight, turn, [*block, *powers], t),
        }
    }

    /// The multipliers of a dropout, drawn in f32 and narrowed.
    fn mask(&self, drops: bool, values: usize) -> Option<Buffer> {
        (drops && self.lifts).then(|| {
            let wide = (self.at.width < 4).then(|| self.at.scratch(4 * values));
            let mask = self.at.activation(values);
            drop(wide);
            mask
        })
    }

    /// `x W + s (D(x) A) B`, r the inner size.
    fn factors(
        &mut self,
        x: Value,
        weight: &Parameter,
        mask: Option<Buffer>,
        [down, up]: [Value; 2],
        r: usize,
        t: usize,
    ) -> Value {
        let [m, n] = weight.dims;
        let w = self.operand(weight);
        let tracked = Tracked { x: x.node.is_some(), down: down.node.is_some(), up: up.node.is_some() };
        let is_dense = matches!(weight.format, Format::Dense(_));
        if mask.is_none() && is_dense && is_cheaper(t, m, n, r, tracked) {
            return self.merged(x, weight, [down, up], t);
        }
        let dropped = mask.as_ref().map(|_| self.at.scratch(self.at.width * t * m));
        let h = self.at.product([t, m, r], Read::Plain, Category::Activations);
        drop(dropped);
        let y = {
            let _values = Self::unpacked(self.at, weight);
            self.at.product([t, m, n], Read::Plain, Category::Activations)
        };
        let y = self.at.accumulate([t, r, n], Read::Plain, y);
        let kept = down.node.map(|_| x.buffer.clone());
        let nodes = [x.node, down.node, up.node];
        let (at, weight, factors) = (self.at.clone(), weight.clone(), (w.buffer, down.buffer, up.buffer));
        self.tape.operation(&nodes, y, move |dy, gradients| {
            if nodes[2].is_some() {
                gradients.register(nodes[2], at.product([r, t, n], Read::Transposed, Category::Gradients));
            }
            drop(h);
            if nodes[0].is_none() && nodes[1].is_none() {
                return;
            }
            let u = at.product([t, n, r], Read::Plain, Category::Workspace);
            if nodes[1].is_some() {
                let _dropped = mask.as_ref().map(|_| at.scratch(at.width * t * m));
                gradients.register(nodes[1], at.product([m, t, r], Read::Transposed, Category::Gradients));
            }
            drop(kept);
            if nodes[0].is_some() {
                let dx = backward_product(&at, &weight, t);
                drop(dy);
                let dx = match &mask {
                    None => at.accumulate([t, r, m], Read::Plain, dx),
                    Some(_) => {
                        let through = at.product([t, r, m], Read::Plain, Category::Workspace);
                        drop(through); // added in place
                        dx
                    }
                };
                gradients.register(nodes[0], dx);
            }
            drop((u, mask, factors));
        })
    }

    /// B with M and c in it, `[r, d_out]`, in the type of the activations.
    fn folded_up(&mut self, delta: &LowRank, n: usize) -> Value {
        if !delta.folds() {
            return self.operand(&delta.up);
        }
        let parts = [Some(&delta.up), delta.core.as_ref(), delta.out_scale.as_ref()];
        let parts: Vec<(Value, usize)> =
            parts.into_iter().flatten().map(|part| (self.parameter(part), 4 * part.values())).collect();
        let values = delta.rank() * n;
        // `M B` before its scale, which the gradient of c needs.
        let unscaled = delta.out_scale.as_ref().map(|_| self.at.ledger.take(Category::Activations, 4 * values));
        let folded = self.at.ledger.take(Category::Activations, 4 * values);
        let (at, nodes) = (self.at.clone(), parts.iter().map(|(part, _)| part.node).collect::<Vec<_>>());
        let folded = self.tape.operation(&nodes, folded, move |dy, gradients| {
            let through = at.scratch(4 * values);
            for (part, bytes) in parts.iter().filter(|(part, _)| part.node.is_some()) {
                gradients.register(part.node, at.ledger.take(Category::Gradients, *bytes));
            }
            drop((dy, through, unscaled));
        });
        self.at.cast(&mut self.tape, &folded, values, 4)
    }

    /// `x (W + s A B)`, with the sum kept for the backward pass or built anew there.
    fn merged(&mut self, x: Value, weight: &Parameter, [down, up]: [Value; 2], t: usize) -> Value {
        let ([m, n], nodes) = (weight.dims, [x.node, down.node, up.node]);
        let sum = self.at.scratch(self.at.width * m * n);
        drop(self.at.scratch((4.max(self.at.width) - self.at.width) * m * n));
        let y = self.at.product([t, m, n], Read::Plain, Category::Activations);
        let keeps = keeps_sum(t, n) && nodes[0].is_some();
        let kept_sum = keeps.then(|| {
            sum.refile(Category::Activations);
            sum.clone()
        });
        drop(sum);
        let bytes = [down.buffer.bytes(), up.buffer.bytes()];
        let builds = nodes[0].is_some() && !keeps;
        let factors = (
            (builds || nodes[2].is_some()).then_some(down.buffer),
            (builds || nodes[1].is_some()).then_some(up.buffer),
        );
        let kept = (nodes[1].is_some() || nodes[2].is_some()).then_some(x.buffer);
        let at = self.at.clone();
        self.tape.operation(&nodes, y, move |dy, gradients| {
            if nodes[1].is_some() || nodes[2].is_some() {
                let _dense = at.product([m, t, n], Read::Transposed, Category::Workspace);
                drop(kept);
                for (node, bytes) in nodes[1..].iter().zip(bytes) {
                    if node.is_some() {
                        gradients.register(*node, at.ledger.take(Category::Gradients, bytes));
                    }
                }
            }
            if nodes[0].is_some() {
                let sum = kept_sum.unwrap_or_else(|| at.scratch(at.width * m * n));
                let dx = at.product([t, n, m], Read::Plain, Category::Workspace);
                drop((sum, dy));
                gradients.register(nodes[0], dx);
            }
            drop(factors);
        })
    }

    /// `(x (W + s A B)) * (m / n)`; with dropout `(x - D(x)) W` beside the same of `D(x)`.
    fn dora(
        &mut self,
        x: Value,
        weight: &Parameter,
        delta: &LowRank,
        magnitude: &Parameter,
        biased: bool,
        t: usize,
    ) -> Value {
        let ([m, n], r, at) = (weight.dims, delta.rank(), self.at.clone());
        let mask = self.mask(delta.drops, t * m);
        let rest = mask.as_ref().map(|_| {
            let _difference = at.scratch(at.width * t * m);
            at.product([t, m, n], Read::Plain, Category::Activations)
        });
        let input = match mask {
            None => x,
            Some(mask) => {
                let (book, node) = (at.clone(), x.node);
                self.tape.operation(&[node], at.activation(t * m), move |dy, gradients| {
                    let dx = book.scratch(book.width * t * m); // of the dropped part, and of the rest
                    drop((dy, mask));
                    gradients.register(node, dx);
                })
            }
        };
        let pair = [self.operand(&delta.down), self.operand(&delta.up)];
        let is_dense = weight.format == Format::F32 && at.width == 4 && matches!(at.machine, Machine::Cpu { .. });
        let (has_rest, ratio) = (rest.is_some(), self.parameter(magnitude));
        if Form::of(is_dense && (!biased || has_rest), t, weight.dims) == Form::Built {
            let y = self.directed(input, weight, pair, ratio, t);
            return match rest {
                Some(rest) => self.at.add(&mut self.tape, Value::constant(rest), y),
                None => y,
            };
        }
        {
            // Lengths of the columns, off the tape.
            let _values = Self::unpacked(&at, weight);
            let _cross = at.product([r, m, n], Read::Transposed, Category::Workspace);
            let _square = at.scratch(8 * r * n);
        }
        let y = self.factors(input, weight, None, pair, r, t);
        // On the CPU the output takes the place of the product and is kept; with dropout the bias is in the rest.
        let replaces = matches!(at.machine, Machine::Cpu { .. }) && (!biased || rest.is_some());
        let scaled = match replaces && at.width == 4 {
            true => y.buffer.clone(),
            false => at.activation(t * n),
        };
        let kept = if replaces { scaled.clone() } else { y.buffer };
        let (nodes, bytes) = ([y.node, ratio.node], 4 * n);
        let scaled = self.tape.operation(&nodes, scaled, move |dy, gradients| {
            let through = match dy.is_unique() && at.width == 4 {
                true => dy,
                false => at.scratch(at.width * t * n),
            };
            gradients.register(nodes[0], through);
            gradients.register(nodes[1], at.ledger.take(Category::Gradients, bytes));
            drop(kept);
        });
        match rest {
            Some(rest) => self.at.add(&mut self.tape, Value::constant(rest), scaled),
            None => scaled,
        }
    }

    /// `x (W + s A B) diag(m / n)` by a weight that is built forward and backward.
    fn directed(&mut self, x: Value, weight: &Parameter, [down, up]: [Value; 2], ratio: Value, t: usize) -> Value {
        let ([m, n], at) = (weight.dims, self.at.clone());
        let y = {
            let _built = at.scratch(4 * m * n);
            at.product([t, m, n], Read::Plain, Category::Activations)
        };
        let nodes = [x.node, down.node, up.node, ratio.node];
        let (kept, r) = ((x.buffer, y.clone()), up.buffer.bytes() / (4 * n).max(1));
        self.tape.operation(&nodes, y, move |dy, gradients| {
            gradients.register(nodes[3], at.ledger.take(Category::Gradients, 4 * n));
            let (x, y) = kept;
            drop(y);
            {
                let _h = at.product([t, m, r], Read::Plain, Category::Workspace);
                gradients.register(nodes[2], at.product([r, t, n], Read::Transposed, Category::Gradients));
            }
            {
                let _u = at.product([t, n, r], Read::Plain, Category::Workspace);
                gradients.register(nodes[1], at.product([m, t, r], Read::Transposed, Category::Gradients));
            }
            drop(x);
            if nodes[0].is_some() {
                let _built = at.scratch(4 * m * n);
                let dx = at.product([t, n, m], Read::Plain, Category::Workspace);
                drop(dy);
                gradients.register(nodes[0], dx);
            }
        })
    }

    /// RandLoRA's `diag(lambda) A diag(gamma)`, `[n r, m]` in f32.
    fn scaled_small(&mut self, lambda: &Parameter, gamma: &Parameter) -> Value {
        let ([r, n], [_, m]) = (lambda.dims, gamma.dims);
        let values = n * r * m;
        let small = self.at.ledger.take(Category::Activations, 4 * values);
        let (lambda, gamma) = (self.parameter(lambda), self.parameter(gamma));
        let (at, nodes) = (self.at.clone(), [lambda.node, gamma.node]);
        let small = self.tape.operation(&nodes, small, move |dy, gradients| {
            let in_rows = at.scratch(4 * values);
            drop(dy);
            gradients.register(nodes[0], at.ledger.take(Category::Gradients, 4 * r * n));
            gradients.register(nodes[1], at.ledger.take(Category::Gradients, 4 * n * m));
            drop(in_rows);
        });
        self.at.cast(&mut self.tape, &small, values, 4)
    }

    /// `x - ((x V) T) V^T` before the base.
    fn hra(&mut self, x: Value, weight: &Parameter, vectors: &Parameter, t: usize) -> Value {
        let ([m, _], [_, r]) = (weight.dims, vectors.dims);
        let at = self.at.clone();
        let leaf = self.parameter(vectors);
        let inner = at.ledger.take(Category::Activations, 4 * (5 * m * r + 4 * r * r));
        let thin = at.product([t, m, r], Read::Plain, Category::Activations);
        let moved = at.accumulate([t, r, m], Read::Plain, at.activation(t * m));
        let (nodes, book, kept, bytes) = ([x.node, leaf.node], at, (x.buffer, thin, inner), 4 * m * r);
        let turned = self.tape.operation(&nodes, moved, move |dy, gradients| {
            let thin = book.product([t, m, r], Read::Plain, Category::Workspace);
            gradients.register(nodes[1], book.ledger.take(Category::Gradients, bytes));
            let dx = nodes[0].map(|_| book.accumulate([t, r, m], Read::Plain, dy));
            drop((thin, kept));
            if let Some(dx) = dx {
                gradients.register(nodes[0], dx);
            }
        });
        self.dense(turned, weight, t)
    }

    /// `x + x (R - I)` before the base, block by block.
    fn oft(&mut self, x: Value, weight: &Parameter, turn: &Parameter, [block, powers]: [usize; 2], t: usize) -> Value {
        let (m, at) = (weight.dims[0], self.at.clone());
        let leaf = self.parameter(turn);
        let size = turn.dims[0] * block * block;
        let inner = at.ledger.take(Category::Activations, 4 * powers * size);
        let moved = at.activation(t * m);
        let (nodes, book, kept, bytes) = ([x.node, leaf.node], at, (x.buffer, inner), turn.bytes());
        let turned = self.tape.operation(&nodes, moved, move |dy, gradients| {
            let products = book.scratch(4 * 2 * size);
            let dx = nodes[0].map(|_| book.scratch(book.width * t * m));
            drop((dy, kept));
            drop(products);
            gradients.register(nodes[1], book.ledger.take(Category::Gradients, bytes));
            if let Some(dx) = dx {
                gradients.register(nodes[0], dx);
            }
        });
        self.dense(turned, weight, t)
    }
}
