//! Checks of `[adapter]`, `[quantization]` and `[calibration]`, and of what they ask of each other.

use super::adapter::{AdapterCommon, AdapterConfig, Alpha, LoraConfig, OftConfig};
use super::check::{Findings, check_at_least_one, check_at_most, check_modules, check_positive, check_regex};
use super::optimizer::OptimizerConfig;
use super::quantization::QuantizationConfig;
use super::raw::RunConfig;
use super::resolve::Purpose;
use crate::data::Paths;

/// Every value of these tables that makes no sense.
pub(super) fn check_adapter(config: &RunConfig, purpose: Purpose, found: &mut Findings) {
    if let Some(adapter) = &config.adapter {
        check_common(adapter.common(), found);
        check_method(adapter, found);
    }
    if let Some(quantization) = &config.quantization {
        check_quantization(quantization, found);
    }
    if purpose == Purpose::Train {
        check_combination(config, found);
    }
    if let Some(calibration) = &config.calibration {
        check_at_least_one("calibration.samples", calibration.samples as u64, found);
        check_at_least_one("calibration.batch_size", calibration.batch_size as u64, found);
        found.require(!calibration.data.as_ref().is_some_and(Paths::is_empty), || {
            "calibration.data names no file: leave it out to measure on the training data".to_owned()
        });
        check_at_most("calibration.samples", calibration.samples, 1 << 20, found);
        check_at_most("calibration.batch_size", calibration.batch_size, 1 << 16, found);
    }
}

fn check_common(table: AdapterCommon<'_>, found: &mut Findings) {
    let at = |key: &str| format!("adapter.{}.{key}", table.key);
    check_at_least_one(&at("r"), table.r.unwrap_or(1) as u64, found);
    if let Some((key, dropout)) = table.dropout {
        found.require((0.0..1.0).contains(&dropout), || {
            format!("{} is {dropout}, must be at least 0 and less than 1", at(key))
        });
    }
    if let Some(Alpha { key, value, .. }) = table.alpha {
        check_positive(&at(key), value.unwrap_or(1.0), found);
    }
    check_modules(&at("target_modules"), table.target_modules, found);
    if let Some(excluded) = table.exclude_modules {
        check_modules(&at("exclude_modules"), excluded, found);
    }
    if table.layers_to_transform.is_some_and(<[usize]>::is_empty) {
        found.push(format!("{} is empty: leave it out to adapt every block", at("layers_to_transform")));
    }
    for (pattern, rank) in table.rank_pattern.into_iter().flatten() {
        check_at_least_one(&format!("{}.\"{pattern}\"", at("rank_pattern")), *rank as u64, found);
        check_regex(&at("rank_pattern"), pattern, found);
    }
    for (pattern, alpha) in table.alpha.and_then(|alpha| alpha.pattern).into_iter().flatten() {
        check_positive(&format!("{}.\"{pattern}\"", at("alpha_pattern")), *alpha, found);
        check_regex(&at("alpha_pattern"), pattern, found);
    }
}

/// What only one method has.
fn check_method(adapter: &AdapterConfig, found: &mut Findings) {
    match adapter {
        AdapterConfig::Lora(lora) => check_lora_plus(lora, found),
        AdapterConfig::Pissa(pissa) => {
            check_at_least_one("adapter.pissa.niter", pissa.niter.unwrap_or(1) as u64, found);
        }
        AdapterConfig::LoraSb(lora_sb) => {
            check_positive("adapter.lora_sb.eta", lora_sb.eta.unwrap_or(1.0), found);
            let (alpha, r) = (lora_sb.lora_alpha.unwrap_or(lora_sb.r as f64), lora_sb.r);
            found.require(alpha == r as f64, || {
                format!(
                    "adapter.lora_sb.lora_alpha is {alpha}, must be r ({r}): only at a scale of 1 does a step of the core \
                     follow the full gradient; leave it out"
                )
            });
        }
        AdapterConfig::Vera(vera) => check_positive("adapter.vera.d_initial", vera.d_initial, found),
        AdapterConfig::Randlora(randlora) => found.require(!(randlora.sparse && randlora.very_sparse), || {
            "adapter.randlora.sparse and adapter.randlora.very_sparse are both set: they are two densities of the same random \
             factors, keep one"
                .to_owned()
        }),
        AdapterConfig::Tucker(tucker) => {
            check_at_least_one("adapter.tucker.r_in", tucker.r_in as u64, found);
            check_at_least_one("adapter.tucker.r_out", tucker.r_out as u64, found);
            check_at_least_one("adapter.tucker.r_rows", tucker.r_rows as u64, found);
            check_at_least_one("adapter.tucker.r_columns", tucker.r_columns as u64, found);
            check_positive("adapter.tucker.scale", tucker.scale, found);
        }
        AdapterConfig::Oft(oft) => check_oft(oft, found),
        AdapterConfig::Dora(_) | AdapterConfig::Olora(_) | AdapterConfig::Corda(_) | AdapterConfig::Eora(_) => {}
        AdapterConfig::LoraXs(_) | AdapterConfig::Svfit(_) | AdapterConfig::Hra(_) => {}
    }
}

fn check_lora_plus(lora: &LoraConfig, found: &mut Findings) {
    if let Some(ratio) = lora.loraplus_lr_ratio {
        check_positive("adapter.lora.loraplus_lr_ratio", ratio, found);
    }
    if let Some(rate) = lora.loraplus_lr_embedding {
        check_positive("adapter.lora.loraplus_lr_embedding", rate, found);
        found.require(lora.loraplus_lr_ratio.is_some(), || {
            "adapter.lora.loraplus_lr_embedding is set without loraplus_lr_ratio".to_owned()
        });
    }
}

fn check_oft(oft: &OftConfig, found: &mut Findings) {
    found.require(oft.oft_block_size >= 2, || {
        format!("adapter.oft.oft_block_size is {}, must be at least 2: a block of 1 cannot turn", oft.oft_block_size)
    });
    let terms = oft.num_cayley_neumann_terms;
    found.require(!oft.use_cayley_neumann || terms >= 2, || {
        format!("adapter.oft.num_cayley_neumann_terms is {terms}, must be at least 2: fewer do not turn anything")
    });
    check_positive("adapter.oft.eps", oft.eps, found);
}

fn check_quantization(quantization: &QuantizationConfig, found: &mut Findings) {
    let (key, size) = quantization.group();
    let at = format!("quantization.{}", quantization.key());
    found.require(size.is_power_of_two() && (32..=4096).contains(&size), || {
        format!("{at}.{key} is {size}, must be a power of two between 32 and 4096")
    });
    check_modules(&format!("{at}.target_modules"), quantization.target_modules(), found);
}

/// What the tables ask of each other in a training run.
fn check_combination(config: &RunConfig, found: &mut Findings) {
    let has_adapter = config.adapter.is_some() || config.init_adapter.is_some();
    if let Some(quantization) = &config.quantization
        && !has_adapter
    {
        let key = quantization.key();
        found.push(match config.optimizer {
            OptimizerConfig::QGalore(_) => format!(
                "[quantization.{key}] holds frozen weights, and [optimizer.q_galore] trains all of them: it holds its targets in \
                 8 bits by itself (optimizer.q_galore.weights)"
            ),
            _ => format!(
                "[quantization.{key}] holds frozen weights, but without [adapter] every weight is trained: add an adapter, or \
                 use [optimizer.q_galore]"
            ),
        });
    }
    let is_fresh = config.init_adapter.is_none();
    let repairs_nothing = matches!(config.adapter, Some(AdapterConfig::Eora(_))) && config.quantization.is_none();
    found.require(!(is_fresh && repairs_nothing), || {
        "[adapter.eora] repairs what a quantised base lost, and there is no [quantization] table".to_owned()
    });
    let calibrates = config.adapter.as_ref().is_some_and(AdapterConfig::calibrates);
    found.require(config.calibration.is_none() || calibrates, || {
        let has = match &config.adapter {
            Some(adapter) => format!("[adapter.{}] does not", adapter.common().key),
            None => "there is no [adapter]".to_owned(),
        };
        format!("[calibration] is set, but {has}: only corda, eora and lora_sb start from measured data")
    });
    let repairs = matches!(config.adapter, Some(AdapterConfig::Eora(_)));
    let is_sequential = config.calibration.as_ref().and_then(|table| table.sequential);
    found.require(repairs || is_sequential != Some(true), || {
        "calibration.sequential is true, but only [adapter.eora] repairs layers that others could be measured behind".to_owned()
    });
}
