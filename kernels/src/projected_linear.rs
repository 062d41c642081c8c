//! `y = x W + b` whose backward forms the gradient of `W` already projected, or hands over its two factors.
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | x | input | `[t, m]` |
//! | W, b | trained weight, bias | `[m, n]`, `[n]` |
//! | P | `left` | `[m, r]` |
//! | Q | `right` | `[n, q]` |
//!
//! With `g = dL/dy`, the gradient `dW = x^T g` is `[m, n]`. A low-rank optimiser (GaLore, arXiv 2403.03507) needs only
//! `P^T dW Q`, and that is `(x P)^T (g Q)`: two thin products. So W's gradient *arrives* as
//!
//! | given | gradient of W | shape | saved |
//! | --- | --- | --- | --- |
//! | P | `(x P)^T g` | `[r, n]` | `x P`, not `x` |
//! | Q | `x^T (g Q)` | `[m, q]` | `x` |
//! | both | `(x P)^T (g Q)` | `[r, q]` | `x P`, not `x` |
//!
//! Cost of the weight gradient: `2 t r (m + n)` flops instead of `2 t m n`; nothing of size `m n` exists. `dx = g W^T` as ever.
//! [`factored`] registers `x` and `g` themselves instead, for a step in which the subspace is chosen anew.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};
use crate::linear::{add_trained_bias, split_bias};

#[derive(Debug)]
struct ProjectedBackward;

#[derive(Clone, Debug)]
struct Projected<B: LowRankOps> {
    /// `x P`, or `x` without P; nothing where W is frozen.
    rows: Option<FloatTensor<B>>,
    right: Option<FloatTensor<B>>,
    w: FloatTensor<B>,
}

impl<B: LowRankOps> Backward<B, 2> for ProjectedBackward {
    type State = Projected<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, w_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let Projected { rows, right, w } = ops.state;
        if let (Some(node), Some(rows)) = (w_node, rows) {
            let columns = match right {
                Some(right) => B::gemm(dy.clone(), right, Maybe::Absent, 1.0),
                None => dy.clone(),
            };
            grads.register::<B>(node.id, B::gemm(B::float_transpose(rows), columns, Maybe::Absent, 1.0));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::gemm(dy, B::float_transpose(w), Maybe::Absent, 1.0));
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    left: Option<FloatTensor<Autodiff<B, C>>>,
    right: Option<FloatTensor<Autodiff<B, C>>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let left = left.map(|left| left.into_primitive());
    let right = right.map(|right| right.into_primitive());
    let w_is_trained = w.is_tracked();
    let (x, x_node) = x.into_parts();
    let (w, w_node) = w.into_parts();
    let y = match ProjectedBackward.prepare::<C>([x_node, w_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let y = B::dense_linear(x.clone(), w.clone(), Maybe::from_option(constant));
            let rows = w_is_trained.then(|| match left {
                Some(left) => B::gemm(x, left, Maybe::Absent, 1.0),
                None => x,
            });
            prep.finish(Projected { rows, right, w }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::dense_linear(x, w, Maybe::from_option(constant))),
    };
    add_trained_bias::<B, C>(y, trained)
}

#[derive(Debug)]
struct FactoredBackward;

impl<B: LowRankOps> Backward<B, 3> for FactoredBackward {
    /// x, W.
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, x_slot, dy_slot] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, w) = ops.state;
        if let Some(slot) = x_slot {
            grads.register::<B>(slot.id, x);
        }
        if let Some(slot) = dy_slot {
            grads.register::<B>(slot.id, dy.clone());
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::gemm(dy, B::float_transpose(w), Maybe::Absent, 1.0));
        }
    }
}

pub(crate) fn factored<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    x_slot: FloatTensor<Autodiff<B, C>>,
    dy_slot: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let w = w.into_primitive(); // its gradient leaves as two factors, not through its own node
    let (x, x_node) = x.into_parts();
    let (_, x_slot) = x_slot.into_parts();
    let (_, dy_slot) = dy_slot.into_parts();
    let y = match FactoredBackward.prepare::<C>([x_node, x_slot, dy_slot]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let y = B::dense_linear(x.clone(), w.clone(), Maybe::from_option(constant));
            prep.finish((x, w), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::dense_linear(x, w, Maybe::from_option(constant))),
    };
    add_trained_bias::<B, C>(y, trained)
}
