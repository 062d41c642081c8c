//! Every column of a product times its own factor: `y = z * c + b` (DoRA's `m / n`, arXiv 2402.09353).
//!
//! | symbol | argument | shape |
//! | --- | --- | --- |
//! | z | input | `[t, n]` |
//! | c, b | factors, constant bias | `[n]`, `[n]` |
//!
//! With `g = dL/dy`: `dz = g * c`, `dc = sum_t g * z`, `db = sum_t g`. Computed in f32 whatever the type.
//!
//! Memory bound: `8 t n` bytes forward, `12 t n` backward, nothing of which is new memory where z and g have no other owner.
//! Saved: one of `[t, n]`. In plain operations that is z, beside y. On the CPU, without a bias, z is overwritten by y and y is
//! kept, which the next operation often keeps too (a gated activation, values of attention): `dc = (sum_t g * y) / c`. Where
//! a factor is so close to 0 that z does not follow from y, and where a bias would cancel digits of it, z is kept.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, AutodiffBackend, Backend, tensor::FloatTensor};

use crate::extension::{LowRankOps, Maybe};
use crate::linear::{add_trained_bias, split_bias};
use crate::plain::Plain;

/// A vector as one row in f32.
fn row<B: Backend>(vector: FloatTensor<B>) -> Plain<B> {
    let vector = Plain::<B>(vector).f32();
    let width = vector.dims()[0];
    vector.reshape(&[1, width])
}

/// Returns y and what the backward needs: z.
pub(crate) fn reference<B: Backend>(
    z: FloatTensor<B>,
    c: FloatTensor<B>,
    bias: Option<FloatTensor<B>>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let dtype = Plain::<B>(z.clone()).dtype();
    let scaled = Plain::<B>(z.clone()).f32() * row::<B>(c);
    let y = match bias {
        Some(bias) => scaled + row::<B>(bias),
        None => scaled,
    };
    (y.cast(dtype).0, z)
}

/// Returns `(dz, dc)`.
pub(crate) fn backward_reference<B: Backend>(
    z: FloatTensor<B>,
    c: FloatTensor<B>,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (dtype, c_dtype) = (Plain::<B>(dy.clone()).dtype(), Plain::<B>(c.clone()).dtype());
    let (dy, width) = (Plain::<B>(dy).f32(), Plain::<B>(c.clone()).dims()[0]);
    let dc = (dy.clone() * Plain::<B>(z).f32()).sum_dim(0).reshape(&[width]);
    ((dy * row::<B>(c)).cast(dtype).0, dc.cast(c_dtype).0)
}

#[derive(Debug)]
struct ColumnScaleBackward;

impl<B: LowRankOps> Backward<B, 2> for ColumnScaleBackward {
    /// z or y, c, and whether there was a bias.
    type State = (FloatTensor<B>, FloatTensor<B>, bool);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [z_node, c_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (kept, c, has_bias) = ops.state;
        let (dz, dc) = B::column_scale_backward(kept, c, dy, has_bias);
        if let Some(node) = z_node {
            grads.register::<B>(node.id, dz);
        }
        if let Some(node) = c_node {
            grads.register::<B>(node.id, dc);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    z: FloatTensor<Autodiff<B, C>>,
    c: FloatTensor<Autodiff<B, C>>,
    bias: Option<FloatTensor<Autodiff<B, C>>>,
) -> (FloatTensor<Autodiff<B, C>>, FloatTensor<Autodiff<B, C>>) {
    let (constant, trained) = split_bias::<B, C>(bias);
    let has_bias = constant.is_some();
    let (z, z_node) = z.into_parts();
    let (c, c_node) = c.into_parts();
    let (y, kept) = B::column_scale(z, c.clone(), Maybe::from_option(constant));
    let out = <Autodiff<B, C> as AutodiffBackend>::from_inner(kept.clone());
    let y = match ColumnScaleBackward.prepare::<C>([z_node, c_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => prep.finish((kept, c, has_bias), y),
        OpsKind::UnTracked(prep) => prep.finish(y),
    };
    (add_trained_bias::<B, C>(y, trained), out)
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{backward as backward_cpu, forward as cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use burn_flex::FlexTensor;

    use crate::cpu::{Rows, assert_shape, dense, for_rows, from_vec, map_rows, output, restore, values, with_output};

    /// Whether every factor can be divided by: `y / c` is then z, rounded twice.
    fn is_invertible(c: &[f32]) -> bool {
        c.iter().all(|c| (1e-12..=1e12).contains(&c.abs()))
    }

    pub(crate) fn forward(z: FlexTensor, c: FlexTensor, bias: Option<FlexTensor>) -> (FlexTensor, FlexTensor) {
        let (dtype, c, bias) = (z.dtype(), dense(c), bias.map(dense));
        let dims = z.layout().shape().to_vec();
        let (rows, width) = (dims[0], dims[1]);
        assert_shape("the factors", &c, &[width]);
        if let Some(bias) = &bias {
            assert_shape("the bias", bias, &[width]);
        }
        let c = values(&c);
        let Some(bias) = bias else {
            if is_invertible(c) {
                let y = restore(with_output(z, |out| scale(out, None, c, None, rows)), dtype);
                return (y.clone(), y);
            }
            return (restore(scaled(&dense(z.clone()), c, None), dtype), z);
        };
        (restore(scaled(&dense(z.clone()), c, Some(values(&bias))), dtype), z)
    }

    fn scaled(z: &FlexTensor, c: &[f32], bias: Option<&[f32]>) -> FlexTensor {
        let dims = z.layout().shape().to_vec();
        output(&dims, |out| scale(out, Some(values(z)), c, bias, dims[0]))
    }

    /// `out = z * c + bias`, z being what is in `out` where it is not given.
    fn scale(out: *mut f32, z: Option<&[f32]>, c: &[f32], bias: Option<&[f32]>, rows: usize) {
        let (out, width) = (Rows(out), c.len());
        for_rows(
            rows,
            #[inline(always)]
            |range| {
                for row in range {
                    // SAFETY: one task per row; without z the caller has initialised it, with z it is written first.
                    let y = unsafe { out.slice(row * width, width) };
                    if let Some(z) = z {
                        y.copy_from_slice(&z[row * width..][..width]);
                    }
                    for (y, c) in y.iter_mut().zip(c) {
                        *y *= c;
                    }
                    if let Some(bias) = bias {
                        for (y, b) in y.iter_mut().zip(bias) {
                            *y += b;
                        }
                    }
                }
            },
        );
    }

    pub(crate) fn backward(
        kept: FlexTensor,
        c: FlexTensor,
        dy: FlexTensor,
        has_bias: bool,
    ) -> (FlexTensor, FlexTensor) {
        let (dtype, c_dtype, c) = (dy.dtype(), c.dtype(), dense(c));
        let dims = dy.layout().shape().to_vec();
        assert_shape("the factors", &c, &[dims[1]]);
        assert_shape("what the forward kept", &kept, &dims);
        let (c, kept) = (values(&c), dense(kept));
        let dy = dense(dy);
        let mut dc = vec![];
        let dz = match dy.is_unique() {
            true => with_output(dy, |out| dc = gradients(out, None, values(&kept), c, dims[0])),
            false => output(&dims, |out| dc = gradients(out, Some(values(&dy)), values(&kept), c, dims[0])),
        };
        if !has_bias && is_invertible(c) {
            dc.iter_mut().zip(c).for_each(|(dc, c)| *dc /= c);
        }
        let width = dc.len();
        (restore(dz, dtype), restore(from_vec(dc, &[width]), c_dtype))
    }

    /// `out = dy * c` and the sums of `dy * kept` over the rows, dy being what is in `out` where it is not given.
    fn gradients(out: *mut f32, dy: Option<&[f32]>, kept: &[f32], c: &[f32], rows: usize) -> Vec<f32> {
        let (out, width) = (Rows(out), c.len());
        let partial = map_rows(
            rows,
            #[inline(always)]
            |range| {
                let mut sums = vec![0.0f32; width];
                for row in range {
                    // SAFETY: one task per row; without dy the caller has initialised it, with dy it is written first.
                    let dz = unsafe { out.slice(row * width, width) };
                    if let Some(dy) = dy {
                        dz.copy_from_slice(&dy[row * width..][..width]);
                    }
                    let kept = &kept[row * width..][..width];
                    for (((dz, k), c), sum) in dz.iter_mut().zip(kept).zip(c).zip(sums.iter_mut()) {
                        *sum += *dz * k;
                        *dz *= c;
                    }
                }
                sums
            },
        );
        let mut sums = vec![0.0f32; width];
        for part in partial {
            sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        sums
    }
}
