//! Matrices on the host in f64 and what the tests of the methods check against.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor, TensorData};

use super::{MatrixOptimizer, StepRule};
use crate::linalg;

pub(super) const RULE: StepRule = StepRule { learning_rate: 0.05, weight_decay: 0.1, gradient_scale: 0.5 };

/// A matrix on the host in f64, as plain as it gets.
#[derive(Clone, Debug)]
pub(super) struct Host {
    pub rows: usize,
    pub cols: usize,
    pub values: Vec<f64>,
}

impl Host {
    pub fn new(rows: usize, cols: usize, value: impl Fn(usize, usize) -> f64) -> Self {
        let values = (0..rows * cols).map(|at| value(at / cols, at % cols)).collect();
        Self { rows, cols, values }
    }

    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self::new(rows, cols, |_, _| 0.0)
    }

    pub fn of(tensor: &Tensor<2>) -> Self {
        let [rows, cols] = tensor.dims();
        let values = linalg::host(tensor.clone());
        Self::new(rows, cols, |i, j| f64::from(values[i * cols + j]))
    }

    pub fn at(&self, i: usize, j: usize) -> f64 {
        self.values[i * self.cols + j]
    }

    pub fn t(&self) -> Self {
        Self::new(self.cols, self.rows, |i, j| self.at(j, i))
    }

    pub fn mul(&self, other: &Self) -> Self {
        assert_eq!(self.cols, other.rows);
        Self::new(self.rows, other.cols, |i, j| (0..self.cols).map(|k| self.at(i, k) * other.at(k, j)).sum())
    }

    pub fn zip(&self, other: &Self, f: impl Fn(f64, f64) -> f64) -> Self {
        assert_eq!((self.rows, self.cols), (other.rows, other.cols));
        Self::new(self.rows, self.cols, |i, j| f(self.at(i, j), other.at(i, j)))
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self::new(self.rows, self.cols, |i, j| f(self.at(i, j)))
    }

    pub fn norm(&self) -> f64 {
        self.values.iter().map(|value| value * value).sum::<f64>().sqrt()
    }

    /// Norms over an axis: one per column (axis 0) or row (axis 1).
    pub fn norms(&self, axis: usize) -> Vec<f64> {
        let lines = if axis == 0 { self.t() } else { self.clone() };
        (0..lines.rows).map(|i| (0..lines.cols).map(|j| lines.at(i, j).powi(2)).sum::<f64>().sqrt()).collect()
    }

    /// Asserts that both are equal up to `tolerance` of the norm.
    pub fn assert_close(&self, other: &Self, tolerance: f64) {
        let error = self.zip(other, |a, b| a - b).norm();
        assert!(error <= tolerance * other.norm().max(1e-3), "error {error:e} at norm {:e}", other.norm());
    }
}

/// A random matrix of the device under test.
pub(super) fn random(seed: u64, rows: usize, cols: usize) -> Tensor<2> {
    linalg::gaussian(seed, "test", rows, cols, 1.0, &Device::flex())
}

/// A matrix of given values.
pub(super) fn device(host: &Host) -> Tensor<2> {
    let values = host.values.iter().map(|&value| value as f32).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(values, [host.rows, host.cols]), &Device::flex())
}

/// Asserts that two optimisers, one of them restored from the other's state after `split` steps, stay equal bit by
/// bit.
pub(super) fn assert_resumes(new: impl Fn() -> Box<dyn MatrixOptimizer>, dims: [usize; 2], split: u64, steps: u64) {
    let mut whole = new();
    let mut weight = random(99, dims[0], dims[1]);
    let mut resumed: Option<(Box<dyn MatrixOptimizer>, Tensor<2>)> = None;
    for step in 0..steps {
        if step == split {
            let mut fresh = new();
            fresh.restore(whole.save()).unwrap();
            assert_eq!(fresh.save().numbers, whole.save().numbers);
            resumed = Some((fresh, weight.clone()));
        }
        let gradient = random(step, dims[0], dims[1]);
        whole.collect(1);
        weight = whole.step(weight, gradient.clone(), RULE);
        if let Some((optimizer, copy)) = &mut resumed {
            optimizer.collect(1);
            *copy = optimizer.step(copy.clone(), gradient, RULE);
            assert_eq!(linalg::host(copy.clone()), linalg::host(weight.clone()), "step {step}");
            assert_eq!(optimizer.state_bytes(), whole.state_bytes());
        }
    }
    assert!(resumed.is_some());
}

/// HF-form Adam on a host matrix, M and V starting at 0: the N of every step.
pub(super) struct HostAdam {
    pub m: Host,
    pub v: Host,
    pub betas: (f64, f64),
    pub eps: f64,
}

impl HostAdam {
    pub fn new(rows: usize, cols: usize, betas: (f64, f64), eps: f64) -> Self {
        Self { m: Host::zeros(rows, cols), v: Host::zeros(rows, cols), betas, eps }
    }

    pub fn normed(&mut self, r: &Host) -> Host {
        let (b1, b2) = self.betas;
        self.m = self.m.zip(r, |m, r| b1 * m + (1.0 - b1) * r);
        self.v = self.v.zip(r, |v, r| b2 * v + (1.0 - b2) * r * r);
        self.m.zip(&self.v, |m, v| m / (v.sqrt() + self.eps))
    }
}
