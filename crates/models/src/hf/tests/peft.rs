use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Value, json};

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::peft::{
    AdapterTensor, InitLoraWeights, KeyForm, METADATA_KEY, MethodConfig, ModulePattern, Modules, Part, shortest_names,
};
use crate::hf::{AdapterConfig, Checkpoint, Dtype, HfError, OutTensor, write_safetensors};

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
    assert!(!all.targets_convolution("resnet.encoder.convolution"));
    let convolutions = AdapterConfig {
        target_modules: Modules::Pattern(ModulePattern::whole(".*").unwrap()),
        exclude_modules: Some(Modules::AllLinear),
        ..all
    };
    assert!(convolutions.targets_convolution("resnet.encoder.convolution") && !convolutions.targets(Q0));
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
            let tensor = AdapterTensor::from_key(key, KeyForm::Peft).unwrap_or_else(|| panic!("{case}: {key}"));
            assert_eq!(tensor.key(KeyForm::Peft), key);
            let shape = adapter.shape(key).unwrap();
            let AdapterTensor { module, part } = &tensor;
            match part {
                Part::A | Part::EmbeddingA => {
                    assert_eq!(shape[0], config.rank_of(module), "{case}: {key}");
                    found.insert(module.clone());
                }
                Part::B | Part::EmbeddingB => assert_eq!(shape[1], config.rank_of(module), "{case}: {key}"),
                Part::Saved => assert!(config.saves(module.strip_suffix(".weight").unwrap()), "{case}: {key}"),
                Part::BaseCopy => assert!(model.contains(module), "{case}: {key}"),
                other => panic!("{case}: {key} is {other:?}"),
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
        (
            json!({"peft_type": "IA3"}),
            "`peft_type`: expected one of \"LORA\", \"VERA\", \"RANDLORA\", \"HRA\", \"OFT\", got \"IA3\"",
        ),
        (json!({"peft_type": null}), "`peft_type`: missing"),
        (json!({"peft_type": null, "type": "lora_xy"}), "`type`: expected \"lora_xs\", \"lora_sb\""),
        (json!({"peft_type": null, "type": "tucker", "r_in": 4}), "`r_out`: missing; expected a rank"),
        (
            json!({"peft_type": null, "type": "tucker", "lora_alpha": 0, "r_in": 4, "r_out": 0}),
            "`r_out`: expected a rank of at least 1",
        ),
        (json!({"peft_type": "VERA", "lora_alpha": 0, "save_projection": false}), "`save_projection`: is false"),
        (
            json!({"peft_type": "VERA", "lora_alpha": 0, "vera_dropout": 2}),
            "`vera_dropout`: expected a probability from 0 to 1, got 2",
        ),
        (json!({"peft_type": "VERA", "lora_dropout": 0.1}), "`lora_alpha`: is set to 8, which is not supported"),
        (
            json!({"peft_type": "OFT", "lora_alpha": 0, "r": 0, "peft_version": "0.17.1"}),
            "`peft_version`: expected 0.18.0 or later for use_cayley_neumann, got \"0.17.1\"",
        ),
        (json!({"peft_type": "OFT", "lora_alpha": 0}), "`r`: expected 0, got 4: a number of blocks is not supported"),
        (
            json!({"peft_type": "OFT", "lora_alpha": 0, "r": 0, "oft_block_size": 1, "use_cayley_neumann": false}),
            "`oft_block_size`: expected at least 2",
        ),
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
    let from_key = |key| AdapterTensor::from_key(key, KeyForm::Peft);
    assert_eq!(from_key(with_name), Some(AdapterTensor::new(Q0, Part::A)));
    let saved = "base_model.model.lm_head.modules_to_save.default.weight";
    assert_eq!(from_key(saved), Some(AdapterTensor::new("lm_head.weight", Part::Saved)));
    let magnitude = "base_model.model.q_proj.lora_magnitude_vector.default.weight";
    assert_eq!(from_key(magnitude), Some(AdapterTensor::new("q_proj", Part::Magnitude)));
    assert_eq!(from_key("base_model.vera_A.default"), Some(AdapterTensor::new("", Part::VeraBaseA)));
    for foreign in [
        "model.q_proj.lora_A.weight",
        "base_model.model.q_proj.ia3_l",
        "base_model.model.q_proj.lora_R",
        "base_model.model.q_proj.oft_r",
        "base_model.model.hra_u",
    ] {
        assert_eq!(from_key(foreign).filter(|tensor| tensor.part != Part::Saved), None, "{foreign}");
    }
    assert_eq!(from_key("base_model.model.q_proj.lora_R"), None);
}

/// Settings that peft 0.21 wrote, with the tensors it wrote beside them.
#[test]
fn other_methods_are_read_and_written_as_peft_does() {
    let lora = |more: &str| format!(r#"{{"peft_type": "LORA", "r": 8, "lora_alpha": 16, {more}"#);
    let rest = r#""target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": true,
        "auto_mapping": null, "revision": null, "layers_pattern": null, "layers_to_transform": null, "peft_version": "0.21.2",
        "modules_to_save": null, "base_model_name_or_path": "tiny-llama""#;
    let (d_initial, key) = (0.1, 5);
    for (text, method, scale) in [
        (lora(r#""use_dora": true, "lora_bias": false, "qalora_group_size": 16, "#), MethodConfig::Dora, 2.0),
        (
            r#"{"peft_type": "VERA", "r": 16, "d_initial": 0.1, "projection_prng_key": 5, "save_projection": true,
                "vera_dropout": 0.25, "fan_in_fan_out": false, "init_weights": true, "#
                .to_string(),
            MethodConfig::Vera { d_initial, projection_prng_key: key },
            1.0,
        ),
        (
            r#"{"peft_type": "RANDLORA", "r": 8, "randlora_alpha": 32, "randlora_dropout": 0.25, "sparse": true,
                "projection_prng_key": 5, "save_projection": true, "very_sparse": false, "fan_in_fan_out": false, "#
                .to_string(),
            MethodConfig::RandLora { projection_prng_key: key, sparse: true, very_sparse: false },
            4.0,
        ),
        (
            r#"{"peft_type": "HRA", "r": 4, "apply_GS": true, "exclude_modules": null, "init_weights": true, "#
                .to_string(),
            MethodConfig::Hra { apply_gs: true },
            1.0,
        ),
        (
            r#"{"peft_type": "OFT", "r": 0, "oft_block_size": 8, "block_share": true, "coft": false, "eps": 6e-05,
                "module_dropout": 0.0, "num_cayley_neumann_terms": 5, "use_cayley_neumann": false, "#
                .to_string(),
            MethodConfig::Oft {
                oft_block_size: 8,
                use_cayley_neumann: false,
                num_cayley_neumann_terms: 5,
                coft: false,
                eps: 6e-5,
                block_share: true,
            },
            1.0,
        ),
    ] {
        let json: Value = serde_json::from_str(&format!("{text}{rest}}}")).unwrap();
        let config = read(json.clone()).unwrap();
        assert_eq!((&config.method, config.scale_of(Q0)), (&method, scale), "{json}");
        let written = config.to_json();
        assert_eq!(read(written.clone()).unwrap(), config);
        for (key, value) in written.as_object().unwrap() {
            // What peft leaves at its default, and what is a number in two ways.
            let theirs = json.get(key).unwrap_or(&Value::Null);
            if key == "peft_version" {
                continue; // ours is the first that reads the file
            }
            let is_same = theirs == value || theirs.as_f64().is_some_and(|number| value.as_f64() == Some(number));
            let defaults = [json!(false), json!({}), json!(true), json!(0.0), Value::Null];
            assert!(is_same || (theirs.is_null() && defaults.contains(value)), "{key}: {value}, peft has {theirs}");
        }
    }
}

#[test]
fn tensors_of_all_methods_have_their_names() {
    for (case, parts) in [
        ("dora_all_r8", &[Part::A, Part::B, Part::Magnitude][..]),
        ("vera_r16", &[Part::VeraD, Part::VeraB, Part::VeraBaseA, Part::VeraBaseB]),
        ("randlora_r8", &[Part::RandLambda, Part::RandGamma, Part::RandBaseA, Part::RandBaseB]),
        ("lora_xs_r8", &[Part::A, Part::B, Part::Core]),
        ("lora_sb_r8", &[Part::A, Part::B, Part::Core]),
        ("svfit_r16", &[Part::A, Part::B, Part::Sigma]),
    ] {
        let folder = golden(case).join("adapter_final");
        let config = AdapterConfig::from_folder(&folder).unwrap();
        let form = config.method.key_form();
        let adapter = Checkpoint::open_file(&folder.join("adapter_model.safetensors")).unwrap();
        let mut found = BTreeSet::new();
        for key in adapter.names() {
            let tensor = AdapterTensor::from_key(key, form).unwrap_or_else(|| panic!("{case}: {key}"));
            assert_eq!(tensor.key(form), key, "{case}");
            assert!(tensor.module.is_empty() || config.targets(&tensor.module), "{case}: {key}");
            found.insert(tensor.part);
        }
        assert_eq!(found, parts.iter().copied().collect(), "{case}");
    }
    for (key, module, part) in [
        ("base_model.model.model.layers.0.self_attn.q_proj.hra_u", Q0, Part::HraU),
        ("base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight", Q0, Part::OftR),
        ("base_model.model.model.embed_tokens.lora_magnitude_vector", "model.embed_tokens", Part::Magnitude),
        ("base_model.randlora_B", "", Part::RandBaseB),
    ] {
        let tensor = AdapterTensor::new(module, part);
        assert_eq!(AdapterTensor::from_key(key, KeyForm::Peft), Some(tensor.clone()));
        assert_eq!(tensor.key(KeyForm::Peft), key);
    }
}

#[test]
fn own_methods_have_folders_of_their_own() {
    let own = |json: Value| read(json).unwrap();
    let xs = own(json!({"type": "lora_xs", "r": 8, "alpha": 16, "target_modules": ["q_proj"]}));
    assert_eq!((&xs.method, xs.scale_of(Q0)), (&MethodConfig::LoraXs, 2.0));
    let sb = own(json!({"type": "lora_sb", "r": 8, "alpha": 8, "eta": 0.001, "target_modules": ["q_proj"]}));
    assert_eq!((&sb.method, sb.scale_of(Q0)), (&MethodConfig::LoraSb { eta: Some(0.001) }, 1.0));
    let svfit = own(json!({"type": "svfit", "r": 16, "alpha": 16, "target_modules": ["q_proj"]}));
    assert_eq!((&svfit.method, svfit.r, svfit.scale_of(Q0)), (&MethodConfig::Svfit, 16, 1.0));
    let tucker = own(json!({"type": "tucker", "r_in": 4, "r_out": 6, "scale": 2.5, "target_modules": ["q_proj"]}));
    assert_eq!((tucker.r, tucker.scale_of(Q0)), (6, 2.5));
    let convolutions = json!({"type": "tucker", "r_in": 4, "r_out": 6, "r_rows": 3, "target_modules": ["convolution"]});
    let convolutions = own(convolutions);
    let method = MethodConfig::Tucker { r_in: 4, r_out: 6, r_rows: 3, r_columns: 2, scale: 4.0 };
    assert_eq!(convolutions.method, method);
    for mut config in [xs, sb, svfit, tucker, convolutions] {
        assert_eq!((read(config.to_json()).unwrap(), config.to_metadata()), (config.clone(), None));
        config.lora_dropout = 0.1;
        config.exclude_modules = Some(Modules::Names(vec![V1.to_string()]));
        config.layers_to_transform = vec![1];
        config.modules_to_save = vec![ModulePattern::part("lm_head").unwrap()];
        assert_eq!(read(config.to_json()).unwrap(), config);
    }
    let text = text_of(read(json!({"type": "lora_xs", "r": 8, "use_dora": true, "target_modules": ["q_proj"]})));
    assert_has(&text, &["`use_dora`: is set to true, which is not supported"]);
}

/// What changes the base at the start is a LoRA of twice the rank to every reader, and itself to us.
#[test]
fn a_start_in_the_base_is_stored_as_a_lora_of_twice_the_rank() {
    for use_rslora in [false, true] {
        for method in [
            MethodConfig::Pissa { niter: Some(4) },
            MethodConfig::Olora,
            MethodConfig::Corda { corda_method: crate::hf::peft::CordaMethod::Kpm },
        ] {
            let config = AdapterConfig {
                method,
                use_rslora,
                rank_pattern: vec![(ModulePattern::ending("v_proj").unwrap(), 3)],
                alpha_pattern: vec![(ModulePattern::ending("v_proj").unwrap(), 5.0)],
                ..AdapterConfig::new(8, 12.0, Modules::Names(vec!["q_proj".to_string(), "v_proj".to_string()]))
            };
            let stored = read(config.to_json()).unwrap();
            assert_eq!((&stored.method, stored.r, stored.rank_of(V1)), (&MethodConfig::Lora, 16, 6));
            for module in [Q0, V1] {
                let (ours, theirs) = (config.scale_of(module), stored.scale_of(module));
                assert!((ours - theirs).abs() < 1e-12 * ours, "{ours} {theirs}");
            }
            let note = config.to_metadata().unwrap();
            let back = stored.clone().with_metadata(&note, Path::new("adapter_model.safetensors")).unwrap();
            assert_eq!(back, config);
            let edited = AdapterConfig { r: 4, ..stored };
            let text = text_of(edited.with_metadata(&note, Path::new("adapter_model.safetensors")));
            assert_has(
                &text,
                &["metadata entry `lowrank`", "of rank 8 is stored as a LoRA of rank 16", "says 4", "hint:"],
            );
        }
    }
}

#[test]
fn the_note_in_the_tensor_file_gives_the_method_back() {
    let config = AdapterConfig {
        method: MethodConfig::Eora { trained: true },
        ..AdapterConfig::new(4, 4.0, Modules::Names(vec!["q_proj".to_string()]))
    };
    let folder = temp();
    put(folder.path(), &[("adapter_config.json", &config.to_json().to_string())]);
    assert_eq!(AdapterConfig::from_folder(folder.path()).unwrap().method, MethodConfig::Lora);
    let write = |metadata: &[(&str, &str)]| {
        let tensor = OutTensor::from_f32("base_model.model.q_proj.lora_A.weight", Dtype::F32, &[4, 1], vec![0.0; 4]);
        write_safetensors(&folder.path().join("adapter_model.safetensors"), vec![tensor], metadata).unwrap();
    };
    let metadata = config.file_metadata();
    assert_eq!(metadata[0], ("format", "pt".to_string()));
    write(&metadata.iter().map(|(key, text)| (*key, text.as_str())).collect::<Vec<_>>());
    assert_eq!(AdapterConfig::from_folder(folder.path()).unwrap(), config);
    write(&[("format", "pt")]);
    assert_eq!(AdapterConfig::from_folder(folder.path()).unwrap().method, MethodConfig::Lora);
    for (note, reason) in
        [("{", "not valid JSON"), ("[]", "expected an object"), ("{\"method\":\"x\"}", "expected pissa")]
    {
        write(&[(METADATA_KEY, note)]);
        assert_has(
            &text_of(AdapterConfig::from_folder(folder.path())),
            &["adapter_model.safetensors", reason, "hint:"],
        );
    }
}

/// peft has no exclusions for these methods: the targets are then listed one by one.
#[test]
fn exclusions_that_peft_cannot_say_become_names() {
    let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let (all, attached) = (names(&[Q0, Q1, V1, UP1, "lm_head"]), names(&[Q1]));
    let mut config = AdapterConfig::new(8, 8.0, Modules::Names(names(&["q_proj"])));
    config.exclude_modules = Some(Modules::Names(names(&["layers.0.self_attn.q_proj"])));
    assert_eq!(config.with_names(&attached, &all), config);
    config.method = MethodConfig::Vera { d_initial: 0.1, projection_prng_key: 0 };
    let named = config.with_names(&attached, &all);
    assert_eq!((named.target_modules, named.exclude_modules), (Modules::Names(attached.clone()), None));
    config = AdapterConfig::new(8, 8.0, Modules::AllLinear);
    assert_eq!(config.with_names(&names(&[Q0, Q1]), &all).target_modules, Modules::Names(names(&["q_proj"])));
}
