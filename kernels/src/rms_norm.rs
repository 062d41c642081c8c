//! Root-mean-square normalisation: `y = x / sqrt(mean(x^2) + eps) * (offset + gamma)` (arXiv 1910.07467; Gemma: offset 1).
//!
//! With `n = x / rms` and `h = dy * (offset + gamma)`: `dx = (h - n mean(h n)) / rms`, `dgamma = sum_t dy n`.
//! Computed in f32 whatever the type. Saved for the backward: x alone. Memory bound: reads x once, writes y once
//! (`8 t d` bytes in f32); the plain operations move `28 t d`.

use burn::backend::autodiff::{
    checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
    grads::Gradients,
    ops::{Backward, Ops, OpsKind},
};
use burn::backend::{Autodiff, Backend, tensor::FloatTensor};

use crate::LowRankOps;
use crate::plain::Plain;

/// Shapes: `x [t, d]`, `gamma [d]`.
pub(crate) fn reference<B: Backend>(x: FloatTensor<B>, gamma: FloatTensor<B>, eps: f32, offset: f32) -> FloatTensor<B> {
    let (n, _) = normalised::<B>(Plain(x.clone()), eps);
    (n * weight::<B>(gamma, offset)).cast(Plain::<B>(x).dtype()).0
}

fn normalised<B: Backend>(x: Plain<B>, eps: f32) -> (Plain<B>, Plain<B>) {
    let x = x.f32();
    let inverse = ((x.clone() * x.clone()).mean_dim(1) + eps).sqrt().recip();
    (x * inverse.clone(), inverse)
}

fn weight<B: Backend>(gamma: FloatTensor<B>, offset: f32) -> Plain<B> {
    let gamma = Plain::<B>(gamma).f32();
    let width = gamma.dims()[0];
    gamma.reshape(&[1, width]) + offset
}

pub(crate) fn backward_reference<B: Backend>(
    x: FloatTensor<B>,
    gamma: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f32,
    offset: f32,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (x, dy) = (Plain::<B>(x), Plain::<B>(dy).f32());
    let (dtype, gamma_dtype) = (x.dtype(), Plain::<B>(gamma.clone()).dtype());
    let (n, inverse) = normalised(x, eps);
    let width = n.dims()[1];
    let d_gamma = (dy.clone() * n.clone()).sum_dim(0).reshape(&[width]);
    let h = dy * weight::<B>(gamma, offset);
    let dx = (h.clone() - n.clone() * (h * n).mean_dim(1)) * inverse;
    (dx.cast(dtype).0, d_gamma.cast(gamma_dtype).0)
}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: LowRankOps> Backward<B, 2> for RmsNormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f32, f32);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _checkpointer: &mut Checkpointer) {
        let [x_node, gamma_node] = ops.parents;
        let dy = grads.consume::<B>(&ops.node);
        let (x, gamma, eps, offset) = ops.state;
        let dx = match gamma_node {
            Some(node) => {
                let (dx, d_gamma) = B::rms_norm_backward(x, gamma, dy, eps, offset);
                grads.register::<B>(node.id, d_gamma);
                dx
            }
            None => B::rms_norm_input_gradient(x, gamma, dy, eps, offset),
        };
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
    }
}

pub(crate) fn autodiff<B: LowRankOps, C: CheckpointStrategy>(
    x: FloatTensor<Autodiff<B, C>>,
    gamma: FloatTensor<Autodiff<B, C>>,
    eps: f32,
    offset: f32,
) -> FloatTensor<Autodiff<B, C>> {
    let (x, x_node) = x.into_parts();
    let (gamma, gamma_node) = gamma.into_parts();
    match RmsNormBackward.prepare::<C>([x_node, gamma_node]).compute_bound().stateful() {
        OpsKind::Tracked(prep) => {
            let y = B::rms_norm(x.clone(), gamma.clone(), eps, offset);
            prep.finish((x, gamma, eps, offset), y)
        }
        OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, gamma, eps, offset)),
    }
}

#[cfg(feature = "flex")]
pub(crate) use on_cpu::{backward as backward_cpu, forward as cpu};

#[cfg(feature = "flex")]
mod on_cpu {
    use burn_flex::FlexTensor;

    use crate::cpu::{Rows, assert_shape, dense, dot, for_rows, from_vec, map_rows, output, restore, values};

    pub(crate) fn forward(x: FlexTensor, gamma: FlexTensor, eps: f32, offset: f32) -> FlexTensor {
        let dtype = x.dtype();
        let (x, gamma) = (dense(x), dense(gamma));
        let dims = x.layout().shape().to_vec();
        let (rows, width) = (dims[0], dims[1]);
        assert_shape("gamma", &gamma, &[width]);
        let (x, gamma) = (values(&x), values(&gamma));
        let y = output(&dims, |out| {
            let out = Rows(out);
            for_rows(
                rows,
                #[inline(always)]
                |range| {
                    for row in range {
                        let x = &x[row * width..][..width];
                        // SAFETY: one task per row.
                        let y = unsafe { out.slice(row * width, width) };
                        let inverse = inverse_rms(x, eps);
                        for ((y, x), g) in y.iter_mut().zip(x).zip(gamma) {
                            *y = x * inverse * (offset + g);
                        }
                    }
                },
            );
        });
        restore(y, dtype)
    }

    #[inline(always)]
    fn inverse_rms(x: &[f32], eps: f32) -> f32 {
        1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
    }

    pub(crate) fn backward(
        x: FlexTensor,
        gamma: FlexTensor,
        dy: FlexTensor,
        eps: f32,
        offset: f32,
    ) -> (FlexTensor, FlexTensor) {
        let (dtype, gamma_dtype) = (x.dtype(), gamma.dtype());
        let (x, gamma, dy) = (dense(x), dense(gamma), dense(dy));
        let dims = x.layout().shape().to_vec();
        let (rows, width) = (dims[0], dims[1]);
        assert_shape("gamma", &gamma, &[width]);
        assert_shape("dy", &dy, &dims);
        let (x, gamma, dy) = (values(&x), values(&gamma), values(&dy));
        let mut d_gamma = vec![0.0f32; width];
        let dx = output(&dims, |out| {
            let out = Rows(out);
            let partial = map_rows(
                rows,
                #[inline(always)]
                |range| {
                    let mut d_gamma = vec![0.0f32; width];
                    for row in range {
                        let (x, dy) = (&x[row * width..][..width], &dy[row * width..][..width]);
                        // SAFETY: one task per row.
                        let dx = unsafe { out.slice(row * width, width) };
                        let inverse = inverse_rms(x, eps);
                        for (((dx, x), dy), (g, dg)) in
                            dx.iter_mut().zip(x).zip(dy).zip(gamma.iter().zip(d_gamma.iter_mut()))
                        {
                            *dx = dy * (offset + g);
                            *dg += dy * x * inverse;
                        }
                        let mean = dot(dx, x) * inverse / width as f32;
                        for (dx, x) in dx.iter_mut().zip(x) {
                            *dx = (*dx - x * inverse * mean) * inverse;
                        }
                    }
                    d_gamma
                },
            );
            for part in partial {
                d_gamma.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
            }
        });
        (restore(dx, dtype), restore(from_vec(d_gamma, &[width]), gamma_dtype))
    }
}
