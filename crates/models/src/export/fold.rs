//! Deltas as products of two factors, with the error of what is left out.

use burn::tensor::{Tensor, TensorData};
use lowrank_core::{LowRank, linalg};

/// How much of a delta is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Limit {
    /// At most so many directions.
    pub rank: Option<usize>,
    /// As few directions as leave out at most this share of the delta (Frobenius).
    pub tolerance: Option<f64>,
}

impl Limit {
    /// Whether everything is kept.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The same with at most `most` directions.
    pub fn at_most(self, most: usize) -> Self {
        let rank = self.rank.unwrap_or(usize::MAX).min(most);
        Self { rank: (rank < usize::MAX).then_some(rank), ..self }
    }
}

/// `delta = down up`, up to an error.
#[derive(Debug)]
pub struct Folded {
    /// `[d_in, r]`.
    pub down: Tensor<2>,
    /// `[r, d_out]`.
    pub up: Tensor<2>,
    /// `||delta - down up|| / ||delta||`; 0 where the factors are those of the adapter, and NaN where the delta is not finite.
    pub error: f64,
}

/// Factors of an additive delta over the unchanged weight; their product times s is what the adapter adds.
pub fn factors(lowrank: &LowRank) -> (Tensor<2>, Tensor<2>) {
    let (down, up) = match &lowrank.core {
        // A core with fewer columns than rows goes to the side of A.
        Some(core) if core.dims()[0] == lowrank.rank() && core.dims()[1] < core.dims()[0] => {
            let core = match &lowrank.core_start {
                Some(origin) => core.val() - origin.val(),
                None => core.val(),
            };
            let up = match &lowrank.out_scale {
                Some(scale) => lowrank.up.val() * scale.val(),
                None => lowrank.up.val(),
            };
            (lowrank.down.val().matmul(core), up)
        }
        _ => lowrank.factors(),
    };
    match &lowrank.start {
        // s A B over W - s A_0 B_0 is s (A B - A_0 B_0) over W.
        Some(start) => {
            let down = Tensor::cat(vec![down, start.down.val()], 1);
            (down, Tensor::cat(vec![up, start.up.val().neg()], 0))
        }
        None => (down, up),
    }
}

/// A product as one that respects the limit: itself where it does.
pub fn fold_pair(down: Tensor<2>, up: Tensor<2>, limit: Limit) -> Folded {
    let r = down.dims()[1];
    if limit.tolerance.is_none() && limit.rank.is_none_or(|rank| r <= rank) {
        return Folded { down, up, error: 0.0 };
    }
    let is_finite = [&down, &up].into_iter().all(is_finite);
    // A = Q_a (S_a V_a^T) and B = (U_b S_b) Q_b^T: only the small matrix between the orthonormal ones is decomposed.
    let (a, b) = (linalg::svd(down, r), linalg::svd(up, r));
    let left = a.right.clone().transpose() * column(&a.values, &a.left);
    let right = b.left.clone() * column(&b.values, &b.left).transpose();
    let folded = fold_dense(left.matmul(right), limit);
    let error = if is_finite { folded.error } else { f64::NAN };
    Folded { down: a.left.matmul(folded.down), up: folded.up.matmul(b.right.transpose()), error }
}

/// The leading directions of a dense delta, `[d_in, d_out]`.
pub fn fold_dense(delta: Tensor<2>, limit: Limit) -> Folded {
    let [d_in, d_out] = delta.dims();
    let is_finite = is_finite(&delta);
    let svd = linalg::svd(delta, d_in.min(d_out));
    let (rank, error) = choose(&svd.values, limit);
    let roots: Vec<f64> = svd.values.iter().take(rank).map(|value| value.sqrt()).collect();
    let roots = column(&roots, &svd.left).transpose();
    Folded {
        down: svd.left.narrow(1, 0, rank) * roots.clone(),
        up: (svd.right.narrow(1, 0, rank) * roots).transpose(),
        error: if is_finite { error } else { f64::NAN },
    }
}

/// Whether all values are numbers; a decomposition counts others as zero.
pub(super) fn is_finite(values: &Tensor<2>) -> bool {
    values.clone().abs().sum().into_scalar::<f32>().is_finite()
}

/// How many of the singular values are kept, at least one, and the share of the norm of those that are not.
fn choose(values: &[f64], limit: Limit) -> (usize, f64) {
    let squares: Vec<f64> = values.iter().map(|value| value * value).collect();
    let total: f64 = squares.iter().sum();
    if total == 0.0 {
        return (1, 0.0);
    }
    // Added up from the smallest: tail[i] is what is left out when i are kept.
    let mut tail = vec![0.0; values.len() + 1];
    for (i, square) in squares.iter().enumerate().rev() {
        tail[i] = tail[i + 1] + square;
    }
    let error = |rank: usize| (tail[rank] / total).sqrt();
    let most = limit.rank.unwrap_or(usize::MAX).clamp(1, values.len());
    let rank = match limit.tolerance {
        Some(tolerance) => (1..most).find(|rank| error(*rank) <= tolerance).unwrap_or(most),
        None => most,
    };
    (rank, error(rank))
}

/// Values as a column `[n, 1]`, on the device of `like`.
fn column(values: &[f64], like: &Tensor<2>) -> Tensor<2> {
    let data: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(data, [values.len(), 1]), &like.device())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_few_values_as_the_tolerance_allows() {
        let values = [4.0, 2.0, 2.0, 1.0, 0.0];
        let limit = |rank, tolerance| Limit { rank, tolerance };
        assert_eq!(choose(&values, limit(None, None)), (5, 0.0));
        assert_eq!(choose(&values, limit(Some(3), None)), (3, 0.2));
        assert_eq!(choose(&values, limit(None, Some(0.2))), (3, 0.2));
        assert_eq!(choose(&values, limit(None, Some(0.19))), (4, 0.0));
        assert_eq!(choose(&values, limit(Some(2), Some(0.0))), (2, (5.0f64 / 25.0).sqrt()));
        assert_eq!(choose(&values, limit(Some(0), None)).0, 1);
        assert_eq!(choose(&values, limit(Some(9), Some(2.0))).0, 1);
        assert_eq!(choose(&[0.0, 0.0], limit(None, Some(0.1))), (1, 0.0));
    }

    #[test]
    fn a_limit_can_be_lowered_and_not_raised() {
        let limit = Limit { rank: Some(4), tolerance: None };
        assert_eq!((limit.at_most(2).rank, limit.at_most(9).rank), (Some(2), Some(4)));
        assert!(Limit::default().at_most(usize::MAX).is_none());
        assert!(!Limit { tolerance: Some(0.1), ..Limit::default() }.is_none());
    }
}
