//! What a projected backward pass keeps in memory, read from a log of all allocations.
//!
//! The model is chosen so that a weight of a block is larger than every activation; nothing else has its size.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicIsize, AtomicUsize, Ordering};

use burn::module::Module;
use burn::tensor::Tensor;
use lowrank_core::optim::Optimizer;
use lowrank_core::optim::adamw::StepRule;
use lowrank_models::{Batch, Decoder, Inputs, load, parameters};
use lowrank_train::config::{GradientCheckpointing, OptimizerConfig, RunConfig};
use lowrank_train::optimizer;
use lowrank_train::step::StepOptions;
use lowrank_train::train_loop::{StepPlan, optimizer_step};

// Not multiples of what products pad their own copies to, so that those have other sizes.
const HIDDEN: usize = 248;
const INNER: usize = 644;
const RANK: usize = 24;
const TOKENS: usize = 32;

/// The system's allocator with a log.
struct Logged;

static IS_LOGGING: AtomicBool = AtomicBool::new(false);
/// Allocations of the exact size of a weight of a block.
static OF_WEIGHT_SIZE: AtomicUsize = AtomicUsize::new(0);
/// Allocations of this size that are not yet freed, and the most of them while logging.
static WEIGHTS_LIVE: AtomicIsize = AtomicIsize::new(0);
static MOST_WEIGHTS: AtomicIsize = AtomicIsize::new(0);
/// Bytes allocated and not yet freed.
static LIVE: AtomicIsize = AtomicIsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Logged {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        if is_weight(layout.size()) {
            WEIGHTS_LIVE.fetch_sub(1, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Logged = Logged;

fn note(size: usize) {
    LIVE.fetch_add(size as isize, Ordering::Relaxed);
    if is_weight(size) {
        let live = WEIGHTS_LIVE.fetch_add(1, Ordering::Relaxed) + 1;
        if IS_LOGGING.load(Ordering::Relaxed) {
            OF_WEIGHT_SIZE.fetch_add(1, Ordering::Relaxed);
            MOST_WEIGHTS.fetch_max(live, Ordering::Relaxed);
        }
    }
}

fn is_weight(size: usize) -> bool {
    [4 * HIDDEN * HIDDEN, 4 * HIDDEN * INNER].contains(&size)
}

/// The counters belong to the process: one test at a time.
static ALONE: Mutex<()> = Mutex::new(());

fn model() -> Decoder {
    let folder = tempfile::tempdir().unwrap();
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
        "tie_word_embeddings": false, "initializer_range": 0.02, "rope_theta": 10000.0,
    });
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let device = lowrank_train::device::choose("cpu").unwrap().device;
    let decoder = load::random(folder.path(), burn::tensor::FloatDType::F32, 1, &device).unwrap();
    parameters::set_trained(decoder, |_| Some(true))
}

fn optimizer_of(table: &str, decoder: &mut Decoder) -> Optimizer {
    let table: OptimizerConfig = toml::from_str(table).unwrap();
    let mut config = RunConfig { optimizer: table, ..RunConfig::default() };
    config.data.max_seq_length = TOKENS;
    optimizer::build(&config, decoder).unwrap()
}

fn batch() -> Batch {
    let ids: Vec<i32> = (0..TOKENS as i32).map(|i| 3 + (i * 7) % 60).collect();
    Batch::from_rows(std::slice::from_ref(&ids), std::slice::from_ref(&ids), None)
}

/// Allocations of a weight's size in one step, the update included.
fn weight_sized(decoder: &mut Decoder, optimizer: &mut Optimizer, step: u64) -> usize {
    let batch = batch();
    let plan = StepPlan {
        options: StepOptions { checkpointing: GradientCheckpointing::None, head_chunk_tokens: 64, seed: 0 },
        step,
        max_grad_norm: 1.0,
        denominators: &[batch.target_count() as f64],
        first_key: step,
        rule: &|_, _, gradient_scale| StepRule { learning_rate: 1e-3, weight_decay: 0.0, gradient_scale },
        immediate: false,
    };
    OF_WEIGHT_SIZE.store(0, Ordering::Relaxed);
    IS_LOGGING.store(true, Ordering::Relaxed);
    let report = optimizer_step(decoder, optimizer, std::slice::from_ref(&batch), &plan);
    IS_LOGGING.store(false, Ordering::Relaxed);
    assert!(report.applied, "{report:?}");
    OF_WEIGHT_SIZE.load(Ordering::Relaxed)
}

/// Between refreshes nothing of a weight's size is allocated: no gradient, no copy, no update beside the weight. Full training
/// allocates a gradient for each of the 14 matrices.
#[test]
fn no_tensor_of_a_weights_size_exists_in_an_ordinary_step() {
    let _alone = ALONE.lock();
    let mut counts = vec![];
    for table in ["adamw = {}", "galore = { rank = 24, stagger = false }"] {
        let mut decoder = model();
        let mut optimizer = optimizer_of(table, &mut decoder);
        weight_sized(&mut decoder, &mut optimizer, 0); // the refresh; weights become row-major
        counts.push(weight_sized(&mut decoder, &mut optimizer, 1));
    }
    assert!(counts[0] >= 14, "full training: {counts:?}");
    assert_eq!(counts[1], 0, "projected training");
}

/// Bytes that a block keeps between forward and backward.
fn saved_bytes(decoder: &Decoder) -> isize {
    let inputs = Inputs::new(&batch(), &decoder.config, 0, &decoder.device());
    let config = &decoder.config;
    let x = Tensor::<2>::ones([TOKENS, HIDDEN], &decoder.device());
    let run = || {
        let lifted = decoder.model.layers[0].clone().train();
        let input = Tensor::from_inner(x.clone()).require_grad();
        let out = lifted.forward(input.clone(), &inputs, config, config.layers[0], true, None);
        (lifted, input, out)
    };
    drop(run()); // whatever is allocated once
    let before = LIVE.load(Ordering::Relaxed);
    let kept = run();
    let after = LIVE.load(Ordering::Relaxed);
    drop(kept);
    after - before
}

/// On the input side a layer saves `x P` in place of x. In a block three inputs are kept for their layers alone: the two
/// normed streams and the gated product (the attention's output is needed by its own backward).
#[test]
fn projected_layers_save_t_times_r() {
    let _alone = ALONE.lock();
    let mut decoder = model();
    let full = saved_bytes(&decoder);
    let mut optimizer = optimizer_of("galore = { rank = 24, norm_sketch = 8 }", &mut decoder);
    for step in 0..2 {
        weight_sized(&mut decoder, &mut optimizer, step); // leaves the bases with the layers
    }
    weight_sized(&mut decoder, &mut optimizer, 2);
    let projected = saved_bytes(&decoder);
    let inputs = TOKENS * (2 * HIDDEN + INNER);
    let instead = TOKENS * 7 * (RANK + 8);
    let want = 4 * (inputs as isize - instead as isize);
    let saved = full - projected;
    // Nodes of the tape differ by a few hundred bytes.
    assert!((saved - want).abs() < 4096, "{saved} bytes less are kept, expected {want}; {full} and {projected}");
}

/// Q-GaLore holds its weights in a byte each: between steps nothing of a weight's size in f32 is there, and in a step the values of
/// one matrix at a time. What is held agrees with the sizes of the codes.
#[test]
fn quantised_weights_exist_one_at_a_time() {
    let _alone = ALONE.lock();
    const TABLE: &str = "q_galore = { rank = 24, update_proj_gap = 2 }";
    drop(optimizer_of(TABLE, &mut model())); // whatever is allocated once
    let before = (LIVE.load(Ordering::Relaxed), WEIGHTS_LIVE.load(Ordering::Relaxed));
    let mut decoder = model();
    let dense = LIVE.load(Ordering::Relaxed) - before.0;
    assert_eq!(WEIGHTS_LIVE.load(Ordering::Relaxed) - before.1, 14);
    let mut optimizer = optimizer_of(TABLE, &mut decoder);
    let packed = LIVE.load(Ordering::Relaxed) - before.0;
    assert_eq!(WEIGHTS_LIVE.load(Ordering::Relaxed) - before.1, 0);
    let values = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INNER);
    let saved = 4 * values - (values + 5 * values / 256);
    // Modules and the optimiser's own objects are a few hundred bytes a layer.
    let off = (dense - packed) - saved as isize;
    assert!(off.abs() < 32 << 10, "{off} bytes more are saved than {saved}");
    for step in 0..4 {
        MOST_WEIGHTS.store(0, Ordering::Relaxed);
        weight_sized(&mut decoder, &mut optimizer, step);
        let most = MOST_WEIGHTS.load(Ordering::Relaxed) - before.1;
        assert!((1..=2).contains(&most), "{most} buffers of a weight's size in step {step}");
        assert_eq!(WEIGHTS_LIVE.load(Ordering::Relaxed) - before.1, 0, "after step {step}");
    }
}
