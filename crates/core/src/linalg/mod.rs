//! Orthonormal bases of gradients, leading parts of weights: what optimisers and starts of adapters need of linear algebra.
//!
//! Products with a long side run on the device ([`lowrank_kernels::gemm`]). Everything that is `[l, l]`, exact or a
//! rescue runs on the host in f64 (faer). No function fails or loops on bad input: non-finite values count as zero,
//! missing directions are completed by fixed pseudo-random ones.
//!
//! | function | method | device flops | host flops |
//! | --- | --- | --- | --- |
//! | [`svd`] | bidiagonalisation, exact | | `O(m n min(m, n))` |
//! | [`orthonormal()`] | CholeskyQR2, shifted where needed | `8 m l^2` | `O(l^3)` |
//! | [`range_finder()`] | randomised subspace iteration | `(2 + 2q) 2 t l (m + n)` | `O(l^3)` |
//! | [`sketch_basis`] | QR and SVD of the small factor | `12 m l^2` | `O(l^3)` |
//! | [`truncated_svd`] | exact, or randomised where that pays | `(2 + 2q) 2 l m n` | `O(l^3)` |
//!
//! Bases are `[m, l]` with directions in columns. Signs are arbitrary in the mathematics and matter to Adam, so the
//! bases of [`svd`], [`eigen`], [`range_finder()`], [`sketch_basis`] and [`truncated_svd`] come out of [`fix_signs`]' rule.

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use faer::Mat;
use lowrank_kernels as kernels;

use crate::lowrank::cast;
use crate::random::Stream;

pub mod dct;
mod host;
pub mod inverse;
mod orthonormal;
mod range_finder;
mod truncated;

#[cfg(test)]
mod tests;

pub use orthonormal::{align_signs, fix_signs, orthonormal};
pub use range_finder::{Range, range_finder, sketch_basis};
pub use truncated::{
    ITERATIONS, OVERSAMPLING, Operator, inverse_error, is_exact, operator_svd, randomized_root_svd, randomized_svd,
    root_svd, svd_of_product, truncated_svd,
};

/// The leading part of a singular value decomposition, `g = left diag(values) right^T`.
#[derive(Debug)]
pub struct Svd {
    /// Left singular vectors, `[m, k]`; the entry of largest magnitude of each column is positive.
    pub left: Tensor<2>,
    /// Singular values, descending.
    pub values: Vec<f64>,
    /// Right singular vectors, `[n, k]`.
    pub right: Tensor<2>,
}

/// The values of a tensor on the host, row by row.
pub fn host(t: Tensor<2>) -> Vec<f32> {
    let data = cast(t, FloatDType::F32).into_data();
    data.try_into_vec::<f32>().unwrap_or_else(|_| unreachable!("cast to f32 just before"))
}

/// The leading `min(rank, m, n)` singular triples of `g`, exact to f32.
///
/// # Shapes
/// `g [m, n]`.
pub fn svd(g: Tensor<2>, rank: usize) -> Svd {
    let device = g.device();
    let (left, values, right) = host::svd(&download(g));
    let k = rank.min(values.len());
    Svd {
        left: upload(&left, k, &device),
        right: upload(&right, k, &device),
        values: values.into_iter().take(k).collect(),
    }
}

/// Eigenvalues, descending, and eigenvectors, in columns, of a symmetric matrix.
///
/// # Shapes
/// `s [l, l]`, of which the symmetric part is taken.
pub fn eigen(s: Tensor<2>) -> (Vec<f64>, Tensor<2>) {
    let device = s.device();
    let (values, vectors) = host::eigen(&download(s));
    let vectors = upload(&vectors, values.len(), &device);
    (values, vectors)
}

/// A `[rows, cols]` block of independent normals that depends only on the seed and the name.
pub fn gaussian(seed: u64, name: &str, rows: usize, cols: usize, deviation: f64, device: &Device) -> Tensor<2> {
    Stream::new(seed, name).normal_tensor(rows, cols, deviation, device)
}

/// A tensor as a host matrix.
fn download(t: Tensor<2>) -> Mat<f64> {
    let [rows, cols] = t.dims();
    let values = host(t);
    Mat::from_fn(rows, cols, |i, j| f64::from(values[i * cols + j]))
}

/// The first `cols` columns of a host matrix as a tensor.
fn upload(matrix: &Mat<f64>, cols: usize, device: &Device) -> Tensor<2> {
    let rows = matrix.nrows();
    let mut values = vec![0.0f32; rows * cols];
    for j in 0..cols {
        for i in 0..rows {
            values[i * cols + j] = matrix[(i, j)] as f32;
        }
    }
    Tensor::from_data(TensorData::new(values, [rows, cols]), device)
}

/// `a b`, zeros where there is nothing to add up (a batch without tokens).
fn product(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let ([rows, inner], [_, cols]) = (a.dims(), b.dims());
    if rows * inner * cols == 0 {
        return Tensor::zeros([rows, cols], &a.device());
    }
    kernels::gemm(a, b, None, 1.0)
}
