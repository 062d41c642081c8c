//! Rotary position embedding in the half-split form of Llama: `y = x cos + rotate_half(x) sin` (RoFormer, arXiv 2104.09864).
//!
//! The pair `(x[i], x[i + d/2])` is turned by the angle of its position; the backward turns by the negative angle, so nothing
//! but the tables is saved. Memory bound: `8 t h d` bytes in f32.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, TensorMetadata, tensor::FloatTensor};

use crate::LowRankOps;
use crate::plain::Plain;

/// Shapes: `x [b, s, h, d]`, `cos` and `sin` `[b * s, d / 2]` f32; `sign` is 1 or -1 (inverse).
pub(crate) fn reference<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    sign: f32,
) -> FloatTensor<B> {
    let x = Plain::<B>(x);
    let (dims, dtype) = (x.dims(), x.dtype());
    let half = dims[3] / 2;
    let table = |t| Plain::<B>(t).reshape(&[dims[0], dims[1], 1, half]);
    let (cos, sin) = (table(cos), table(sin) * sign);
    let x = x.f32();
    let (a, b) = (x.clone().narrow(3, 0..half), x.narrow(3, half..dims[3]));
    let first = a.clone() * cos.clone() - b.clone() * sin.clone();
    let second = b * cos + a * sin;
    Plain::<B>(B::float_cat(vec![first.0, second.0], 3)).cast(dtype).0
}

#[derive(Debug)]
struct RotaryBackward;

impl<B: LowRankOps> Backward<B, 1> for RotaryBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f32);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (cos, sin, sign) = ops.state;
        if let Some(node) = node {
            grads.register::<B>(node.id, B::rotary(dy, cos, sin, -sign));
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    cos: FloatTensor<Autodiff<B, C>>,
    sin: FloatTensor<Autodiff<B, C>>,
    sign: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let (cos, sin) = (cos.into_primitive(), sin.into_primitive());
    let (x, node) = x.into_parts();
    debug_assert_eq!(x.shape()[0] * x.shape()[1], cos.shape()[0], "one table row per token");
    match RotaryBackward.prepare::<C>([node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((cos.clone(), sin.clone(), sign), B::rotary(x, cos, sin, sign)),
        OpsKind::UnTracked(prep) => prep.finish(B::rotary(x, cos, sin, sign)),
    }
}

#[cfg(feature = "flex")]
pub(crate) fn cpu(
    x: burn_flex::FlexTensor,
    cos: burn_flex::FlexTensor,
    sin: burn_flex::FlexTensor,
    sign: f32,
) -> burn_flex::FlexTensor {
    use crate::cpu::{Rows, assert_shape, dense, for_rows, output, restore, values};

    let dtype = x.dtype();
    let (x, cos, sin) = (dense(x), dense(cos), dense(sin));
    let dims = x.layout().shape().to_vec();
    let (tokens, heads, width) = (dims[0] * dims[1], dims[2], dims[3]);
    let half = width / 2;
    assert_eq!(width, 2 * half, "the width of a head is even");
    assert_shape("the table of cosines", &cos, &[tokens, half]);
    assert_shape("the table of sines", &sin, &[tokens, half]);
    let (x, cos, sin) = (values(&x), values(&cos), values(&sin));
    let y = output(&dims, |out| {
        let out = Rows(out);
        for_rows(
            tokens,
            #[inline(always)]
            |range| {
                for token in range {
                    let (cos, sin) = (&cos[token * half..][..half], &sin[token * half..][..half]);
                    for head in 0..heads {
                        let at = (token * heads + head) * width;
                        let (a, b) = (&x[at..][..half], &x[at + half..][..half]);
                        // SAFETY: one task per token.
                        let (ya, yb) = unsafe { (out.slice(at, half), out.slice(at + half, half)) };
                        for i in 0..half {
                            let s = sin[i] * sign;
                            ya[i] = a[i] * cos[i] - b[i] * s;
                            yb[i] = b[i] * cos[i] + a[i] * s;
                        }
                    }
                }
            },
        );
    });
    restore(y, dtype)
}
