//! One small basis under n pairs of diagonals: `U[k r + i, j] = lambda[i, k] a[i, j] gamma[k, j]` (RandLoRA, arXiv 2502.00987).
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | a | basis, a constant | `[r, m]` |
//! | lambda, gamma | trained scales | `[r, n]`, `[n, m]` |
//! | U | result | `[n r, m]` |
//!
//! With `g = dL/dU`: `dlambda[i, k] = sum_j g a[i, j] gamma[k, j]`, `dgamma[k, j] = sum_i g a[i, j] lambda[i, k]`. Memory bound:
//! U is written once and g read once (`4 n r m` bytes each). Saved: the three operands, nothing of the size of U.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, TensorMetadata, tensor::FloatTensor};

use crate::extension::LowRankOps;
use crate::plain::Plain;

/// `[n, r, m]` factors that multiply to U.
fn factors<B: Backend>(a: FloatTensor<B>, lambda: FloatTensor<B>, gamma: FloatTensor<B>) -> [Plain<B>; 3] {
    let ([r, n], m) = ([lambda.shape()[0], lambda.shape()[1]], gamma.shape()[1]);
    let lambda = Plain::<B>(lambda).t().reshape(&[n, r, 1]);
    [lambda, Plain(a).reshape(&[1, r, m]), Plain(gamma).reshape(&[n, 1, m])]
}

pub(crate) fn reference<B: Backend>(
    a: FloatTensor<B>,
    lambda: FloatTensor<B>,
    gamma: FloatTensor<B>,
) -> FloatTensor<B> {
    let ([r, n], m) = ([lambda.shape()[0], lambda.shape()[1]], gamma.shape()[1]);
    let [lambda, a, gamma] = factors::<B>(a, lambda, gamma);
    (lambda * a * gamma).reshape(&[n * r, m]).0
}

/// Returns `(dlambda, dgamma)`.
pub(crate) fn backward_reference<B: Backend>(
    a: FloatTensor<B>,
    lambda: FloatTensor<B>,
    gamma: FloatTensor<B>,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let ([r, n], m) = ([lambda.shape()[0], lambda.shape()[1]], gamma.shape()[1]);
    let [lambda, a, gamma] = factors::<B>(a, lambda, gamma);
    let through = Plain::<B>(dy).reshape(&[n, r, m]) * a;
    let d_lambda = (through.clone() * gamma).sum_dim(2).reshape(&[n, r]).t();
    let d_gamma = (through * lambda).sum_dim(1).reshape(&[n, m]);
    (d_lambda.0, d_gamma.0)
}

#[derive(Debug)]
struct ScaledBasisBackward;

impl<B: LowRankOps> Backward<B, 2> for ScaledBasisBackward {
    /// a, lambda, gamma.
    type State = [FloatTensor<B>; 3];

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [lambda_node, gamma_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let [a, lambda, gamma] = ops.state;
        let (d_lambda, d_gamma) = B::scaled_basis_backward(a, lambda, gamma, dy);
        if let Some(node) = lambda_node {
            grads.register::<B>(node.id, d_lambda);
        }
        if let Some(node) = gamma_node {
            grads.register::<B>(node.id, d_gamma);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    a: FloatTensor<Autodiff<B, C>>,
    lambda: FloatTensor<Autodiff<B, C>>,
    gamma: FloatTensor<Autodiff<B, C>>,
) -> FloatTensor<Autodiff<B, C>> {
    let a = a.into_primitive();
    let (lambda, lambda_node) = lambda.into_parts();
    let (gamma, gamma_node) = gamma.into_parts();
    let y = B::scaled_basis(a.clone(), lambda.clone(), gamma.clone());
    match ScaledBasisBackward.prepare::<C>([lambda_node, gamma_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish([a, lambda, gamma], y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    }
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{backward as backward_cpu, forward as cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use std::borrow::Cow;

    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use crate::cpu::{
        LANES, Rows, as_f32, assert_shape, dense, from_vec, output, outputs, restore, values, vectorised,
    };

    /// r, n, m.
    fn sizes(a: &FlexTensor, lambda: &FlexTensor, gamma: &FlexTensor) -> [usize; 3] {
        let (lambda_dims, m) = (lambda.layout().shape().to_vec(), gamma.layout().shape().to_vec()[1]);
        let (r, n) = (lambda_dims[0], lambda_dims[1]);
        assert_shape("the basis", a, &[r, m]);
        assert_shape("gamma", gamma, &[n, m]);
        [r, n, m]
    }

    /// A matrix in whatever order it lies: the gradient of a transposed U arrives transposed.
    struct Strided<'a> {
        values: &'a [f32],
        strides: [isize; 2],
    }

    impl<'a> Strided<'a> {
        fn of(tensor: &'a FlexTensor) -> Self {
            let layout = tensor.layout();
            let values = &tensor.storage::<f32>()[layout.start_offset().min(tensor.storage::<f32>().len())..];
            Self { values, strides: [layout.strides()[0], layout.strides()[1]] }
        }

        /// `count` rows of `width` values, one after the other.
        #[inline(always)]
        fn rows(&self, first: usize, count: usize, width: usize) -> Cow<'a, [f32]> {
            let at = |row: usize, column: usize| {
                (row as isize * self.strides[0] + column as isize * self.strides[1]) as usize
            };
            if count * width == 0 {
                return Cow::Borrowed(&[]);
            }
            if self.strides == [width as isize, 1] {
                return Cow::Borrowed(&self.values[at(first, 0)..][..count * width]);
            }
            let mut rows = vec![0.0; count * width];
            for column in 0..width {
                for row in 0..count {
                    rows[row * width + column] = self.values[at(first + row, column)];
                }
            }
            Cow::Owned(rows)
        }
    }

    pub(crate) fn forward(a: FlexTensor, lambda: FlexTensor, gamma: FlexTensor) -> FlexTensor {
        let dtype = a.dtype();
        let (a, lambda, gamma) = (dense(a), dense(lambda), dense(gamma));
        let [r, n, m] = sizes(&a, &lambda, &gamma);
        let (a, lambda, gamma) = (values(&a), values(&lambda), values(&gamma));
        let u = output(&[n * r, m], |out| {
            let out = Rows(out);
            (0..n).into_par_iter().for_each(|k| {
                vectorised(
                    #[inline(always)]
                    || {
                        let gamma = &gamma[k * m..][..m];
                        for i in 0..r {
                            // SAFETY: one task per k.
                            let u = unsafe { out.slice((k * r + i) * m, m) };
                            let lambda = lambda[i * n + k];
                            for ((u, a), g) in u.iter_mut().zip(&a[i * m..][..m]).zip(gamma) {
                                *u = lambda * a * g;
                            }
                        }
                    },
                );
            });
        });
        restore(u, dtype)
    }

    pub(crate) fn backward(
        a: FlexTensor,
        lambda: FlexTensor,
        gamma: FlexTensor,
        dy: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let dtype = a.dtype();
        let (a, lambda, gamma, dy) = (dense(a), dense(lambda), dense(gamma), as_f32(dy));
        let is_flipped = dy.layout().strides().iter().any(|&stride| stride < 0);
        let dy = if is_flipped { dense(dy) } else { dy };
        let [r, n, m] = sizes(&a, &lambda, &gamma);
        assert_shape("dU", &dy, &[n * r, m]);
        let (a, lambda, gamma, dy) = (values(&a), values(&lambda), values(&gamma), Strided::of(&dy));
        let (across, d_gamma) = outputs(&[n, r], &[n, m], |d_lambda, d_gamma| {
            let (d_lambda, d_gamma) = (Rows(d_lambda), Rows(d_gamma));
            (0..n).into_par_iter().for_each(|k| {
                vectorised(
                    #[inline(always)]
                    || {
                        // SAFETY: one task per k.
                        let (d_lambda, d_gamma) = unsafe { (d_lambda.slice(k * r, r), d_gamma.slice(k * m, m)) };
                        d_gamma.fill(0.0);
                        let (block, gamma) = (dy.rows(k * r, r, m), &gamma[k * m..][..m]);
                        for i in 0..r {
                            let (dy, a) = (&block[i * m..][..m], &a[i * m..][..m]);
                            d_lambda[i] = block_row(dy, a, gamma, lambda[i * n + k], d_gamma);
                        }
                    },
                );
            });
        });
        let across = values(&across);
        let d_lambda: Vec<f32> = (0..r * n).map(|at| across[at % n * r + at / n]).collect();
        (restore(from_vec(d_lambda, &[r, n]), dtype), restore(d_gamma, dtype))
    }

    /// Adds `lambda dy a` to `d_gamma` and returns `sum dy a gamma`.
    #[inline(always)]
    fn block_row(dy: &[f32], a: &[f32], gamma: &[f32], lambda: f32, d_gamma: &mut [f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let whole = dy.len() / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            let (dy, a, gamma) = (&dy[at..][..LANES], &a[at..][..LANES], &gamma[at..][..LANES]);
            let d_gamma = &mut d_gamma[at..][..LANES];
            for l in 0..LANES {
                let through = dy[l] * a[l];
                lanes[l] += through * gamma[l];
                d_gamma[l] += through * lambda;
            }
        }
        let mut sum: f32 = lanes.iter().sum();
        for at in whole..dy.len() {
            let through = dy[at] * a[at];
            sum += through * gamma[at];
            d_gamma[at] += through * lambda;
        }
        sum
    }
}
