//! From `[adapter.<method>]` of a run to the settings of an adapter's folder.

use lowrank_models::hf;
use lowrank_models::hf::peft::{
    CordaMethod as PeftCorda, InitLoraWeights as PeftInit, MethodConfig, ModulePattern, Modules,
};

use crate::config::{AdapterCommon, AdapterConfig, CordaMethod, InitLoraWeights, TargetModules, TuckerConfig};
use crate::error::Problem;

/// The settings of a fresh adapter in the terms of its folder. Random factors have the seed 0: set it to that of the run.
///
/// ```
/// use lowrank_models::hf::peft::MethodConfig;
/// use lowrank_train::adapter::peft_config;
/// use lowrank_train::config::{AdapterConfig, PissaConfig};
///
/// let pissa = PissaConfig { r: 16, ..PissaConfig::default() };
/// let config = peft_config(&AdapterConfig::Pissa(pissa)).unwrap();
/// assert_eq!((config.method, config.r, config.lora_alpha), (MethodConfig::Pissa { niter: None }, 16, 16.0));
/// ```
///
/// # Errors
/// A pattern that is no regular expression.
pub fn peft_config(adapter: &AdapterConfig) -> Result<hf::AdapterConfig, Problem> {
    let common = adapter.common();
    let key = common.key;
    let method = method(adapter);
    let r = match method {
        MethodConfig::Tucker { r_in, r_out, .. } => r_in.max(r_out),
        _ => common.r.unwrap_or(0),
    };
    let targets = modules(common.target_modules, key, "target_modules")?;
    let mut config = hf::AdapterConfig::new(r, r as f64, targets);
    config.method = method;
    config.lora_dropout = common.dropout.map_or(0.0, |(_, dropout)| dropout);
    config.exclude_modules =
        common.exclude_modules.map(|wanted| modules(wanted, key, "exclude_modules")).transpose()?;
    config.layers_to_transform = common.layers_to_transform.unwrap_or_default().to_vec();
    for text in common.modules_to_save {
        config.modules_to_save.push(pattern(text, ModulePattern::part, key, "modules_to_save")?);
    }
    set_ranks_and_alphas(&mut config, common)?;
    if let AdapterConfig::Lora(lora) = adapter
        && lora.init_lora_weights == InitLoraWeights::Gaussian
    {
        config.init_lora_weights = PeftInit::Named("gaussian".to_owned());
    }
    Ok(config)
}

/// Length of LoRA-SB's estimate of the first step where `eta` is not set: that of the first step of the run's schedule.
pub fn first_step(learning_rate: f64, warmup_steps: u64) -> f64 {
    learning_rate / warmup_steps.max(1) as f64
}

fn method(adapter: &AdapterConfig) -> MethodConfig {
    match adapter {
        AdapterConfig::Lora(_) => MethodConfig::Lora,
        AdapterConfig::Dora(_) => MethodConfig::Dora,
        AdapterConfig::Pissa(pissa) => MethodConfig::Pissa { niter: pissa.niter },
        AdapterConfig::Olora(_) => MethodConfig::Olora,
        AdapterConfig::Corda(corda) => MethodConfig::Corda {
            corda_method: match corda.corda_method {
                CordaMethod::Ipm => PeftCorda::Ipm,
                CordaMethod::Kpm => PeftCorda::Kpm,
            },
        },
        AdapterConfig::Eora(eora) => MethodConfig::Eora { trained: eora.trained },
        AdapterConfig::LoraXs(_) => MethodConfig::LoraXs,
        AdapterConfig::LoraSb(lora_sb) => MethodConfig::LoraSb { eta: lora_sb.eta },
        AdapterConfig::Svfit(_) => MethodConfig::Svfit,
        AdapterConfig::Vera(vera) => MethodConfig::Vera { d_initial: vera.d_initial, projection_prng_key: 0 },
        AdapterConfig::Randlora(randlora) => MethodConfig::RandLora {
            projection_prng_key: 0,
            sparse: randlora.sparse,
            very_sparse: randlora.very_sparse,
        },
        AdapterConfig::Tucker(tucker) => {
            let TuckerConfig { r_in, r_out, r_rows, r_columns, scale, .. } = *tucker;
            MethodConfig::Tucker { r_in, r_out, r_rows, r_columns, scale }
        }
        AdapterConfig::Hra(hra) => MethodConfig::Hra { apply_gs: hra.apply_gs },
        AdapterConfig::Oft(oft) => MethodConfig::Oft {
            oft_block_size: oft.oft_block_size,
            use_cayley_neumann: oft.use_cayley_neumann,
            num_cayley_neumann_terms: oft.num_cayley_neumann_terms,
            coft: oft.coft,
            eps: oft.eps,
            block_share: oft.block_share,
        },
    }
}

/// Ranks and alphas of the whole adapter and of single layers. An alpha that is not set is the layer's rank.
fn set_ranks_and_alphas(config: &mut hf::AdapterConfig, common: AdapterCommon<'_>) -> Result<(), Problem> {
    let key = common.key;
    for (text, &rank) in common.rank_pattern.into_iter().flatten() {
        config.rank_pattern.push((pattern(text, ModulePattern::ending, key, "rank_pattern")?, rank));
    }
    let Some(alpha) = common.alpha else { return Ok(()) };
    config.use_rslora = alpha.use_rslora;
    for (text, &value) in alpha.pattern.into_iter().flatten() {
        config.alpha_pattern.push((pattern(text, ModulePattern::ending, key, "alpha_pattern")?, value));
    }
    match alpha.value {
        Some(value) => config.lora_alpha = value,
        // Of two patterns that match, the first counts: those that the user wrote stay in front.
        None => {
            config.alpha_pattern.extend(config.rank_pattern.iter().map(|(text, rank)| (text.clone(), *rank as f64)))
        }
    }
    Ok(())
}

fn modules(wanted: &TargetModules, method: &str, key: &str) -> Result<Modules, Problem> {
    match wanted {
        TargetModules::Pattern(text) => Modules::from_text(text)
            .map_err(|reason| Problem::config(format!("adapter.{method}.{key} = \"{text}\": {reason}"))),
        TargetModules::Names(names) => Ok(Modules::Names(names.clone())),
    }
}

fn pattern(
    text: &str,
    make: fn(&str) -> Result<ModulePattern, String>,
    method: &str,
    key: &str,
) -> Result<ModulePattern, Problem> {
    make(text).map_err(|reason| Problem::config(format!("adapter.{method}.{key}: \"{text}\": {reason}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::config::{LoraConfig, LoraSbConfig, OftConfig, PissaConfig, VeraConfig};

    #[test]
    fn an_alpha_that_is_not_set_follows_the_rank_of_each_layer() {
        let rank_pattern = [("v_proj".to_owned(), 2)].into();
        let lora_sb = LoraSbConfig { r: 6, rank_pattern, ..LoraSbConfig::default() };
        let config = peft_config(&AdapterConfig::LoraSb(lora_sb)).unwrap();
        assert_eq!([config.scale_of("a.q_proj"), config.scale_of("a.v_proj")], [1.0, 1.0]);
        let alpha_pattern = [(".*v_proj".to_owned(), 1.0)].into();
        let rank_pattern = [("v_proj".to_owned(), 2), ("q_proj".to_owned(), 3)].into();
        let pissa = PissaConfig { alpha_pattern, rank_pattern, ..PissaConfig::default() };
        let config = peft_config(&AdapterConfig::Pissa(pissa)).unwrap();
        assert_eq!(["a.q_proj", "a.v_proj", "a.k_proj"].map(|module| config.scale_of(module)), [1.0, 0.5, 1.0]);
        let lora = LoraConfig { lora_alpha: 16.0, use_rslora: true, r: 4, ..LoraConfig::default() };
        assert_eq!(peft_config(&AdapterConfig::Lora(lora)).unwrap().scale_of("a.q_proj"), 8.0);
    }

    #[test]
    fn methods_without_alpha_have_a_scale_of_their_own() {
        for (adapter, scale) in [
            (AdapterConfig::Vera(VeraConfig::default()), 1.0),
            (AdapterConfig::Tucker(TuckerConfig { scale: 2.5, ..TuckerConfig::default() }), 2.5),
            (AdapterConfig::Oft(OftConfig::default()), 1.0),
        ] {
            let config = peft_config(&adapter).unwrap();
            assert_eq!((config.scale_of("a.q_proj"), config.method.name()), (scale, adapter.common().key));
        }
    }

    #[test]
    fn a_bad_pattern_is_named_with_its_table() {
        let target_modules = TargetModules::Pattern("(?!q).*".to_owned());
        let vera = VeraConfig { target_modules, ..VeraConfig::default() };
        let error = peft_config(&AdapterConfig::Vera(vera)).unwrap_err();
        assert!(error.what.starts_with("adapter.vera.target_modules = \"(?!q).*\": "), "{}", error.what);
    }
}
