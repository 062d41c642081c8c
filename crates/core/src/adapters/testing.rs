//! What the tests of adapters share: weights with a spectrum, sites with everything a start may ask for, norms.
#![allow(clippy::unwrap_used)]

use burn::tensor::{Device, Tensor};
use lowrank_kernels as kernels;

use super::start::row;
use super::{Site, Statistics};
use crate::linalg::{self, gaussian, orthonormal};
use crate::random::Stream;

pub(super) fn device() -> Device {
    Device::flex()
}

pub(super) fn normal(name: &str, rows: usize, cols: usize) -> Tensor<2> {
    gaussian(5, name, rows, cols, 1.0, &device())
}

pub(super) fn product(a: &Tensor<2>, b: &Tensor<2>) -> Tensor<2> {
    kernels::gemm(a.clone(), b.clone(), None, 1.0)
}

pub(super) fn t(a: &Tensor<2>) -> Tensor<2> {
    a.clone().transpose()
}

pub(super) fn norm(a: &Tensor<2>) -> f64 {
    linalg::host(a.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// `||a - b|| / ||b||`, or `||a||` where b is zero.
pub(super) fn distance(a: &Tensor<2>, b: &Tensor<2>) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let size = norm(b);
    norm(&(a.clone() - b.clone())) / if size > 0.0 { size } else { 1.0 }
}

#[track_caller]
pub(super) fn assert_near(what: &str, got: &Tensor<2>, want: &Tensor<2>, limit: f64) {
    let error = distance(got, want);
    assert!(error <= limit, "{what}: relative error {error:.2e}, allowed {limit:.0e}");
}

/// `||Q^T Q - I||`.
pub(super) fn defect(q: &Tensor<2>) -> f64 {
    norm(&(product(&t(q), q) - Tensor::eye(q.dims()[1], &device())))
}

/// A weight with singular values from 1 down to 0.1, evenly spaced, laid out as one read from a file.
pub(super) fn weight(d_in: usize, d_out: usize) -> Tensor<2> {
    let k = d_in.min(d_out);
    let [left, right] = [("left", d_in), ("right", d_out)].map(|(name, d)| orthonormal(normal(name, d, k)));
    t(&product(&(right * row((0..k).map(|i| spectrum(i, k)), &device())), &t(&left)))
}

/// The singular values of [`weight`].
pub(super) fn spectrum(i: usize, k: usize) -> f64 {
    1.0 - 0.9 * i as f64 / k as f64
}

/// What a calibration pass could have found: some directions used ten times as much as others, some gradients zero.
pub(super) fn statistics(d_in: usize, d_out: usize) -> Statistics {
    let usage = row((0..d_in).map(|i| 10f64.powf(i as f64 / d_in as f64)), &device());
    let x = normal("inputs", 2 * d_in + 3, d_in) * usage;
    let gradient = normal("gradient", d_in, d_out);
    let used = gradient.clone().greater_elem(-1.5).float();
    Statistics { covariance: Some(product(&t(&x), &x)), gradient: Some(gradient * used), samples: 3 }
}

/// A site on [`weight`]; with `lost`, over a base that differs from it.
pub(super) fn site<'a>(weight: &Tensor<2>, statistics: Option<&'a Statistics>, lost: Option<Tensor<2>>) -> Site<'a> {
    let module = "model.layers.0.mlp.up_proj";
    let (weight, stream) = (weight.clone(), Stream::new(3, module));
    Site { module, weight, residual: lost, seed: 3, stream, statistics }
}
