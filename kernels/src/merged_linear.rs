//! The low-rank linear layer for a large rank: `y = x V + b` with `V = W + s A B` built for the time of one product.
//!
//! Same function and same shapes as [`crate::lowrank_linear`]; which of the two runs is decided by counting (see
//! [`is_cheaper`]). With `g = dL/dy` and `G = x^T g`: `dx = g V^T`, `dA = s G B^T`, `dB = s A^T G`. Saved: x where a factor
//! is trained, and V where it is no larger than x (`n <= t`), so that long batches of a small model build it once; else V
//! is built again from A and B, and nothing of the size of W is kept.
//!
//! | | factors | merged |
//! | --- | --- | --- |
//! | forward | `2 t r (m + n)` | `2 r m n` |
//! | dx | `2 t r (m + n)` | `2 r m n`, or nothing where V is kept |
//! | dA, dB (where trained) | `2 t r m`, `2 t r n` | `2 t m n` once, then `2 r m n` each |

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, TensorMetadata, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};

/// Which operands of a low-rank layer a pass differentiates.
#[derive(Clone, Copy, Debug)]
pub struct Tracked {
    /// The input.
    pub x: bool,
    /// A.
    pub down: bool,
    /// B.
    pub up: bool,
}

/// Whether [`lowrank_linear`](crate::lowrank_linear()) builds `V = W + s A B`, for a dense W without dropout: whether that saves
/// arithmetic over the factors, for `t` rows, `W [m, n]` and rank `r`.
pub fn is_cheaper(t: usize, m: usize, n: usize, r: usize, tracked: Tracked) -> bool {
    let (tokens, width) = (t, n);
    let [t, m, n, r] = [t, m, n, r].map(|size| size as f64);
    let passes = |needed: bool| if needed { 1.0 } else { 0.0 };
    let trains = tracked.down || tracked.up;
    let through = passes(tracked.x);
    let u = if tracked.x || tracked.down { t * r * n } else { 0.0 };
    let factors =
        t * r * (m + n) + u + through * t * r * m + passes(tracked.down) * t * r * m + passes(tracked.up) * t * r * n;
    let builds = if keeps_sum(tokens, width) { 1.0 } else { 1.0 + through };
    let merged = (builds + passes(tracked.down) + passes(tracked.up)) * r * m * n + passes(trains) * t * m * n;
    merged < factors
}

/// Whether a pass over `t` rows keeps `V [m, n]` for its backward: where it is no larger than `x [t, m]`.
pub fn keeps_sum(t: usize, n: usize) -> bool {
    n <= t
}

/// `W + s A B`, laid out as `W^T` lies on disk: a stored `[d_out, d_in]` matrix is read along its rows.
fn sum<B: LowRankOps>(w: FloatTensor<B>, down: FloatTensor<B>, up: FloatTensor<B>, scale: f32) -> FloatTensor<B> {
    let [w, down, up] = [w, down, up].map(B::float_transpose);
    B::float_transpose(B::gemm(up, down, Maybe::Given(w), scale))
}

pub(crate) fn forward<B: LowRankOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    scale: f32,
) -> FloatTensor<B> {
    B::dense_linear(x, sum::<B>(w, down, up, scale), Maybe::from_option(bias))
}

#[derive(Debug)]
struct MergedBackward;

/// What `dx` multiplies with.
#[derive(Clone, Debug)]
enum Sum<B: LowRankOps> {
    /// V.
    Kept(FloatTensor<B>),
    /// W, A and B, from which it is built.
    Parts([FloatTensor<B>; 3]),
    /// x has no gradient.
    Unused,
}

#[derive(Clone, Debug)]
struct State<B: LowRankOps> {
    /// Where a factor is trained.
    x: Option<FloatTensor<B>>,
    sum: Sum<B>,
    /// A where B is trained, and B where A is.
    down: Option<FloatTensor<B>>,
    up: Option<FloatTensor<B>>,
    scale: f32,
}

impl<B: LowRankOps> Backward<B, 3> for MergedBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, down_node, up_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let State { x, sum: v, down, up, scale } = ops.state;
        if let Some(x) = x {
            let dv = B::gemm(B::float_transpose(x), dy.clone(), Maybe::Absent, 1.0);
            if let (Some(node), Some(up)) = (down_node, up) {
                grads.register::<B>(node.id, B::gemm(dv.clone(), B::float_transpose(up), Maybe::Absent, scale));
            }
            if let (Some(node), Some(down)) = (up_node, down) {
                grads.register::<B>(node.id, B::gemm(B::float_transpose(down), dv, Maybe::Absent, scale));
            }
        }
        let v = match v {
            Sum::Kept(v) => v,
            Sum::Parts([w, down, up]) => sum::<B>(w, down, up, scale),
            Sum::Unused => return,
        };
        if let Some(node) = x_node {
            grads.register::<B>(node.id, B::gemm(dy, B::float_transpose(v), Maybe::Absent, 1.0));
        }
    }
}

/// On the tape, with the bias already split off; the nodes are those of x, down and up.
pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<B>,
    constant: Option<FloatTensor<B>>,
    down: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    scale: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let tracked = Tracked { x: x.is_tracked(), down: down.is_tracked(), up: up.is_tracked() };
    let (x, x_node) = x.into_parts();
    let (down, down_node) = down.into_parts();
    let (up, up_node) = up.into_parts();
    let v = sum::<B>(w.clone(), down.clone(), up.clone(), scale);
    let y = B::dense_linear(x.clone(), v.clone(), Maybe::from_option(constant));
    match MergedBackward.prepare::<C>([x_node, down_node, up_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let keeps = keeps_sum(x.shape()[0], w.shape()[1]);
            let sum = match tracked.x {
                true if keeps => Sum::Kept(v),
                true => Sum::Parts([w, down.clone(), up.clone()]),
                false => Sum::Unused,
            };
            let (down, up) = (tracked.up.then_some(down), tracked.down.then_some(up));
            prep.finish(State { x: (tracked.down || tracked.up).then_some(x), sum, down, up, scale }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}
