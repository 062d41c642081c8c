//! A linear layer whose columns have trained lengths: `y = x V diag(m / n)`, `V = W + s A B`, `n_j = ||V_j||` (DoRA, arXiv
//! 2402.09353).
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | x | input | `[t, d_in]` |
//! | W | frozen base | `[d_in, d_out]` |
//! | A, B | `down`, `up` | `[d_in, r]`, `[r, d_out]` |
//! | m | magnitude | `[d_out]` |
//!
//! With `c = m / n`, which is as a constant to A and B (section 4.3), `U = V diag(c)` and `g = dL/dy`: `dx = g U^T`,
//! `u = s g (B diag(c))^T`, `dA = x^T u`, `dB = s (x A)^T g diag(c)`, `dm_j = sum_t g_tj y_tj / m_j`.
//!
//! Same function as a low-rank linear layer and a column scale. U is built for the time of a product, forward and backward,
//! in one sweep over W that also measures n. So neither the delta nor the lengths need a pass over the outputs, nor the delta one
//! over dx. Beside the base products and the thin ones of LoRA's backward, in values read and written:
//!
//! | | here | low-rank layer and column scale |
//! | --- | --- | --- |
//! | forward | `2 d_in d_out` | `d_in d_out` (for n), `4 t d_out` |
//! | backward | `2 d_in d_out`, `2 t d_out` | `3 t d_out`, `2 t d_in` |
//! | flops of the sweeps | `4 r d_in d_out` | `2 r d_in d_out`, `2 t r (d_in + d_out)` |
//!
//! Saved: x where A or B is trained, and y. A factor c below 1e-12 counts as 1e-12, so that m has a gradient where it is 0.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};
use crate::plain::Plain;

/// Least squared length of a column.
const LEAST_SQUARE: f32 = 1e-24;
/// Least size of a factor.
const LEAST_FACTOR: f32 = 1e-12;

/// Whether building U costs less on the CPU than passes over the outputs, by the table above: for `t` rows and `W [m, n]`.
pub fn builds_are_cheaper(t: usize, m: usize, n: usize) -> bool {
    4 * m * n + 2 * t * n < m * n + 7 * t * n + 2 * t * m
}

/// U, n and c.
pub(crate) fn reference<B: Backend>(
    w: FloatTensor<B>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    magnitude: FloatTensor<B>,
    scale: f32,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let sum = Plain::<B>(w) + Plain::<B>(down).matmul(Plain(up)) * scale;
    let width = sum.dims()[1];
    let length = (sum.clone() * sum.clone()).sum_dim(0).clamp(LEAST_SQUARE, f32::MAX).sqrt();
    let factor = Plain::<B>(magnitude).reshape(&[1, width]) * length.clone().recip();
    let is_small = B::float_lower_elem(factor.clone().abs().0, LEAST_FACTOR.into(), factor.bools());
    let factor = Plain::<B>(B::float_mask_fill(factor.0, is_small, LEAST_FACTOR.into()));
    ((sum * factor.clone()).0, length.reshape(&[width]).0, factor.reshape(&[width]).0)
}

/// `sum_t a_tj b_tj`, `[n]`.
pub(crate) fn dots_reference<B: Backend>(a: FloatTensor<B>, b: FloatTensor<B>) -> FloatTensor<B> {
    let product = Plain::<B>(a) * Plain(b);
    let width = product.dims()[1];
    product.sum_dim(0).reshape(&[width]).0
}

pub(crate) fn forward<B: LowRankOps>(
    x: FloatTensor<B>,
    w: FloatTensor<B>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    magnitude: FloatTensor<B>,
    scale: f32,
) -> FloatTensor<B> {
    B::dense_linear(x, B::directed_weight(w, down, up, magnitude, scale).0, Maybe::Absent)
}

#[derive(Debug)]
struct DirectedBackward;

#[derive(Clone, Debug)]
struct State<B: LowRankOps> {
    /// Where A or B is trained.
    x: Option<FloatTensor<B>>,
    /// Where m is trained.
    y: Option<FloatTensor<B>>,
    /// W and m, where x has a gradient.
    base: Option<[FloatTensor<B>; 2]>,
    down: FloatTensor<B>,
    up: FloatTensor<B>,
    lengths: FloatTensor<B>,
    factors: FloatTensor<B>,
    scale: f32,
}

impl<B: LowRankOps> Backward<B, 4> for DirectedBackward {
    type State = State<B>;

    fn backward(self, ops: Ops<Self::State, 4>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, down_node, up_node, magnitude_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let State { x, y, base, down, up, lengths, factors, scale } = ops.state;
        if let (Some(node), Some(y)) = (magnitude_node, y) {
            let whole = Plain::<B>(lengths) * Plain(factors.clone());
            let dots = Plain::<B>(B::column_dots(dy.clone(), y));
            grads.register::<B>(node.id, (dots * whole.recip()).0);
        }
        let width = Plain::<B>(factors.clone()).dims()[0];
        let row = || Plain::<B>(factors.clone()).reshape(&[1, width]);
        if let (Some(node), Some(x)) = (up_node, x.clone()) {
            let h = B::gemm(x, down.clone(), Maybe::Absent, 1.0);
            let gradient = B::gemm(B::float_transpose(h), dy.clone(), Maybe::Absent, scale);
            grads.register::<B>(node.id, (Plain::<B>(gradient) * row()).0);
        }
        if let (Some(node), Some(x)) = (down_node, x) {
            let scaled = (Plain::<B>(up.clone()) * row()).t().0;
            let u = B::gemm(dy.clone(), scaled, Maybe::Absent, scale);
            grads.register::<B>(node.id, B::gemm(B::float_transpose(x), u, Maybe::Absent, 1.0));
        }
        if let (Some(node), Some([w, magnitude])) = (x_node, base) {
            let u = B::directed_weight(w, down, up, magnitude, scale).0;
            grads.register::<B>(node.id, B::gemm(dy, B::float_transpose(u), Maybe::Absent, 1.0));
        }
    }
}

/// The nodes are those of x, down, up and magnitude.
pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    w: FloatTensor<B>,
    down: FloatTensor<Autodiff<B, C>>,
    up: FloatTensor<Autodiff<B, C>>,
    magnitude: FloatTensor<Autodiff<B, C>>,
    scale: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let trains = down.is_tracked() || up.is_tracked();
    let (measures, passes) = (magnitude.is_tracked(), x.is_tracked());
    let (x, x_node) = x.into_parts();
    let (down, down_node) = down.into_parts();
    let (up, up_node) = up.into_parts();
    let (magnitude, magnitude_node) = magnitude.into_parts();
    let (u, lengths, factors) = B::directed_weight(w.clone(), down.clone(), up.clone(), magnitude.clone(), scale);
    let y = B::dense_linear(x.clone(), u, Maybe::Absent);
    let nodes = [x_node, down_node, up_node, magnitude_node];
    match DirectedBackward.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let (x, kept) = (trains.then_some(x), measures.then(|| y.clone()));
            let base = passes.then_some([w, magnitude]);
            prep.finish(State { x, y: kept, base, down, up, lengths, factors, scale }, y)
        }
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{directed as cpu, dots as dots_cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;
    use burn_flex::FlexTensor;

    use super::{LEAST_FACTOR, LEAST_SQUARE};
    use crate::cpu::{Rows, assert_shape, dense, dot, for_rows, from_vec, map_rows, output, restore, values};

    /// Columns of W are rows here, as they lie on disk.
    pub(crate) fn directed(
        w: FlexTensor,
        down: FlexTensor,
        up: FlexTensor,
        magnitude: FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let dtype = w.dtype();
        let [w, down] = [w, down].map(|tensor| dense(Flex::float_transpose(tensor)));
        let (dims, rank) = (w.layout().shape().to_vec(), down.layout().shape().to_vec()[0]);
        let (width, height) = (dims[0], dims[1]);
        let (up, magnitude) = (dense(up), dense(magnitude));
        assert_shape("A^T", &down, &[rank, height]);
        assert_shape("B", &up, &[rank, width]);
        assert_shape("the magnitude", &magnitude, &[width]);
        let (w, down, up, magnitude) = (values(&w), values(&down), values(&up), values(&magnitude));
        let (mut lengths, mut factors) = (vec![0.0; width], vec![0.0; width]);
        let columns = (Rows(lengths.as_mut_ptr()), Rows(factors.as_mut_ptr()));
        let sum = output(&dims, |out| {
            let out = Rows(out);
            for_rows(
                width,
                #[inline(always)]
                |range| {
                    for column in range {
                        // SAFETY: one task per column; the three buffers have a place for each.
                        let (v, length, factor) = unsafe {
                            (out.slice(column * height, height), columns.0.slice(column, 1), columns.1.slice(column, 1))
                        };
                        v.copy_from_slice(&w[column * height..][..height]);
                        for first in (0..rank).step_by(4) {
                            let coefficient = |k: usize| {
                                if k < rank { scale * up[k * width + column] } else { 0.0 }
                            };
                            let b = [0, 1, 2, 3].map(|i| coefficient(first + i));
                            // Beyond the rank: any row, times 0.
                            let a = [0, 1, 2, 3].map(|i| &down[(first + i).min(rank - 1) * height..][..height]);
                            for ((((v, a0), a1), a2), a3) in v.iter_mut().zip(a[0]).zip(a[1]).zip(a[2]).zip(a[3]) {
                                *v += (a0 * b[0] + a1 * b[1]) + (a2 * b[2] + a3 * b[3]);
                            }
                        }
                        let n = dot(v, v).max(LEAST_SQUARE).sqrt();
                        let c = magnitude[column] / n;
                        let c = if c.abs() < LEAST_FACTOR { LEAST_FACTOR } else { c };
                        for v in v.iter_mut() {
                            *v *= c;
                        }
                        (length[0], factor[0]) = (n, c);
                    }
                },
            );
        });
        let [lengths, factors] = [lengths, factors].map(|column| from_vec(column, &[width]));
        (restore(Flex::float_transpose(sum), dtype), lengths, factors)
    }

    pub(crate) fn dots(a: FlexTensor, b: FlexTensor) -> FlexTensor {
        let dims = a.layout().shape().to_vec();
        assert_shape("the other factor", &b, &dims);
        let (a, b, width) = (dense(a), dense(b), dims[1]);
        let (a, b) = (values(&a), values(&b));
        let partial = map_rows(
            dims[0],
            #[inline(always)]
            |range| {
                let mut sums = vec![0.0f32; width];
                for row in range {
                    let (a, b) = (&a[row * width..][..width], &b[row * width..][..width]);
                    for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
                        *sum += a * b;
                    }
                }
                sums
            },
        );
        let mut sums = vec![0.0f32; width];
        for part in partial {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        from_vec(sums, &[width])
    }
}
