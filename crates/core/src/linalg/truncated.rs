//! Leading singular triples of weights, and of products with a covariance: what the starts of adapters need.
//!
//! Randomised subspace iteration (Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1) of a matrix `G [m, n]`
//! that is known by its products only:
//!
//! ```text
//! Y = orth(G Z0),  Z0 Gaussian [n, l], l = rank + oversampling
//! q times:  Z = orth(G^T Y),  Y = orth(G Z)
//! T = orth(G^T Y)^T (G^T Y) = U diag(s) V^T   [l, l], on the host
//! left = Y V,  right = orth(G^T Y) U
//! ```
//!
//! Flops: `(2 + 2q) 2 l m n` on the device, `O(l^3)` on the host; the exact decomposition is `O(m n min(m, n))` on the host in
//! f64. [`truncated_svd`] chooses by [`is_exact`]. Signs follow the rule of [`fix_signs`](super::fix_signs), taken from the left
//! vectors.

use burn::tensor::{Device, FloatDType, Tensor};
use faer::Mat;
use faer::linalg::solvers::DenseSolveCore;

use super::orthonormal::largest_signs;
use super::{Svd, download, gaussian, host, orthonormal, product, svd, upload};
use crate::lowrank::cast;

/// Columns of the start block beyond the rank, as scikit-learn's randomised decomposition has.
pub const OVERSAMPLING: usize = 10;
/// Subspace iterations of the methods whose references use ten.
pub const ITERATIONS: usize = 10;
/// Smaller sides are decomposed exactly: seconds on the host.
const EXACT_UP_TO: usize = 1024;

/// Whether the leading `rank` triples of a `[m, n]` matrix are worth an exact decomposition: small ones, and those of which
/// a quarter or more of the triples is wanted.
pub fn is_exact(m: usize, n: usize, rank: usize) -> bool {
    let k = m.min(n);
    k <= EXACT_UP_TO || 4 * (rank + OVERSAMPLING) >= k
}

/// A matrix `G [m, n]` that is known by its products.
pub struct Operator<'a> {
    /// `[m, n]`.
    pub dims: [usize; 2],
    /// `Z [n, l]` to `G Z`.
    pub image: &'a dyn Fn(Tensor<2>) -> Tensor<2>,
    /// `Y [m, l]` to `G^T Y`.
    pub preimage: &'a dyn Fn(Tensor<2>) -> Tensor<2>,
}

/// The leading `min(rank, m, n)` singular triples of a matrix that is never formed, to f32 where the spectrum falls off.
pub fn operator_svd(
    operator: &Operator<'_>,
    rank: usize,
    oversampling: usize,
    power_iterations: usize,
    seed: u64,
    device: &Device,
) -> Svd {
    let [m, n] = operator.dims;
    let (rank, size) = (rank.min(m).min(n), (rank + oversampling).min(m).min(n));
    let start = gaussian(seed, "linalg.operator_svd", n, size, 1.0, device);
    let mut y = orthonormal((operator.image)(start));
    for _ in 0..power_iterations {
        let z = orthonormal((operator.preimage)(y));
        y = orthonormal((operator.image)(z));
    }
    let back = (operator.preimage)(y.clone());
    let z = orthonormal(back.clone());
    let small = svd(product(z.clone().transpose(), back), rank);
    let (left, right) = (product(y, small.right), product(z, small.left));
    let signs = largest_signs(&left);
    Svd { left: left * signs.clone(), values: small.values, right: right * signs }
}

/// The leading `min(rank, m, n)` singular triples of `w [m, n]` by randomised subspace iteration.
pub fn randomized_svd(w: Tensor<2>, rank: usize, oversampling: usize, power_iterations: usize, seed: u64) -> Svd {
    let w = cast(w, FloatDType::F32);
    let image = |z| product(w.clone(), z);
    let preimage = |y| product(w.clone().transpose(), y);
    let operator = Operator { dims: w.dims(), image: &image, preimage: &preimage };
    operator_svd(&operator, rank, oversampling, power_iterations, seed, &w.device())
}

/// The leading `min(rank, m, n)` singular triples of `w [m, n]`: exact, or randomised where [`is_exact`] says so.
pub fn truncated_svd(w: Tensor<2>, rank: usize, seed: u64) -> Svd {
    let [m, n] = w.dims();
    match is_exact(m, n, rank) {
        true => svd(w, rank),
        false => randomized_svd(w, rank, OVERSAMPLING, ITERATIONS, seed),
    }
}

/// All singular triples of `a b`, the product taken in f64: small values are right where f32 would have lost them.
///
/// # Shapes
/// `a [m, p]`, `b [p, n]`.
pub fn svd_of_product(a: Tensor<2>, b: Tensor<2>) -> Svd {
    let device = a.device();
    let (left, values, right) = host::svd(&(download(a) * download(b)));
    let k = values.len();
    Svd { left: upload(&left, k, &device), right: upload(&right, k, &device), values }
}

/// The leading `min(rank, m, n)` singular values and right singular vectors of `C^(1/2) d`, which are the eigenvectors of
/// `d^T C d`. Exact, by the smaller side: the eigenvectors of `d^T C d` where it is no larger than C, else those of C and the
/// decomposition of its root times d.
///
/// # Shapes
/// `c [m, m]`, symmetric and positive up to rounding; `d [m, n]`; vectors `[n, rank]`.
pub fn root_svd(c: Tensor<2>, d: Tensor<2>, rank: usize) -> (Vec<f64>, Tensor<2>) {
    let (device, [m, n]) = (d.device(), d.dims());
    let (c, d) = (download(c), download(d));
    let (mut values, vectors) = if n <= m {
        let (squares, vectors) = host::eigen(&(d.transpose() * (c * &d)));
        (squares.iter().map(|square| square.max(0.0).sqrt()).collect::<Vec<_>>(), vectors)
    } else {
        let (squares, vectors) = host::eigen(&c);
        let root = Mat::from_fn(m, m, |i, j| vectors[(i, j)] * squares[j].max(0.0).sqrt());
        let (_, values, right) = host::svd(&(root.transpose() * d));
        (values, right)
    };
    values.truncate(rank.min(m).min(n));
    (values.clone(), upload(&vectors, values.len(), &device))
}

/// [`root_svd`] without a decomposition of anything large: subspace iteration on `d^T C d` by its products.
pub fn randomized_root_svd(c: Tensor<2>, d: Tensor<2>, rank: usize, seed: u64) -> (Vec<f64>, Tensor<2>) {
    let (c, d) = (cast(c, FloatDType::F32), cast(d, FloatDType::F32));
    let n = d.dims()[1];
    let apply = |z| product(d.clone().transpose(), product(c.clone(), product(d.clone(), z)));
    let operator = Operator { dims: [n, n], image: &apply, preimage: &apply };
    // Every application is a power of the root's spectrum, two to a round.
    let found = operator_svd(&operator, rank, OVERSAMPLING, ITERATIONS / 2, seed, &d.device());
    (found.values.iter().map(|square| square.sqrt()).collect(), found.left)
}

/// `||C C^-1 - I||` with the inverse taken in f32: how far single precision can be trusted with C. Not a number where C has no
/// inverse.
///
/// # Shapes
/// `c [n, n]`.
pub fn inverse_error(c: Tensor<2>) -> f64 {
    let n = c.dims()[0];
    let values = super::host(c);
    let c = Mat::<f32>::from_fn(n, n, |i, j| values[i * n + j]);
    let product = &c * c.partial_piv_lu().inverse();
    let off = |i: usize, j: usize| f64::from(product[(i, j)]) - f64::from(u8::from(i == j));
    (0..n).flat_map(|j| (0..n).map(move |i| (i, j))).map(|(i, j)| off(i, j).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(name: &str, rows: usize, cols: usize) -> Tensor<2> {
        gaussian(11, name, rows, cols, 1.0, &Device::flex())
    }

    fn norm(a: &Tensor<2>) -> f64 {
        super::super::host(a.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
    }

    fn row(values: &[f64]) -> Tensor<2> {
        let values = values.iter().map(|&v| v as f32).collect::<Vec<_>>();
        let width = values.len();
        Tensor::from_data(burn::tensor::TensorData::new(values, [1, width]), &Device::flex())
    }

    fn gram_defect(q: &Tensor<2>) -> f64 {
        norm(&(product(q.clone().transpose(), q.clone()) - Tensor::eye(q.dims()[1], &q.device())))
    }

    /// `m x n` with singular values `1 / (1 + i)`.
    fn harmonic(m: usize, n: usize) -> Tensor<2> {
        let k = m.min(n);
        let values = (0..k).map(|i| 1.0 / (1.0 + i as f64)).collect::<Vec<_>>();
        let left = orthonormal(random("left", m, k));
        let right = orthonormal(random("right", n, k));
        product(left * row(&values), right.transpose())
    }

    #[test]
    fn randomised_triples_are_the_exact_ones() {
        for [m, n] in [[70, 50], [50, 70], [9, 200]] {
            let (w, rank) = (harmonic(m, n), 6);
            let found = randomized_svd(w.clone(), rank, OVERSAMPLING, ITERATIONS, 3);
            let exact = svd(w.clone(), rank);
            for (a, b) in found.values.iter().zip(&exact.values) {
                assert!((a - b).abs() < 2e-6, "{a} {b}");
            }
            // The gaps of the spectrum are above 1/42, so the vectors themselves agree.
            assert!(norm(&(found.left.clone() - exact.left)) < 1e-4);
            assert!(norm(&(found.right.clone() - exact.right)) < 1e-4);
            assert!(gram_defect(&found.left) < 2e-6 && gram_defect(&found.right) < 2e-6);
        }
    }

    #[test]
    fn every_size_has_an_answer() {
        for [m, n] in [[1, 5], [5, 1], [3, 3]] {
            let w = random("odd", m, n);
            let found = randomized_svd(w.clone(), 9, OVERSAMPLING, 1, 0);
            let back = product(found.left.clone() * row(&found.values), found.right.clone().transpose());
            assert_eq!(found.values.len(), m.min(n));
            assert!(norm(&(back - w.clone())) < 1e-5 * norm(&w).max(1.0));
        }
        let nothing = randomized_svd(Tensor::zeros([20, 30], &Device::flex()), 3, OVERSAMPLING, 2, 0);
        assert!(nothing.values.iter().all(|&value| value == 0.0));
        assert!(gram_defect(&nothing.left) < 1e-5);
        assert!(is_exact(1024, 4096, 8) && !is_exact(1025, 4096, 8) && is_exact(2000, 2000, 600));
    }

    #[test]
    fn the_root_of_a_covariance_weighs_both_sides_alike() {
        for [m, n] in [[40, 24], [24, 40]] {
            let x = random("x", 15, m) * row(&(0..m).map(|i| 10f64.powf(i as f64 / m as f64)).collect::<Vec<_>>());
            let (c, d) = (product(x.clone().transpose(), x.clone()), random("d", m, n));
            let (values, e) = root_svd(c.clone(), d.clone(), 5);
            let exact = svd(product(x.clone(), d.clone()), 15);
            for (a, b) in values.iter().zip(&exact.values) {
                assert!((a - b).abs() < 1e-5 * exact.values[0], "{a} {b}");
            }
            // Nothing of rank 5 is closer to x d.
            let rest = product(x, d.clone() - product(product(d.clone(), e.clone()), e.clone().transpose()));
            let tail = exact.values[5..].iter().map(|v| v * v).sum::<f64>().sqrt();
            assert!((norm(&rest) / tail - 1.0).abs() < 1e-5);
            let (again, f) = randomized_root_svd(c, d, 5, 1);
            assert!(norm(&(product(e.clone(), e.transpose()) - product(f.clone(), f.transpose()))) < 1e-3);
            assert!(again.iter().zip(&values).all(|(a, b)| (a - b).abs() < 1e-3 * values[0]));
        }
    }

    #[test]
    fn products_keep_their_small_values() {
        // diag(1e-6) times a rotation: in f32 the sum of squares of the small rows drowns beside the large ones.
        let q = orthonormal(random("q", 12, 12));
        let scales = (0..12).map(|i| 10f64.powi(-i)).collect::<Vec<_>>();
        let found = svd_of_product(Tensor::eye(12, &q.device()) * row(&scales), q);
        for (a, b) in found.values.iter().zip(&scales) {
            assert!((a / b - 1.0).abs() < 1e-4, "{a} {b}");
        }
    }

    #[test]
    fn an_inverse_is_judged_in_single_precision() {
        let near = Tensor::<2>::eye(30, &Device::flex()) * 3.0;
        assert!(inverse_error(near) < 1e-6);
        let q = orthonormal(random("q", 40, 40));
        let hard = row(&(0..40).map(|i| 10f64.powf(-8.0 * i as f64 / 39.0)).collect::<Vec<_>>());
        let error = inverse_error(product(q.clone() * hard, q.transpose()));
        assert!(error.is_nan() || error > 0.05, "{error}");
        let none = inverse_error(Tensor::zeros([4, 4], &Device::flex()));
        assert!(none.is_nan() || none > 0.05, "{none}");
    }
}
