//! The `[adapter.<method>]` tables: plain structs with every default visible, and no logic but access to what several have.
//! This file is long because it is the reference of all keys.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use super::raw::TargetModules;

/// The list of adapter methods; a method adds a row.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterConfig {
    /// `[adapter.lora]`
    Lora(LoraConfig),
    /// `[adapter.dora]`
    Dora(DoraConfig),
    /// `[adapter.pissa]`
    Pissa(PissaConfig),
    /// `[adapter.olora]`
    Olora(OloraConfig),
    /// `[adapter.corda]`
    Corda(CordaConfig),
    /// `[adapter.eora]`
    Eora(EoraConfig),
    /// `[adapter.lora_xs]`
    LoraXs(LoraXsConfig),
    /// `[adapter.lora_sb]`
    LoraSb(LoraSbConfig),
    /// `[adapter.svfit]`
    Svfit(SvfitConfig),
    /// `[adapter.vera]`
    Vera(VeraConfig),
    /// `[adapter.randlora]`
    Randlora(RandloraConfig),
    /// `[adapter.tucker]`
    Tucker(TuckerConfig),
    /// `[adapter.hra]`
    Hra(HraConfig),
    /// `[adapter.oft]`
    Oft(OftConfig),
}

/// What every adapter table has.
#[derive(Debug, Clone, Copy)]
pub struct AdapterCommon<'a> {
    /// Name of the table.
    pub key: &'static str,
    /// Adapted layers.
    pub target_modules: &'a TargetModules,
    /// Layers left out.
    pub exclude_modules: Option<&'a TargetModules>,
    /// Blocks whose layers are adapted; none for all.
    pub layers_to_transform: Option<&'a [usize]>,
    /// Modules that are trained whole.
    pub modules_to_save: &'a [String],
    /// Rank of a layer without a pattern; none where the table has other sizes.
    pub r: Option<usize>,
    /// Key and value of the dropout, where the method has one.
    pub dropout: Option<(&'static str, f64)>,
    /// Ranks of some layers, where the method allows it.
    pub rank_pattern: Option<&'a BTreeMap<String, usize>>,
    /// The scale's numerator, where the method has one.
    pub alpha: Option<Alpha<'a>>,
}

/// How a table sets the numerator of the scale.
#[derive(Debug, Clone, Copy)]
pub struct Alpha<'a> {
    /// Its key.
    pub key: &'static str,
    /// Its value; none for that of the rank, whatever a layer's rank is.
    pub value: Option<f64>,
    /// Whether the scale is `alpha / sqrt(r)`.
    pub use_rslora: bool,
    /// Values of some layers, where the method allows it.
    pub pattern: Option<&'a BTreeMap<String, f64>>,
}

macro_rules! common {
    ($key:literal, $table:expr) => {
        AdapterCommon {
            key: $key,
            target_modules: &$table.target_modules,
            exclude_modules: $table.exclude_modules.as_ref(),
            layers_to_transform: $table.layers_to_transform.as_deref(),
            modules_to_save: &$table.modules_to_save,
            r: None,
            dropout: None,
            rank_pattern: None,
            alpha: None,
        }
    };
    ($key:literal, $table:expr, r, $dropout:ident) => {
        AdapterCommon {
            r: Some($table.r),
            dropout: Some((stringify!($dropout), $table.$dropout)),
            ..common!($key, $table)
        }
    };
    ($key:literal, $table:expr, ranks) => {
        AdapterCommon { rank_pattern: Some(&$table.rank_pattern), ..common!($key, $table, r, lora_dropout) }
    };
    ($key:literal, $table:expr, lora, $alpha:expr, $use_rslora:expr) => {
        AdapterCommon {
            alpha: Some(Alpha {
                key: "lora_alpha",
                value: $alpha,
                use_rslora: $use_rslora,
                pattern: Some(&$table.alpha_pattern),
            }),
            ..common!($key, $table, ranks)
        }
    };
}

impl AdapterConfig {
    /// What every table has.
    pub fn common(&self) -> AdapterCommon<'_> {
        let alpha = |key, value| Some(Alpha { key, value, use_rslora: false, pattern: None });
        match self {
            Self::Lora(table) => common!("lora", table, lora, Some(table.lora_alpha), table.use_rslora),
            Self::Dora(table) => common!("dora", table, lora, Some(table.lora_alpha), table.use_rslora),
            Self::Pissa(table) => common!("pissa", table, lora, table.lora_alpha, table.use_rslora),
            Self::Olora(table) => common!("olora", table, lora, Some(table.lora_alpha), table.use_rslora),
            Self::Corda(table) => common!("corda", table, lora, Some(table.lora_alpha), table.use_rslora),
            Self::Eora(table) => common!("eora", table, ranks),
            Self::LoraXs(table) => common!("lora_xs", table, lora, Some(table.lora_alpha), false),
            Self::LoraSb(table) => {
                AdapterCommon { alpha: alpha("lora_alpha", table.lora_alpha), ..common!("lora_sb", table, ranks) }
            }
            Self::Svfit(table) => common!("svfit", table, ranks),
            Self::Vera(table) => common!("vera", table, r, vera_dropout),
            Self::Randlora(table) => AdapterCommon {
                alpha: alpha("randlora_alpha", Some(table.randlora_alpha)),
                ..common!("randlora", table, r, randlora_dropout)
            },
            Self::Tucker(table) => {
                AdapterCommon { dropout: Some(("dropout", table.dropout)), ..common!("tucker", table) }
            }
            Self::Hra(table) => AdapterCommon { r: Some(table.r), ..common!("hra", table) },
            Self::Oft(table) => common!("oft", table),
        }
    }

    /// Whether a fresh adapter starts from what a calibration pass measures.
    pub fn calibrates(&self) -> bool {
        matches!(self, Self::Corda(_) | Self::Eora(_) | Self::LoraSb(_))
    }
}

/// `[adapter.lora]`: `y = x W + s (D(x) A) B`, with `s = lora_alpha / r`. Names are those of PEFT's `LoraConfig`. It also
/// adapts convolutions that `target_modules` names: A has the size of the kernel, B is 1 x 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// Numerator of the scale. Default 8.
    pub lora_alpha: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// How A starts; B always starts at zero. Default `"default"`.
    pub init_lora_weights: InitLoraWeights,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// LoRA+: learning rate of B over that of A. Default: one rate for both.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_ratio: Option<f64>,
    /// LoRA+: learning rate of embedding adapters. Default: that of A. Only with `loraplus_lr_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loraplus_lr_embedding: Option<f64>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            lora_dropout: 0.0,
            init_lora_weights: InitLoraWeights::default(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            loraplus_lr_ratio: None,
            loraplus_lr_embedding: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// How the input factor of a LoRA starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InitLoraWeights {
    /// `"default"`, or `true` as in PEFT: uniform Kaiming with a = sqrt(5).
    #[default]
    Default,
    /// `"gaussian"`: normal with standard deviation 1 / r.
    Gaussian,
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(InitLoraWeightsVisitor)
    }
}

struct InitLoraWeightsVisitor;

impl Visitor<'_> for InitLoraWeightsVisitor {
    type Value = InitLoraWeights;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("\"default\" (or true) or \"gaussian\"")
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<InitLoraWeights, E> {
        if value { Ok(InitLoraWeights::Default) } else { Err(E::invalid_value(de::Unexpected::Bool(value), &self)) }
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<InitLoraWeights, E> {
        match value {
            "default" => Ok(InitLoraWeights::Default),
            "gaussian" => Ok(InitLoraWeights::Gaussian),
            _ => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
        }
    }
}

/// `[adapter.dora]`: LoRA, and a trained length for every column of `W + s A B`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DoraConfig {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// Numerator of the scale. Default 8.
    pub lora_alpha: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for DoraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.pissa]`: LoRA that starts at the largest singular triples of W, which the frozen weight loses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PissaConfig {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// Numerator of the scale. Default: the rank, which makes the scale 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Rounds of a randomised decomposition, 4 to 16. Default: the exact decomposition.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub niter: Option<usize>,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for PissaConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: None,
            use_rslora: false,
            lora_dropout: 0.0,
            niter: None,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.olora]`: LoRA that starts at a QR decomposition of W, which the frozen weight loses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OloraConfig {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// Numerator of the scale. Default 8.
    pub lora_alpha: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for OloraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.corda]`: LoRA that starts at the part of W that the calibration data uses most, or least.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CordaConfig {
    /// Rank of the update. Default 8.
    pub r: usize,
    /// Numerator of the scale. Default 8.
    pub lora_alpha: f64,
    /// Scale by `lora_alpha / sqrt(r)` instead of `lora_alpha / r`. Default false.
    pub use_rslora: bool,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Which part is trained. Default `"ipm"`.
    pub corda_method: CordaMethod,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for CordaConfig {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            use_rslora: false,
            lora_dropout: 0.0,
            corda_method: CordaMethod::default(),
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// Which part of a decomposed weight CorDA trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CordaMethod {
    /// Instruction-previewed: what the calibration data uses most; calibrate on the task.
    #[default]
    Ipm,
    /// Knowledge-preserved: what the calibration data uses least; calibrate on what must not be forgotten.
    Kpm,
}

/// `[adapter.eora]`: the low-rank term that repairs a quantised base best for the calibration data. Needs
/// `[quantization]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EoraConfig {
    /// Rank of the repair. Default 64.
    pub r: usize,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Train the repair further. False: it stays as it is computed, and only `modules_to_save` are trained. Default
    /// true.
    pub trained: bool,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
}

impl Default for EoraConfig {
    fn default() -> Self {
        Self {
            r: 64,
            lora_dropout: 0.0,
            trained: true,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.lora_xs]`: a trained r x r matrix between frozen singular vectors of W.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraXsConfig {
    /// Rank; r x r values are trained in each layer. Default 16.
    pub r: usize,
    /// Numerator of the scale `lora_alpha / r`. Default 16.
    pub lora_alpha: f64,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other values of `lora_alpha` for some layers: name or regular expression = alpha. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub alpha_pattern: BTreeMap<String, f64>,
}

impl Default for LoraXsConfig {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: 16.0,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.lora_sb]`: a trained r x r matrix between singular vectors of the first step of full fine-tuning.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSbConfig {
    /// Rank; r x r values are trained in each layer. Default 16.
    pub r: usize,
    /// Numerator of the scale. Default: the rank. The method is derived for a scale of 1, so nothing else is accepted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora_alpha: Option<f64>,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Learning rate of that first step. Default: `learning_rate` divided by the number of warm-up steps, at least 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta: Option<f64>,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
}

impl Default for LoraSbConfig {
    fn default() -> Self {
        Self {
            r: 16,
            lora_alpha: None,
            lora_dropout: 0.0,
            eta: None,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.svfit]`: the largest singular values of W are trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SvfitConfig {
    /// Number of singular values. Default 64.
    pub r: usize,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub lora_dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
    /// Other ranks for some layers: name or regular expression = rank. Default none.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub rank_pattern: BTreeMap<String, usize>,
}

impl Default for SvfitConfig {
    fn default() -> Self {
        Self {
            r: 64,
            lora_dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            rank_pattern: BTreeMap::new(),
        }
    }
}

/// `[adapter.vera]`: two trained vectors around random factors that all layers share. Names are those of PEFT's
/// `VeraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VeraConfig {
    /// Width of the random factors; may be larger than the layer. Default 256.
    pub r: usize,
    /// Start of the inner vector. Default 0.1.
    pub d_initial: f64,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub vera_dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
}

impl Default for VeraConfig {
    fn default() -> Self {
        Self {
            r: 256,
            d_initial: 0.1,
            vera_dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }
}

/// `[adapter.randlora]`: a full-rank update, the sum of scaled products of random factors that all layers share. Names
/// are those of PEFT's `RandLoraConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RandloraConfig {
    /// Rank of one product. A smaller one trains more values. Default 32.
    pub r: usize,
    /// Numerator of the scale `randlora_alpha / r`. Default 640.
    pub randlora_alpha: f64,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub randlora_dropout: f64,
    /// Random factors of -1, 0 and 1 in shares 1/6, 2/3, 1/6. Default false.
    pub sparse: bool,
    /// Random factors with still more zeros. Not together with `sparse`. Default false.
    pub very_sparse: bool,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
}

impl Default for RandloraConfig {
    fn default() -> Self {
        Self {
            r: 32,
            randlora_alpha: 640.0,
            randlora_dropout: 0.0,
            sparse: false,
            very_sparse: false,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }
}

/// `[adapter.tucker]`: FLoRA, `y = x W + s ((D(x) A) M) B` with all three factors trained. It also adapts convolutions that
/// `target_modules` names, by a core of four axes and a factor for each of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuckerConfig {
    /// Columns of A, or input channels of the core of a convolution. Default 8.
    pub r_in: usize,
    /// Rows of B, or output channels of the core of a convolution. Default 8.
    pub r_out: usize,
    /// Of convolutions: rows of the core, at most as many as the kernel has. Default 2.
    pub r_rows: usize,
    /// Of convolutions: columns of the core, at most as many as the kernel has. Default 2.
    pub r_columns: usize,
    /// Factor s of the update. Default 4.
    pub scale: f64,
    /// Probability that an input of the adapter is dropped while training. Default 0.
    pub dropout: f64,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
}

impl Default for TuckerConfig {
    fn default() -> Self {
        Self {
            r_in: 8,
            r_out: 8,
            r_rows: 2,
            r_columns: 2,
            scale: 4.0,
            dropout: 0.0,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }
}

/// `[adapter.hra]`: r trained reflections of the input of W. Names are those of PEFT's `HRAConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HraConfig {
    /// Number of reflections. An odd number cannot start at the base model. Default 8.
    pub r: usize,
    /// Make the reflections orthogonal to each other; they then start at random, not at the base model. Default false.
    pub apply_gs: bool,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
}

impl Default for HraConfig {
    fn default() -> Self {
        Self {
            r: 8,
            apply_gs: false,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }
}

/// `[adapter.oft]`: a trained block-diagonal rotation of the input of W. Names are those of PEFT's `OFTConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OftConfig {
    /// Width of a block; must divide the input width of every target. Default 32.
    pub oft_block_size: usize,
    /// Form the rotation by a series, which is fast and nearly orthogonal; else exactly. Default true.
    pub use_cayley_neumann: bool,
    /// Terms of the series. Default 5.
    pub num_cayley_neumann_terms: usize,
    /// Keep the rotation within `eps` of none. Default false.
    pub coft: bool,
    /// Size of the rotation that `coft` allows. Default 6e-5.
    pub eps: f64,
    /// One block for the whole layer instead of one each. Default false.
    pub block_share: bool,
    /// Which layers get an adapter. Default `"all-linear"`.
    pub target_modules: TargetModules,
    /// Layers to leave out: names, or one regular expression for the whole name. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<TargetModules>,
    /// Numbers of the blocks that get adapters. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules outside the targets that are trained whole and saved with the adapter, such as `lm_head`. Default none.
    pub modules_to_save: Vec<String>,
}

impl Default for OftConfig {
    fn default() -> Self {
        Self {
            oft_block_size: 32,
            use_cayley_neumann: true,
            num_cayley_neumann_terms: 5,
            coft: false,
            eps: 6e-5,
            block_share: false,
            target_modules: TargetModules::default(),
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
        }
    }
}
