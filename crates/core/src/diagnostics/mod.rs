//! Numbers that describe a matrix, a set of activations, or what training did to a weight. On host values, in f64.
//!
//! | function | of | definition | from |
//! | --- | --- | --- | --- |
//! | [`effective_rank`] | singular values | `exp(H(s / sum s))` | Roy and Vetterli, EUSIPCO 2007 |
//! | [`rank_me`] | singular values of activations, not centred | the same with `p + 1e-7` | RankMe, arXiv 2210.02885 |
//! | [`participation_ratio`] | eigenvalues of a covariance | `(sum l)^2 / sum l^2` | |
//! | [`stable_rank`] | singular values | `sum s^2 / s_1^2` | |
//! | [`numerical_rank`] | singular values | how many are above `eps s_1` | |
//! | [`alpha_req`] | eigenvalues of the covariance of activations | slope of `ln l_i` over `ln i` | alpha-ReQ, arXiv 2202.05808 |
//! | [`spectrum_drift`] | singular values before and after | `norm(s1 - s0) / norm(s0)` | arXiv 2511.08567 |
//! | [`principal_angles`] | two orthonormal bases | `acos s_i(A^T B)` | Björck and Golub, 1973 |
//! | [`subspace_similarity`] | two orthonormal bases of k | `norm(A^T B)^2 / k` | LoRA, arXiv 2106.09685, section 7.2 |
//! | [`unchanged_share`] | a weight before and after | `1 - mean[abs(w1 - w0) > eta max(abs(w0), abs(w1))]` | arXiv 2511.08567 |
//! | [`bf16_mask`] | a weight before and after | `bf16(w1) != bf16(w0)` | arXiv 2511.08567 |
//! | [`off_principal_share`] | a weight, an update mask, k, a | `1 - overlap` of the update with the principal entries | arXiv 2511.08567 |
//! | [`overlap`] | two masks | `size(X and M) / size(M)` | arXiv 2511.08567 |
//!
//! `norm` is Frobenius'. For any matrix `1 <= stable rank <= sum s / s_1 <= effective rank <= rank`. A chance overlap with the
//! top share a of all entries is a.

mod masks;
mod spectrum;
mod subspace;

pub use masks::{bf16_mask, lowest, off_principal_share, overlap, principal_entries, unchanged_share};
pub use spectrum::{
    PowerLaw, alpha_req, covariance_spectrum, effective_rank, numerical_rank, participation_ratio, rank_me,
    spectrum_drift, stable_rank,
};
pub use subspace::{Decomposition, principal_angles, subspace_similarity};

use faer::Mat;

/// A matrix of f32 values, row by row.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
}

impl<'a> View<'a> {
    /// `rows * cols` values; `None` where there are more or fewer.
    pub fn new(values: &'a [f32], rows: usize, cols: usize) -> Option<Self> {
        (values.len() == rows * cols).then_some(Self { values, rows, cols })
    }

    /// `[rows, cols]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    /// Row by row.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// In f64; what is not finite counts as 0.
    fn matrix(&self) -> Mat<f64> {
        Mat::from_fn(self.rows, self.cols, |i, j| {
            let value = f64::from(self.values[i * self.cols + j]);
            if value.is_finite() { value } else { 0.0 }
        })
    }
}
