//! The `[quantization.<format>]` tables: how frozen weights are held in fewer bits.

use serde::{Deserialize, Serialize};

use super::raw::TargetModules;

/// The list of formats; a format adds a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QuantizationConfig {
    /// `[quantization.nf4]`
    Nf4(Nf4Config),
    /// `[quantization.int8]`
    Int8(Int8Config),
    /// `[quantization.int4]`
    Int4(Int4Config),
}

impl QuantizationConfig {
    /// Name of the table.
    pub fn key(&self) -> &'static str {
        match self {
            Self::Nf4(_) => "nf4",
            Self::Int8(_) => "int8",
            Self::Int4(_) => "int4",
        }
    }

    /// The layers that are quantised.
    pub fn target_modules(&self) -> &TargetModules {
        match self {
            Self::Nf4(table) => &table.target_modules,
            Self::Int8(table) => &table.target_modules,
            Self::Int4(table) => &table.target_modules,
        }
    }

    /// Key and number of the values that share a scale.
    pub fn group(&self) -> (&'static str, usize) {
        match self {
            Self::Nf4(table) => ("block_size", table.block_size),
            Self::Int8(table) => ("group_size", table.group_size),
            Self::Int4(table) => ("group_size", table.group_size),
        }
    }
}

/// `[quantization.nf4]`: 4 bits with the levels of a normal distribution, as QLoRA has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nf4Config {
    /// Values that share a scale. Default 64.
    pub block_size: usize,
    /// Hold the scales in 8 bits. Default true.
    pub double_quant: bool,
    /// Which linear layers are quantised. Default `"all-linear"`.
    pub target_modules: TargetModules,
}

impl Default for Nf4Config {
    fn default() -> Self {
        Self { block_size: 64, double_quant: true, target_modules: TargetModules::default() }
    }
}

/// `[quantization.int8]`: 8 bits between the smallest and the largest value of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Int8Config {
    /// Values that share a scale. Default 256.
    pub group_size: usize,
    /// Which linear layers are quantised. Default `"all-linear"`.
    pub target_modules: TargetModules,
}

impl Default for Int8Config {
    fn default() -> Self {
        Self { group_size: 256, target_modules: TargetModules::default() }
    }
}

/// `[quantization.int4]`: 4 bits between the smallest and the largest value of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Int4Config {
    /// Values that share a scale. Default 128.
    pub group_size: usize,
    /// Which linear layers are quantised. Default `"all-linear"`.
    pub target_modules: TargetModules,
}

impl Default for Int4Config {
    fn default() -> Self {
        Self { group_size: 128, target_modules: TargetModules::default() }
    }
}
