//! SGD with momentum, as `torch.optim.SGD` without dampening (Sutskever et al., 2013): `M = mu M + R`, step `eta M`, or
//! `eta (R + mu M)` looking ahead.
//!
//! It is linear, so a basis may be rotated freely if M is: `M' = C M`.
//!
//! State: one f32 buffer, 4 bytes a value; none without momentum.

use burn::tensor::Tensor;

use super::adamw::change_basis;
use super::{Rule, save_tensor};
use crate::optim::State;

/// The buffer of one matrix.
#[derive(Debug)]
pub struct Sgd {
    momentum: f64,
    nesterov: bool,
    rank_axis: usize,
    buffer: Option<Tensor<2>>,
    step: u64,
}

impl Sgd {
    /// Without state; `rank_axis` is the axis of the gradient that a basis spans.
    pub fn new(momentum: f64, nesterov: bool, rank_axis: usize) -> Self {
        Self { momentum, nesterov, rank_axis, buffer: None, step: 0 }
    }
}

impl Rule for Sgd {
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        self.step += 1;
        if self.momentum == 0.0 {
            return gradient.mul_scalar(learning_rate);
        }
        let buffer = match self.buffer.take() {
            Some(buffer) => buffer.mul_scalar(self.momentum) + gradient.clone(),
            None => gradient.clone(),
        };
        self.buffer = Some(buffer.clone());
        let update = if self.nesterov { buffer.mul_scalar(self.momentum) + gradient } else { buffer };
        update.mul_scalar(learning_rate)
    }

    fn momentum(&self) -> Option<Tensor<2>> {
        self.buffer.clone()
    }

    fn rotate(&mut self, c: &Tensor<2>) {
        self.buffer = self.buffer.take().map(|buffer| change_basis(c, buffer, self.rank_axis));
    }

    fn save(&self, into: &mut State) {
        into.numbers.insert("rule.step".to_owned(), self.step);
        save_tensor(into, "rule.first", self.buffer.as_ref());
    }

    fn restore(&mut self, from: &mut State) -> Result<(), String> {
        self.step = from.number("rule.step")?;
        self.buffer = from.tensors.remove("rule.first");
        match self.step > 0 && self.momentum != 0.0 && self.buffer.is_none() {
            true => Err("rule.first is missing".to_owned()),
            false => Ok(()),
        }
    }

    fn state_bytes(&self) -> usize {
        self.buffer.as_ref().map_or(0, |buffer| 4 * buffer.shape().num_elements())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_near, matrix, of};
    use super::*;
    use crate::linalg::host;

    #[test]
    fn three_steps_are_the_written_formula() {
        for (momentum, nesterov) in [(0.0, false), (0.9, false), (0.9, true)] {
            let mut rule = Sgd::new(momentum, nesterov, 0);
            let mut buffer = [0.0f64; 4];
            for step in 0..3 {
                let gradient = matrix(2, 2, &format!("gradient {step}"));
                let mut expected = vec![];
                for (m, g) in buffer.iter_mut().zip(host(gradient.clone())) {
                    *m = momentum * *m + f64::from(g);
                    expected.push(0.1 * if nesterov { f64::from(g) + momentum * *m } else { *m });
                }
                assert_near(&rule.step(gradient, 0.1), &expected, 1e-6);
            }
            assert_eq!(rule.state_bytes(), if momentum == 0.0 { 0 } else { 16 });
        }
    }

    /// Steps in rotated coordinates are the rotated steps.
    #[test]
    fn a_rotation_of_the_basis_changes_nothing() {
        let c = of(vec![0.6, 0.8, -0.8, 0.6], [2, 2]);
        let (mut fixed, mut turned) = (Sgd::new(0.9, true, 0), Sgd::new(0.9, true, 0));
        let first = matrix(2, 3, "first");
        fixed.step(first.clone(), 0.1);
        turned.step(first, 0.1);
        turned.rotate(&c);
        let second = matrix(2, 3, "second");
        let expected: Vec<f64> =
            host(c.clone().matmul(fixed.step(second.clone(), 0.1))).into_iter().map(f64::from).collect();
        assert_near(&turned.step(c.matmul(second), 0.1), &expected, 1e-6);
    }
}
