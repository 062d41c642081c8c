//! AdamW on the gradient of a method, without decay (arXiv 1711.05101; in GaLore: arXiv 2403.03507, algorithm 2).
//!
//! `M = b1 M + (1 - b1) R`, `V = b2 V + (1 - b2) R^2`, `c1 = 1 - b1^t`, `c2 = 1 - b2^t`. Two forms are in use, which
//! differ in where eps is added:
//! * torch: `eta (M / c1) / (sqrt(V / c2) + eps)`;
//! * Hugging Face (GaLore, Fira, APOLLO): `eta sqrt(c2) / c1 M / (sqrt(V) + eps)`, which is torch's with
//!   `eps / sqrt(c2)`.
//!
//! A change of basis, `C = P_new^T P_old`, takes the moments along (LDAdam, arXiv 2410.16103, section 3): `M' = C M`,
//! `V' = c2 | C^2 (V / c2 - (M / c1)^2) + (M' / c1)^2 |` with squares element by element; on the output side everything
//! is transposed. With `C = I` nothing changes.
//!
//! State: two f32 moments, 8 bytes a value.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::{Rule, same_shape, save_tensor};
use crate::optim::State;

/// Where eps is added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdamForm {
    /// To `sqrt(V)`, before the bias correction.
    Hf,
    /// To `sqrt(V / c2)`, after it.
    Torch,
}

/// AdamW's moments for one matrix.
#[derive(Debug)]
pub struct AdamW {
    betas: (f64, f64),
    eps: f64,
    form: AdamForm,
    rank_axis: usize,
    moments: Option<(Tensor<2>, Tensor<2>)>,
    step: u32,
}

impl AdamW {
    /// Without state; `rank_axis` is the axis of the gradient that a basis spans.
    pub fn new(betas: (f64, f64), eps: f64, form: AdamForm, rank_axis: usize) -> Self {
        Self { betas, eps, form, rank_axis, moments: None, step: 0 }
    }

    /// Steps taken.
    pub fn steps(&self) -> u32 {
        self.step
    }

    /// Both moments.
    pub fn moments(&self) -> Option<&(Tensor<2>, Tensor<2>)> {
        self.moments.as_ref()
    }
}

/// `1 - beta^t`.
fn correction(beta: f64, step: u32) -> f64 {
    1.0 - beta.powi(step as i32)
}

/// `c x` on the axis that a basis spans.
pub(super) fn change_basis(c: &Tensor<2>, x: Tensor<2>, rank_axis: usize) -> Tensor<2> {
    match rank_axis {
        0 => kernels::gemm(c.clone(), x, None, 1.0),
        _ => kernels::gemm(x, c.clone().transpose(), None, 1.0),
    }
}

/// Both moments in the new basis, after `step` steps.
pub(super) fn rotate_moments(
    (first, second): (Tensor<2>, Tensor<2>),
    c: &Tensor<2>,
    rank_axis: usize,
    betas: (f64, f64),
    step: u32,
) -> (Tensor<2>, Tensor<2>) {
    if step == 0 {
        return (first, second);
    }
    let (c1, c2) = (correction(betas.0, step), correction(betas.1, step));
    let rotated = change_basis(c, first.clone(), rank_axis);
    let mean = first.mul_scalar(1.0 / c1);
    let variance = second.mul_scalar(1.0 / c2) - mean.clone() * mean;
    let square = c.clone() * c.clone();
    let new_mean = rotated.clone().mul_scalar(1.0 / c1);
    let second = (change_basis(&square, variance, rank_axis) + new_mean.clone() * new_mean).abs().mul_scalar(c2);
    (rotated, second)
}

impl Rule for AdamW {
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        let (dims, device) = (gradient.dims(), gradient.device());
        let zeros = || Tensor::zeros(dims, &device);
        let (first, second) = self.moments.take().unwrap_or_else(|| (zeros(), zeros()));
        self.step += 1;
        let eps = match self.form {
            AdamForm::Torch => self.eps,
            AdamForm::Hf => self.eps / correction(self.betas.1, self.step).sqrt(),
        };
        // A parameter of zero and a negative learning rate leave the step to subtract.
        let rule = kernels::AdamW {
            learning_rate: -learning_rate,
            betas: self.betas,
            eps,
            weight_decay: 0.0,
            step: self.step,
            gradient_scale: 1.0,
        };
        let (update, first, second) = kernels::adamw(zeros(), first, second, gradient, rule);
        self.moments = Some((first, second));
        update
    }

    fn momentum(&self) -> Option<Tensor<2>> {
        self.moments.as_ref().map(|(first, _)| first.clone())
    }

    fn rotate(&mut self, c: &Tensor<2>) {
        let moments = self.moments.take();
        self.moments = moments.map(|moments| rotate_moments(moments, c, self.rank_axis, self.betas, self.step));
    }

    fn save(&self, into: &mut State) {
        into.numbers.insert("rule.step".to_owned(), u64::from(self.step));
        save_tensor(into, "rule.first", self.moments.as_ref().map(|(first, _)| first));
        save_tensor(into, "rule.second", self.moments.as_ref().map(|(_, second)| second));
    }

    fn restore(&mut self, from: &mut State) -> Result<(), String> {
        self.step = from.number("rule.step")? as u32;
        let (first, second) = (from.tensors.remove("rule.first"), from.tensors.remove("rule.second"));
        same_shape("rule.first and rule.second", first.as_ref(), second.as_ref())?;
        self.moments = first.zip(second);
        match self.step > 0 && self.moments.is_none() {
            true => Err("rule.first is missing".to_owned()),
            false => Ok(()),
        }
    }

    fn state_bytes(&self) -> usize {
        self.moments.as_ref().map_or(0, |(first, _)| 8 * first.shape().num_elements())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_near, matrix, of};
    use super::*;
    use crate::linalg::host;

    #[test]
    fn two_steps_are_the_written_formula_in_both_forms() {
        let gradients = [[0.5f32, -0.25, 1e-4, 0.0, 2.0, -3.0], [-0.5, 0.75, 2e-4, 0.0, 1.0, 1.0]];
        for form in [AdamForm::Hf, AdamForm::Torch] {
            let (b1, b2, eps, eta) = (0.9f64, 0.99f64, 1e-3, 0.1);
            let mut rule = AdamW::new((b1, b2), eps, form, 0);
            let (mut m, mut v) = ([0.0f64; 6], [0.0f64; 6]);
            for (t, gradient) in (1..).zip(gradients) {
                let (c1, c2) = (1.0 - b1.powi(t), 1.0 - b2.powi(t));
                let mut expected = vec![];
                for i in 0..6 {
                    let g = f64::from(gradient[i]);
                    m[i] = b1 * m[i] + (1.0 - b1) * g;
                    v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                    expected.push(match form {
                        AdamForm::Hf => eta * c2.sqrt() / c1 * m[i] / (v[i].sqrt() + eps),
                        AdamForm::Torch => eta * (m[i] / c1) / ((v[i] / c2).sqrt() + eps),
                    });
                }
                let update = rule.step(of(gradient.to_vec(), [2, 3]), eta);
                assert_near(&update, &expected, 1e-6);
                assert_near(&rule.momentum().unwrap_or(update), &m, 1e-6);
            }
            assert_eq!(rule.state_bytes(), 48);
        }
    }

    #[test]
    fn the_identity_changes_no_moment_and_a_signed_permutation_moves_rows() {
        for axis in [0, 1] {
            let dims = if axis == 0 { [3, 5] } else { [5, 3] };
            let mut rule = AdamW::new((0.9, 0.99), 1e-8, AdamForm::Torch, axis);
            for step in 0..4 {
                rule.step(matrix(dims[0], dims[1], &format!("gradient {step}")), 0.1);
            }
            let values = |rule: &AdamW| {
                let (m, v) = rule.moments.clone().map(|(m, v)| (host(m), host(v))).unwrap_or_default();
                let wide = |values: Vec<f32>| values.into_iter().map(f64::from).collect::<Vec<_>>();
                (wide(m), wide(v))
            };
            let before = values(&rule);
            rule.rotate(&of(vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0], [3, 3]));
            let near = |rule: &AdamW, m: &[f64], v: &[f64]| {
                if let Some((first, second)) = rule.moments() {
                    assert_near(first, m, 1e-6);
                    assert_near(second, v, 1e-6);
                }
            };
            near(&rule, &before.0, &before.1);
            // New direction 0 is old direction 1 turned round; 1 is old 2; 2 is old 0.
            rule.rotate(&of(vec![0.0, -1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [3, 3]));
            let (from, sign) = ([1, 2, 0], [-1.0, 1.0, 1.0]);
            let moved = |values: &[f64], is_signed: bool| -> Vec<f64> {
                (0..15)
                    .map(|i| {
                        let (row, col) = (i / dims[1], i % dims[1]);
                        let rank = if axis == 0 { row } else { col };
                        let old = if axis == 0 { from[rank] * dims[1] + col } else { row * dims[1] + from[rank] };
                        values[old] * if is_signed { sign[rank] } else { 1.0 }
                    })
                    .collect()
            };
            near(&rule, &moved(&before.0, true), &moved(&before.1, false));
        }
    }

    #[test]
    fn a_rotation_is_the_written_formula() {
        let (b1, b2) = (0.9f64, 0.99f64);
        let mut rule = AdamW::new((b1, b2), 1e-8, AdamForm::Torch, 0);
        for step in 0..3 {
            rule.step(matrix(2, 1, &format!("gradient {step}")), 0.1);
        }
        let Some((m, v)) = rule.moments.clone() else { unreachable!("three steps were taken") };
        let (m, v) = (host(m).into_iter().map(f64::from).collect::<Vec<_>>(), host(v));
        let c = [[0.6f64, 0.7], [-0.5, 0.4]];
        rule.rotate(&of(c.as_flattened().iter().map(|x| *x as f32).collect(), [2, 2]));
        let (c1, c2) = (1.0 - b1.powi(3), 1.0 - b2.powi(3));
        let mut expected = (vec![], vec![]);
        for row in c {
            let rotated = row[0] * m[0] + row[1] * m[1];
            let spread = |i: usize| row[i].powi(2) * (f64::from(v[i]) / c2 - (m[i] / c1).powi(2));
            expected.0.push(rotated);
            expected.1.push(c2 * (spread(0) + spread(1) + (rotated / c1).powi(2)).abs());
        }
        let Some((m, v)) = &rule.moments else { unreachable!("they were rotated") };
        assert_near(m, &expected.0, 1e-6);
        assert_near(v, &expected.1, 1e-6);
    }
}
