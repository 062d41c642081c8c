//! What singular values and eigenvalues tell of a matrix.

use faer::Mat;

use super::View;
use super::subspace::eigen;

/// Added to every share in [`rank_me`].
const RANK_ME_EPS: f64 = 1e-7;
/// Eigenvalues that [`covariance_spectrum`] returns at most.
const MOST_EIGENVALUES: usize = 2048;
/// The first of the ranks that alpha-ReQ fits, counted from 1, and the last.
const WINDOW: (usize, usize) = (11, 100);
/// Ranks on which the fit is judged.
const JUDGED: usize = 500;

/// `exp(- sum p ln p)` of shares p, where `0 ln 0 = 0`.
fn exponential_of_entropy(shares: impl Iterator<Item = f64>) -> f64 {
    (-shares.filter(|&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>()).exp()
}

fn total(values: &[f64]) -> Option<f64> {
    let sum = values.iter().sum::<f64>();
    (sum > 0.0 && sum.is_finite()).then_some(sum)
}

/// The number of equal singular values that have the entropy of these. `None` for zeros.
///
/// ```
/// use lowrank_core::diagnostics::effective_rank;
/// assert!((effective_rank(&[2.0; 64]).unwrap() - 64.0).abs() < 1e-9);
/// assert_eq!(effective_rank(&[0.0, 0.0]), None);
/// ```
pub fn effective_rank(singular: &[f64]) -> Option<f64> {
    let sum = total(singular)?;
    Some(exponential_of_entropy(singular.iter().map(|s| s / sum)))
}

/// RankMe of activations by their singular values. `None` for zeros.
pub fn rank_me(singular: &[f64]) -> Option<f64> {
    let sum = total(singular)?;
    Some(exponential_of_entropy(singular.iter().map(|s| s / sum + RANK_ME_EPS)))
}

/// `(sum l)^2 / sum l^2`. `None` for zeros.
pub fn participation_ratio(eigenvalues: &[f64]) -> Option<f64> {
    let sum = total(eigenvalues)?;
    Some(1.0 / eigenvalues.iter().map(|l| (l / sum).powi(2)).sum::<f64>())
}

/// `norm(A)^2 / norm_2(A)^2` by the singular values of A. `None` for zeros.
pub fn stable_rank(singular: &[f64]) -> Option<f64> {
    let largest = largest(singular)?;
    Some(singular.iter().map(|s| (s / largest).powi(2)).sum())
}

/// Singular values above `eps` times the largest.
pub fn numerical_rank(singular: &[f64], eps: f64) -> usize {
    largest(singular).map_or(0, |largest| singular.iter().filter(|&&s| s > eps * largest).count())
}

fn largest(singular: &[f64]) -> Option<f64> {
    singular.iter().copied().reduce(f64::max).filter(|&s| s > 0.0 && s.is_finite())
}

/// `norm(s1 - s0) / norm(s0)`, both descending; a shorter one is filled up with zeros. `None` where s0 is zero.
pub fn spectrum_drift(before: &[f64], after: &[f64]) -> Option<f64> {
    let at = |values: &[f64], i: usize| values.get(i).copied().unwrap_or(0.0);
    let length = before.len().max(after.len());
    let difference: f64 = (0..length).map(|i| (at(after, i) - at(before, i)).powi(2)).sum();
    let norm: f64 = before.iter().map(|s| s * s).sum();
    (norm > 0.0).then(|| (difference / norm).sqrt())
}

/// Eigenvalues of the covariance of activations `[samples, width]`, descending, with sum 1; at most 2048. Empty where all
/// samples are equal.
pub fn covariance_spectrum(activations: View<'_>) -> Vec<f64> {
    let mut centred = activations.matrix();
    let rows = centred.nrows();
    for j in 0..centred.ncols() {
        let mean = (0..rows).map(|i| centred[(i, j)]).sum::<f64>() / rows.max(1) as f64;
        (0..rows).for_each(|i| centred[(i, j)] -= mean);
    }
    let gram: Mat<f64> = match rows < centred.ncols() {
        true => &centred * centred.transpose(),
        false => centred.transpose() * &centred,
    };
    let mut values: Vec<f64> = eigen(&gram).0.into_iter().map(|value| value.max(0.0)).collect();
    let Some(sum) = total(&values) else { return vec![] };
    values.truncate(MOST_EIGENVALUES);
    values.iter_mut().for_each(|value| *value /= sum);
    values
}

/// `l_i = e^c i^-alpha`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerLaw {
    /// alpha. Good representations have one near 1.
    pub alpha: f64,
    /// Share of the variance of `ln l` that the line explains, over the first 500 ranks (ten fewer than there are, where
    /// there are fewer).
    pub r_squared: f64,
}

/// The decay of eigenvalues, descending: least squares of `ln l_i = c - alpha ln i` with weights `1 / i` over the ranks 11 to
/// 100, or as many of them as are positive. `None` for fewer than ten.
pub fn alpha_req(eigenvalues: &[f64]) -> Option<PowerLaw> {
    let positive = eigenvalues.iter().take_while(|&&l| l > 0.0).count();
    let last = WINDOW.1.min(positive);
    if last + 1 < WINDOW.0 + 10 {
        return None;
    }
    let point = |rank: usize| ((rank as f64).ln(), eigenvalues[rank - 1].ln(), 1.0 / rank as f64);
    let (mut w, mut wx, mut wy, mut wxx, mut wxy) = (0.0, 0.0, 0.0, 0.0, 0.0);
    for (x, y, weight) in (WINDOW.0..=last).map(point) {
        w += weight;
        wx += weight * x;
        wy += weight * y;
        wxx += weight * x * x;
        wxy += weight * x * y;
    }
    let slope = (w * wxy - wx * wy) / (w * wxx - wx * wx);
    let constant = (wy - slope * wx) / w;
    let judged = JUDGED.min(positive.saturating_sub(10)).max(last);
    let logs: Vec<(f64, f64)> = (1..=judged).map(point).map(|(x, y, _)| (x, y)).collect();
    let mean = logs.iter().map(|(_, y)| y).sum::<f64>() / judged as f64;
    let spread: f64 = logs.iter().map(|(_, y)| (y - mean).powi(2)).sum();
    let error: f64 = logs.iter().map(|(x, y)| (y - constant - slope * x).powi(2)).sum();
    let r_squared = if spread > 0.0 { 1.0 - error / spread } else { 0.0 };
    Some(PowerLaw { alpha: -slope, r_squared })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::subspace::Decomposition;
    use super::*;
    use crate::random::Stream;

    fn normals(count: usize, name: &str) -> Vec<f32> {
        let stream = Stream::new(1, name);
        (0..count as u64).map(|i| stream.normal(i) as f32).collect()
    }

    fn singular(values: &[f32], rows: usize, cols: usize) -> Vec<f64> {
        Decomposition::of(View::new(values, rows, cols).unwrap(), 0).values
    }

    #[test]
    fn the_identity_has_every_rank_and_an_outer_product_one() {
        let identity: Vec<f32> = (0..64 * 64).map(|i| f32::from(u8::from(i % 65 == 0))).collect();
        let s = singular(&identity, 64, 64);
        assert!((rank_me(&s).unwrap() - 64.001).abs() < 1e-3, "{:?}", rank_me(&s));
        assert!((effective_rank(&s).unwrap() - 64.0).abs() < 1e-9);
        assert!((stable_rank(&s).unwrap() - 64.0).abs() < 1e-9);
        assert_eq!(numerical_rank(&s, 1e-6), 64);
        let outer: Vec<f32> = (0..100 * 64).map(|i| (i / 64 + 1) as f32 * ((i % 64) as f32 - 20.0)).collect();
        let s = singular(&outer, 100, 64);
        assert!((rank_me(&s).unwrap() - 1.0001).abs() < 1e-4, "{:?}", rank_me(&s));
        assert_eq!(numerical_rank(&s, 1e-6), 1);
    }

    /// By hand for s = (3, 2, 1): shares 1/2, 1/3, 1/6.
    #[test]
    fn three_values_by_hand() {
        let s = [3.0, 2.0, 1.0];
        let entropy = 0.5 * 2f64.ln() + 3f64.ln() / 3.0 + 6f64.ln() / 6.0;
        assert!((effective_rank(&s).unwrap() - entropy.exp()).abs() < 1e-12);
        assert!((stable_rank(&s).unwrap() - 14.0 / 9.0).abs() < 1e-12);
        assert!((participation_ratio(&s).unwrap() - 36.0 / 14.0).abs() < 1e-12);
        assert!((spectrum_drift(&s, &[3.0, 1.0]).unwrap() - (2.0f64 / 14.0).sqrt()).abs() < 1e-12);
        assert!((spectrum_drift(&s, &s.map(|s| 1.5 * s)).unwrap() - 0.5).abs() < 1e-12);
    }

    #[test]
    fn zeros_have_no_rank() {
        assert_eq!((effective_rank(&[0.0]), rank_me(&[]), stable_rank(&[0.0])), (None, None, None));
        assert_eq!(
            (participation_ratio(&[]), spectrum_drift(&[], &[1.0]), numerical_rank(&[0.0], 0.1)),
            (None, None, 0)
        );
        let equal = [1.0f32; 12];
        assert!(covariance_spectrum(View::new(&equal, 4, 3).unwrap()).is_empty());
    }

    #[test]
    fn the_ranks_are_in_order_and_do_not_change_with_scale_or_rotation() {
        let values = normals(60 * 40, "matrix");
        let s = singular(&values, 60, 40);
        let largest = s[0];
        let chain = [
            1.0,
            stable_rank(&s).unwrap(),
            s.iter().sum::<f64>() / largest,
            effective_rank(&s).unwrap(),
            numerical_rank(&s, 1e-9) as f64,
        ];
        assert!(chain.windows(2).all(|pair| pair[0] <= pair[1]), "{chain:?}");
        let scaled: Vec<f32> = values.iter().map(|v| 4.0 * v).collect();
        let transposed: Vec<f32> = (0..40 * 60).map(|i| values[(i % 60) * 40 + i / 60]).collect();
        for other in [singular(&scaled, 60, 40), singular(&transposed, 40, 60)] {
            assert!((effective_rank(&other).unwrap() - chain[3]).abs() < 1e-9);
        }
    }

    #[test]
    fn a_power_law_is_found_to_twelve_digits() {
        for count in [40, 100, 2000] {
            let eigenvalues: Vec<f64> = (1..=count).map(|i| f64::from(i).powf(-1.3)).collect();
            let fit = alpha_req(&eigenvalues).unwrap();
            assert!((fit.alpha - 1.3).abs() < 1e-12 && (fit.r_squared - 1.0).abs() < 1e-12, "{count}: {fit:?}");
        }
        assert_eq!(alpha_req(&[1.0; 19]), None);
        assert!(alpha_req(&[1.0; 20]).is_some_and(|fit| fit.alpha.abs() < 1e-12));
    }

    /// numpy: `e = sort(eigvalsh(cov(z.T)))[::-1]; e / e.sum()` and `polyfit(log i, log e, 1, w=sqrt(1/i))`.
    #[test]
    fn covariance_and_fit_agree_with_numpy() {
        let hash = |i: u64| ((i * i * i * 37 + i * i * 11 + i * 5) % 101) as f32;
        let values: Vec<f32> = (0..90 * 30).map(|i| (hash(i) / 50.0 - 1.0) / (1 + i % 30) as f32).collect();
        let eigenvalues = covariance_spectrum(View::new(&values, 90, 30).unwrap());
        for (index, expected) in [(0, 0.6244139708), (1, 0.1585639814), (10, 0.004820349077), (29, 0.0004261654855)] {
            assert!((eigenvalues[index] - expected).abs() < 1e-7, "{index}: {} {expected}", eigenvalues[index]);
        }
        let fit = alpha_req(&eigenvalues).unwrap();
        assert!((fit.alpha - 2.2979194).abs() < 1e-5, "{fit:?}");
        let s = singular(&values, 90, 30);
        assert!((rank_me(&s).unwrap() - 16.424088).abs() < 1e-5, "{:?}", rank_me(&s));
        // Fewer samples than columns: the same through the other Gram matrix.
        let wide = covariance_spectrum(View::new(&values[..20 * 30], 20, 30).unwrap());
        assert_eq!(wide.len(), 20);
        assert!((wide.iter().sum::<f64>() - 1.0).abs() < 1e-12);
    }
}
