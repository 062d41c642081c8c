//! The loss scale of a run in f16.
//!
//! The smallest f16 is 6e-8, and the gradient of one of thousands of tokens is smaller: the backward pass starts from
//! `scale * loss`, and the f32 gradients of the parameters are divided by the scale again. Where the scaled gradient of an activation
//! does not fit into f16 (above 65504), the step is left out and the scale halved; after 2000 steps without that it is doubled
//! (arXiv 1710.03740, section 3.2). It is a power of two, so that scaling loses no bits.

use serde::{Deserialize, Serialize};

/// The scale and how it fared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// Factor of the loss.
    pub scale: f64,
    /// Steps since it last changed.
    pub good_steps: u64,
    /// Steps that were left out so far.
    pub skipped_steps: u64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: Self::START, good_steps: 0, skipped_steps: 0 }
    }
}

impl LossScale {
    /// The first scale.
    pub const START: f64 = 65536.0;
    /// The largest one.
    pub const LARGEST: f64 = 16_777_216.0;
    /// Steps after which it is doubled.
    pub const PATIENCE: u64 = 2000;

    /// Whether a step that did not fit may be tried with less.
    pub fn can_shrink(&self) -> bool {
        self.scale > 1.0
    }

    /// A step did not fit.
    pub fn shrink(&mut self) {
        (self.scale, self.good_steps) = ((self.scale / 2.0).max(1.0), 0);
        self.skipped_steps += 1;
    }

    /// A step was made.
    pub fn note_good(&mut self) {
        self.good_steps += 1;
        if self.good_steps == Self::PATIENCE {
            (self.scale, self.good_steps) = ((self.scale * 2.0).min(Self::LARGEST), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_an_overflow_and_doubles_after_2000_good_steps() {
        let mut scale = LossScale::default();
        scale.note_good();
        scale.shrink();
        assert_eq!(scale, LossScale { scale: 32768.0, good_steps: 0, skipped_steps: 1 });
        (1..2000).for_each(|_| scale.note_good());
        assert_eq!((scale.scale, scale.good_steps), (32768.0, 1999));
        scale.note_good();
        assert_eq!((scale.scale, scale.good_steps), (65536.0, 0));
    }

    #[test]
    fn it_stays_between_1_and_the_largest() {
        let mut scale = LossScale::default();
        (0..20).for_each(|_| scale.shrink());
        assert_eq!((scale.scale, scale.can_shrink(), scale.skipped_steps), (1.0, false, 20));
        (0..40 * 2000).for_each(|_| scale.note_good());
        assert_eq!(scale.scale, LossScale::LARGEST);
    }
}
