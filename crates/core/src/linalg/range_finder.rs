//! The leading left subspace of a gradient `G = x^T dy` that is never formed.
//!
//! Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1) with G kept as its
//! factors:
//!
//! ```text
//! Y = orth(x^T (dy Z0))
//! q times:  Z = orth(dy^T (x Y)),  Y = orth(x^T (dy Z))
//! S = (x Y)^T dy = Y^T G,  S S^T = U diag(s^2) U^T
//! P = Y U[:, :r],  R = U[:, :r]^T S = P^T G
//! ```
//!
//! Shapes: `x [t, m]`, `dy [t, n]`, `Z0, Z [n, l]`, `Y [m, l]`, `S [l, n]`. Flops: `(2 + 2q) 2 t l (m + n)` and `1 +
//! 2q` orthonormalisations. Orthonormal by QR, not by the polar factor: then the columns of a warm start converge in
//! order, and Adam depends on the order. Nothing is kept between calls.

use burn::tensor::{FloatDType, Tensor};

use super::orthonormal::{aligned_signs, complete, fix_signs, largest_signs, orthonormal};
use super::{eigen, host, product, svd};
use crate::lowrank::cast;

/// A basis and the gradient in its coordinates.
#[derive(Debug)]
pub struct Range {
    /// P, `[m, r]`, orthonormal columns.
    pub basis: Tensor<2>,
    /// `R = P^T G`, `[r, n]`.
    pub projected: Tensor<2>,
    /// Lengths of the rows of R: the singular values found, descending. Columns of P beyond the width of the start
    /// block are directions nobody searched for; theirs follow, in no order.
    pub values: Vec<f64>,
}

impl Range {
    /// The same with the signs of the columns chosen after a reference basis, as [`super::align_signs`] does.
    pub fn align(self, reference: &Tensor<2>) -> Self {
        let signs = aligned_signs(&self.basis, reference);
        self.turn(signs)
    }

    fn turn(self, signs: Tensor<2>) -> Self {
        let basis = self.basis * signs.clone();
        Self { basis, projected: self.projected * signs.transpose(), values: self.values }
    }
}

/// The `rank` leading left directions of `G = x^T dy` by subspace iteration.
///
/// For the right directions swap `x` and `dy`; `projected` is then `(G Q)^T`. `rank` is cut to m, the start block to
/// `min(m, n)` columns.
///
/// # Shapes
/// `x [t, m]`, `dy [t, n]`, `start [n, l]`: Gaussian with `l = rank + oversampling`, or the transpose of the last R.
///
/// # Panics
/// As Burn does, where sizes do not fit or `rank` or `l` is 0.
pub fn range_finder(x: &Tensor<2>, dy: &Tensor<2>, start: Tensor<2>, iterations: usize, rank: usize) -> Range {
    let x = cast(x.clone(), FloatDType::F32);
    let dy = cast(dy.clone(), FloatDType::F32);
    let (m, n) = (x.dims()[1], dy.dims()[1]);
    let rank = rank.min(m);
    let size = start.dims()[1].min(m).min(n);
    let found = rank.min(size);

    let image = |z: Tensor<2>| product(x.clone().transpose(), product(dy.clone(), z));
    let preimage = |y: Tensor<2>| product(dy.clone().transpose(), product(x.clone(), y));
    let projected = |p: Tensor<2>| product(product(x.clone(), p).transpose(), dy.clone());

    let mut y = orthonormal(image(start.narrow(1, 0, size)));
    for _ in 0..iterations {
        let z = orthonormal(preimage(y));
        y = orthonormal(image(z));
    }
    let small = projected(y.clone());
    // Squares of a small gradient leave the range of f32.
    let largest = host(small.clone().max_abs().reshape([1, 1])).first().copied().unwrap_or(0.0);
    let scale = if largest > 0.0 && largest.is_finite() { largest } else { 1.0 };
    let scaled = small.clone() / scale;
    let (squares, vectors) = eigen(product(scaled.clone(), scaled.transpose()));
    let vectors = vectors.narrow(1, 0, found);

    let mut basis = product(y, vectors.clone());
    let mut coordinates = product(vectors.transpose(), small);
    let mut values = squares.into_iter().take(found).map(|s| s.max(0.0).sqrt() * f64::from(scale)).collect::<Vec<_>>();
    if found < rank {
        basis = complete(basis, rank);
        let rest = projected(basis.clone().narrow(1, found, rank - found));
        values.extend(host(rest.clone()).chunks(n).map(length));
        coordinates = Tensor::cat(vec![coordinates, rest], 0);
    }
    let signs = largest_signs(&basis);
    Range { basis, projected: coordinates, values }.turn(signs)
}

fn length(row: &[f32]) -> f64 {
    row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// The leading left singular vectors of a sketch `Y = G Omega`, summed over micro batches, and the singular values of
/// Y.
///
/// `rank` is cut to m; directions beyond l are fixed ones with the value 0.
///
/// # Shapes
/// `y [m, l]`; the basis is `[m, rank]`.
pub fn sketch_basis(y: Tensor<2>, rank: usize) -> (Tensor<2>, Vec<f64>) {
    let [m, l] = y.dims();
    let rank = rank.min(m);
    let (basis, mut values) = if l <= m {
        let q = orthonormal(y.clone());
        let triangle = svd(product(q.clone().transpose(), y), rank);
        (product(q, triangle.left), triangle.values)
    } else {
        let exact = svd(y, rank);
        (exact.left, exact.values)
    };
    values.resize(rank, 0.0);
    (fix_signs(complete(basis, rank)), values)
}
