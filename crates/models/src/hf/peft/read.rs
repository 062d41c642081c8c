//! Reads `adapter_config.json` into an [`AdapterConfig`]: every key is either used, known to be without effect here, or must
//! be switched off.

use std::path::Path;

use serde_json::Value;

use super::AdapterConfig;
use super::keys::{Keys, adapter_error, is_off};
use super::method::{MethodConfig, own_method, peft_method, validate_method};
use super::modules::{ModulePattern, Modules};
use super::write::{alpha_key, dropout_key};
use crate::hf::error::HfError;

/// Keys that decide something here, whatever the method. Some methods of peft have no `exclude_modules`; we read it for all.
const USED: &[&str] = &[
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "base_model_name_or_path",
    "task_type",
];

/// Keys that say nothing about the result: descriptions, and how a fresh adapter of another program starts.
const WITHOUT_EFFECT: &[&str] =
    &["auto_mapping", "inference_mode", "peft_version", "revision", "runtime_config", "init_weights"];

/// The keys of one kind of file, beside those above.
struct Form {
    used: &'static [&'static str],
    /// Details of features that other keys switch on, and what only training in peft would see.
    without_effect: &'static [&'static str],
    r: usize,
    alpha: f64,
}

/// The kinds of adapters in peft's form.
const PEFT: &[(&str, Form)] = &[
    (
        "LORA",
        Form {
            used: &[
                "lora_alpha",
                "lora_dropout",
                "use_rslora",
                "use_dora",
                "rank_pattern",
                "alpha_pattern",
                "init_lora_weights",
            ],
            without_effect: &[
                "megatron_core",
                "qalora_group_size",
                "corda_config",
                "eva_config",
                "loftq_config",
                "lora_ga_config",
            ],
            r: 8,
            alpha: 8.0,
        },
    ),
    (
        "VERA",
        Form {
            used: &["d_initial", "vera_dropout", "projection_prng_key", "save_projection"],
            without_effect: &[],
            r: 256,
            alpha: 0.0,
        },
    ),
    (
        "RANDLORA",
        Form {
            used: &[
                "randlora_alpha",
                "randlora_dropout",
                "projection_prng_key",
                "save_projection",
                "sparse",
                "very_sparse",
            ],
            without_effect: &[],
            r: 32,
            alpha: 640.0,
        },
    ),
    ("HRA", Form { used: &["apply_GS"], without_effect: &[], r: 8, alpha: 0.0 }),
    (
        "OFT",
        Form {
            used: &["oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps", "block_share"],
            // peft builds the dropout of blocks and never applies it to a linear layer.
            without_effect: &["module_dropout"],
            r: 0,
            alpha: 0.0,
        },
    ),
];

/// Our own form.
const OWN: Form = Form {
    used: &[
        "alpha",
        "dropout",
        "eta",
        "r_in",
        "r_out",
        "r_rows",
        "r_columns",
        "scale",
        "rank_pattern",
        "alpha_pattern",
    ],
    without_effect: &[],
    r: 8,
    alpha: 8.0,
};

pub(super) fn read(json: &Value, origin: &Path) -> Result<AdapterConfig, HfError> {
    let Some(keys) = json.as_object() else {
        return Err(HfError::bad_file(origin, "expected a JSON object", "this is not an adapter_config.json"));
    };
    let keys = Keys { keys, origin };
    let is_own = keys.get("peft_type").is_none() && keys.get("type").is_some();
    let config = if is_own { read_own(&keys)? } else { read_peft(&keys)? };
    validate(&config, origin)?;
    Ok(config)
}

fn read_peft(keys: &Keys<'_>) -> Result<AdapterConfig, HfError> {
    let known = || PEFT.iter().map(|(name, _)| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
    let (name, form) = match keys.get("peft_type") {
        None => {
            let hint = "this is not the configuration of a PEFT adapter";
            return keys.fail("peft_type", format!("missing; expected one of {}", known()), hint);
        }
        Some(wanted) => match PEFT.iter().find(|(name, _)| wanted.as_str() == Some(name)) {
            Some(found) => found,
            None => {
                let hint = "merge the adapter with peft, or train one with a method that is read here";
                return keys.fail("peft_type", format!("expected one of {}, got {wanted}", known()), hint);
            }
        },
    };
    check_unsupported(keys, form, "peft_type")?;
    read_common(keys, peft_method(keys, name)?, form)
}

fn read_own(keys: &Keys<'_>) -> Result<AdapterConfig, HfError> {
    let name = keys.text("type")?.unwrap_or_default();
    let method = own_method(keys, &name)?;
    check_unsupported(keys, &OWN, "type")?;
    read_common(keys, method, &OWN)
}

fn read_common(keys: &Keys<'_>, method: MethodConfig, form: &Form) -> Result<AdapterConfig, HfError> {
    let r = match &method {
        MethodConfig::Tucker { r_in, r_out, .. } => (*r_in).max(*r_out),
        _ => keys.count("r")?.unwrap_or(form.r),
    };
    let alpha = match alpha_key(&method) {
        Some(key) => keys.number(key)?.unwrap_or(form.alpha),
        None => r as f64,
    };
    let dropout = dropout_key(&method).map(|key| keys.number(key)).transpose()?.flatten();
    Ok(AdapterConfig {
        method,
        r,
        lora_alpha: alpha,
        lora_dropout: dropout.unwrap_or(0.0),
        use_rslora: keys.flag("use_rslora")?,
        target_modules: keys.target_modules()?,
        exclude_modules: keys.modules("exclude_modules", |text| ModulePattern::whole(text).map(Modules::Pattern))?,
        rank_pattern: keys.ranks()?,
        alpha_pattern: keys.alphas()?,
        modules_to_save: keys.patterns("modules_to_save", ModulePattern::part)?,
        layers_to_transform: keys.layers()?,
        layers_pattern: keys.patterns("layers_pattern", ModulePattern::before_number)?,
        init_lora_weights: keys.init()?,
        base_model_name_or_path: keys.text("base_model_name_or_path")?,
        task_type: keys.text("task_type")?,
    })
}

/// A key that is neither used nor without effect must be off.
fn check_unsupported(keys: &Keys<'_>, form: &Form, type_key: &str) -> Result<(), HfError> {
    for (key, value) in keys.keys {
        let is_in = |list: &[&str]| list.contains(&key.as_str());
        let is_known = is_in(USED) || is_in(form.used) || is_in(WITHOUT_EFFECT) || is_in(form.without_effect);
        if !is_known && key != type_key && !is_off(value) {
            return keys.fail(
                key,
                format!("is set to {value}, which is not supported"),
                "merge the adapter with peft, or train one without this feature",
            );
        }
    }
    match keys.get("bias") {
        None => Ok(()),
        Some(Value::String(bias)) if bias == "none" => Ok(()),
        Some(other) => keys.fail("bias", format!("expected \"none\", got {other}"), "trained biases are not supported"),
    }
}

pub(super) fn validate(config: &AdapterConfig, origin: &Path) -> Result<(), HfError> {
    let fail = |key: &str, reason: String, hint: &str| Err(adapter_error(origin, key, reason, hint));
    if config.r == 0 && !matches!(config.method, MethodConfig::Oft { .. }) {
        return fail("r", "expected a rank of at least 1, got 0".to_string(), "common ranks are 8, 16 and 32");
    }
    if let Some((pattern, _)) = config.rank_pattern.iter().find(|(_, rank)| *rank == 0) {
        return fail("rank_pattern", format!("`{}`: expected a rank of at least 1, got 0", pattern.text()), "");
    }
    let alphas = config.alpha_pattern.iter().map(|(_, alpha)| *alpha).chain([config.lora_alpha]);
    if let Some(alpha) = alphas.into_iter().find(|alpha| !alpha.is_finite()) {
        return fail("lora_alpha", format!("expected a finite number, got {alpha}"), "");
    }
    if !(0.0..=1.0).contains(&config.lora_dropout) {
        return fail(
            dropout_key(&config.method).unwrap_or("dropout"),
            format!("expected a probability from 0 to 1, got {}", config.lora_dropout),
            "",
        );
    }
    validate_method(config, origin)?;
    let by_name = matches!(config.target_modules, Modules::Names(_));
    if !by_name && !config.layers_to_transform.is_empty() {
        let hint = "list the names of the modules, or put the layers into the regular expression";
        return fail("layers_to_transform", "cannot be combined with target_modules given as a text".to_string(), hint);
    }
    if !config.layers_pattern.is_empty() && config.layers_to_transform.is_empty() {
        return fail(
            "layers_pattern",
            "has no effect without layers_to_transform".to_string(),
            "set layers_to_transform too",
        );
    }
    Ok(())
}
