use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::peft::{AdapterTensor, InitLoraWeights, ModulePattern, Modules, shortest_names};
use crate::hf::{AdapterConfig, Checkpoint, HfError};

fn read(json: Value) -> Result<AdapterConfig, HfError> {
    AdapterConfig::from_json(&json, Path::new("adapter_config.json"))
}

fn with(changes: Value) -> AdapterConfig {
    read(settings(changes)).unwrap()
}

fn settings(changes: Value) -> Value {
    let mut settings = json!({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]});
    for (key, value) in changes.as_object().unwrap() {
        settings[key] = value.clone();
    }
    settings
}

const Q0: &str = "model.layers.0.self_attn.q_proj";
const Q1: &str = "model.layers.1.self_attn.q_proj";
const V1: &str = "model.layers.1.self_attn.v_proj";
const UP1: &str = "model.layers.1.mlp.up_proj";

#[test]
fn names_match_whole_or_after_a_dot() {
    let config = with(json!({"target_modules": ["q_proj", "layers.1.self_attn.v_proj", "lm_head"]}));
    assert!(config.targets(Q0) && config.targets(V1) && config.targets("lm_head"));
    assert!(
        !config.targets("model.layers.0.self_attn.v_proj")
            && !config.targets("model.xq_proj")
            && !config.targets("proj")
    );
}

#[test]
fn texts_are_patterns_for_the_whole_name() {
    let config = with(json!({"target_modules": r".*\.(q|v)_proj|lm_head"}));
    assert!(config.targets(Q0) && config.targets(V1) && config.targets("lm_head"));
    assert!(!config.targets(UP1) && !config.targets("x.lm_head") && !config.targets("model.q_proj.sub"));
    assert!(!with(json!({"target_modules": "q_proj"})).targets(Q0));
    let all = with(json!({"target_modules": "All-Linear"}));
    assert_eq!(all.target_modules, Modules::AllLinear);
    assert!(all.targets(Q0) && all.targets(UP1) && !all.targets("lm_head") && !all.targets("model.embed_tokens"));
}

#[test]
fn exclusions_and_saved_modules_win() {
    let config = with(
        json!({"target_modules": ["q_proj", "v_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.q_proj"], "modules_to_save": ["lm_head"]}),
    );
    assert!(!config.targets(Q0) && config.targets(Q1) && !config.targets("lm_head"));
    assert!(config.saves("lm_head") && !config.saves(Q0));
    let config = with(json!({"exclude_modules": r".*layers\.1\..*"}));
    assert!(config.targets(Q0) && !config.targets(Q1));
    // Everything inside a saved module is out as well.
    assert!(!with(json!({"modules_to_save": ["self_attn"]})).targets(Q0));
}

#[test]
fn layers_are_chosen_by_the_first_number() {
    let config = with(json!({"layers_to_transform": [1]}));
    assert!(!config.targets(Q0) && config.targets(Q1));
    assert!(config.targets("model.layers.1.experts.0.q_proj") && !config.targets("model.layers.0.experts.1.q_proj"));
    assert!(!config.targets("layers.1.q_proj") && !config.targets("q_proj.1") && !config.targets("lm.q_proj"));
    assert!(with(json!({"layers_to_transform": 0})).targets(Q0));
    assert!(with(json!({"layers_to_transform": []})).targets(Q1));
    let config = with(json!({"layers_to_transform": [1], "layers_pattern": "layers"}));
    assert!(config.targets(Q1) && config.targets("layers.1.q_proj") && !config.targets("model.h.1.q_proj"));
    assert!(with(json!({"layers_to_transform": [1], "layers_pattern": ["h", "layers"]})).targets("model.h.1.q_proj"));
    // A module listed by its full name is not asked for its layer.
    assert!(with(json!({"layers_to_transform": [1], "target_modules": [Q0]})).targets(Q0));
}

#[test]
fn patterns_set_rank_and_alpha() {
    let config = with(json!({
        "rank_pattern": {r"layers\.1\.self_attn\.v_proj": 6, "q_proj": 2, r".*\.v_proj": 3},
        "alpha_pattern": {"q_proj|v_proj": 12.5},
    }));
    assert_eq!(
        [Q0, V1, "model.layers.0.self_attn.v_proj", UP1, "xq_proj"].map(|module| config.rank_of(module)),
        [2, 6, 3, 4, 4]
    );
    assert_eq!([Q0, V1, UP1].map(|module| config.alpha_of(module)), [12.5, 12.5, 8.0]);
    assert_eq!(config.scale_of(Q0), 12.5 / 2.0);
    assert_eq!(config.scale_of(UP1), 2.0);
    let stabilised = AdapterConfig { use_rslora: true, ..config };
    assert_eq!(stabilised.scale_of(UP1), 4.0);
    assert_eq!(stabilised.scale_of(Q0), 12.5 / 2f64.sqrt());
}

/// The tensors in the files of peft are those of the modules that the settings choose, with the chosen ranks.
#[test]
fn chooses_what_peft_chose() {
    for case in [
        "lora_patterns",
        "lora_one_layer_lm_head",
        "lora_embeddings",
        "lora_qv_r4",
        "lora_all_rslora_r8",
        "lora_attn_qwen3",
        "lora_llama3_long",
    ] {
        let folder = golden(case).join("adapter_final");
        let config = AdapterConfig::from_folder(&folder).unwrap();
        let model = Checkpoint::open(&golden("models").join(config.base_model_name_or_path.as_ref().unwrap())).unwrap();
        let adapter = Checkpoint::open_file(&folder.join("adapter_model.safetensors")).unwrap();
        let mut found = BTreeSet::new();
        for key in adapter.names() {
            let tensor = AdapterTensor::from_key(key).unwrap_or_else(|| panic!("{case}: {key}"));
            assert_eq!(tensor.key(), key);
            let shape = adapter.shape(key).unwrap();
            match &tensor {
                AdapterTensor::A(module) | AdapterTensor::EmbeddingA(module) => {
                    assert_eq!(shape[0], config.rank_of(module), "{case}: {key}");
                    found.insert(module.clone());
                }
                AdapterTensor::B(module) | AdapterTensor::EmbeddingB(module) => {
                    assert_eq!(shape[1], config.rank_of(module), "{case}: {key}")
                }
                AdapterTensor::Saved(parameter) => {
                    assert!(config.saves(parameter.strip_suffix(".weight").unwrap()), "{case}: {key}")
                }
                AdapterTensor::BaseCopy(parameter) => assert!(model.contains(parameter), "{case}: {key}"),
            }
        }
        let chosen: BTreeSet<String> = model
            .names()
            .filter_map(|name| name.strip_suffix(".weight"))
            .filter(|module| config.targets(module))
            .map(str::to_string)
            .collect();
        assert_eq!(chosen, found, "{case}");
    }
}

#[test]
fn what_is_written_is_read_back_the_same() {
    let config = AdapterConfig {
        lora_dropout: 0.05,
        use_rslora: true,
        exclude_modules: Some(Modules::Names(vec!["lm_head".to_string()])),
        rank_pattern: vec![(ModulePattern::ending("z_proj").unwrap(), 2), (ModulePattern::ending(r"a\.b").unwrap(), 3)],
        alpha_pattern: vec![(ModulePattern::ending("up_proj").unwrap(), 1.5)],
        modules_to_save: vec![ModulePattern::part("embed_tokens").unwrap()],
        layers_to_transform: vec![0, 3],
        layers_pattern: vec![ModulePattern::before_number("layers").unwrap()],
        init_lora_weights: InitLoraWeights::Named("gaussian".to_string()),
        base_model_name_or_path: Some("org/name".to_string()),
        ..AdapterConfig::new(16, 32.0, Modules::Names(vec!["q_proj".to_string(), "up_proj".to_string()]))
    };
    let json = config.to_json();
    assert_eq!(read(json.clone()).unwrap(), config);
    assert_eq!(json["lora_alpha"].to_string(), "32");
    assert_eq!(json["alpha_pattern"].to_string(), r#"{"up_proj":1.5}"#);
    assert_eq!(json["rank_pattern"].to_string(), r#"{"z_proj":2,"a\\.b":3}"#);
    for modules in [Modules::AllLinear, Modules::from_text(r".*\.q_proj").unwrap()] {
        let config = AdapterConfig::new(8, 16.0, modules);
        assert_eq!(read(config.to_json()).unwrap(), config);
    }
    let plain = AdapterConfig::new(8, 16.0, Modules::AllLinear).to_json();
    assert_eq!((&plain["init_lora_weights"], &plain["modules_to_save"]), (&json!(true), &Value::Null));
}

#[test]
fn unsupported_features_are_named() {
    for (key, value) in [
        ("use_dora", json!(true)),
        ("lora_bias", json!(true)),
        ("fan_in_fan_out", json!(true)),
        ("use_qalora", json!(true)),
        ("target_parameters", json!(["experts.gate_up_proj"])),
        ("trainable_token_indices", json!([1, 2])),
        ("layer_replication", json!([[0, 4]])),
        ("ensure_weight_tying", json!(true)),
        ("megatron_config", json!({"a": 1})),
        ("alora_invocation_tokens", json!([1])),
        ("some_new_feature", json!("on")),
    ] {
        assert_has(
            &text_of(read(settings(json!({key: value})))),
            &[&format!("adapter_config.json: `{key}`: is set to"), "not supported", "hint:"],
        );
        for off in [Value::Null, json!(false), json!([]), json!({})] {
            with(json!({key: off}));
        }
    }
    assert_has(&text_of(read(settings(json!({"bias": "all"})))), &["`bias`: expected \"none\", got \"all\""]);
    for name in ["pissa", "pissa_niter_16", "olora", "corda", "loftq"] {
        assert_has(
            &text_of(read(settings(json!({"init_lora_weights": name})))),
            &["`init_lora_weights`", name, "changes the base model's weights"],
        );
    }
    let text = text_of(AdapterConfig::from_folder(&golden("dora_all_r8").join("adapter_final")));
    assert_has(&text, &["adapter_config.json: `use_dora`"]);
    assert_eq!(with(json!({"init_lora_weights": false})).init_lora_weights, InitLoraWeights::Random);
    AdapterConfig::from_folder(&golden("pissa_r8").join("adapter_final_converted")).unwrap();
}

#[test]
fn wrong_values_are_named() {
    for (changes, text) in [
        (json!({"r": 0}), "`r`: expected a rank of at least 1, got 0"),
        (json!({"r": "8"}), "`r`: expected a whole number, got \"8\""),
        (json!({"r": -1}), "`r`: expected a whole number, got -1"),
        (json!({"lora_alpha": "x"}), "`lora_alpha`: expected a number"),
        (json!({"lora_dropout": 1.5}), "`lora_dropout`: expected a probability from 0 to 1, got 1.5"),
        (json!({"use_rslora": 1}), "`use_rslora`: expected true or false, got 1"),
        (json!({"target_modules": null}), "`target_modules`: missing"),
        (json!({"target_modules": []}), "`target_modules`: missing"),
        (json!({"target_modules": [1]}), "`target_modules`: expected a list of names, got 1"),
        (json!({"target_modules": "(q_proj"}), "`target_modules`: `(q_proj` is not a regular expression"),
        (json!({"target_modules": "(?!x).*"}), "`target_modules`: `(?!x).*`: looking ahead or behind is not supported"),
        (
            json!({"target_modules": ".*q_proj", "layers_to_transform": [0]}),
            "`layers_to_transform`: cannot be combined",
        ),
        (json!({"layers_pattern": "layers"}), "`layers_pattern`: has no effect without"),
        (json!({"layers_to_transform": ["0"]}), "`layers_to_transform`: expected layer numbers, got \"0\""),
        (json!({"rank_pattern": {"q_proj": 0}}), "`rank_pattern`: `q_proj`: expected a rank of at least 1"),
        (json!({"rank_pattern": {"q_proj": "a"}}), "`rank_pattern.q_proj`: expected a rank, got \"a\""),
        (json!({"rank_pattern": ["q_proj"]}), "`rank_pattern`: expected an object"),
        (json!({"alpha_pattern": {"[": 1}}), "`alpha_pattern`: `[` is not a regular expression"),
        (json!({"init_lora_weights": "magic"}), "`init_lora_weights`: expected true, false"),
        (json!({"peft_type": "VERA"}), "`peft_type`: expected \"LORA\", got \"VERA\""),
        (json!({"peft_type": null}), "`peft_type`: missing"),
    ] {
        assert_has(&text_of(read(settings(changes))), &["adapter_config.json: ", text]);
    }
    assert_has(&text_of(read(json!([]))), &["expected a JSON object"]);
    let folder = temp();
    put(folder.path(), &[("model.safetensors", "")]);
    assert_has(
        &text_of(AdapterConfig::from_folder(folder.path())),
        &["has no adapter_config.json", "it holds: model.safetensors"],
    );
}

#[test]
fn short_names_are_exact() {
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let all = names(&[Q0, Q1, V1, UP1, "lm_head"]);
    assert_eq!(shortest_names(&names(&[Q1, Q0, V1]), &all), ["q_proj", "v_proj"]);
    assert_eq!(shortest_names(&names(&[Q1, V1]), &all), [Q1, V1]);
}

#[test]
fn keys_of_other_writers_are_understood() {
    let with_name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight";
    assert_eq!(AdapterTensor::from_key(with_name), Some(AdapterTensor::A(Q0.to_string())));
    let saved = "base_model.model.lm_head.modules_to_save.default.weight";
    assert_eq!(AdapterTensor::from_key(saved), Some(AdapterTensor::Saved("lm_head.weight".to_string())));
    assert_eq!(AdapterTensor::from_key("base_model.model.q_proj.lora_magnitude_vector"), None);
    assert_eq!(AdapterTensor::from_key("model.q_proj.lora_A.weight"), None);
}
