//! `config.json` against what transformers makes of it (`config_reference.json`, written by `config_reference.py`), against
//! the tensors of real files, and the text of every error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lowrank_models::config::{Activation, DecoderConfig, LayerConfig, registry};
use serde_json::{Value, json};

type Shapes = BTreeMap<String, Vec<usize>>;

fn parse(config: &Value) -> DecoderConfig {
    DecoderConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap_or_else(|error| panic!("{error}"))
}

/// The message for a broken config, without the file name.
fn message(config: &Value) -> String {
    let error = DecoderConfig::from_json(&config.to_string(), Path::new("m/config.json")).unwrap_err().to_string();
    error.strip_prefix("m/config.json: ").unwrap_or_else(|| panic!("no file name in: {error}")).to_string()
}

fn expected_shapes(config: &DecoderConfig) -> Shapes {
    let tensors = config.expected_tensors();
    let count = tensors.len();
    let shapes: Shapes = tensors.into_iter().collect();
    assert_eq!(shapes.len(), count, "a name is listed twice");
    shapes
}

fn reference() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config_reference.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

/// Largest relative difference.
fn relative_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).map(|(ours, theirs)| (ours - theirs).abs() / theirs.abs()).fold(0.0, f32::max)
}

fn option_f32(value: &Value) -> Option<f32> {
    value.as_f64().map(|number| number as f32)
}

#[test]
fn every_case_of_the_reference() {
    let reference = reference();
    let cases = reference["cases"].as_array().unwrap();
    assert!(cases.len() >= 38, "{} cases", cases.len());
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let expected = &case["expected"];
        let config = parse(&case["config"]);
        let tensors: Shapes = serde_json::from_value(expected["tensors"].clone()).unwrap();
        assert_eq!(expected_shapes(&config), tensors, "{name}");
        check_layers(name, &config, expected);
        assert_eq!(config.attention_scale, option_f32(&expected["attention_scale"]).unwrap(), "{name}");
        assert_eq!(config.final_softcap, option_f32(&expected["final_softcap"]), "{name}");
        assert_eq!(config.attention_softcap, option_f32(&expected["attention_softcap"]), "{name}");
        assert_eq!(config.norm_eps, option_f32(&expected["norm_eps"]).unwrap(), "{name}");
        assert_eq!(json!(config.tie_word_embeddings), expected["tied"], "{name}");
        assert_eq!(json!(config.max_position_embeddings), expected["max_position_embeddings"], "{name}");
        assert_eq!(json!(config.bos_token_id), expected["bos"], "{name}");
        assert_eq!(json!(config.pad_token_id), expected["pad"], "{name}");
        let eos = match &expected["eos"] {
            Value::Null => json!([]),
            Value::Array(list) => json!(list),
            one => json!([one]),
        };
        assert_eq!(json!(config.eos_token_ids), eos, "{name}");
    }
}

fn check_layers(name: &str, config: &DecoderConfig, expected: &Value) {
    let kinds = expected["layer_types"].as_array().unwrap();
    assert_eq!(config.layers.len(), kinds.len(), "{name}");
    for (index, kind) in kinds.iter().enumerate() {
        let kind = kind.as_str().unwrap();
        let LayerConfig { window, rope } = config.layers[index];
        assert_eq!(json!(window), expected["windows"][index], "{name}, layer {index}");
        let rope = &config.ropes[rope];
        // One rounding of the power, one of the reciprocal, a few more in the blends.
        let difference = relative_difference(&rope.inv_freq, &floats(&expected["inv_freq"][kind]));
        assert!(difference < 4e-7, "{name}, layer {index}: frequencies differ by {difference:e}");
        let factor = expected["attention_factor"][kind].as_f64().unwrap();
        assert_eq!(rope.attention_factor, factor as f32, "{name}, layer {index}");
    }
}

#[test]
fn tables_of_cosines_and_sines() {
    let tables = &reference()["tables"];
    let positions: Vec<i32> = serde_json::from_value(tables["positions"].clone()).unwrap();
    let config = parse(&tables["config"]);
    let (cosines, sines) = config.rope_tables(0, &positions);
    let half = config.head_dim / 2;
    for (ours, theirs) in [(cosines, floats(&tables["cosines"])), (sines, floats(&tables["sines"]))] {
        assert_eq!(ours.len(), positions.len() * half);
        for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            // An ulp of the frequency turns into `position` ulps of the angle.
            let angle = positions[index / half] as f32 * config.ropes[0].inv_freq[index % half];
            let tolerance = 3e-7 + 2.4e-7 * angle;
            assert!((ours - theirs).abs() < tolerance, "index {index}: {ours} against {theirs}");
        }
    }
    assert_eq!(config.rope_tables(0, &[]), (vec![], vec![]));
}

#[test]
fn constants_of_gemma() {
    let config = parse(&json!({
        "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96,
        "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8,
    }));
    assert_eq!(config.architecture, "Gemma3ForCausalLM");
    assert_eq!(config.embedding_scale, Some(48f32.sqrt()));
    assert_eq!((config.norm_offset, config.activation), (1.0, Activation::GeluTanh));
    assert!(config.sandwich_norms && config.qk_norm && config.tie_word_embeddings && !config.qkv_bias);
    let ropes: Vec<usize> = config.layers.iter().map(|layer| layer.rope).collect();
    assert_eq!(ropes, [1, 1, 1, 1, 1, 0, 1]);
    let windows: Vec<Option<usize>> = config.layers.iter().map(|layer| layer.window).collect();
    assert_eq!(windows[4..], [Some(4096), None, Some(4096)]);
}

#[test]
fn gemma3_wrapper_of_a_text_model() {
    let text = json!({
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "head_dim": 8, "sliding_window": 4,
    });
    let wrapped = parse(&json!({"model_type": "gemma3", "architectures": ["Gemma3ForCausalLM"], "text_config": text}));
    let mut flat = text;
    flat["model_type"] = json!("gemma3_text");
    assert_eq!(wrapped, parse(&flat));
}

/// Names and shapes in the header of one safetensors file.
fn header(path: &Path) -> Shapes {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    header
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(|(name, tensor)| (name, serde_json::from_value(tensor["shape"].clone()).unwrap()))
        .collect()
}

fn tiny_models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models")
}

#[test]
fn tensors_of_the_tiny_models() {
    let names = ["gemma2", "llama", "llama-tied", "llama3", "mistral", "qwen2", "qwen3"];
    for name in names {
        let folder = tiny_models().join(format!("tiny-{name}"));
        let config = DecoderConfig::read(&folder).unwrap();
        let mut stored = Shapes::new();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                stored.extend(header(&path));
            }
        }
        assert_eq!(expected_shapes(&config), stored, "{name}");
        assert_eq!(config.layers.len(), config.num_layers);
    }
}

#[test]
fn other_kinds_of_tiny_models_are_refused_by_name() {
    for name in ["BertForSequenceClassification", "ViTForImageClassification"] {
        let kind = name.split("For").next().unwrap().to_lowercase();
        let error = DecoderConfig::read(&tiny_models().join(format!("tiny-{kind}"))).unwrap_err().to_string();
        assert!(error.contains(&format!("unknown architecture {name} (model_type {kind})")), "{error}");
    }
}

#[test]
fn ignorable_tensors() {
    let mut config = parse(&llama());
    assert!(config.is_ignorable("model.layers.3.self_attn.rotary_emb.inv_freq"));
    assert!(config.is_ignorable("model.rotary_emb.inv_freq"));
    assert!(!config.is_ignorable("lm_head.weight"));
    assert!(!config.is_ignorable("model.layers.0.self_attn.q_proj.bias"));
    config.tie_word_embeddings = true;
    assert!(config.is_ignorable("lm_head.weight"));
}

#[test]
fn linear_modules_in_model_order() {
    let modules = parse(&llama()).linear_modules();
    assert_eq!(modules.len(), 14);
    assert_eq!(modules[0], "model.layers.0.self_attn.q_proj");
    assert_eq!(modules[6], "model.layers.0.mlp.down_proj");
    assert_eq!(modules[7], "model.layers.1.self_attn.q_proj");
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    })
}

/// [`llama`] or another family with some keys set; null removes a key.
fn with(model_type: &str, changes: Value) -> Value {
    let mut config = llama();
    if model_type != "llama" {
        config["model_type"] = json!(model_type);
        config.as_object_mut().unwrap().remove("architectures");
    }
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

#[test]
fn text_of_errors() {
    let scaled = |scaling: Value| json!({ "rope_scaling": scaling });
    let one_kind = json!(["full_attention"]);
    let size = "a whole number from 1 to 2147483647";
    let cases = [
        ("llama", json!({"hidden_size": null}), format!("key `hidden_size` is missing: expected {size}")),
        ("llama", json!({"hidden_size": 0}), format!("key `hidden_size`: expected {size}, got 0")),
        ("llama", json!({"hidden_size": 32.0}), format!("key `hidden_size`: expected {size}, got 32.0")),
        ("llama", json!({"vocab_size": "64"}), format!("key `vocab_size`: expected {size}, got \"64\" (a string)")),
        ("llama", json!({"intermediate_size": -1}), format!("key `intermediate_size`: expected {size}, got -1")),
        ("llama", json!({"num_hidden_layers": 10001}), "key `num_hidden_layers`: expected a whole number from 1 to 10000, got 10001".into()),
        ("llama", json!({"num_attention_heads": [4]}), format!("key `num_attention_heads`: expected {size}, got [4] (a list)")),
        ("llama", json!({"num_key_value_heads": 3}), "key `num_key_value_heads`: expected a divisor of num_attention_heads (4), got 3".into()),
        ("llama", json!({"hidden_size": 34}), "key `hidden_size`: expected a multiple of num_attention_heads (4), or a head_dim, got 34".into()),
        ("llama", json!({"head_dim": 7}), "key `head_dim`: expected an even number of at most 65536 (rotary embeddings turn pairs), got 7".into()),
        ("llama", json!({"hidden_act": "relu6"}), "key `hidden_act`: expected silu, swish, gelu, gelu_python, gelu_new, gelu_fast, gelu_pytorch_tanh or gelu_python_tanh, got \"relu6\"".into()),
        ("llama", json!({"rms_norm_eps": 0}), "key `rms_norm_eps`: expected a number above 0, got 0".into()),
        ("llama", json!({"rms_norm_eps": -1e-6}), "key `rms_norm_eps`: expected a number above 0, got -1e-6".into()),
        ("llama", json!({"attention_bias": 1}), "key `attention_bias`: expected true or false, got 1".into()),
        ("llama", json!({"tie_word_embeddings": "yes"}), "key `tie_word_embeddings`: expected true or false, got \"yes\" (a string)".into()),
        ("llama", json!({"eos_token_id": [2, -3]}), "key `eos_token_id`: expected a token id, a list of token ids or null, got [2,-3] (a list)".into()),
        ("llama", json!({"bos_token_id": "<s>"}), "key `bos_token_id`: expected a token id or null, got \"<s>\" (a string)".into()),
        ("llama", json!({"pad_token_id": 64}), "key `pad_token_id`: expected less than vocab_size (64), got 64".into()),
        ("llama", json!({"architectures": "LlamaForCausalLM"}), "key `architectures`: expected a list of strings, got \"LlamaForCausalLM\" (a string)".into()),
        ("llama", json!({"rope_theta": 1}), "key `rope_theta`: expected a number above 1, got 1".into()),
        ("llama", json!({"rope_parameters": {"rope_theta": "1e4"}}), "key `rope_parameters.rope_theta`: expected a number above 0, got \"1e4\" (a string)".into()),
        ("llama", json!({"rope_scaling": 2.0}), "key `rope_scaling`: expected an object, got 2.0".into()),
        ("llama", scaled(json!({"type": "dynamic", "factor": 2.0})), "key `rope_scaling.type`: \"dynamic\" (a string) is not supported, expected default, linear, llama3 or yarn\nhint: choose a checkpoint without this kind of rotary scaling".into()),
        ("llama", json!({"rope_parameters": {"rope_type": "longrope"}}), "key `rope_parameters.rope_type`: \"longrope\" (a string) is not supported, expected default, linear, llama3 or yarn\nhint: choose a checkpoint without this kind of rotary scaling".into()),
        ("llama", scaled(json!({"type": "linear"})), "key `rope_scaling.factor` is missing: expected a number above 0".into()),
        ("llama", scaled(json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})), "key `rope_scaling.high_freq_factor`: expected a number above low_freq_factor (4), got 4".into()),
        ("llama", scaled(json!({"rope_type": "yarn", "factor": -4})), "key `rope_scaling.factor`: expected a number above 0, got -4".into()),
        ("llama", json!({"partial_rotary_factor": 0.5}), "key `partial_rotary_factor`: 0.5 is not supported, expected 1 (the whole head turns)\nhint: choose a checkpoint whose heads are rotated whole".into()),
        ("llama", json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "key `rope_parameters`: {\"full_attention\":{\"rope_type\":\"default\"}} (an object) is not supported, expected one set of rotary parameters for all layers\nhint: only Gemma 3 has rotary parameters per layer type".into()),
        ("llama", json!({"quantization_config": {"quant_method": "awq"}}), "key `quantization_config`: {\"quant_method\":\"awq\"} (an object) is not supported, expected a checkpoint with plain weights (f32, f16 or bf16)\nhint: use the unquantised checkpoint as base_model; this program quantises it itself ([quantization.<format>])".into()),
        ("mistral", json!({"sliding_window": 0}), format!("key `sliding_window`: expected {size}, got 0")),
        ("qwen2", json!({"layer_types": one_kind}), "key `layer_types`: expected one entry per layer (num_hidden_layers is 2), got 1 entries".into()),
        ("qwen2", json!({"layer_types": ["full_attention", "chunked_attention"]}), "key `layer_types`: expected full_attention or sliding_attention, got \"chunked_attention\"".into()),
        ("qwen3", json!({"layer_types": ["full_attention", "sliding_attention"]}), "key `sliding_window`: expected a window of at least 1, because some layers slide, got none".into()),
        ("qwen2", json!({"max_window_layers": -1}), "key `max_window_layers`: expected a whole number, got -1".into()),
        ("gemma2", json!({"sliding_window": null}), "key `sliding_window`: expected a window of at least 1, because some layers slide, got none".into()),
        ("gemma2", json!({"attn_logit_softcapping": 0}), "key `attn_logit_softcapping`: expected a number above 0, got 0".into()),
        ("gemma2", json!({"use_bidirectional_attention": true}), "key `use_bidirectional_attention`: true is not supported, expected false\nhint: encoders made from Gemma (EmbeddingGemma) are not causal language models".into()),
        ("gemma3_text", json!({"sliding_window_pattern": 0}), format!("key `sliding_window_pattern`: expected {size}, got 0")),
        ("gemma3_text", json!({"rope_parameters": {"rope_theta": 1e6}}), "key `rope_parameters`: {\"rope_theta\":1000000.0} (an object) is not supported, expected the keys full_attention and sliding_attention, each with its rotary parameters\nhint: write rope_theta, rope_local_base_freq and rope_scaling at the top level instead".into()),
        ("gemma3", json!({"vision_config": {"depth": 2}}), "key `vision_config`: {\"depth\":2} (an object) is not supported, expected a text model without a vision tower\nhint: use a text-only checkpoint (Gemma3ForCausalLM), such as one saved from the text part of this model".into()),
        ("gemma3", json!({"architectures": ["Gemma3ForConditionalGeneration"]}), "key `architectures`: [\"Gemma3ForConditionalGeneration\"] (a list) is not supported, expected Gemma3ForCausalLM\nhint: use a text-only checkpoint (Gemma3ForCausalLM), such as one saved from the text part of this model".into()),
        ("gemma3", json!({"text_config": {"vocab_size": 0}}), format!("key `text_config.vocab_size`: expected {size}, got 0")),
    ];
    for (model_type, changes, expected) in cases {
        assert_eq!(message(&with(model_type, changes.clone())), expected, "{model_type} with {changes}");
    }
}

#[test]
fn unknown_architecture_lists_the_known_ones() {
    let expected = "unknown architecture GPT2LMHeadModel (model_type gpt2)
expected one of:
  LlamaForCausalLM (model_type llama)
  MistralForCausalLM (model_type mistral)
  Qwen2ForCausalLM (model_type qwen2)
  Qwen3ForCausalLM (model_type qwen3)
  Gemma2ForCausalLM (model_type gemma2)
  Gemma3ForCausalLM (model_type gemma3_text)
  Gemma3ForCausalLM or Gemma3ForConditionalGeneration (model_type gemma3)
hint: choose a base_model of one of these families";
    assert_eq!(message(&json!({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})), expected);
    assert!(message(&json!({})).starts_with("unknown architecture (none given) (model_type (none given))\n"));
    // A head that is not a language model's.
    let classifier = with("llama", json!({"architectures": ["LlamaForSequenceClassification"]}));
    assert!(
        message(&classifier).starts_with("unknown architecture LlamaForSequenceClassification (model_type llama)\n")
    );
    for row in registry() {
        assert!(expected.contains(row.model_type));
    }
}

#[test]
fn files_that_are_not_a_config() {
    let error = |text: &str| DecoderConfig::from_json(text, Path::new("m/config.json")).unwrap_err().to_string();
    assert_eq!(error("[1]"), "m/config.json: expected a JSON object, got [1] (a list)");
    let cut_off = "m/config.json: not valid JSON: EOF while parsing an object at line 2 column 17\n\
                   hint: the file may be cut off; fetch the checkpoint again";
    assert_eq!(error("{\n \"vocab_size\": 64"), cut_off);
    let missing = DecoderConfig::read(Path::new("no/such/folder")).unwrap_err().to_string();
    assert!(missing.starts_with("no/such/folder/config.json: cannot read: No such file"), "{missing}");
}

#[test]
fn an_architecture_alone_or_a_model_type_alone_is_enough() {
    let with_both = parse(&llama());
    let mut config = llama();
    config.as_object_mut().unwrap().remove("model_type");
    assert_eq!(parse(&config), with_both);
    config["model_type"] = json!("llama");
    config["architectures"] = Value::Null;
    assert_eq!(parse(&config), with_both);
}

#[test]
fn a_pad_token_of_minus_one_is_none() {
    assert_eq!(parse(&with("llama", json!({"pad_token_id": -1}))).pad_token_id, None);
}

/// Every key of every reference config, nested ones too, replaced by values of all kinds: an error or a config that holds
/// together, never a panic.
#[test]
fn no_value_of_any_key_panics() {
    let values =
        json!([null, true, -1, 0, 1, 3, 9007199254740992u64, 1e300, 1e-300, "x", [], ["x"], [-1], {}, {"a": 1}]);
    for case in reference()["cases"].as_array().unwrap() {
        for pointer in pointers(&case["config"]) {
            for value in values.as_array().unwrap() {
                let mut config = case["config"].clone();
                *config.pointer_mut(&pointer).unwrap() = value.clone();
                if let Ok(config) = DecoderConfig::from_json(&config.to_string(), Path::new("config.json")) {
                    check_invariants(&config, &format!("{pointer} = {value}"));
                }
            }
        }
    }
}

fn pointers(config: &Value) -> Vec<String> {
    let Some(map) = config.as_object() else {
        return Vec::new();
    };
    let below = |(key, value): (&String, &Value)| {
        let nested = pointers(value).into_iter().map(move |rest| format!("/{key}{rest}"));
        std::iter::once(format!("/{key}")).chain(nested).collect::<Vec<_>>()
    };
    map.iter().flat_map(below).collect()
}

fn check_invariants(config: &DecoderConfig, what: &str) {
    assert_eq!(config.layers.len(), config.num_layers, "{what}");
    assert_eq!(config.num_heads % config.num_kv_heads, 0, "{what}");
    assert!(config.layers.iter().all(|layer| layer.rope < config.ropes.len()), "{what}");
    for rope in &config.ropes {
        assert_eq!(rope.inv_freq.len() * 2, config.head_dim, "{what}");
        let finite = rope.inv_freq.iter().all(|frequency| frequency.is_finite());
        assert!(finite && rope.attention_factor.is_finite(), "{what}: {rope:?}");
    }
    let numbers = [config.attention_scale, config.norm_eps, config.initializer_range];
    assert!(numbers.iter().all(|number| number.is_finite()), "{what}");
    assert!(!config.expected_tensors().is_empty(), "{what}");
}
