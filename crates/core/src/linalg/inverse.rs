//! Inverses of small matrices that a gradient flows through.
//!
//! `T_0 = M^-1` is found without the tape; one Newton step on the tape, `T = 2 T_0 - T_0 M T_0`, has the value of the inverse
//! (the step squares the rounding error of `T_0`) and its exact derivative, `dT = -T dM T`. So a backward pass costs four
//! products, however the inverse was found. Second derivatives are not those of the inverse.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// Inverses of a batch of matrices by elimination without pivoting: stable where the symmetric part of M is positive
/// definite, as of `I + Q` with Q skew and of a Gram matrix.
///
/// # Shapes
/// `m [n, b, b]`.
pub fn inverse(m: Tensor<3>) -> Tensor<3> {
    let start = eliminated(m.clone().inner());
    newton(m, start)
}

/// The inverse of a lower triangular matrix by blocks of doubled size.
///
/// # Shapes
/// `m [r, r]`, zero above the diagonal.
pub fn lower_triangular_inverse(m: Tensor<2>) -> Tensor<2> {
    let [r, _] = m.dims();
    let start = doubled(m.clone().inner());
    newton(m.reshape([1, r, r]), start.reshape([1, r, r])).reshape([r, r])
}

/// `2 T_0 - T_0 M T_0`.
fn newton(m: Tensor<3>, start: Tensor<3>) -> Tensor<3> {
    start.clone() * 2.0 - start.clone().matmul(m).matmul(start)
}

/// Gauss and Jordan, one pivot after the other, each a change of rank 1: `M - (m_k - e_k)(m^k + e^k) / m_kk`.
fn eliminated(mut m: Tensor<3>) -> Tensor<3> {
    let [n, b, _] = m.dims();
    let unit = Tensor::<2>::eye(b, &m.device()).reshape([1, b, b]);
    for k in 0..b {
        let pivot = m.clone().slice([0..n, k..k + 1, k..k + 1]);
        let column = m.clone().slice([0..n, 0..b, k..k + 1]) - unit.clone().slice([0..1, 0..b, k..k + 1]);
        let row = m.clone().slice([0..n, k..k + 1, 0..b]) + unit.clone().slice([0..1, k..k + 1, 0..b]);
        m = m - column * (row / pivot);
    }
    m
}

/// `[[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]]`, for all diagonal blocks of a size at once.
fn doubled(m: Tensor<2>) -> Tensor<2> {
    let ([r, _], device) = (m.dims(), m.device());
    let width = r.next_power_of_two();
    // Padded with a unit diagonal.
    let padded = Tensor::<2>::eye(width, &device).slice_assign([0..r, 0..r], m);
    let diagonal: Vec<usize> = (0..width).map(|i| i * (width + 1)).collect();
    let mut inverses = padded.clone().reshape([width * width]).select(0, indices(&diagonal, &device));
    inverses = inverses.recip();
    let mut blocks = inverses.reshape([width, 1, 1]);
    let mut size = 1;
    while size < width {
        let pairs = width / (2 * size);
        let tiles = padded.clone().reshape([pairs, 2 * size, pairs, 2 * size]).swap_dims(1, 2);
        let on_diagonal: Vec<usize> = (0..pairs).map(|i| i * (pairs + 1)).collect();
        let below = tiles
            .reshape([pairs * pairs, 2 * size, 2 * size])
            .select(0, indices(&on_diagonal, &device))
            .slice([0..pairs, size..2 * size, 0..size]);
        let halves = blocks.reshape([pairs, 2, size * size]);
        let half = |i: usize| halves.clone().slice([0..pairs, i..i + 1, 0..size * size]).reshape([pairs, size, size]);
        let (first, second) = (half(0), half(1));
        let corner = second.clone().matmul(below).matmul(first.clone()).neg();
        let top = Tensor::cat(vec![first, Tensor::zeros([pairs, size, size], &device)], 2);
        blocks = Tensor::cat(vec![top, Tensor::cat(vec![corner, second], 2)], 1);
        size *= 2;
    }
    blocks.reshape([width, width]).slice([0..r, 0..r])
}

fn indices(values: &[usize], device: &Device) -> Tensor<1, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value as i32).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::linalg::host;
    use crate::random::Stream;

    fn normal(rows: usize, cols: usize, name: &str) -> Tensor<2> {
        Stream::new(3, name).normal_tensor(rows, cols, 1.0, &Device::flex())
    }

    fn distance_from_identity(product: Tensor<2>) -> f32 {
        let r = product.dims()[0];
        host((product - Tensor::eye(r, &Device::flex())).abs()).into_iter().fold(0.0, f32::max)
    }

    #[test]
    fn triangular_inverses_of_every_size() {
        for r in [1usize, 2, 3, 7, 8, 13, 32] {
            // As of reflections: one half on the diagonal, inner products of unit vectors below.
            let v = normal(64, r, "v");
            let v = v.clone() / v.clone().powf_scalar(2.0).sum_dim(0).sqrt();
            let m = v.clone().transpose().matmul(v).tril(-1) + Tensor::eye(r, &Device::flex()) * 0.5;
            let t = lower_triangular_inverse(m.clone());
            assert!(distance_from_identity(m.matmul(t)) < 1e-5, "r = {r}");
        }
    }

    #[test]
    fn inverses_of_rotations_and_gram_matrices() {
        for b in [1usize, 2, 5, 16, 32] {
            let q = normal(b, b, "q");
            let skew = q.clone() - q.clone().transpose();
            let m = Tensor::eye(b, &Device::flex()) + skew;
            let both = Tensor::cat(vec![m.clone().reshape([1, b, b]), m.clone().transpose().reshape([1, b, b])], 0);
            let t = inverse(both);
            let first = t.clone().slice([0..1, 0..b, 0..b]).reshape([b, b]);
            let second = t.slice([1..2, 0..b, 0..b]).reshape([b, b]);
            assert!(distance_from_identity(m.clone().matmul(first)) < 1e-5, "b = {b}");
            assert!(distance_from_identity(m.transpose().matmul(second)) < 1e-5, "b = {b}");
            let v = normal(4 * b, b, "g");
            let gram = v.clone().transpose().matmul(v) / (4 * b) as f32;
            let t = inverse(gram.clone().reshape([1, b, b])).reshape([b, b]);
            assert!(distance_from_identity(gram.matmul(t)) < 2e-5, "b = {b}");
        }
    }

    #[test]
    fn the_derivative_is_that_of_the_inverse() {
        let b = 5;
        let q = normal(b, b, "q");
        let m = Tensor::eye(b, &Device::flex()) + q.clone() - q.transpose();
        let outer = normal(b, b, "outer");
        let lifted = Tensor::from_inner(m.clone().reshape([1, b, b])).require_grad();
        let t = inverse(lifted.clone()).reshape([b, b]);
        let gradient = lifted.grad(&(t.clone() * Tensor::from_inner(outer.clone())).sum().backward()).unwrap();
        let t = t.inner().transpose();
        let expected = t.clone().matmul(outer).matmul(t).neg(); // -T^T C T^T
        let distance = host((gradient.reshape([b, b]) - expected.clone()).abs()).into_iter().fold(0.0, f32::max);
        let largest = host(expected.abs()).into_iter().fold(0.0, f32::max);
        assert!(distance < 1e-5 * largest.max(1.0), "{distance} of {largest}");
    }
}
