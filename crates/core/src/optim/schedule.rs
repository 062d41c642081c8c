//! Learning-rate schedules: a factor for each step, from nothing but the step's number.

/// The shape after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ScheduleKind {
    /// 1 throughout.
    Constant,
    /// From 1 down to the minimum in a line.
    Linear,
    /// From 1 down to the minimum in half a cosine.
    Cosine,
    /// 1, then down to the minimum in a line over the last steps (warm-up, stable, decay).
    WarmupStableDecay {
        /// Steps of the final decay.
        decay_steps: usize,
    },
}

/// A schedule over `total_steps` steps, the first `warmup_steps` of which rise in a line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Steps of the run.
    pub total_steps: usize,
    /// Steps of the warm-up.
    pub warmup_steps: usize,
    /// The factor at the end of a decay.
    pub min_ratio: f64,
}

impl Schedule {
    /// The factor of the learning rate at a step, counted from 0.
    ///
    /// As in transformers, warm-up step k has the factor `k / warmup_steps`, so the first is 0.
    ///
    /// ```
    /// use lowrank_core::optim::{Schedule, ScheduleKind};
    /// let cosine = Schedule { kind: ScheduleKind::Cosine, total_steps: 12, warmup_steps: 2, min_ratio: 0.1 };
    /// assert_eq!(cosine.factor(1), 0.5);
    /// assert_eq!(cosine.factor(2), 1.0);
    /// assert!((cosine.factor(7) - 0.55).abs() < 1e-12);
    /// assert!((cosine.factor(12) - 0.1).abs() < 1e-12);
    /// ```
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let falling = |from: usize| {
            let length = self.total_steps.saturating_sub(from).max(1) as f64;
            (step.saturating_sub(from) as f64 / length).min(1.0)
        };
        let down = |shape: f64| self.min_ratio + (1.0 - self.min_ratio) * shape;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => down(1.0 - falling(self.warmup_steps)),
            ScheduleKind::Cosine => down(0.5 * (1.0 + (std::f64::consts::PI * falling(self.warmup_steps)).cos())),
            ScheduleKind::WarmupStableDecay { decay_steps } => {
                down(1.0 - falling(self.total_steps.saturating_sub(decay_steps).max(self.warmup_steps)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stable_until_the_decay_then_to_the_minimum() {
        let kind = ScheduleKind::WarmupStableDecay { decay_steps: 4 };
        let schedule = Schedule { kind, total_steps: 10, warmup_steps: 2, min_ratio: 0.0 };
        let factors: Vec<f64> = (0..=10).map(|step| schedule.factor(step)).collect();
        assert_eq!(factors, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]);
    }

    #[test]
    fn linear_and_constant() {
        let linear = Schedule { kind: ScheduleKind::Linear, total_steps: 4, warmup_steps: 0, min_ratio: 0.5 };
        assert_eq!([0, 2, 4].map(|s| linear.factor(s)), [1.0, 0.75, 0.5]);
        let constant = Schedule { kind: ScheduleKind::Constant, ..linear };
        assert_eq!(constant.factor(100), 1.0);
    }
}
