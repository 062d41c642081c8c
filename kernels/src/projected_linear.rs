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
//!
//! A weight that is held as codes ([`crate::Packed`]) has no node of its own: its gradient arrives at a placeholder. Forward and
//! backward then dequantise panel by panel.
//!
//! An update that is not yet in the weight is carried as a low-rank offset: the layer acts as `c W + D U` ([`Offset`]), with
//! `y = c x W + (x D) U` and `dx = c g W^T + (g U^T) D^T`. Where D is P itself, `x P` serves both.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};
use crate::linear::{add_trained_bias, split_bias};
use crate::packed::{Operand, PackedParts};

/// The low-rank part of `c W + D U` and the factor c.
#[derive(Clone, Debug)]
pub(crate) struct Offset<B: LowRankOps> {
    pub down: FloatTensor<B>,
    pub up: FloatTensor<B>,
    pub keep: f32,
}

impl<B: LowRankOps> Offset<B> {
    pub fn from_options(down: Option<FloatTensor<B>>, up: Option<FloatTensor<B>>, keep: f32) -> Option<Self> {
        Some(Self { down: down?, up: up?, keep })
    }
}

/// `c x W + (x D) U + b`.
pub(crate) fn forward<B: LowRankOps>(
    x: FloatTensor<B>,
    w: Operand<B>,
    bias: Option<FloatTensor<B>>,
    offset: Option<&Offset<B>>,
) -> FloatTensor<B> {
    let Some(Offset { down, up, keep }) = offset else { return w.linear(x, Maybe::from_option(bias)) };
    let thin = B::gemm(x.clone(), down.clone(), Maybe::Absent, 1.0);
    let y = w.scaled(x, bias, *keep);
    B::gemm(thin, up.clone(), Maybe::Given(y), 1.0)
}

/// `c g W^T + (g U^T) D^T`.
fn input_gradient<B: LowRankOps>(dy: FloatTensor<B>, w: Operand<B>, offset: Option<Offset<B>>) -> FloatTensor<B> {
    let Some(Offset { down, up, keep }) = offset else { return w.input_gradient(dy) };
    let thin = B::gemm(dy.clone(), B::float_transpose(up), Maybe::Absent, 1.0);
    let dx = w.scaled_gradient(dy, keep);
    B::gemm(thin, B::float_transpose(down), Maybe::Given(dx), 1.0)
}

#[derive(Debug)]
struct ProjectedBackward;

#[derive(Clone, Debug)]
struct Projected<B: LowRankOps> {
    /// `x P`, or `x` without P; nothing where W is frozen.
    rows: Option<FloatTensor<B>>,
    right: Option<FloatTensor<B>>,
    w: Operand<B>,
    offset: Option<Offset<B>>,
}

impl<B: LowRankOps> Backward<B, 2> for ProjectedBackward {
    type State = Projected<B>;

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, w_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let Projected { rows, right, w, offset } = ops.state;
        if let (Some(node), Some(rows)) = (w_node, rows) {
            let columns = match right {
                Some(right) => B::gemm(dy.clone(), right, Maybe::Absent, 1.0),
                None => dy.clone(),
            };
            grads.register::<B>(node.id, B::gemm(B::float_transpose(rows), columns, Maybe::Absent, 1.0));
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, input_gradient::<B>(dy, w, offset));
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    left: Option<FloatTensor<Autodiff<B, C>>>,
    right: Option<FloatTensor<Autodiff<B, C>>>,
    up: Option<FloatTensor<Autodiff<B, C>>>,
    keep: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let value = w.clone().into_primitive();
    projected::<B, C>(x, Operand::Dense(value), w, bias, left, right, up, keep)
}

/// The same for a weight that is held as codes; its gradient is that of the placeholder.
pub(crate) fn packed<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: PackedParts<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    left: Option<FloatTensor<Autodiff<B, C>>>,
    right: Option<FloatTensor<Autodiff<B, C>>>,
    up: Option<FloatTensor<Autodiff<B, C>>>,
    keep: f32,
    slot: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let w = Operand::Packed(Box::new(crate::packed::autodiff::inner::<B, C>(w)));
    projected::<B, C>(x, w, slot, bias, left, right, up, keep)
}

/// The gradient of the weight becomes that of `receiver`.
fn projected<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: Operand<B>,
    receiver: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    left: Option<FloatTensor<Autodiff<B, C>>>,
    right: Option<FloatTensor<Autodiff<B, C>>>,
    up: Option<FloatTensor<Autodiff<B, C>>>,
    keep: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let left = left.map(|left| left.into_primitive());
    let right = right.map(|right| right.into_primitive());
    let offset = Offset::<B>::from_options(left.clone(), up.map(|up| up.into_primitive()), keep);
    let w_is_trained = receiver.is_tracked();
    let (_, w_node) = receiver.into_parts();
    let (x, x_node) = x.into_parts();
    let y = match ProjectedBackward.prepare::<C>([x_node, w_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let thin = left.map(|left| B::gemm(x.clone(), left, Maybe::Absent, 1.0));
            let y = match (&thin, &offset) {
                (Some(thin), Some(Offset { up, keep, .. })) => {
                    let y = w.clone().scaled(x.clone(), constant, *keep);
                    B::gemm(thin.clone(), up.clone(), Maybe::Given(y), 1.0)
                }
                _ => w.clone().linear(x.clone(), Maybe::from_option(constant)),
            };
            let rows = w_is_trained.then(|| thin.unwrap_or(x));
            prep.finish(Projected { rows, right, w, offset }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>(x, w, constant, offset.as_ref())),
    };
    add_trained_bias::<B, C>(y, trained)
}

#[derive(Debug)]
struct FactoredBackward;

impl<B: LowRankOps> Backward<B, 3> for FactoredBackward {
    /// x, W, offset.
    type State = (FloatTensor<B>, Operand<B>, Option<Offset<B>>);

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, x_slot, dy_slot] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, w, offset) = ops.state;
        if let Some(slot) = x_slot {
            grads.register::<B>(slot.id, x);
        }
        if let Some(slot) = dy_slot {
            grads.register::<B>(slot.id, dy.clone());
        }
        if let Some(node) = x_node {
            grads.register::<B>(node.id, input_gradient::<B>(dy, w, offset));
        }
    }
}

pub(crate) fn factored<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: Operand<B>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    down: Option<FloatTensor<Autodiff<B, C>>>,
    up: Option<FloatTensor<Autodiff<B, C>>>,
    keep: f32,
    x_slot: FloatTensor<Autodiff<B, C>>,
    dy_slot: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let [down, up] = [down, up].map(|factor| factor.map(|factor| factor.into_primitive()));
    let offset = Offset::<B>::from_options(down, up, keep);
    let (x, x_node) = x.into_parts();
    let (_, x_slot) = x_slot.into_parts();
    let (_, dy_slot) = dy_slot.into_parts();
    let y = match FactoredBackward.prepare::<C>([x_node, x_slot, dy_slot]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let y = forward::<B>(x.clone(), w.clone(), constant, offset.as_ref());
            prep.finish((x, w, offset), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>(x, w, constant, offset.as_ref())),
    };
    add_trained_bias::<B, C>(y, trained)
}
