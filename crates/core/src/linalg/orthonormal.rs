//! Orthonormal columns, and what fixes their signs.
//!
//! CholeskyQR2 (Fukaya, Nakatsukasa, Yanagisawa, Yamamoto 2014): `Y^T Y = R^T R`, `Q = Y R^-1`, twice, because one pass
//! loses the square of the condition number. The `[m, l]` products run on the device, the factor of the `[l, l]` Gram
//! matrix and its inverse on the host in f64. Where a pivot drowns in the rounding of the f32 Gram matrix, the first
//! pass factors `Y^T Y + s I` instead (shifted CholeskyQR, arXiv 1809.11085), which leaves a condition that two more
//! passes remove. Where that fails too, columns are dependent for f32: Householder QR on the host.
//!
//! R has a positive diagonal on every path, so all of them give the same Q. Each pass: `4 m l^2` flops on the device.

use burn::tensor::{Tensor, TensorData};

use super::host::{self, Pass};
use super::{download, host as values_of, product, upload};

/// One shifted pass and two plain ones, and one in reserve.
const PASSES: usize = 4;

/// Q of `Y = Q R` with `diag(R) > 0`: the columns of Y made orthonormal, in their order.
///
/// Zero, dependent and non-finite columns are replaced by fixed directions orthogonal to the rest.
///
/// # Shapes
/// `y [m, l]` with `l <= m`.
///
/// # Panics
/// Where `l > m`: there are no more than m orthonormal columns.
pub fn orthonormal(y: Tensor<2>) -> Tensor<2> {
    let [m, l] = y.dims();
    assert!(l <= m, "{l} columns of length {m} cannot be orthonormal");
    if l == 0 {
        return y;
    }
    let device = y.device();
    let mut q = y.clone();
    for pass in 0..PASSES {
        let gram = download(product(q.clone().transpose(), q.clone()));
        match host::cholesky_pass(&gram, pass == 0) {
            Pass::Last(inverse) => return product(q, upload(&inverse, l, &device)),
            Pass::Again(inverse) => q = product(q, upload(&inverse, l, &device)),
            Pass::Doubtful => break,
        }
    }
    upload(&host::orthonormal(&download(y)), l, &device)
}

/// `basis [m, k]` with orthonormal columns, extended to `rank <= m` columns; itself where it has them.
pub(super) fn complete(basis: Tensor<2>, rank: usize) -> Tensor<2> {
    let [m, k] = basis.dims();
    if k >= rank {
        return basis;
    }
    let device = basis.device();
    let basis = download(basis);
    let wide = faer::Mat::from_fn(m, rank, |i, j| if j < k { basis[(i, j)] } else { 0.0 });
    upload(&host::orthonormal(&wide), rank, &device)
}

/// Turns every column so that its entry of largest magnitude (ties: the first) is positive.
///
/// # Shapes
/// `basis [m, r]`.
pub fn fix_signs(basis: Tensor<2>) -> Tensor<2> {
    let signs = largest_signs(&basis);
    basis * signs
}

/// Turns every column so that its inner product with the same column of the reference is not negative.
///
/// # Shapes
/// `basis [m, r]`, `reference [m, s]`; columns without a partner stay.
pub fn align_signs(basis: Tensor<2>, reference: Tensor<2>) -> Tensor<2> {
    let signs = aligned_signs(&basis, &reference);
    basis * signs
}

/// `[1, r]`: what [`fix_signs`] multiplies with.
pub(super) fn largest_signs(basis: &Tensor<2>) -> Tensor<2> {
    row(host::signs(&download(basis.clone())).into_iter().map(|sign| sign as f32).collect(), basis)
}

/// `[1, r]`: what [`align_signs`] multiplies with.
pub(super) fn aligned_signs(basis: &Tensor<2>, reference: &Tensor<2>) -> Tensor<2> {
    let rank = basis.dims()[1];
    let shared = rank.min(reference.dims()[1]);
    let mut signs = vec![1.0; rank];
    if shared > 0 {
        let products = basis.clone().narrow(1, 0, shared) * reference.clone().narrow(1, 0, shared);
        for (sign, product) in signs.iter_mut().zip(values_of(products.sum_dim(0))) {
            *sign = if product < 0.0 { -1.0 } else { 1.0 };
        }
    }
    row(signs, basis)
}

fn row(values: Vec<f32>, like: &Tensor<2>) -> Tensor<2> {
    let width = values.len();
    Tensor::from_data(TensorData::new(values, [1, width]), &like.device())
}
