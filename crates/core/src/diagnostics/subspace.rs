//! Leading singular directions, and how two subspaces lie to each other.

use faer::{Mat, Side};

use super::View;

/// Singular values of a matrix `[m, n]` and its leading directions, from the eigenvectors of its smaller Gram matrix in f64.
/// Values below `1e-8` of the largest are not exact.
#[derive(Clone, Debug)]
pub struct Decomposition {
    /// All `min(m, n)` of them, descending.
    pub values: Vec<f64>,
    /// `[m, k]`, orthonormal columns; fewer than were asked for where values are 0.
    pub left: Mat<f64>,
    /// `[n, k]`.
    pub right: Mat<f64>,
}

impl Decomposition {
    /// The values, and `k` directions of each side.
    pub fn of(view: View<'_>, k: usize) -> Self {
        let a = view.matrix();
        let is_wide = a.nrows() < a.ncols();
        let gram = if is_wide { &a * a.transpose() } else { a.transpose() * &a };
        let (squares, vectors) = eigen(&gram);
        let values: Vec<f64> = squares.iter().map(|square| square.max(0.0).sqrt()).collect();
        let floor = 1e-7 * values.first().copied().unwrap_or(0.0);
        let k = values.iter().take(k).take_while(|&&value| value > floor).count();
        let own = Mat::from_fn(vectors.nrows(), k, |i, j| vectors[(i, j)]);
        let image = if is_wide { a.transpose() * &own } else { &a * &own };
        let other = Mat::from_fn(image.nrows(), k, |i, j| image[(i, j)] / values[j]);
        let (left, right) = if is_wide { (own, other) } else { (other, own) };
        Self { values, left, right }
    }
}

/// Eigenvalues, descending, and eigenvectors of a symmetric matrix; zeros where the iteration fails.
pub(super) fn eigen(symmetric: &Mat<f64>) -> (Vec<f64>, Mat<f64>) {
    let size = symmetric.nrows();
    let Ok(found) = symmetric.self_adjoint_eigen(Side::Lower) else {
        return (vec![0.0; size], Mat::zeros(size, size));
    };
    // faer's order is ascending.
    let values: Vec<f64> = (0..size).map(|j| found.S().column_vector()[size - 1 - j]).collect();
    (values, Mat::from_fn(size, size, |i, j| found.U()[(i, size - 1 - j)]))
}

/// The cosines between two subspaces, descending, for bases with orthonormal columns `[m, k]` and `[m, l]`.
fn cosines(a: &Mat<f64>, b: &Mat<f64>) -> Vec<f64> {
    let count = a.ncols().min(b.ncols());
    if count == 0 {
        return vec![];
    }
    let mut values = (a.transpose() * b).singular_values().unwrap_or_default();
    values.truncate(count);
    values
}

/// Angles between two subspaces in degrees, ascending.
pub fn principal_angles(a: &Mat<f64>, b: &Mat<f64>) -> Vec<f64> {
    cosines(a, b).into_iter().map(|cosine| cosine.clamp(0.0, 1.0).acos().to_degrees()).collect()
}

/// `norm(A^T B)^2 / k` for the smaller number of columns k: 1 where one subspace holds the other, 0 where they are
/// orthogonal. `None` for an empty basis.
pub fn subspace_similarity(a: &Mat<f64>, b: &Mat<f64>) -> Option<f64> {
    let cosines = cosines(a, b);
    let squares: f64 = cosines.iter().map(|cosine| cosine * cosine).sum();
    (!cosines.is_empty()).then(|| squares / cosines.len() as f64)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::random::Stream;

    fn normals(rows: usize, cols: usize, name: &str) -> Vec<f32> {
        let stream = Stream::new(1, name);
        (0..(rows * cols) as u64).map(|i| stream.normal(i) as f32).collect()
    }

    #[test]
    fn the_decomposition_is_faers_on_either_orientation() {
        for (rows, cols) in [(30, 12), (12, 30), (20, 20)] {
            let values = normals(rows, cols, "matrix");
            let view = View::new(&values, rows, cols).unwrap();
            let found = Decomposition::of(view, 5);
            let exact = view.matrix().thin_svd().unwrap();
            for (i, value) in found.values.iter().enumerate() {
                let expected = exact.S().column_vector()[i];
                assert!((value - expected).abs() < 1e-6 * found.values[0], "{i}: {value} {expected}");
            }
            for (side, expected) in [(&found.left, exact.U()), (&found.right, exact.V())] {
                assert_eq!(side.ncols(), 5);
                let leading = Mat::from_fn(side.nrows(), 5, |i, j| expected[(i, j)]);
                assert!(principal_angles(side, &leading).iter().all(|angle| *angle < 1e-4), "{rows} {cols}");
            }
        }
    }

    #[test]
    fn directions_end_where_the_rank_does() {
        let outer: Vec<f32> = (0..10 * 6).map(|i| (i / 6 + 1) as f32 * (i % 6 + 2) as f32).collect();
        let found = Decomposition::of(View::new(&outer, 10, 6).unwrap(), 4);
        assert_eq!((found.left.ncols(), found.right.ncols(), found.values.len()), (1, 1, 6));
        let zeros = Decomposition::of(View::new(&[0.0; 6], 2, 3).unwrap(), 2);
        assert_eq!((zeros.left.ncols(), zeros.values.clone()), (0, vec![0.0; 2]));
        assert_eq!(
            (principal_angles(&zeros.left, &zeros.left), subspace_similarity(&zeros.left, &zeros.left)),
            (vec![], None)
        );
    }

    /// Two planes in space that share the first axis and enclose 30 degrees.
    #[test]
    fn planes_with_a_known_angle() {
        let (sin, cos) = 30f64.to_radians().sin_cos();
        let a = Mat::from_fn(3, 2, |i, j| if i == j { 1.0 } else { 0.0 });
        let b = Mat::from_fn(3, 2, |i, j| match (i, j) {
            (0, 0) => -1.0, // signs do not matter
            (1, 1) => cos,
            (2, 1) => sin,
            _ => 0.0,
        });
        let angles = principal_angles(&a, &b);
        assert!(angles[0].abs() < 1e-6 && (angles[1] - 30.0).abs() < 1e-9, "{angles:?}");
        assert!((subspace_similarity(&a, &b).unwrap() - (1.0 + cos * cos) / 2.0).abs() < 1e-12);
    }

    /// `W O` has the left subspace of W, whatever the rotation O.
    #[test]
    fn a_rotation_of_the_inputs_leaves_the_left_subspace() {
        let values = normals(24, 10, "weight");
        let rotation = Decomposition::of(View::new(&normals(10, 10, "rotation"), 10, 10).unwrap(), 10).left;
        let turned = View::new(&values, 24, 10).unwrap().matrix() * rotation;
        let turned: Vec<f32> = (0..240).map(|i| turned[(i / 10, i % 10)] as f32).collect();
        let [before, after] = [&values, &turned].map(|values| Decomposition::of(View::new(values, 24, 10).unwrap(), 4));
        assert!(principal_angles(&before.left, &after.left).iter().all(|angle| *angle < 1e-2));
        assert!(principal_angles(&before.right, &after.right).iter().any(|angle| *angle > 5.0));
    }
}
