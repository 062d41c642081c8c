//! The search for d90: the smallest d that reaches 90 % of what full training reaches (arXiv 1804.08838, section 2).

/// Steps of a decade.
const STEPS: [usize; 5] = [1, 2, 3, 5, 8];

/// The dimensions from `first` to `last` in steps 1, 2, 3, 5, 8 of each decade.
///
/// ```
/// use lowrank_core::optim::intrinsic::grid;
/// assert_eq!(grid(2, 100), vec![2, 3, 5, 8, 10, 20, 30, 50, 80, 100]);
/// ```
pub fn grid(first: usize, last: usize) -> Vec<usize> {
    let decades = std::iter::successors(Some(1usize), |decade| decade.checked_mul(10));
    let steps = decades.flat_map(|decade| STEPS.map(|step| step.checked_mul(decade)));
    let all = steps.map_while(|dims| dims.filter(|&dims| dims <= last));
    all.filter(|&dims| dims >= first).collect()
}

/// How the seeds of one d become one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Summary {
    /// Their mean: d reaches the target on average.
    Mean,
    /// The best: the target is reachable.
    Best,
}

/// What a metric has to reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// The value.
    pub value: f64,
    /// Whether larger is better, as of an accuracy; a loss has its target named.
    pub higher_is_better: bool,
}

impl Target {
    /// A share of what full training reaches, for metrics of which more is better.
    pub fn share(baseline: f64, share: f64) -> Self {
        Self { value: baseline * share, higher_is_better: true }
    }

    fn is_reached(self, metric: f64) -> bool {
        if self.higher_is_better { metric >= self.value } else { metric <= self.value }
    }

    /// The summary of some runs; one that has no finite metric reaches nothing.
    pub fn summary(self, metrics: &[f64], summary: Summary) -> Option<f64> {
        match summary {
            Summary::Mean => {
                let is_whole = !metrics.is_empty() && metrics.iter().all(|metric| metric.is_finite());
                is_whole.then(|| metrics.iter().sum::<f64>() / metrics.len() as f64)
            }
            Summary::Best => {
                let finite = metrics.iter().copied().filter(|metric| metric.is_finite());
                finite.reduce(|a, b| if (a > b) == self.higher_is_better { a } else { b })
            }
        }
    }
}

/// The smallest d whose runs reach the target, from pairs of d and metric in any order: d90 where the target is 90 % of the
/// baseline. Nothing is interpolated.
///
/// ```
/// use lowrank_core::optim::intrinsic::{Summary, Target, smallest};
/// let runs = [(100, 0.7), (100, 0.9), (300, 0.86), (300, 0.84), (1000, 0.93)];
/// let target = Target::share(0.95, 0.9);
/// assert_eq!(smallest(target, &runs, Summary::Mean), Some(1000));
/// assert_eq!(smallest(target, &runs, Summary::Best), Some(100));
/// ```
pub fn smallest(target: Target, runs: &[(usize, f64)], summary: Summary) -> Option<usize> {
    let mut dims: Vec<usize> = runs.iter().map(|&(dims, _)| dims).collect();
    dims.sort_unstable();
    dims.dedup();
    dims.into_iter().find(|&wanted| {
        let metrics: Vec<f64> = runs.iter().filter(|&&(dims, _)| dims == wanted).map(|&(_, metric)| metric).collect();
        target.summary(&metrics, summary).is_some_and(|metric| target.is_reached(metric))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_grid_has_five_steps_a_decade() {
        assert_eq!(grid(1, 10), vec![1, 2, 3, 5, 8, 10]);
        assert_eq!(grid(90, 2500), vec![100, 200, 300, 500, 800, 1000, 2000]);
        assert_eq!(grid(4, 4), Vec::<usize>::new());
        assert_eq!(grid(1, usize::MAX).len() % 5, grid(1, usize::MAX / 10).len() % 5);
    }

    #[test]
    fn losses_and_failed_runs() {
        let loss = Target { value: 2.0, higher_is_better: false };
        let runs = [(10, 3.0), (10, 1.9), (20, 1.8), (20, f64::NAN), (30, 1.7), (30, 2.1)];
        assert_eq!(smallest(loss, &runs, Summary::Best), Some(10));
        assert_eq!(smallest(loss, &runs, Summary::Mean), Some(30));
        assert_eq!(smallest(Target { value: 1.0, ..loss }, &runs, Summary::Best), None);
        assert_eq!(loss.summary(&[f64::INFINITY], Summary::Best), None);
        assert_eq!(smallest(loss, &[], Summary::Mean), None);
    }
}
