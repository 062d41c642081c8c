//! One AdamW step on one tensor (arXiv 1711.05101), as `torch.optim.AdamW` computes it.
//!
//! `p *= 1 - lr wd`; `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`;
//! `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
//! All four tensors are equal in shape and f32; the kernel for GPUs also takes a 16-bit parameter or gradient.
//! Memory bound: reads 16 and writes 12 bytes a value.

use burn::backend::{Backend, tensor::FloatTensor};

use crate::plain::Plain;

/// The numbers of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub learning_rate: f64,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Number of this step, from 1.
    pub step: u32,
    /// Multiplies the gradient first (global-norm clipping).
    pub gradient_scale: f64,
}

/// What the loops over values need.
pub(crate) struct Factors {
    /// `1 - lr wd`
    pub decay: f32,
    /// `lr / (1 - b1^t)`
    pub step_size: f32,
    /// Turns `sqrt(v)` into its corrected root.
    pub root: f32,
    pub eps: f32,
    pub clip: f32,
    /// b1 and b2.
    pub kept: [f32; 2],
    /// `1 - b1` and `1 - b2`.
    pub added: [f32; 2],
}

impl AdamW {
    pub(crate) fn factors(&self) -> Factors {
        let first = 1.0 - self.betas.0.powi(self.step as i32);
        let second = 1.0 - self.betas.1.powi(self.step as i32);
        Factors {
            decay: (1.0 - self.learning_rate * self.weight_decay) as f32,
            step_size: (self.learning_rate / first) as f32,
            root: (1.0 / second.sqrt()) as f32,
            eps: self.eps as f32,
            clip: self.gradient_scale as f32,
            kept: [self.betas.0 as f32, self.betas.1 as f32],
            added: [(1.0 - self.betas.0) as f32, (1.0 - self.betas.1) as f32],
        }
    }
}

/// Returns `(parameter, first moment, second moment)`.
pub(crate) fn reference<B: Backend>(
    parameter: FloatTensor<B>,
    first: FloatTensor<B>,
    second: FloatTensor<B>,
    gradient: FloatTensor<B>,
    rule: AdamW,
) -> (FloatTensor<B>, FloatTensor<B>, FloatTensor<B>) {
    let Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let g = Plain::<B>(gradient) * clip;
    let m = Plain::<B>(first) * b1 + g.clone() * c1;
    let v = Plain::<B>(second) * b2 + g.clone() * g * c2;
    let denominator = v.clone().sqrt() * root + eps;
    let update = Plain::<B>(B::float_div(m.clone().0, denominator.0)) * step_size;
    ((Plain::<B>(parameter) * decay - update).0, m.0, v.0)
}

#[cfg(feature = "flex")]
pub(crate) fn cpu(
    parameter: burn_flex::FlexTensor,
    first: burn_flex::FlexTensor,
    second: burn_flex::FlexTensor,
    gradient: burn_flex::FlexTensor,
    rule: AdamW,
) -> (burn_flex::FlexTensor, burn_flex::FlexTensor, burn_flex::FlexTensor) {
    use crate::cpu::{Rows, assert_shape, dense, for_chunks, values, with_output};

    let Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let dims = gradient.layout().shape().to_vec();
    for (what, tensor) in [("the parameter", &parameter), ("the first moment", &first), ("the second moment", &second)]
    {
        assert_shape(what, tensor, &dims);
    }
    let gradient = dense(gradient);
    let g = values(&gradient);
    let (mut m_out, mut v_out) = (None, None);
    let p_out = with_output(parameter, |p| {
        m_out = Some(with_output(first, |m| {
            v_out = Some(with_output(second, |v| {
                let (p, m, v) = (Rows(p), Rows(m), Rows(v));
                for_chunks(
                    g.len(),
                    #[inline(always)]
                    |range| {
                        let (start, len) = (range.start, range.len());
                        // SAFETY: chunks are disjoint and all four tensors have the same length.
                        let (p, m, v) = unsafe { (p.slice(start, len), m.slice(start, len), v.slice(start, len)) };
                        for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(&g[range]) {
                            let g = g * clip;
                            *m = b1 * *m + c1 * g;
                            *v = b2 * *v + c2 * g * g;
                            *p = *p * decay - step_size * (*m / (v.sqrt() * root + eps));
                        }
                    },
                );
            }));
        }));
    });
    match (m_out, v_out) {
        (Some(m), Some(v)) => (p_out, m, v),
        _ => unreachable!("both closures ran"),
    }
}
