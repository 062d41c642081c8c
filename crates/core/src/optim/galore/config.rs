//! What GaLore can be told.

use crate::optim::q_galore::Quantised;
use crate::optim::rules::RuleConfig;
use crate::optim::subspace::ProjType;

/// How a refresh over several micro batches gets its basis.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Accumulation {
    /// From a sketch of the summed gradient, for the steps after this one.
    #[default]
    Lagged,
    /// From the dense gradient, kept for this step.
    Dense,
    /// From the first micro batch.
    FirstMicroBatch,
}

/// How the norm of the whole gradient is known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Norm {
    /// R exactly, the rest by a sketch.
    #[default]
    Hybrid,
    /// Exactly, from the factors; one micro batch only.
    Exact,
    /// That of R alone.
    Projected,
}

/// What happens to the moments when the basis changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Moments {
    /// Nothing, as published: they are read in the new coordinates.
    #[default]
    Keep,
    /// They are carried into the new coordinates (LDAdam, arXiv 2410.16103).
    Rotate,
}

/// When updates reach the weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Merge {
    /// In every step.
    #[default]
    Eager,
    /// At refreshes, and before the model is written. Input side only.
    Deferred,
}

/// Hyper-parameters.
#[derive(Clone, Debug, PartialEq)]
pub struct GaloreConfig {
    /// r; at most the smaller dimension is used.
    pub rank: usize,
    /// Steps between two refreshes of the basis.
    pub update_proj_gap: u64,
    /// Factor of the update.
    pub scale: f64,
    /// Side.
    pub proj_type: ProjType,
    /// The published algorithm: dense gradient, exact SVD.
    pub exact: bool,
    /// Rule on R.
    pub rule: RuleConfig,
    /// Power iterations of a refresh from nothing; a refresh with a momentum needs one less.
    pub power_iterations: usize,
    /// Columns of the range finder beyond r.
    pub oversampling: usize,
    /// Columns of the norm's sketch.
    pub norm_sketch: usize,
    /// How the gradient norm is known.
    pub norm: Norm,
    /// Refresh over several micro batches.
    pub accumulation: Accumulation,
    /// Choose the signs of a new basis so that each direction agrees with its predecessor.
    pub align_sign: bool,
    /// Moments at a refresh.
    pub moments: Moments,
    /// When updates reach the weight.
    pub merge: Merge,
    /// Q-GaLore: basis held in 4 bits, lazy refreshes.
    pub quantised: Option<Quantised>,
    /// Tokens of a micro batch, for `proj_type = auto`.
    pub tokens: usize,
}

impl Default for GaloreConfig {
    fn default() -> Self {
        Self {
            rank: 128,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: ProjType::Input,
            exact: false,
            rule: RuleConfig::galore_adamw(),
            power_iterations: 1,
            oversampling: 16,
            norm_sketch: 8,
            norm: Norm::Hybrid,
            accumulation: Accumulation::Lagged,
            align_sign: true,
            moments: Moments::Keep,
            merge: Merge::Eager,
            quantised: None,
            tokens: 2048,
        }
    }
}
