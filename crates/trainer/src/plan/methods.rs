//! What a low-rank method is made of, as far as memory is concerned.

use lowrank_core::optim::{ProjType, Side};

use super::model::Format;

/// What turns a projected gradient into a step; see [`lowrank_core::optim::rules`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// Two f32 moments.
    AdamW,
    /// Two moments of 8-bit codes in blocks; f32 for small matrices.
    AdamW8bit {
        /// Values of a block.
        block: usize,
    },
    /// A value a row and column, and perhaps a first moment.
    Adafactor {
        /// Whether there is a first moment.
        momentum: bool,
    },
    /// One buffer, or none.
    Sgd {
        /// Whether there is one.
        momentum: bool,
    },
    /// One momentum.
    Muon,
}

impl Rule {
    /// Bytes of the state for R of these sizes.
    pub fn state(self, [p, q]: [usize; 2]) -> usize {
        let values = p * q;
        match self {
            Self::AdamW => 8 * values,
            Self::AdamW8bit { .. } if values < 4096 => 8 * values,
            Self::AdamW8bit { block } => 2 * (values + 4 * values.div_ceil(block)),
            Self::Adafactor { momentum } => 4 * (p + q) + if momentum { 4 * values } else { 0 },
            Self::Sgd { momentum } => {
                if momentum {
                    4 * values
                } else {
                    0
                }
            }
            Self::Muon => 4 * values,
        }
    }

    /// Most bytes of a step beside R: the update, and what it is made of.
    pub fn scratch(self, [p, q]: [usize; 2]) -> usize {
        let values = 4 * p * q;
        let small = p.min(q);
        match self {
            Self::AdamW | Self::Sgd { .. } => values,
            Self::AdamW8bit { .. } => 2 * values,
            Self::Adafactor { .. } => 2 * values,
            Self::Muon => 4 * values + 8 * small * small,
        }
    }
}

/// How a low-rank method gets its subspace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// GaLore and Q-GaLore.
    Galore {
        /// Dense gradients and exact SVDs.
        exact: bool,
        /// Columns beyond the rank.
        oversampling: usize,
        /// Power iterations of a first refresh.
        power_iterations: usize,
        /// Columns of the norm's sketch.
        sketch: usize,
        /// Factors in every step, for the exact norm.
        norm_from_factors: bool,
        /// A refresh over several micro batches waits for a sketch of their sum.
        lagged: bool,
        /// A refresh over several micro batches takes the dense gradient.
        dense: bool,
        /// Updates wait beside the weight.
        deferred: bool,
        /// The codes that the basis is held in.
        quantised: Option<Format>,
        /// New directions take the signs of the old ones.
        aligns: bool,
    },
    /// DCT-AdamW.
    Dct {
        /// R instead of G between selections.
        projected: bool,
        /// Keeps E.
        error_feedback: bool,
    },
    /// APOLLO and APOLLO-Mini.
    Apollo,
    /// Fira.
    Fira,
    /// LDAdam.
    LdAdam {
        /// Keeps E.
        error_feedback: bool,
    },
    /// One random subspace for all matrices.
    Intrinsic,
}

/// How the weights of a low-rank method are stored between steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    /// f32.
    F32,
    /// bf16.
    Bf16,
    /// 8-bit codes in groups of so many values.
    Int8 {
        /// Values of a group.
        group: usize,
    },
}

/// A low-rank method on one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct Method {
    /// Which.
    pub kind: Kind,
    /// r, at most the smaller dimension.
    pub rank: usize,
    /// Side of the projection.
    pub side: Side,
    /// Rule on R.
    pub rule: Rule,
    /// Steps between refreshes, and how many earlier this matrix has its own.
    pub gap: u64,
    /// The offset.
    pub offset: u64,
    /// Storage of the weight.
    pub store: Store,
}

/// The side of a method that has one side only; see [`lowrank_core::optim`].
pub fn one_side(proj_type: ProjType, [m, n]: [usize; 2], rank: usize) -> Side {
    match proj_type.side(m, n, rank, 0) {
        Side::Both => ProjType::Std.side(m, n, rank, 0),
        side => side,
    }
}
