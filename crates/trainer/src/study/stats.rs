//! Mean, standard error and ties of a few runs.
//!
//! A run with another seed is an independent measurement. The standard error of the mean of `n` of them is
//! `s / sqrt(n)`, with the sample variance `s^2 = sum (x - mean)^2 / (n - 1)`. Two means differ by their difference
//! `d +- sqrt(e1^2 + e2^2)` (Welch 1947: the variances need not be equal). One run has no error, and none is claimed.

/// Two means are tied if they differ by at most this many standard errors of their difference.
pub const TIE: f64 = 2.0;

/// What several runs gave together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Summary {
    /// Number of runs.
    pub n: usize,
    /// Their mean.
    pub mean: f64,
    /// Standard error of the mean; none for a single run.
    pub error: Option<f64>,
    /// Lowest value.
    pub lowest: f64,
    /// Highest value.
    pub highest: f64,
}

/// Mean and standard error; none without values or with one that is not finite.
///
/// ```
/// use lowrank_train::study::stats::summarise;
///
/// let three = summarise(&[1.0, 2.0, 6.0]).unwrap();
/// assert_eq!((three.n, three.mean), (3, 3.0));
/// assert!((three.error.unwrap() - (7.0f64 / 3.0).sqrt()).abs() < 1e-12); // variance 14 / 2
/// assert_eq!(summarise(&[5.0]).unwrap().error, None);
/// assert_eq!(summarise(&[]), None);
/// ```
pub fn summarise(values: &[f64]) -> Option<Summary> {
    if values.is_empty() || values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let n = values.len();
    let mean = values.iter().sum::<f64>() / n as f64;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let error = (n > 1).then(|| (squares / (n - 1) as f64 / n as f64).sqrt());
    let lowest = values.iter().copied().fold(f64::INFINITY, f64::min);
    let highest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    Some(Summary { n, mean, error, lowest, highest })
}

/// Whether two means cannot be told apart; none if one of them has no error.
pub fn tied(one: &Summary, other: &Summary) -> Option<bool> {
    let difference = one.error?.hypot(other.error?);
    Some((one.mean - other.mean).abs() <= TIE * difference)
}

/// Where a variant stands among the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The best mean.
    Best,
    /// Its difference to the best is within [`TIE`] standard errors.
    Tied,
    /// Its difference to the best is larger.
    Behind,
    /// It, or the best, is a single run: nothing can be said.
    Unknown,
}

/// The place of every score; none where there is no score. With `higher`, more is better.
pub fn places(scores: &[Option<Summary>], higher: bool) -> Vec<Option<Place>> {
    let sign = if higher { -1.0 } else { 1.0 };
    let known = scores.iter().enumerate().filter_map(|(index, score)| score.map(|score| (index, score)));
    let best = known.min_by(|(_, a), (_, b)| (sign * a.mean).total_cmp(&(sign * b.mean)));
    let Some((best_index, best)) = best else { return vec![None; scores.len()] };
    let place = |(index, score): (usize, &Option<Summary>)| {
        let score = score.as_ref()?;
        Some(match tied(score, &best) {
            _ if index == best_index => Place::Best,
            Some(true) => Place::Tied,
            Some(false) => Place::Behind,
            None => Place::Unknown,
        })
    };
    scores.iter().enumerate().map(place).collect()
}

/// The middle value, or the mean of the two in the middle; none without values.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(sorted[middle]),
        _ => Some((sorted[middle - 1] + sorted[middle]) / 2.0),
    }
}

/// A point of a curve: step, mean over the seeds, standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CurvePoint {
    /// The step.
    pub x: f64,
    /// Mean over the seeds.
    pub mean: f64,
    /// Standard error of the mean; none for a single seed.
    pub error: Option<f64>,
}

/// Mean curve of several seeds at the steps that all of them have. Values that are not finite are left out.
pub fn mean_curve(seeds: &[Vec<(u64, f64)>]) -> Vec<CurvePoint> {
    let Some((first, others)) = seeds.split_first() else { return vec![] };
    let value = |series: &[(u64, f64)], step: u64| {
        let index = series.binary_search_by_key(&step, |&(step, _)| step).ok()?;
        Some(series[index].1)
    };
    let point = |&(step, here): &(u64, f64)| {
        let mut values = vec![here];
        for series in others {
            values.push(value(series, step)?);
        }
        let Summary { mean, error, .. } = summarise(&values)?;
        Some(CurvePoint { x: step as f64, mean, error })
    };
    first.iter().filter_map(point).collect()
}

/// A series averaged over a window of `width` points around each point, fewer at the ends.
pub fn smooth(series: &[(u64, f64)], width: usize) -> Vec<(u64, f64)> {
    let half = width / 2;
    let window = |index: usize| {
        // As far to one side as to the other, so that the ends are not shifted.
        let reach = half.min(index).min(series.len() - 1 - index);
        let around = &series[index - reach..=index + reach];
        around.iter().map(|&(_, value)| value).sum::<f64>() / around.len() as f64
    };
    series.iter().enumerate().map(|(index, &(step, _))| (step, window(index))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn near(one: f64, other: f64) -> bool {
        (one - other).abs() <= 1e-12 * other.abs().max(1.0)
    }

    /// By hand: 2, 4, 4, 4, 5, 5, 7, 9 have mean 5 and squares that sum to 32.
    #[test]
    fn mean_and_standard_error_by_hand() {
        let eight = summarise(&[2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]).unwrap();
        assert_eq!((eight.n, eight.mean, eight.lowest, eight.highest), (8, 5.0, 2.0, 9.0));
        assert!(near(eight.error.unwrap(), (32.0f64 / 7.0 / 8.0).sqrt()));
        let one = summarise(&[3.5]).unwrap();
        assert_eq!((one.n, one.mean, one.error), (1, 3.5, None));
        assert_eq!(summarise(&[1.0, f64::NAN]), None);
    }

    /// Means 1 and 1.4 with errors 0.1 each: 0.4 against 2 * 0.1414.
    #[test]
    fn ties_by_hand() {
        let with = |mean: f64, spread: f64| summarise(&[mean - spread, mean + spread]).unwrap();
        let (one, near_one, far) = (with(1.0, 0.1), with(1.28, 0.1), with(1.29, 0.1));
        assert!(near(one.error.unwrap(), 0.1)); // variance 0.02, over 2
        assert_eq!(tied(&one, &near_one), Some(true));
        assert_eq!(tied(&one, &far), Some(false));
        assert_eq!(tied(&one, &summarise(&[1.0]).unwrap()), None);
    }

    #[test]
    fn places_follow_the_direction_and_claim_nothing_of_single_runs() {
        use Place::{Behind, Best, Tied, Unknown};
        let scores = [summarise(&[1.0, 1.2]), summarise(&[1.1, 1.3]), None, summarise(&[9.0, 9.1]), summarise(&[1.15])];
        assert_eq!(places(&scores, false), [Some(Best), Some(Tied), None, Some(Behind), Some(Unknown)]);
        assert_eq!(places(&scores, true), [Some(Behind), Some(Behind), None, Some(Best), Some(Unknown)]);
        let single = [summarise(&[1.0]), summarise(&[2.0, 2.0])];
        assert_eq!(places(&single, false), [Some(Best), Some(Unknown)]);
        assert_eq!(places(&[None, None], false), [None, None]);
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn a_mean_curve_has_the_steps_of_all_seeds() {
        let seeds = [vec![(1, 2.0), (2, 3.0), (3, f64::NAN), (4, 1.0)], vec![(1, 4.0), (3, 1.0), (4, 1.0), (5, 0.0)]];
        let curve = mean_curve(&seeds);
        assert_eq!(curve.len(), 2);
        assert_eq!((curve[0].x, curve[0].mean), (1.0, 3.0));
        assert!(near(curve[0].error.unwrap(), 1.0)); // variance 2, over 2
        assert_eq!((curve[1].x, curve[1].mean, curve[1].error), (4.0, 1.0, Some(0.0)));
        assert_eq!(mean_curve(&seeds[..1])[0].error, None);
        assert!(mean_curve(&[]).is_empty());
    }

    #[test]
    fn smoothing_keeps_lines_and_ends() {
        let line: Vec<(u64, f64)> = (0..9).map(|step| (step, step as f64)).collect();
        assert_eq!(smooth(&line, 5), line);
        assert_eq!(smooth(&[(0, 0.0), (1, 3.0), (2, 0.0)], 3), [(0, 0.0), (1, 1.0), (2, 0.0)]);
        assert!(smooth(&[], 3).is_empty());
    }
}
