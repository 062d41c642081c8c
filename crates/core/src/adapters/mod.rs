//! The adapter methods: one file each, one row in [`METHODS`].
//!
//! A method decides how the factors of a [`LowRank`](crate::LowRank) start and which of them are trained; the forward and the
//! backward are shared.

#[cfg(test)]
pub(crate) mod checks;
#[cfg(test)]
mod contract_rows;
#[cfg(test)]
mod contract_tests;
pub mod corda;
pub mod dora;
pub mod eora;
pub mod hra;
pub mod lora;
pub mod lora_sb;
pub mod lora_xs;
pub mod oft;
pub mod olora;
pub mod pissa;
pub mod randlora;
mod start;
#[cfg(test)]
mod starts_tests;
pub mod svfit;
#[cfg(test)]
mod testing;
pub mod tucker;
pub mod vera;

use burn::tensor::Tensor;

use crate::random::Stream;

/// Name (its config key and file), paper, trainable parameters of one projection.
pub const METHODS: &[(&str, &str, &str)] = &[
    ("lora", "LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732", "r (d_in + d_out)"),
    ("dora", "DoRA, arXiv 2402.09353: directions by LoRA, lengths of columns beside them", "r (d_in + d_out) + d_out"),
    ("pissa", "PiSSA, arXiv 2404.02948: starts at the leading singular triples of W", "r (d_in + d_out)"),
    ("olora", "OLoRA, arXiv 2406.01775: starts at a QR decomposition of W", "r (d_in + d_out)"),
    ("corda", "CorDA, arXiv 2406.05223: starts at what some text uses of W, or does not", "r (d_in + d_out)"),
    ("eora", "EoRA, arXiv 2410.21271: repairs a quantised base for some text", "r (d_in + d_out), or none"),
    ("lora_xs", "LoRA-XS, arXiv 2405.17604: a core between frozen singular vectors of W", "r^2"),
    ("lora_sb", "LoRA-SB, arXiv 2411.19557: a core between singular vectors of the first step", "r^2"),
    ("svfit", "SVFit, arXiv 2409.05926: the leading singular values of W", "r"),
    ("vera", "VeRA, arXiv 2310.11454: shared random factors, two trained vectors", "r + d_out"),
    (
        "randlora",
        "RandLoRA, arXiv 2502.00987: sum of shared random products, full rank",
        "n (r + m), m = min(d_in, d_out), n = m / r",
    ),
    ("tucker", "FLoRA, arXiv 2405.14739: Tucker core", "r_in r_out + r_in d_in + r_out d_out"),
    ("hra", "HRA, arXiv 2405.17484: Householder reflections of the input", "r d_in"),
    ("oft", "OFT, arXiv 2306.07280: block-diagonal rotation of the input", "d_in (b - 1) / 2"),
];

/// Where an adapter is attached, and what its start may look at.
#[derive(Clone, Debug)]
pub struct Site<'a> {
    /// Name of the module.
    pub module: &'a str,
    /// W, `[d_in, d_out]` in f32, at full precision also where the base is quantised.
    pub weight: Tensor<2>,
    /// What a quantised base lost, `W - W_base`, `[d_in, d_out]`.
    pub residual: Option<Tensor<2>>,
    /// Seed of the run.
    pub seed: u64,
    /// Random numbers of this module.
    pub stream: Stream,
    /// What a calibration pass measured here.
    pub statistics: Option<&'a Statistics>,
}

impl Site<'_> {
    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }
}

/// What a calibration pass measured at a linear layer.
#[derive(Clone, Debug, Default)]
pub struct Statistics {
    /// C, the (normalised) sum of `x^T x`, `[d_in, d_in]`.
    pub covariance: Option<Tensor<2>>,
    /// Summed gradient of W, `[d_in, d_out]`.
    pub gradient: Option<Tensor<2>>,
    /// Samples seen.
    pub samples: usize,
}

/// Why an adapter cannot start on a layer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// It needs a pass over data that was not made.
    #[error("{module}: {method} starts from {what} of a calibration pass, which was not made")]
    NeedsCalibration {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// What is missing.
        what: &'static str,
    },
    /// The pass was made, and there is nothing in it.
    #[error(
        "{module}: {method} starts from {what}, but the calibration pass found {got}\nhint: leave this module out, or \
         calibrate on data that reaches it"
    )]
    NothingMeasured {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// What says nothing.
        what: &'static str,
        /// What it is.
        got: String,
    },
    /// It repairs a base that is not compressed.
    #[error(
        "{module}: {method} repairs what a quantised base lost, but this base is held at full precision\nhint: quantise the \
         base, or use another method"
    )]
    NeedsResidual {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
    },
    /// A rank that the layer does not have.
    #[error(
        "{module}: {method} needs a rank between 1 and {}, as the module maps {d_in} to {d_out}; got {r}\nhint: lower r, or set \
         rank_pattern for this module",
        .d_in.min(.d_out)
    )]
    Rank {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// The rank asked for.
        r: usize,
        /// Its input width.
        d_in: usize,
        /// Its output width.
        d_out: usize,
    },
    /// An s of which the start takes the root.
    #[error("{module}: {method} needs a scale (alpha over r) above 0, got {scale}")]
    Scale {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// The scale asked for.
        scale: String,
    },
    /// A rank or a size that does not fit.
    #[error("{module}: {method} expects r = {expected} ({what}), got {got}")]
    SharedRank {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// Where the expected value comes from.
        what: &'static str,
        /// What it should be.
        expected: usize,
        /// What it is.
        got: usize,
    },
    /// A rank of 0.
    #[error("{module}: {name} of {method} is 0, expected at least 1")]
    ZeroRank {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// The setting.
        name: &'static str,
    },
    /// Bases shared by all layers of a model that were made for smaller layers.
    #[error("{module}: the shared bases of {method} serve layers of up to {held:?} ({sides}), this one has {needed:?}")]
    BasesTooSmall {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// What the two sizes are.
        sides: &'static str,
        /// Largest layer they serve.
        held: [usize; 2],
        /// This layer.
        needed: [usize; 2],
    },
    /// Blocks that do not tile the input.
    #[error(
        "{module}: blocks of {block} do not divide d_in = {d_in}; the nearest sizes that do are {below} and {above}"
    )]
    BlockSize {
        /// The module.
        module: String,
        /// `d_in`.
        d_in: usize,
        /// What was asked for.
        block: usize,
        /// Next smaller divisor, 1 where there is no larger one.
        below: usize,
        /// Next larger divisor.
        above: usize,
    },
    /// An adapter of a convolution in groups.
    #[error("{module}: {method} cannot adapt a convolution of {groups} groups, only of 1; exclude the module")]
    Groups {
        /// The method.
        method: &'static str,
        /// The module.
        module: String,
        /// Groups of the convolution.
        groups: usize,
    },
}
