//! The `[optimizer.<method>]` tables: plain structs with every default visible, and no logic but access to what all have.

use serde::{Deserialize, Serialize};

use super::raw::TargetModules;

/// The list of optimisers; a method adds a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OptimizerConfig {
    /// `[optimizer.adamw]`
    Adamw(AdamWConfig),
    /// `[optimizer.galore]`
    Galore(GaloreConfig),
    /// `[optimizer.q_galore]`
    QGalore(QGaloreConfig),
    /// `[optimizer.dct_adamw]`
    DctAdamw(DctAdamwConfig),
    /// `[optimizer.apollo]`
    Apollo(ApolloConfig),
    /// `[optimizer.fira]`
    Fira(FiraConfig),
    /// `[optimizer.ldadam]`
    Ldadam(LdadamConfig),
    /// `[optimizer.intrinsic]`
    Intrinsic(IntrinsicConfig),
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self::Adamw(AdamWConfig::default())
    }
}

/// What every optimiser table has.
#[derive(Debug, Clone, Copy)]
pub struct Common<'a> {
    /// Name of the table.
    pub key: &'static str,
    /// Peak learning rate of the managed matrices; for AdamW of the linear layers of the blocks.
    pub learning_rate: f64,
    /// Peak learning rate of all other parameters.
    pub plain_learning_rate: f64,
    /// Decay rates of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled decay.
    pub weight_decay: f64,
    /// Parameters that are not decayed.
    pub no_decay: &'a [String],
}

/// What the tables of low-rank methods have beside.
#[derive(Debug, Clone, Copy)]
pub struct LowRankCommon<'a> {
    /// Managed linear layers.
    pub target_modules: &'a TargetModules,
    /// Linear layers left out.
    pub exclude_modules: Option<&'a TargetModules>,
    /// Rank; none for a quarter of the hidden size.
    pub rank: Option<usize>,
    /// Steps between two refreshes of the subspace.
    pub update_proj_gap: u64,
}

macro_rules! common {
    ($key:literal, $table:expr) => {
        Common {
            key: $key,
            learning_rate: $table.learning_rate,
            plain_learning_rate: $table.plain_learning_rate.unwrap_or($table.learning_rate),
            betas: $table.betas,
            eps: $table.eps,
            weight_decay: $table.weight_decay,
            no_decay: &$table.no_decay,
        }
    };
}

macro_rules! low_rank {
    ($table:expr, $gap:expr) => {
        Some(LowRankCommon {
            target_modules: &$table.target_modules,
            exclude_modules: $table.exclude_modules.as_ref(),
            rank: $table.rank,
            update_proj_gap: $gap,
        })
    };
}

impl OptimizerConfig {
    /// What every table has.
    pub fn common(&self) -> Common<'_> {
        match self {
            Self::Adamw(table) => common!("adamw", table),
            Self::Galore(table) => common!("galore", table),
            Self::QGalore(table) => common!("q_galore", table),
            Self::DctAdamw(table) => common!("dct_adamw", table),
            Self::Apollo(table) => common!("apollo", table),
            Self::Fira(table) => common!("fira", table),
            Self::Ldadam(table) => common!("ldadam", table),
            Self::Intrinsic(table) => common!("intrinsic", table),
        }
    }

    /// What the low-rank methods have beside; none for AdamW.
    pub fn low_rank(&self) -> Option<LowRankCommon<'_>> {
        match self {
            Self::Adamw(_) => None,
            Self::Galore(table) => low_rank!(table, table.update_proj_gap),
            Self::QGalore(table) => low_rank!(table, table.update_proj_gap),
            Self::DctAdamw(table) => low_rank!(table, table.update_proj_gap),
            Self::Apollo(table) => low_rank!(table, table.update_proj_gap),
            Self::Fira(table) => low_rank!(table, table.update_proj_gap),
            Self::Ldadam(table) => low_rank!(table, 1),
            Self::Intrinsic(table) => Some(LowRankCommon {
                target_modules: &table.target_modules,
                exclude_modules: table.exclude_modules.as_ref(),
                rank: Some(1), // it has none
                update_proj_gap: 1,
            }),
        }
    }
}

/// `[optimizer.adamw]`: AdamW as in torch, with decoupled weight decay before the update.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Peak of the schedule. Default 2e-4, which suits LoRA; full fine-tuning wants about a tenth of it.
    pub learning_rate: f64,
    /// Peak for everything but the linear layers of the blocks and convolutions: embeddings, head, norms, biases. Default:
    /// `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink in each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions, searched anywhere in a parameter's name; what they find is not decayed. Default none: every
    /// trained tensor is decayed, norms and biases too, as torch does.
    pub no_decay: Vec<String>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            learning_rate: 2e-4,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: Vec::new(),
        }
    }
}

/// Which side of a gradient is projected. The input side is that of the layer's input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProjType {
    /// The input side; galore-torch's `right`. The layer's input is never saved.
    #[serde(alias = "right")]
    Input,
    /// The output side; galore-torch's `left`.
    #[serde(alias = "left")]
    Output,
    /// The smaller dimension, as published.
    Std,
    /// The larger dimension.
    ReverseStd,
    /// Both sides.
    Full,
    /// The side that takes less memory.
    Auto,
}

/// What turns the projected gradient into a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Inner {
    /// AdamW with f32 moments, in the form of galore-torch.
    #[default]
    Adamw,
    /// AdamW with moments in blocks of 8-bit codes, as bitsandbytes has them.
    Adamw8bit,
    /// Adafactor: one mean per row and per column instead of a second moment.
    Adafactor,
    /// Gradient descent with momentum.
    Sgd,
    /// Muon: the momentum, made orthogonal.
    Muon,
}

/// How a refresh over several micro batches gets its basis.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accumulation {
    /// From a sketch of the summed gradient; it serves from the next step on.
    #[default]
    Lagged,
    /// From the dense gradient, which exists in that step.
    Dense,
    /// From the first micro batch of the step.
    FirstMicroBatch,
}

/// How the norm of the whole gradient is known for clipping and logging.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GradientNorm {
    /// The part in the subspace exactly, the rest estimated without bias from a sketch.
    #[default]
    Hybrid,
    /// Exactly, at the price of two products of size tokens x tokens; one micro batch only.
    Exact,
    /// Only the part in the subspace: not the published rule.
    Projected,
}

/// What happens to the moments when the subspace changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moments {
    /// Nothing, as published.
    #[default]
    Keep,
    /// They are carried into the new coordinates.
    Rotate,
}

/// When updates reach the weight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Merge {
    /// In every step.
    #[default]
    Eager,
    /// At refreshes; in between the layer carries them as a low-rank product in f32. Input side only.
    Deferred,
}

/// How the managed weights are stored between steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// 32 bits.
    #[default]
    F32,
    /// 16 bits, rounded stochastically after each step.
    Bf16,
}

/// `[optimizer.galore]`: the targets learn from low-rank gradients, everything else by AdamW of the same form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GaloreConfig {
    /// Peak of the schedule. Default 1e-2; the update is multiplied by `scale` too.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets (embeddings, head, norms). Default: `learning_rate`, as published.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-6.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink after each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers have low-rank gradients. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank of the subspace. Default a quarter of the hidden size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Steps between two refreshes of the subspace. Default 200.
    pub update_proj_gap: u64,
    /// Factor of the update. Default 0.25.
    pub scale: f64,
    /// Side that is projected. Default `input`; with `exact` `std`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proj_type: Option<ProjType>,
    /// The published algorithm: dense gradients and an exact SVD. Slower, for comparison. Default false.
    pub exact: bool,
    /// What turns the projected gradient into a step. Default `adamw`.
    pub inner: Inner,
    /// Values that share a factor in `inner = "adamw8bit"`. Default 256; it was 2048 when GaLore was published.
    pub block_size: usize,
    /// Momentum of `sgd` (default 0.9) and `muon` (default 0.95); first moment of `adafactor` (default none).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// Power iterations of a refresh. Default 1; 2 for flat spectra.
    pub power_iterations: usize,
    /// Directions that a refresh looks at beyond the rank. Default 16.
    pub oversampling: usize,
    /// Layers refresh at different steps, which flattens time and memory. Default true; with `exact` false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stagger: Option<bool>,
    /// How a refresh over several micro batches gets its basis. Default `lagged`.
    pub accumulation: Accumulation,
    /// How the gradient norm is known. Default `hybrid`.
    pub gradient_norm: GradientNorm,
    /// Random directions that estimate the norm outside the subspace. Default 8.
    pub norm_sketch: usize,
    /// New directions take the sign of their predecessors. Default true; with `exact` false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub align_sign: Option<bool>,
    /// What a refresh does to the moments. Default `keep`.
    pub moments: Moments,
    /// How the targets' weights are stored. Default `f32`.
    pub weights: WeightFormat,
    /// When updates reach the weight. Default `eager`.
    pub merge: Merge,
}

impl Default for GaloreConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-2,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-6,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: None,
            exact: false,
            inner: Inner::Adamw,
            block_size: 256,
            momentum: None,
            power_iterations: 1,
            oversampling: 16,
            stagger: None,
            accumulation: Accumulation::Lagged,
            gradient_norm: GradientNorm::Hybrid,
            norm_sketch: 8,
            align_sign: None,
            moments: Moments::Keep,
            weights: WeightFormat::F32,
            merge: Merge::Eager,
        }
    }
}

/// `[optimizer.q_galore]`: GaLore with bases held in 4 bits, refreshes that become rare, 8-bit moments and weights held in 8 bits.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QGaloreConfig {
    /// Peak of the schedule. Default 1e-2; the update is multiplied by `scale` too.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.95].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink after each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers have low-rank gradients. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank of the subspace. Default a quarter of the hidden size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Steps between the first refreshes. Default 200.
    pub update_proj_gap: u64,
    /// Factor of the update. Default 0.25.
    pub scale: f64,
    /// Side that is projected. Default `input`; with `exact` `std`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proj_type: Option<ProjType>,
    /// Dense gradients and an exact SVD, as published. Default false.
    pub exact: bool,
    /// Bits of the basis, 4 or 8. Default 4.
    pub basis_bits: u8,
    /// Values of basis or weight that share a scale, a power of two between 32 and 4096. Default 256.
    pub group_size: usize,
    /// Mean similarity of the last refreshes from which a layer's gap grows. Default 0.4.
    pub cos_threshold: f64,
    /// Factor by which it grows. Default 2.
    pub gamma_proj: u64,
    /// Refreshes that are averaged. Default 5.
    pub queue_size: usize,
    /// Values that share a factor in the 8-bit moments. Default 256.
    pub block_size: usize,
    /// How the targets' weights are stored. Default `int8`.
    pub weights: QWeightFormat,
}

/// How Q-GaLore stores the managed weights between steps.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QWeightFormat {
    /// 8 bits in groups with a scale and a zero: never held in more; rounded stochastically after each step.
    #[default]
    Int8,
    /// 16 bits, rounded stochastically.
    Bf16,
    /// 32 bits.
    F32,
}

impl Default for QGaloreConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-2,
            plain_learning_rate: None,
            betas: [0.9, 0.95],
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            update_proj_gap: 200,
            scale: 0.25,
            proj_type: None,
            exact: false,
            basis_bits: 4,
            group_size: 256,
            cos_threshold: 0.4,
            gamma_proj: 2,
            queue_size: 5,
            block_size: 256,
            weights: QWeightFormat::Int8,
        }
    }
}

/// `[optimizer.dct_adamw]`: the subspace is made of columns of one fixed DCT matrix, chosen by the gradient's energy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DctAdamwConfig {
    /// Peak of the schedule. Default 1e-3.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink before each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers have low-rank gradients. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Columns that are kept. Default a quarter of the hidden size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Steps between two selections. Default 1, every step; a larger gap with `projected` saves the dense gradient.
    pub update_proj_gap: u64,
    /// Score of a column: `l2` or `l1` norm of its coordinates. Default `l2`.
    pub score: Score,
    /// Keep what the projection leaves out and add it to the next gradient: a buffer of the weight's size. Default false.
    pub error_feedback: bool,
    /// Carry the moments of surviving columns over. Default true.
    pub rotate_subspace: bool,
    /// Form the gradient already projected between selections. Default false. Needs `score = "l2"` and no error feedback.
    pub projected: bool,
}

/// Norm that scores a DCT column.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    /// Sum of squares.
    #[default]
    L2,
    /// Sum of magnitudes.
    L1,
}

impl Default for DctAdamwConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            update_proj_gap: 1,
            score: Score::L2,
            error_feedback: false,
            rotate_subspace: true,
            projected: false,
        }
    }
}

/// What one scaling factor of APOLLO covers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Granularity {
    /// One channel: APOLLO.
    #[default]
    Channel,
    /// The whole matrix: APOLLO-Mini.
    Tensor,
}

/// `[optimizer.apollo]`: the dense gradient, scaled by what Adam does to a random projection of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ApolloConfig {
    /// Peak of the schedule. Default 1e-2.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-6.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink after each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers are managed. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank of the projection. Default a quarter of the hidden size; 1 with `granularity = "tensor"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Steps between two random projections. Default 200.
    pub update_proj_gap: u64,
    /// `channel` for APOLLO, `tensor` for APOLLO-Mini. Default `channel`.
    pub granularity: Granularity,
    /// The update is multiplied by its root. Default 1; 128 with `granularity = "tensor"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Multiply before the norm's growth is limited. Default false.
    pub scale_front: bool,
}

impl Default for ApolloConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-2,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-6,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            update_proj_gap: 200,
            granularity: Granularity::Channel,
            scale: None,
            scale_front: false,
        }
    }
}

/// What Fira counts as the part outside the subspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// `G - P P^T G`, as the paper says.
    #[default]
    Paper,
    /// `G - scale P P^T G`, as the authors' program computes.
    Code,
}

/// `[optimizer.fira]`: GaLore plus the part of the gradient outside the subspace, scaled like the part inside.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FiraConfig {
    /// Peak of the schedule. Default 1e-2.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-6.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink after each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers are managed. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank of the subspace. Default a quarter of the hidden size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Steps between two refreshes. Default 200.
    pub update_proj_gap: u64,
    /// Factor of the update. Default 0.25.
    pub scale: f64,
    /// What the part outside the subspace is. Default `paper`.
    pub residual: Residual,
}

impl Default for FiraConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-2,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-6,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            update_proj_gap: 200,
            scale: 0.25,
            residual: Residual::Paper,
        }
    }
}

/// `[optimizer.ldadam]`: a new subspace in every step, moments carried along, what is left out fed back.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LdadamConfig {
    /// Peak of the schedule. Default 1e-3.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.908, 0.99].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Share of the learning rate by which weights shrink before each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers are managed. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Rank of the subspace. Default a quarter of the hidden size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rank: Option<usize>,
    /// Share of the momentum in the block power step. Default 0.908.
    pub rho: f64,
    /// Keep what the projection leaves out and add it to the next gradient. Default true.
    pub error_feedback: bool,
}

impl Default for LdadamConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            plain_learning_rate: None,
            betas: [0.908, 0.99],
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            rank: None,
            rho: 0.908,
            error_feedback: true,
        }
    }
}

/// `[optimizer.intrinsic]`: all managed matrices move inside one random subspace; what is trained is `dims` numbers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct IntrinsicConfig {
    /// Peak of the schedule, for the numbers of the subspace. Default 1e-2.
    pub learning_rate: f64,
    /// Peak for parameters that are no targets, where `train_rest` is set. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub plain_learning_rate: Option<f64>,
    /// Decay rates of the two moments. Default [0.9, 0.999].
    pub betas: [f64; 2],
    /// Added to the root of the second moment. Default 1e-8.
    pub eps: f64,
    /// Share of the learning rate by which the weights go back to where they started in each step. Default 0.
    pub weight_decay: f64,
    /// Regular expressions of parameters that are not decayed. Default none.
    pub no_decay: Vec<String>,
    /// Which linear layers are managed. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Trained numbers in all. Default 1000.
    pub dims: usize,
    /// Give every matrix a trained factor of its own (SAID), out of `dims`. Default false (DID).
    pub said: bool,
    /// Train all parameters that are no targets with plain AdamW. Default false: they are frozen.
    pub train_rest: bool,
}

impl Default for IntrinsicConfig {
    fn default() -> Self {
        Self {
            learning_rate: 1e-2,
            plain_learning_rate: None,
            betas: [0.9, 0.999],
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: Vec::new(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            dims: 1000,
            said: false,
            train_rest: false,
        }
    }
}
