//! Dense decompositions on the host in f64, made total: every input has an answer.

use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Mat, Side, get_global_parallelism};

use crate::random::Stream;

/// A column counts as dependent where less than this part of its length is new. Columns come from f32 products, whose
/// rounding is of this size.
const DEPENDENT: f64 = 1e-6;
/// The least squared pivot of an f32 Gram matrix that its rounding (about 1e-6) does not reach.
const SAFE_PIVOT: f64 = 1e-4;
/// Sweeps after which Jacobi's method stops; it converges in about ten.
const SWEEPS: usize = 30;
/// Rounds of the search for independent columns; more than two take contrived columns.
const ROUNDS: usize = 8;

/// What a Gram matrix `Y^T Y` says about orthonormalising Y by `Y R^-1`.
pub(super) enum Pass {
    /// `Y R^-1` is orthonormal to working precision.
    Last(Mat<f64>),
    /// `Y R^-1` is better conditioned than Y.
    Again(Mat<f64>),
    /// Some column is zero, dependent, non-finite or out of range.
    Doubtful,
}

/// Singular value decomposition `(U [m, k], s descending, V [n, k])`, `k = min(m, n)`.
pub(super) fn svd(a: &Mat<f64>) -> (Mat<f64>, Vec<f64>, Mat<f64>) {
    let a = finite(a);
    let k = a.nrows().min(a.ncols());
    if k == 0 {
        return (Mat::zeros(a.nrows(), 0), Vec::new(), Mat::zeros(a.ncols(), 0));
    }
    let (mut left, values, mut right) = match a.thin_svd() {
        Ok(svd) => (svd.U().to_owned(), svd.S().column_vector().iter().copied().collect(), svd.V().to_owned()),
        Err(_) => svd_by_gram(&a),
    };
    for (j, sign) in signs(&left).into_iter().enumerate() {
        scale_column(&mut left, j, sign);
        scale_column(&mut right, j, sign);
    }
    (left, values, right)
}

/// The decomposition from the eigenvectors of the smaller Gram matrix: half the digits, but no iteration that can fail.
pub(super) fn svd_by_gram(a: &Mat<f64>) -> (Mat<f64>, Vec<f64>, Mat<f64>) {
    if a.nrows() < a.ncols() {
        let (left, values, right) = svd_by_gram(&a.transpose().to_owned());
        return (right, values, left);
    }
    let (_, right) = eigen(&(a.transpose() * a));
    let image = a * &right;
    let values = (0..image.ncols()).map(|j| image.col(j).norm_l2()).collect();
    (orthonormal(&image), values, right)
}

/// Eigenvalues, descending, and eigenvectors, in columns, of the symmetric part of `s`.
pub(super) fn eigen(s: &Mat<f64>) -> (Vec<f64>, Mat<f64>) {
    let s = finite(s);
    let l = s.nrows();
    if l == 0 {
        return (Vec::new(), Mat::zeros(0, 0));
    }
    let s = Mat::from_fn(l, l, |i, j| 0.5 * (s[(i, j)] + s[(j, i)]));
    let (values, vectors) = match s.self_adjoint_eigen(Side::Lower) {
        Ok(eigen) => (eigen.S().column_vector().iter().copied().collect(), eigen.U().to_owned()),
        Err(_) => jacobi(s),
    };
    let mut order = (0..l).collect::<Vec<_>>();
    order.sort_by(|&i, &j| values[j].total_cmp(&values[i]));
    let mut sorted = columns(&vectors, &order);
    for (j, sign) in signs(&sorted).into_iter().enumerate() {
        scale_column(&mut sorted, j, sign);
    }
    (order.iter().map(|&j| values[j]).collect(), sorted)
}

/// Eigenvalues and eigenvectors by cyclic rotations: slow, cannot fail.
pub(super) fn jacobi(mut s: Mat<f64>) -> (Vec<f64>, Mat<f64>) {
    let l = s.nrows();
    let mut vectors = Mat::<f64>::identity(l, l);
    for _ in 0..SWEEPS {
        let mut rotated = false;
        for p in 0..l {
            for q in p + 1..l {
                let off = s[(p, q)];
                if off.abs() <= f64::EPSILON * (s[(p, p)] * s[(q, q)]).abs().sqrt() {
                    continue;
                }
                rotated = true;
                // The smaller root of t^2 + 2 t cot(2 angle) - 1, which turns by at most 45 degrees.
                let cot = (s[(q, q)] - s[(p, p)]) / (2.0 * off);
                let tan = cot.signum() / (cot.abs() + cot.hypot(1.0));
                let cos = 1.0 / tan.hypot(1.0);
                let sin = tan * cos;
                for i in 0..l {
                    let (a, b) = (s[(i, p)], s[(i, q)]);
                    (s[(i, p)], s[(i, q)]) = (cos * a - sin * b, sin * a + cos * b);
                }
                for i in 0..l {
                    let (a, b) = (s[(p, i)], s[(q, i)]);
                    (s[(p, i)], s[(q, i)]) = (cos * a - sin * b, sin * a + cos * b);
                    let (a, b) = (vectors[(i, p)], vectors[(i, q)]);
                    (vectors[(i, p)], vectors[(i, q)]) = (cos * a - sin * b, sin * a + cos * b);
                }
            }
        }
        if !rotated {
            break;
        }
    }
    ((0..l).map(|i| s[(i, i)]).collect(), vectors)
}

/// One pass of CholeskyQR from the Gram matrix: `R^-1` of `gram = R^T R` with a positive diagonal.
///
/// The first pass works on columns scaled to length one and shifts the spectrum where a pivot is lost in the rounding
/// of the Gram matrix. Later passes get lengths of at most one, where a short column means that the first pass found
/// nothing but rounding in it.
pub(super) fn cholesky_pass(gram: &Mat<f64>, first: bool) -> Pass {
    let l = gram.nrows();
    let diagonal = (0..l).map(|j| gram[(j, j)]).collect::<Vec<_>>();
    // Squares of f32 values: beyond these bounds they have overflowed or lost digits.
    if !diagonal.iter().all(|d| (1e-30..1e30).contains(d)) {
        return Pass::Doubtful;
    }
    let lengths = if first { diagonal.iter().map(|d| d.sqrt()).collect() } else { vec![1.0; l] };
    let mut scaled = Mat::from_fn(l, l, |i, j| 0.5 * (gram[(i, j)] + gram[(j, i)]) / (lengths[i] * lengths[j]));
    // Two passes end the same way: what was left to do was small, so that rounding stays at its own size.
    let defect = (0..l)
        .flat_map(|j| (0..l).map(move |i| (i, j)))
        .map(|(i, j)| (scaled[(i, j)] - f64::from(u8::from(i == j))).powi(2))
        .sum::<f64>();
    if !defect.is_finite() {
        return Pass::Doubtful;
    }
    let mut inverse = inverse_cholesky(&scaled, SAFE_PIVOT);
    if first && inverse.is_none() {
        let shift = 4.0 * f64::from(f32::EPSILON) * l as f64;
        for j in 0..l {
            scaled[(j, j)] += shift;
        }
        inverse = inverse_cholesky(&scaled, 0.5 * shift);
    }
    let Some(inverse) = inverse else {
        return Pass::Doubtful;
    };
    let inverse = Mat::from_fn(l, l, |i, j| if i <= j { inverse[(j, i)] / lengths[i] } else { 0.0 });
    if defect < 0.25 { Pass::Last(inverse) } else { Pass::Again(inverse) }
}

/// The inverse of the lower Cholesky factor, where every squared pivot is at least `least`.
fn inverse_cholesky(gram: &Mat<f64>, least: f64) -> Option<Mat<f64>> {
    let l = gram.nrows();
    let factor = gram.llt(Side::Lower).ok()?;
    if !(0..l).all(|j| factor.L()[(j, j)].powi(2) >= least) {
        return None;
    }
    let mut inverse = Mat::zeros(l, l);
    invert_lower_triangular(inverse.as_mut(), factor.L(), get_global_parallelism());
    Some(inverse)
}

/// Q of `y = Q R` with a positive diagonal of R, for `l <= m`, by Householder reflections.
///
/// Dependent, zero and non-finite columns are replaced by fixed pseudo-random directions, orthogonal to all others, in
/// place.
pub(super) fn orthonormal(y: &Mat<f64>) -> Mat<f64> {
    let (m, l) = (y.nrows(), y.ncols());
    let mut unit = y.clone();
    let mut usable = Vec::new();
    for j in 0..l {
        // f32 values: their squares stay inside the range of f64.
        let length = y.col(j).norm_l2();
        if length.is_finite() && length > 0.0 {
            scale_column(&mut unit, j, 1.0 / length);
            usable.push(j);
        }
    }
    if usable.len() == l {
        let (q, pivots) = householder(&unit);
        if pivots.iter().all(|&pivot| pivot > DEPENDENT) {
            return q;
        }
    }
    let kept = independent(&unit, &usable);
    // The independent columns first, so that the replacements do not disturb them.
    let replaced = (0..l).filter(|j| !kept.contains(j)).collect::<Vec<_>>();
    let stream = Stream::new(0, "linalg.completion");
    let extended = Mat::from_fn(m, l, |i, j| match kept.get(j) {
        Some(&column) => unit[(i, column)],
        None => stream.normal((replaced[j - kept.len()] * m + i) as u64) / (m as f64).sqrt(),
    });
    let (q, _) = householder(&extended);
    let mut order = vec![0; l];
    for (from, &to) in kept.iter().chain(&replaced).enumerate() {
        order[to] = from;
    }
    columns(&q, &order)
}

/// Which of the usable columns, all of length one, add a direction to the ones before.
fn independent(unit: &Mat<f64>, usable: &[usize]) -> Vec<usize> {
    let mut found = Vec::new();
    let mut candidates = usable.to_vec();
    for _ in 0..ROUNDS {
        let (_, pivots) = householder(&columns(unit, &candidates));
        found = candidates.iter().zip(&pivots).filter(|(_, pivot)| **pivot > DEPENDENT).map(|(&j, _)| j).collect();
        // The direction that stood in for a dependent column may have hidden a good column behind it: look again
        // without.
        let rest = usable.iter().copied().filter(|j| !found.contains(j)).collect::<Vec<_>>();
        let (q, _) = householder(&columns(unit, &found));
        let others = columns(unit, &rest);
        let residual = &others - &q * (q.transpose() * &others);
        candidates = found.clone();
        candidates.extend((0..rest.len()).filter(|&i| residual.col(i).norm_l2() > DEPENDENT).map(|i| rest[i]));
        if candidates.len() == found.len() {
            break;
        }
        candidates.sort_unstable();
    }
    found
}

/// Q and the diagonal of R, made positive, of a matrix with at least as many rows as columns.
fn householder(y: &Mat<f64>) -> (Mat<f64>, Vec<f64>) {
    if y.ncols() == 0 {
        return (y.clone(), Vec::new());
    }
    let qr = y.qr();
    let mut q = qr.compute_thin_Q();
    let pivots = (0..y.ncols()).map(|j| qr.thin_R()[(j, j)]).collect::<Vec<_>>();
    for (j, pivot) in pivots.iter().enumerate() {
        scale_column(&mut q, j, pivot.signum());
    }
    (q, pivots.into_iter().map(f64::abs).collect())
}

/// For every column the sign of its entry of largest magnitude (ties: the first); 1 for a zero column.
pub(super) fn signs(basis: &Mat<f64>) -> Vec<f64> {
    let sign = |j: usize| {
        let largest =
            (0..basis.nrows()).map(|i| basis[(i, j)]).fold(0.0f64, |a, b| if b.abs() > a.abs() { b } else { a });
        if largest < 0.0 { -1.0 } else { 1.0 }
    };
    (0..basis.ncols()).map(sign).collect()
}

fn finite(a: &Mat<f64>) -> Mat<f64> {
    Mat::from_fn(a.nrows(), a.ncols(), |i, j| if a[(i, j)].is_finite() { a[(i, j)] } else { 0.0 })
}

fn columns(a: &Mat<f64>, which: &[usize]) -> Mat<f64> {
    Mat::from_fn(a.nrows(), which.len(), |i, j| a[(i, which[j])])
}

fn scale_column(a: &mut Mat<f64>, j: usize, factor: f64) {
    for i in 0..a.nrows() {
        a[(i, j)] *= factor;
    }
}
