//! The methods: what each has beside the settings that all share, and how its folder is written.
//!
//! | methods | `adapter_config.json` | keys |
//! | --- | --- | --- |
//! | LoRA, DoRA, VeRA, RandLoRA, HRA, OFT | peft's | peft's |
//! | PiSSA, OLoRA, CorDA | LoRA of rank 2r over the unchanged base: `([A | A0], [B; -B0])` | peft's |
//! | EoRA | LoRA | peft's |
//! | LoRA-XS, LoRA-SB, SVFit, FLoRA (`tucker`) | our own: `{"type": "lora_xs", ...}` | our own |

use std::path::Path;

use serde_json::{Map, Value, json};

use super::AdapterConfig;
use super::keys::{Keys, adapter_error};
use super::tensors::KeyForm;
use super::write::number;
use crate::hf::error::HfError;

/// The version of peft from which on OFT's series is this one. peft keeps it in the file to tell.
const NEUMANN_VERSION: &str = "0.18.0";

/// Which part of the spectrum CorDA trains.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CordaMethod {
    /// `ipm`, instruction-previewed: the largest.
    #[default]
    Ipm,
    /// `kpm`, knowledge-preserved: the smallest.
    Kpm,
}

impl CordaMethod {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ipm => "ipm",
            Self::Kpm => "kpm",
        }
    }
}

/// A method with its own settings.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum MethodConfig {
    /// LoRA, also with the rsLoRA scale.
    #[default]
    Lora,
    /// DoRA: LoRA with a trained magnitude per output.
    Dora,
    /// LoRA from the largest singular triples of the weight.
    Pissa {
        /// Rounds of the randomised decomposition; none for the exact one.
        niter: Option<usize>,
    },
    /// LoRA from the first columns of a QR decomposition of the weight.
    Olora,
    /// LoRA from a decomposition of the weight times the covariance of its inputs.
    Corda {
        /// Which part is trained.
        corda_method: CordaMethod,
    },
    /// The low-rank repair of a quantised weight.
    Eora {
        /// Whether it is trained further.
        trained: bool,
    },
    /// A trained r x r core between frozen singular vectors of the weight.
    LoraXs,
    /// A trained r x r core between frozen singular vectors of the first update.
    LoraSb {
        /// Length of the estimated first update; none for the learning rate.
        eta: Option<f64>,
    },
    /// Trained singular values.
    Svfit,
    /// Trained scales around frozen random factors.
    Vera {
        /// Start of the inner scale.
        d_initial: f64,
        /// Seed of the random factors.
        projection_prng_key: u64,
    },
    /// A sum of scaled random products.
    RandLora {
        /// Seed of the random bases.
        projection_prng_key: u64,
        /// Ternary bases.
        sparse: bool,
        /// Ternary bases with few entries; wins over `sparse`.
        very_sparse: bool,
    },
    /// FLoRA: a factor for each axis of the weight and a core between them, all trained.
    Tucker {
        /// Rank of the inputs.
        r_in: usize,
        /// Rank of the outputs.
        r_out: usize,
        /// Rank of the rows of a convolution's kernel, where it has so many.
        r_rows: usize,
        /// Rank of its columns.
        r_columns: usize,
        /// s.
        scale: f64,
    },
    /// A product of r trained reflections before the weight.
    Hra {
        /// The reflections are made orthogonal to each other.
        apply_gs: bool,
    },
    /// A trained block-diagonal rotation before the weight.
    Oft {
        /// Width of a block.
        oft_block_size: usize,
        /// The rotation is a Neumann series; else an exact Cayley map, of the opposite sign.
        use_cayley_neumann: bool,
        /// Terms of the series.
        num_cayley_neumann_terms: usize,
        /// The rotation is kept small.
        coft: bool,
        /// How small.
        eps: f64,
        /// One block serves all.
        block_share: bool,
    },
}

impl MethodConfig {
    /// The method's name in the run's configuration: `[adapter.<name>]`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lora => "lora",
            Self::Dora => "dora",
            Self::Pissa { .. } => "pissa",
            Self::Olora => "olora",
            Self::Corda { .. } => "corda",
            Self::Eora { .. } => "eora",
            Self::LoraXs => "lora_xs",
            Self::LoraSb { .. } => "lora_sb",
            Self::Svfit => "svfit",
            Self::Vera { .. } => "vera",
            Self::RandLora { .. } => "randlora",
            Self::Tucker { .. } => "tucker",
            Self::Hra { .. } => "hra",
            Self::Oft { .. } => "oft",
        }
    }

    /// peft's name of the method whose files it reads and writes; none for the folders of our own.
    pub fn peft_type(&self) -> Option<&'static str> {
        match self {
            Self::Lora | Self::Dora | Self::Pissa { .. } | Self::Olora | Self::Corda { .. } | Self::Eora { .. } => {
                Some("LORA")
            }
            Self::Vera { .. } => Some("VERA"),
            Self::RandLora { .. } => Some("RANDLORA"),
            Self::Hra { .. } => Some("HRA"),
            Self::Oft { .. } => Some("OFT"),
            Self::LoraXs | Self::LoraSb { .. } | Self::Svfit | Self::Tucker { .. } => None,
        }
    }

    /// Whether it has a form for convolutions.
    pub fn adapts_convolutions(&self) -> bool {
        matches!(self, Self::Lora | Self::Tucker { .. })
    }

    /// How the keys of its tensor file are written.
    pub fn key_form(&self) -> KeyForm {
        if self.peft_type().is_some() { KeyForm::Peft } else { KeyForm::Own }
    }

    /// Whether the base's weight is changed at the start by what the adapter starts with, so that the file holds the factors
    /// twice: those of now, and those of the start with the opposite sign.
    pub fn doubles_rank(&self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora | Self::Corda { .. })
    }

    /// Whether its scale is `lora_alpha / r`, by PEFT's rules for single modules.
    pub fn has_alpha(&self) -> bool {
        match self {
            Self::Lora | Self::Dora | Self::Pissa { .. } | Self::Olora | Self::Corda { .. } => true,
            Self::LoraXs | Self::LoraSb { .. } | Self::RandLora { .. } => true,
            Self::Eora { .. } | Self::Svfit | Self::Vera { .. } | Self::Tucker { .. } => false,
            Self::Hra { .. } | Self::Oft { .. } => false,
        }
    }
}

/// Reads the method of a configuration in peft's form, with the keys that only it has.
pub(super) fn peft_method(keys: &Keys<'_>, peft_type: &str) -> Result<MethodConfig, HfError> {
    match peft_type {
        "LORA" => Ok(if keys.flag("use_dora")? { MethodConfig::Dora } else { MethodConfig::Lora }),
        "VERA" => {
            keys.saved_projection()?;
            let d_initial = keys.number("d_initial")?.unwrap_or(0.1);
            Ok(MethodConfig::Vera { d_initial, projection_prng_key: keys.seed()? })
        }
        "RANDLORA" => {
            keys.saved_projection()?;
            let (sparse, very_sparse) = (keys.flag("sparse")?, keys.flag("very_sparse")?);
            Ok(MethodConfig::RandLora { projection_prng_key: keys.seed()?, sparse, very_sparse })
        }
        "HRA" => Ok(MethodConfig::Hra { apply_gs: keys.flag("apply_GS")? }),
        _ => oft(keys),
    }
}

fn oft(keys: &Keys<'_>) -> Result<MethodConfig, HfError> {
    if let Some(blocks) = keys.count("r")?.filter(|blocks| *blocks > 0) {
        let hint = "save it with peft as r = 0 and the oft_block_size of the layers";
        return keys.fail("r", format!("expected 0, got {blocks}: a number of blocks is not supported"), hint);
    }
    let use_cayley_neumann = keys.flag_or("use_cayley_neumann", true)?;
    let version = keys.text("peft_version")?.unwrap_or_default();
    if use_cayley_neumann && !is_at_least(&version, NEUMANN_VERSION) {
        let got = if version.is_empty() { "none".to_string() } else { format!("\"{version}\"") };
        return keys.fail(
            "peft_version",
            format!(
                "expected {NEUMANN_VERSION} or later for use_cayley_neumann, got {got}: earlier ones turned otherwise"
            ),
            "train the adapter again with a newer peft",
        );
    }
    Ok(MethodConfig::Oft {
        oft_block_size: keys.count("oft_block_size")?.unwrap_or(32),
        use_cayley_neumann,
        num_cayley_neumann_terms: keys.count("num_cayley_neumann_terms")?.unwrap_or(5),
        coft: keys.flag("coft")?,
        eps: keys.number("eps")?.unwrap_or(6e-5),
        block_share: keys.flag("block_share")?,
    })
}

/// Whether a version such as `0.21.2` or `0.18.1.dev0@commit` is not before `least`.
fn is_at_least(version: &str, least: &str) -> bool {
    let parts = |text: &str| {
        let mut numbers = text.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
        [numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)]
    };
    parts(version) >= parts(least)
}

/// Reads the method of a configuration in our own form.
pub(super) fn own_method(keys: &Keys<'_>, name: &str) -> Result<MethodConfig, HfError> {
    match name {
        "lora_xs" => Ok(MethodConfig::LoraXs),
        "lora_sb" => Ok(MethodConfig::LoraSb { eta: keys.number("eta")? }),
        "svfit" => Ok(MethodConfig::Svfit),
        "tucker" => {
            let rank = |key: &str, default: Option<usize>| match keys.count(key)?.or(default) {
                Some(rank) => Ok(rank),
                None => keys.fail(key, "missing; expected a rank", ""),
            };
            Ok(MethodConfig::Tucker {
                r_in: rank("r_in", None)?,
                r_out: rank("r_out", None)?,
                r_rows: rank("r_rows", Some(2))?,
                r_columns: rank("r_columns", Some(2))?,
                scale: keys.number("scale")?.unwrap_or(4.0),
            })
        }
        other => keys.fail(
            "type",
            format!("expected \"lora_xs\", \"lora_sb\", \"svfit\" or \"tucker\", got \"{other}\""),
            "",
        ),
    }
}

/// The keys that only this method has, in peft's form or ours.
pub(super) fn write_method(method: &MethodConfig, keys: &mut Map<String, Value>) {
    let own = match method {
        MethodConfig::Vera { d_initial, projection_prng_key } => {
            json!({"d_initial": d_initial, "projection_prng_key": projection_prng_key, "save_projection": true})
        }
        MethodConfig::RandLora { projection_prng_key, sparse, very_sparse } => json!({
            "projection_prng_key": projection_prng_key, "save_projection": true, "sparse": sparse,
            "very_sparse": very_sparse,
        }),
        MethodConfig::Hra { apply_gs } => json!({ "apply_GS": apply_gs }),
        MethodConfig::Oft { oft_block_size, use_cayley_neumann, num_cayley_neumann_terms, coft, eps, block_share } => {
            json!({
                "oft_block_size": oft_block_size, "use_cayley_neumann": use_cayley_neumann,
                "num_cayley_neumann_terms": num_cayley_neumann_terms, "coft": coft, "eps": eps, "block_share": block_share,
                "module_dropout": 0.0, "peft_version": NEUMANN_VERSION,
            })
        }
        MethodConfig::LoraSb { eta: Some(eta) } => json!({ "eta": eta }),
        MethodConfig::Tucker { r_in, r_out, r_rows, r_columns, scale } => {
            json!({"r_in": r_in, "r_out": r_out, "r_rows": r_rows, "r_columns": r_columns, "scale": number(*scale)})
        }
        _ => return,
    };
    if let Value::Object(own) = own {
        keys.extend(own);
    }
}

/// Checks the numbers that only this method has.
pub(super) fn validate_method(config: &AdapterConfig, origin: &Path) -> Result<(), HfError> {
    let fail = |key: &str, reason: String, hint: &str| Err(adapter_error(origin, key, reason, hint));
    match &config.method {
        MethodConfig::Tucker { r_in, r_out, r_rows, r_columns, .. } => {
            let ranks = [("r_in", r_in), ("r_out", r_out), ("r_rows", r_rows), ("r_columns", r_columns)];
            match ranks.into_iter().find(|(_, rank)| **rank == 0) {
                Some((key, _)) => {
                    let hint = "common ranks are 8, 16 and 32, of rows and columns 1 and 2";
                    fail(key, "expected a rank of at least 1, got 0".to_string(), hint)
                }
                None => Ok(()),
            }
        }
        MethodConfig::Oft { oft_block_size, .. } if *oft_block_size < 2 => fail(
            "oft_block_size",
            format!("expected at least 2, got {oft_block_size}"),
            "a block of 1 has nothing to rotate; 32 is common",
        ),
        MethodConfig::Oft { num_cayley_neumann_terms: terms, use_cayley_neumann: true, .. } if *terms < 2 => {
            fail("num_cayley_neumann_terms", format!("expected at least 2, got {terms}"), "5 is common")
        }
        MethodConfig::Vera { d_initial, .. } if !d_initial.is_finite() => {
            fail("d_initial", format!("expected a finite number, got {d_initial}"), "")
        }
        _ => Ok(()),
    }
}
