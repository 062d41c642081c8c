//! Predictions against sums by hand, for models whose parts can be counted.
#![allow(clippy::unwrap_used)]

use super::advice::suggestions;
use super::model::{Adapter, Format, LowRank};
use super::*;
use crate::config::{AdapterConfig, GradientCheckpointing, LoraConfig};

const CPU: Machine = Machine::Cpu { threads: 2 };
/// Hidden width, inner width, vocabulary, blocks.
const H: usize = 64;
const F: usize = 160;
const V: usize = 300;
const L: usize = 3;

fn decoder() -> DecoderConfig {
    let json = serde_json::json!({
        "model_type": "llama", "hidden_size": H, "intermediate_size": F, "num_hidden_layers": L, "vocab_size": V,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": false, "rope_theta": 10000.0,
    });
    DecoderConfig::from_json(&json.to_string(), "config.json".as_ref()).unwrap()
}

fn config() -> RunConfig {
    let mut config = RunConfig::default();
    config.data.max_seq_length = 128;
    config.training.max_steps = Some(10);
    config
}

fn lora(config: RunConfig) -> RunConfig {
    RunConfig { adapter: Some(AdapterConfig::Lora(LoraConfig { r: 4, ..LoraConfig::default() })), ..config }
}

/// Linear weights of a block: q and o, k and v, gate, up and down.
const BLOCK: usize = 2 * H * H + 2 * H * (H / 2) + 3 * H * F;
const ALL: usize = L * (BLOCK + 2 * H) + H + 2 * V * H;

#[test]
fn parameters_are_those_of_the_model() {
    let plan = predict(&config(), &decoder(), CPU).unwrap();
    assert_eq!((plan.total_parameters, plan.trainable_parameters), (ALL as u64, ALL as u64));
    assert_eq!(plan.of(Category::Weights), 4 * ALL as u64);
    assert_eq!(plan.resting_bytes, 12 * ALL as u64, "weights and two moments");
    let plan = predict(&lora(config()), &decoder(), CPU).unwrap();
    let factors = L * 4 * (2 * 2 * H + 2 * (H + H / 2) + 3 * (H + F));
    assert_eq!((plan.total_parameters, plan.trainable_parameters), ((ALL + factors) as u64, factors as u64));
    assert_eq!(plan.resting_bytes, (4 * ALL + 12 * factors) as u64);
    let bf16 = RunConfig { dtype: crate::config::Dtype::Bf16, ..lora(config()) };
    assert_eq!(predict(&bf16, &decoder(), CPU).unwrap().of(Category::Weights), 2 * ALL as u64);
}

/// What a block keeps, by hand: both normed streams, q, k, v, attention's output and its log-sum-exp, the sum in the middle,
/// gate, up and their product, and the block's output, which is the next one's input; with LoRA seven h more.
#[test]
fn a_block_keeps_what_its_operations_need() {
    let kept = |config: &RunConfig| {
        let one = predict(config, &decoder(), CPU).unwrap();
        let mut shorter = decoder();
        shorter.num_layers -= 1;
        shorter.layers.pop();
        let other = predict(config, &shorter, CPU).unwrap();
        let most = |plan: &Plan| plan.phases.iter().find(|peak| peak.phase == Phase::Forward).unwrap().bytes;
        (most(&one) - most(&other)) - (one.resting_bytes - other.resting_bytes)
    };
    let t = 128;
    let base = 4 * t * (2 * H + (H + 2 * (H / 2)) + H + H + H + 3 * F) + 4 * t * 4;
    assert_eq!(kept(&config()), base as u64);
    assert_eq!(kept(&lora(config())), (base + 4 * t * 7 * 4) as u64);
    let mut rebuilt = config();
    rebuilt.training.gradient_checkpointing = GradientCheckpointing::Block;
    assert_eq!(kept(&rebuilt), (4 * t * H) as u64, "the input alone");
}

/// A frozen A saves h alone: 28 numbers a token here, where a trained one keeps the inputs too.
#[test]
fn frozen_factors_keep_no_input() {
    let described = |frozen: bool| {
        let mut setup = setup::describe(&lora(config()), &decoder(), CPU).unwrap();
        for linear in setup.model.blocks.iter_mut().flat_map(|block| &mut block.linears) {
            if let (true, Some(Adapter::LowRank(LowRank { down, .. }))) = (frozen, &mut linear.adapter) {
                down.trained = false;
            }
        }
        let forward = of(&setup).phases.iter().find(|peak| peak.phase == Phase::Forward).unwrap().bytes;
        (forward, of(&setup).resting_bytes)
    };
    let ((trained, rest), (frozen, frozen_rest)) = (described(false), described(true));
    // Attention keeps its output itself, and the last product exists until the last layer has seen it.
    let inputs = 4 * 128 * (L * (2 * H + F) - F);
    assert_eq!((trained - rest) - (frozen - frozen_rest), inputs as u64);
}

#[test]
fn a_packed_base_takes_its_bits_and_one_dequantised_layer() {
    let mut setup = setup::describe(&lora(config()), &decoder(), CPU).unwrap();
    for linear in setup.model.blocks.iter_mut().flat_map(|block| &mut block.linears) {
        linear.weight.format = Format::NF4;
    }
    let packed: usize = setup.model.blocks[0].linears.iter().map(|linear| linear.weight.bytes()).sum();
    let plan = of(&setup);
    assert_eq!(plan.of(Category::Weights), (L * packed + 4 * (ALL - L * BLOCK)) as u64);
    let packed_values = (L * BLOCK) as u64;
    assert!(plan.storage.iter().any(|s| s.format == Format::NF4.name() && s.values == packed_values), "{plan:?}");
    let dense = 4 * H * F; // the widest layer while it is computed
    let forward = plan.phases.iter().find(|peak| peak.phase == Phase::Forward).unwrap().bytes;
    assert!(forward > plan.of(Category::Weights) + dense as u64);
}

/// Weights in a byte each and bases in half a byte, each with 5 bytes a group; moments of R.
#[test]
fn q_galore_rests_on_codes() {
    let mut config = config();
    config.optimizer = toml::from_str("q_galore = { rank = 8, group_size = 64, block_size = 64 }").unwrap();
    let plan = predict(&config, &decoder(), CPU).unwrap();
    let codes = BLOCK + 5 * BLOCK / 64;
    let plain = ALL - L * BLOCK;
    assert_eq!(plan.of(Category::Weights), (L * codes + 4 * plain) as u64);
    let outputs = 4 * H + 2 * F;
    let bases = |rows: usize| 4 * rows + (40 * (8 * rows).div_ceil(64)).div_ceil(8) + 4 * 8 * rows;
    let bases = L * (6 * bases(H) + bases(F));
    let moments = L * 8 * 8 * outputs; // f32: fewer than 4096 values a matrix
    assert_eq!(plan.resting_bytes, (L * codes + bases + moments + 12 * plain) as u64);
}

/// LLaMA 7B with Q-GaLore, one sequence of 2048 tokens, blocks rebuilt, layers updated at once: below 16 GiB on either machine.
/// Weights, bases and moments are those of the table in `optim/q_galore.rs`.
#[test]
fn seven_billion_parameters_fit_into_16_gib() {
    let json = include_str!("../../../../configs/pretrain/models/llama-7b/config.json");
    let decoder = DecoderConfig::from_json(json, "config.json".as_ref()).unwrap();
    let mut config = config();
    config.optimizer = toml::from_str("q_galore = { rank = 1024 }").unwrap();
    config.dtype = crate::config::Dtype::Bf16;
    config.data.max_seq_length = 2048;
    config.training.micro_batch_size = 1;
    config.training.max_grad_norm = 0.0;
    config.training.gradient_checkpointing = GradientCheckpointing::Block;
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    for machine in [CPU, Machine::Gpu] {
        let plan = predict(&config, &decoder, machine).unwrap();
        let shown = format!("{machine:?}: {} at {}", plan.summary(), plan.peak_phase.name());
        assert!(gib(plan.peak_bytes) < 16.0, "{:.2} GiB, {shown}", gib(plan.peak_bytes));
        assert!((gib(plan.resting_bytes) - 12.31).abs() < 0.01, "{:.3} GiB at rest, {shown}", gib(plan.resting_bytes));
        assert_eq!(plan.trainable_parameters, 6_738_415_616);
    }
}

#[test]
fn suggestions_save_what_they_say() {
    let mut config = config();
    config.training.micro_batch_size = 4;
    let plan = predict(&config, &decoder(), CPU).unwrap();
    let found = suggestions(&config, &decoder(), CPU, &plan).unwrap();
    assert!(found.windows(2).all(|pair| pair[0].peak_bytes <= pair[1].peak_bytes));
    let keys: Vec<&str> = found.iter().map(|suggestion| suggestion.set[0].split('=').next().unwrap()).collect();
    for key in ["training.gradient_checkpointing", "training.micro_batch_size", "data.max_seq_length"] {
        assert!(keys.contains(&key), "{keys:?}");
    }
    for suggestion in &found {
        assert_eq!(suggestion.peak_bytes + suggestion.saves_bytes, plan.peak_bytes);
    }
    config.training.gradient_checkpointing = GradientCheckpointing::Block;
    let plan = predict(&config, &decoder(), CPU).unwrap();
    assert_eq!(plan.peak_bytes, found.iter().find(|s| s.set[0].ends_with("block")).unwrap().peak_bytes);
}

#[test]
fn bytes_are_shown_with_three_digits() {
    let shown: Vec<String> = [0, 1023, 1024, 1536 << 10, 123 << 30].into_iter().map(show).collect();
    assert_eq!(shown, ["0 B", "1023 B", "1.00 KiB", "1.50 MiB", "123.0 GiB"]);
}
