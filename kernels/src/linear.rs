//! `y = x W + b` with a gradient for exactly the operands that ask for one: a frozen `W` never gets a `dW`.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Autodiff, Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{FloatDType, Shape};

use crate::extension::{LowRankOps, Maybe};
use crate::plain::Plain;

/// `x w + bias` by [`crate::gemm`]. Shapes: `x [t, d_in]`, `w [d_in, d_out]`, `bias [d_out]`.
pub(crate) fn forward<B: LowRankOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> FloatTensor<B> {
    let (tokens, d_out) = (x.shape()[0], w.shape()[1]);
    B::gemm(x, w, Maybe::from_option(bias.map(|bias| broadcast_rows::<B>(bias, tokens, d_out))), 1.0)
}

/// A bias as a `[tokens, d_out]` view.
pub(crate) fn broadcast_rows<B: Backend>(bias: FloatTensor<B>, tokens: usize, d_out: usize) -> FloatTensor<B> {
    Plain::<B>(bias).reshape(&[1, d_out]).expand(&[tokens, d_out]).0
}

#[derive(Debug)]
struct LinearBackward;

impl<B: LowRankOps> Backward<B, 2> for LinearBackward {
    /// x (only where W is trained), W.
    type State = (Option<FloatTensor<B>>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, w_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, w) = ops.state;
        if let (Some(node), Some(x)) = (w_node, x) {
            grads.register::<B>(node.id, B::gemm(B::float_transpose(x), dy.clone(), Maybe::Absent, 1.0));
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
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let w_is_trained = w.is_tracked();
    let (x, x_node) = x.into_parts();
    let (w, w_node) = w.into_parts();
    let y = match LinearBackward.prepare::<C>([x_node, w_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let y = B::dense_linear(x.clone(), w.clone(), Maybe::from_option(constant));
            prep.finish((w_is_trained.then_some(x), w), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::dense_linear(x, w, Maybe::from_option(constant))),
    };
    add_trained_bias::<B, C>(y, trained)
}

/// A frozen bias is a constant of the product; a trained one is added on the tape.
pub(crate) fn split_bias<B: LowRankOps, C: CheckpointStrategy>(
    bias: Option<FloatTensor<Autodiff<B, C>>>,
) -> (Option<FloatTensor<B>>, Option<FloatTensor<Autodiff<B, C>>>) {
    match bias {
        Some(bias) if bias.is_tracked() => (None, Some(bias)),
        other => (other.map(|bias| bias.into_primitive()), None),
    }
}

/// `y + bias` where a trained bias was set aside by [`split_bias`].
pub(crate) fn add_trained_bias<B: LowRankOps, C: CheckpointStrategy>(
    y: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
) -> FloatTensor<Autodiff<B, C>> {
    let Some(bias) = bias else { return y };
    let shape = y.shape();
    Autodiff::<B, C>::float_add(y, broadcast_rows::<Autodiff<B, C>>(bias, shape[0], shape[1]))
}

/// The forward of a gradient seed: a `[1]` zero on the device of `out`.
pub(crate) fn zero_like<B: Backend>(out: &FloatTensor<B>, _gradient: FloatTensor<B>) -> FloatTensor<B> {
    B::float_zeros(Shape::new([1]), &out.device(), FloatDType::F32)
}

#[derive(Debug)]
struct SeedBackward;

impl<B: LowRankOps> Backward<B, 1> for SeedBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        grads.consume::<B>(&ops.node);
        if let Some(node) = node {
            grads.register::<B>(node.id, ops.state);
        }
    }
}

pub(crate) fn seed_autodiff<B: LowRankOps, C: CheckpointStrategy>(
    out: FloatTensor<Autodiff<B, C>>,
    gradient: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let gradient = gradient.into_primitive();
    let (out, node) = out.into_parts();
    let zero = zero_like::<B>(&out, gradient.clone());
    match SeedBackward.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(gradient, zero),
        OpsKind::UnTracked(prep) => prep.finish(zero),
    }
}
