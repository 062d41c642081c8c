//! Muon (Jordan et al., 2024): the momentum with its singular values driven towards 1.
//!
//! `M = b M + (1 - b) R`; `g = M`, or `g = (1 - b) R + b M` looking ahead. Newton-Schulz: `X = g / (||g|| + 1e-7)`,
//! then `steps` times `A = X X^T`, `X = a X + (b A + c A A) X` with `(a, b, c) = (3.4445, -4.775, 2.0315)`, on the
//! orientation with the smaller `A`. The step is `eta sqrt(max(1, cols / rows)) X`: the published code holds the
//! transpose of R, whose rows are our columns. Singular values between 0.01 and 1 of the normalised `g` end between
//! 0.68 and 1.14. Here X stays in f32; the original is bf16.
//!
//! The map commutes with rotations, so a basis may be rotated freely if M is: `M' = C M`.
//!
//! State: one f32 momentum, 4 bytes a value. Flops a step: `steps (4 k^2 l + 2 k^3)` for sides `k <= l`.

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::adamw::change_basis;
use super::{Rule, save_tensor};
use crate::optim::State;

/// Coefficients of the polynomial.
const COEFFICIENTS: (f32, f32, f32) = (3.4445, -4.775, 2.0315);

/// The momentum of one matrix.
#[derive(Debug)]
pub struct Muon {
    momentum: f64,
    steps: usize,
    nesterov: bool,
    rank_axis: usize,
    first: Option<Tensor<2>>,
    step: u64,
}

impl Muon {
    /// Without state; `rank_axis` is the axis of the gradient that a basis spans.
    pub fn new(momentum: f64, steps: usize, nesterov: bool, rank_axis: usize) -> Self {
        Self { momentum, steps, nesterov, rank_axis, first: None, step: 0 }
    }
}

/// `g` with its singular values near 1, by Newton and Schulz.
pub fn newton_schulz(g: Tensor<2>, steps: usize) -> Tensor<2> {
    let [rows, cols] = g.dims();
    if rows > cols {
        return newton_schulz(g.transpose(), steps).transpose();
    }
    let norm: Tensor<2> = kernels::sum_squares(g.clone()).sqrt().add_scalar(1e-7).reshape([1, 1]);
    let (a, b, c) = COEFFICIENTS;
    (0..steps).fold(g / norm, |x, _| {
        let gram = kernels::gemm(x.clone(), x.clone().transpose(), None, 1.0);
        let polynomial = kernels::gemm(gram.clone(), gram.clone(), Some(gram.mul_scalar(b)), c);
        kernels::gemm(polynomial, x.clone(), Some(x.mul_scalar(a)), 1.0)
    })
}

impl Rule for Muon {
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        let [rows, cols] = gradient.dims();
        self.step += 1;
        let new = gradient.mul_scalar(1.0 - self.momentum);
        let first = match self.first.take() {
            Some(first) => first.mul_scalar(self.momentum) + new.clone(),
            None => new.clone(),
        };
        self.first = Some(first.clone());
        let direction = if self.nesterov { first.mul_scalar(self.momentum) + new } else { first };
        let scale = (cols as f64 / rows as f64).max(1.0).sqrt();
        newton_schulz(direction, self.steps).mul_scalar(learning_rate * scale)
    }

    fn momentum(&self) -> Option<Tensor<2>> {
        self.first.clone()
    }

    fn rotate(&mut self, c: &Tensor<2>) {
        self.first = self.first.take().map(|first| change_basis(c, first, self.rank_axis));
    }

    fn save(&self, into: &mut State) {
        into.numbers.insert("rule.step".to_owned(), self.step);
        save_tensor(into, "rule.first", self.first.as_ref());
    }

    fn restore(&mut self, from: &mut State) -> Result<(), String> {
        self.step = from.number("rule.step")?;
        self.first = from.tensors.remove("rule.first");
        match self.step > 0 && self.first.is_none() {
            true => Err("rule.first is missing".to_owned()),
            false => Ok(()),
        }
    }

    fn state_bytes(&self) -> usize {
        self.first.as_ref().map_or(0, |first| 4 * first.shape().num_elements())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_near, matrix, of};
    use super::*;
    use crate::linalg::host;

    /// The map of one singular value.
    fn polynomial(value: f64) -> f64 {
        (0..5).fold(value, |s, _| 3.4445 * s - 4.775 * s.powi(3) + 2.0315 * s.powi(5))
    }

    fn wide(tensor: Tensor<2>) -> Vec<f64> {
        host(tensor).into_iter().map(f64::from).collect()
    }

    /// `I - 2 v v^T / |v|^2`.
    fn reflection(size: usize, name: &str) -> Tensor<2> {
        let v = host(matrix(size, 1, name));
        let norm: f32 = v.iter().map(|x| x * x).sum();
        let entry = |i: usize| {
            let (row, col) = (i / size, i % size);
            f32::from(u8::from(row == col)) - 2.0 * v[row] * v[col] / norm
        };
        of((0..size * size).map(entry).collect(), [size, size])
    }

    #[test]
    fn singular_values_follow_the_polynomial_and_end_near_one() {
        let values = [1.0f64, 0.5, 0.2, 0.05, 0.011];
        let norm = values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let mut diagonal = vec![0.0f32; 5 * 9];
        let mut expected = vec![0.0f64; 5 * 9];
        for (i, value) in values.iter().enumerate() {
            diagonal[10 * i] = *value as f32;
            expected[10 * i] = polynomial(value / norm);
        }
        let x = of(diagonal, [5, 9]);
        let got = newton_schulz(x.clone(), 5);
        assert_near(&got, &expected, 1e-4);
        for i in 0..4 {
            assert!((0.68..=1.14).contains(&expected[10 * i]), "{}", expected[10 * i]);
        }
        // The same in any pair of bases, and for the transpose.
        let (left, right) = (reflection(5, "left"), reflection(9, "right"));
        let turned = left.clone().matmul(x.clone()).matmul(right.clone());
        let expected = wide(left.matmul(got.clone()).matmul(right));
        // Rounding in small directions grows by 3.4^5 = 480.
        assert_near(&newton_schulz(turned, 5), &expected, 1e-3);
        assert_near(&newton_schulz(x.transpose(), 5), &wide(got.transpose()), 1e-4);
    }

    #[test]
    fn a_second_step_is_the_written_formula() {
        for nesterov in [false, true] {
            for dims in [[3, 5], [5, 3]] {
                let [rows, cols] = dims;
                let mut rule = Muon::new(0.95, 5, nesterov, 0);
                let (first, second) = (matrix(rows, cols, "first"), matrix(rows, cols, "second"));
                rule.step(first.clone(), 0.1);
                let got = rule.step(second.clone(), 0.1);
                let m = first * (0.05 * 0.95) + second.clone() * 0.05;
                let g = if nesterov { second * 0.05 + m.clone() * 0.95 } else { m.clone() };
                // By plain products, without choosing an orientation.
                let norm = wide(g.clone()).iter().map(|x| x * x).sum::<f64>().sqrt();
                let mut x = g / norm;
                for _ in 0..5 {
                    let gram = x.clone().matmul(x.clone().transpose());
                    x = x.clone() * 3.4445 + (gram.clone() * -4.775 + gram.clone().matmul(gram) * 2.0315).matmul(x);
                }
                let scale = if cols > rows { (5.0f64 / 3.0).sqrt() } else { 1.0 };
                assert_near(&got, &wide(x * (0.1 * scale)), 1e-5);
                assert_near(&rule.momentum().unwrap_or(got), &wide(m), 1e-6);
            }
        }
    }

    #[test]
    fn a_gradient_of_zeros_gives_no_step() {
        let mut rule = Muon::new(0.95, 5, true, 0);
        assert_near(&rule.step(of(vec![0.0; 6], [2, 3]), 0.1), &[0.0; 6], 0.0);
    }
}
