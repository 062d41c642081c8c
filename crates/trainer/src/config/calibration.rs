//! `[calibration]`: the pass over some data that measures what an adapter starts from.

use serde::{Deserialize, Serialize};

use crate::data::Paths;

/// `[calibration]`: used by the starts of CorDA, EoRA and LoRA-SB. They measure layers at full precision, before a base is
/// quantised.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CalibrationConfig {
    /// What is measured on, in the form of `data.train`. Default: the training data itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Paths>,
    /// Samples that are looked at, from the first on. Default 64.
    pub samples: usize,
    /// Rows in one forward pass. Default 1. Changes memory and time, not the result.
    pub batch_size: usize,
    /// Measure block by block, each behind the blocks before it as they will be: quantised and repaired. False: all of them in
    /// one pass of the original model. Only `[adapter.eora]` repairs anything. Default true with it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential: Option<bool>,
    /// Keep what was measured for later runs with the same model, data and settings. Default true.
    pub cache: bool,
}

impl Default for CalibrationConfig {
    fn default() -> Self {
        Self { data: None, samples: 64, batch_size: 1, sequential: None, cache: true }
    }
}
