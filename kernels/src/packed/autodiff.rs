//! The linear layer on a packed weight on the tape: only x gets a gradient, and nothing but the codes is kept for it. Where such
//! a weight is trained, its gradient leaves by another way: see [`crate::projected_linear`].

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, TensorMetadata, tensor::FloatTensor};

use super::{Operand, PackedParts};
use crate::extension::{LowRankOps, Maybe};
use crate::linear::{add_trained_bias, broadcast_rows, split_bias};

impl<B: LowRankOps> Operand<B> {
    /// `x W + b`; the identity takes no b.
    pub fn linear(self, x: FloatTensor<B>, bias: Maybe<B>) -> FloatTensor<B> {
        match self {
            Self::Identity => x,
            Self::Dense(w) => B::dense_linear(x, w, bias),
            Self::Packed(w) => B::packed_linear(x, *w, bias),
        }
    }

    /// `keep x W + b`; the identity takes no b.
    pub fn scaled(self, x: FloatTensor<B>, bias: Option<FloatTensor<B>>, keep: f32) -> FloatTensor<B> {
        match self {
            Self::Identity => B::float_mul_scalar(x, keep.into()),
            Self::Dense(w) => {
                let bias = bias.map(|bias| broadcast_rows::<B>(bias, x.shape()[0], w.shape()[1]));
                B::gemm(x, w, Maybe::from_option(bias), keep)
            }
            Self::Packed(w) => B::packed_linear(B::float_mul_scalar(x, keep.into()), *w, Maybe::from_option(bias)),
        }
    }

    /// `keep dy W^T`.
    pub fn scaled_gradient(self, dy: FloatTensor<B>, keep: f32) -> FloatTensor<B> {
        match self {
            Self::Identity => B::float_mul_scalar(dy, keep.into()),
            Self::Dense(w) => B::gemm(dy, B::float_transpose(w), Maybe::Absent, keep),
            Self::Packed(w) => B::packed_linear_backward(B::float_mul_scalar(dy, keep.into()), *w),
        }
    }

    /// `dy W^T`.
    pub fn input_gradient(self, dy: FloatTensor<B>) -> FloatTensor<B> {
        match self {
            Self::Identity => dy,
            Self::Dense(w) => B::gemm(dy, B::float_transpose(w), Maybe::Absent, 1.0),
            Self::Packed(w) => B::packed_linear_backward(dy, *w),
        }
    }
}

/// The weight without the tape.
pub(crate) fn inner<B: LowRankOps, C: CheckpointStrategy>(w: PackedParts<Autodiff<B, C>>) -> PackedParts<B> {
    match w {
        PackedParts::Table { codes, table, scale, layout } => {
            PackedParts::Table { codes, table: table.into_primitive(), scale: scale.into_primitive(), layout }
        }
        PackedParts::Nested { codes, table, scale_codes, map, absmax, layout } => PackedParts::Nested {
            codes,
            table: table.into_primitive(),
            scale_codes,
            map: map.into_primitive(),
            absmax: absmax.into_primitive(),
            layout,
        },
        PackedParts::Affine { codes, scale, zero, layout } => {
            PackedParts::Affine { codes, scale: scale.into_primitive(), zero, layout }
        }
    }
}

#[derive(Debug)]
struct PackedBackward;

impl<B: LowRankOps> Backward<B, 1> for PackedBackward {
    type State = PackedParts<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::packed_linear_backward(dy, ops.state));
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: PackedParts<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let w = inner::<B, C>(w);
    let (x, node) = x.into_parts();
    let y = B::packed_linear(x, w.clone(), Maybe::from_option(constant));
    let y = match PackedBackward.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish(w, y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    };
    add_trained_bias::<B, C>(y, trained)
}
