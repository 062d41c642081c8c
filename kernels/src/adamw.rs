//! One AdamW step (arXiv 1711.05101), as `torch.optim.AdamW` computes it, on any number of tensors by the same rule.
//!
//! `p *= 1 - lr wd`; `m = b1 m + (1 - b1) g`; `v = b2 v + (1 - b2) g^2`;
//! `p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)`.
//! The four tensors of a set are equal in shape and f32; the kernel for GPUs also takes a 16-bit parameter or gradient. What
//! multiplies the gradient may be a number that only the device knows.
//! Memory bound: reads 16 and writes 12 bytes a value.

use burn::backend::{Backend, tensor::FloatTensor};

use crate::Tensors;
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

/// Parameters, first and second moments, gradients, in lists of one length; returns the first three.
pub(crate) fn reference<B: Backend>(
    lists: [Tensors<B>; 4],
    factor: Option<FloatTensor<B>>,
    rule: AdamW,
) -> (Tensors<B>, Tensors<B>, Tensors<B>) {
    by_set(lists, |set| one::<B>(set, factor.clone(), rule))
}

/// Each set of parameter, moments and gradient on its own.
fn by_set<B: Backend>(
    lists: [Tensors<B>; 4],
    mut step: impl FnMut([FloatTensor<B>; 4]) -> [FloatTensor<B>; 3],
) -> (Tensors<B>, Tensors<B>, Tensors<B>) {
    let [parameters, first, second, gradients] = lists.map(|list| list.0.into_iter());
    let (mut p_out, mut m_out, mut v_out) = (vec![], vec![], vec![]);
    for (((p, m), v), g) in parameters.zip(first).zip(second).zip(gradients) {
        let [p, m, v] = step([p, m, v, g]);
        p_out.push(p);
        m_out.push(m);
        v_out.push(v);
    }
    (Tensors(p_out), Tensors(m_out), Tensors(v_out))
}

fn one<B: Backend>(
    [parameter, first, second, gradient]: [FloatTensor<B>; 4],
    factor: Option<FloatTensor<B>>,
    rule: AdamW,
) -> [FloatTensor<B>; 3] {
    let Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let mut g = Plain::<B>(gradient) * clip;
    if let Some(factor) = factor {
        let ones = vec![1; g.dims().len()];
        g = g * Plain(B::float_reshape(factor, ones.into()));
    }
    let m = Plain::<B>(first) * b1 + g.clone() * c1;
    let v = Plain::<B>(second) * b2 + g.clone() * g * c2;
    let denominator = v.clone().sqrt() * root + eps;
    let update = Plain::<B>(B::float_div(m.clone().0, denominator.0)) * step_size;
    [(Plain::<B>(parameter) * decay - update).0, m.0, v.0]
}

#[cfg(feature = "flex")]
pub(crate) use cpu::step as cpu;

#[cfg(feature = "flex")]
mod cpu {
    use burn_flex::{Flex, FlexTensor};

    use super::{AdamW, Factors, by_set};
    use crate::Tensors;
    use crate::cpu::{Rows, assert_shape, dense, for_chunks, values, with_output};

    pub(crate) fn step(
        lists: [Tensors<Flex>; 4],
        factor: Option<FlexTensor>,
        rule: AdamW,
    ) -> (Tensors<Flex>, Tensors<Flex>, Tensors<Flex>) {
        let mut factors = rule.factors();
        if let Some(factor) = factor {
            factors.clip *= values(&dense(factor))[0];
        }
        by_set(lists, |set| one(set, &factors))
    }

    fn one([parameter, first, second, gradient]: [FlexTensor; 4], factors: &Factors) -> [FlexTensor; 3] {
        let &Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = factors;
        let dims = gradient.layout().shape().to_vec();
        for (what, tensor) in
            [("the parameter", &parameter), ("the first moment", &first), ("the second moment", &second)]
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
            (Some(m), Some(v)) => [p_out, m, v],
            _ => unreachable!("both closures ran"),
        }
    }
}
