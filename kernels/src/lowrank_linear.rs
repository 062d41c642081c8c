//! The low-rank linear layer: `y = x W + b + s (D(x) A) B`, without a dense delta and without a gradient of a frozen `W`.
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | x | input | `[t, d_in]` |
//! | W, b | frozen base | `[d_in, d_out]`, `[d_out]` |
//! | D | `mask`, inverted dropout multipliers | `[t, d_in]` |
//! | A | `down` | `[d_in, r]` |
//! | B | `up` (a core M and an output scale c are folded in: `M B diag(c)`) | `[r, d_out]` |
//!
//! With `h = D(x) A` and `g = dL/dy`: `u = s g B^T`, `dB = s h^T g`, `dA = D(x)^T u`, `dx = g W^T + D(u A^T)` (LoRA, arXiv
//! 2106.09685, section 4.1). Saved: `h [t, r]`, and `x` only where A is trained.
//!
//! Cost: forward `2 t d_in d_out + 2 t r (d_in + d_out)` flops, backward the same for `dx` plus `2 t r (d_in + d_out)` for the
//! factors. The delta accumulates into the base product (`gemm` with C), so it costs no extra pass over `y`. Where r is so large
//! that `W + s A B` is cheaper than the factors, `merged_linear.rs` does the work (never with dropout).
//!
//! On a GPU the products with `W` are bound by arithmetic, everything else by memory. Floors for the seven matrices of a layer, r = 16,
//! bf16, on 989 TFLOP/s and 4.8 TB/s, in us:
//!
//! | | bytes | Llama 1B, 2048 tokens | 8B, 2048 | 8B, 4096 |
//! | --- | --- | --- | --- | --- |
//! | `x W`, and `g W^T` | | 252 * 2 | 903 * 2 | 1807 * 2 |
//! | `h = D(x) A`, and `dA` | `2 t d_in` each | 17 * 2 | 33 * 2 | 66 * 2 |
//! | `u = s g B^T`, and `dB` | `2 t d_out` each | 20 * 2 | 37 * 2 | 73 * 2 |
//! | `y + s h B` | `4 t d_out` | 40 | 73 | 147 |
//! | `dx + u A^T` | `4 t d_in` | 35 | 66 | 133 |
//! | the last two as a product and an addition | twice that | +75 | +140 | +280 |
//!
//! So the four thin products cost 8 % of the base at best (15 % at 1B) and the two updates as much again. Launches: forward 3
//! (h, base, update), backward 5; a thin product whose sum is split adds one. Thin products are `gpu/thin/`; the updates are
//! merged into the writes of their matmuls by Burn's fusion, which is what a kernel of our own would do. Carrying `s h` in extra columns of x and
//! B in extra rows of W would save the updates (the product grows by r / d_in, 0.4 %), but x and W would have to be allocated with
//! room, x once for each adapter that reads it (q, k and v share it), or be copied, which costs what it saves. Without
//! either, it needs a matmul that reads its k range from two pairs of matrices. Not measured yet.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, TensorMetadata, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};
use crate::linear::{add_trained_bias, split_bias};
use crate::merged_linear::{self, Tracked};
use crate::packed::Operand;

/// Returns `(y, h)` with `h = D(x) A`, `[t, r]`.
pub(crate) fn forward<B: LowRankOps>(
    x: FloatTensor<B>,
    w: Operand<B>,
    bias: Option<FloatTensor<B>>,
    mask: Option<FloatTensor<B>>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    scale: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dropped = dropped::<B>(x.clone(), mask);
    let h = B::gemm(dropped, down, Maybe::Absent, 1.0);
    let y = w.linear(x, Maybe::from_option(bias));
    (B::gemm(h.clone(), up, Maybe::Given(y), scale), h)
}

/// The result alone, by the cheaper route.
pub(crate) fn reference<B: LowRankOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    mask: Option<FloatTensor<B>>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    scale: f32,
) -> FloatTensor<B> {
    let nothing = Tracked { x: false, down: false, up: false };
    match mask.is_none() && merges::<B>(&x, &w, &down, nothing) {
        true => merged_linear::forward::<B>(x, w, bias, down, up, scale),
        false => forward::<B>(x, Operand::Dense(w), bias, mask, down, up, scale).0,
    }
}

fn merges<B: LowRankOps>(x: &FloatTensor<B>, w: &FloatTensor<B>, down: &FloatTensor<B>, tracked: Tracked) -> bool {
    let (w, down) = (w.shape(), down.shape());
    merged_linear::is_cheaper(x.shape()[0], w[0], w[1], down[1], tracked)
}

fn dropped<B: LowRankOps>(x: FloatTensor<B>, mask: Option<FloatTensor<B>>) -> FloatTensor<B> {
    match mask {
        Some(mask) => B::float_mul(x, mask),
        None => x,
    }
}

#[derive(Debug)]
struct LowRankLinearBackward;

#[derive(Clone, Debug)]
struct State<B: LowRankOps> {
    /// The undropped input, only where A is trained.
    x: Option<FloatTensor<B>>,
    mask: Option<FloatTensor<B>>,
    h: FloatTensor<B>,
    w: Operand<B>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    scale: f32,
}

impl<B: LowRankOps> Backward<B, 3> for LowRankLinearBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, down_node, up_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let State { x, mask, h, w, down, up, scale } = ops.state;
        if let Some(node) = up_node {
            grads.register::<B>(node.id, B::gemm(B::float_transpose(h), dy.clone(), Maybe::Absent, scale));
        }
        if x_node.is_none() && down_node.is_none() {
            return;
        }
        let u = B::gemm(dy.clone(), B::float_transpose(up), Maybe::Absent, scale);
        if let (Some(node), Some(x)) = (down_node, x) {
            let dropped = dropped::<B>(x, mask.clone());
            grads.register::<B>(node.id, B::gemm(B::float_transpose(dropped), u.clone(), Maybe::Absent, 1.0));
        }
        if let Some(node) = x_node {
            let dx = w.input_gradient(dy);
            let dx = match mask {
                None => B::gemm(u, B::float_transpose(down), Maybe::Given(dx), 1.0),
                Some(mask) => {
                    let through_delta = B::gemm(u, B::float_transpose(down), Maybe::Absent, 1.0);
                    B::float_add(dx, B::float_mul(through_delta, mask))
                }
            };
            grads.register::<B>(node.id, dx);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
    mask: Option<FloatTensor<Autodiff<B, C>>>,
    down: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    scale: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let (constant, trained) = split_bias::<B, C>(bias);
    let mask = mask.map(|mask| mask.into_primitive());
    let w = w.into_primitive(); // frozen: not a parent, so it can never receive a gradient
    let tracked = Tracked { x: x.is_tracked(), down: down.is_tracked(), up: up.is_tracked() };
    let (t, r) = (x.shape()[0], down.shape()[1]);
    let y = match mask.is_none() && merged_linear::is_cheaper(t, w.shape()[0], w.shape()[1], r, tracked) {
        true => merged_linear::autodiff::<B, C>(x, w, constant, down, up, scale),
        false => factors::<B, C>(x, Operand::Dense(w), constant, mask, down, up, scale),
    };
    add_trained_bias::<B, C>(y, trained)
}

/// On the tape, with the bias already split off; the nodes are those of x, down and up.
pub(crate) fn factors<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: Operand<B>,
    constant: Option<FloatTensor<B>>,
    mask: Option<FloatTensor<B>>,
    down: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    scale: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let down_is_trained = down.is_tracked();
    let (x, x_node) = x.into_parts();
    let (down, down_node) = down.into_parts();
    let (up, up_node) = up.into_parts();
    match LowRankLinearBackward.prepare::<C>([x_node, down_node, up_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (y, h) = forward::<B>(x.clone(), w.clone(), constant, mask.clone(), down.clone(), up.clone(), scale);
            prep.finish(State { x: down_is_trained.then_some(x), mask, h, w, down, up, scale }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(forward::<B>(x, w, constant, mask, down, up, scale).0),
    }
}
