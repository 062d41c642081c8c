//! Predicted memory against the allocations of real training steps on the CPU.
//!
//! Every case is a configuration; its model has a few million random parameters. What is measured is the most bytes allocated at
//! any moment of the steps, beyond what was allocated before the model was made.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicIsize, Ordering};

use burn::tensor::FloatDType;
use lowrank_core::adapters::Statistics;
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::quant::Quantisation;
use lowrank_core::random::Stream;
use lowrank_models::classifier::{self, Classifier, ClassifierConfig, Input, Labels};
use lowrank_models::config::DecoderConfig;
use lowrank_models::network::{Network, NetworkBatch};
use lowrank_models::{Batch, ClassifierBatch, Decoder, hf, load, parameters, save};
use lowrank_train::attach;
use lowrank_train::classification::save_whole;
use lowrank_train::config::{Dtype, ProgressStyle, QuantizationConfig, RunConfig};
use lowrank_train::optimizer;
use lowrank_train::plan::{self, Machine, Plan, Subject, show};
use lowrank_train::step::StepOptions;
use lowrank_train::train_loop::{StepPlan, optimizer_step};

/// Largest difference between prediction and measurement, as a share of the measurement.
const TOLERANCE: f64 = 0.10;
/// Steps that are measured: the first, ordinary ones, and refreshes with `update_proj_gap = 4`.
const STEPS: u64 = 6;

/// The system's allocator with a count.
struct Counted;

/// Bytes allocated and not yet freed, and the most of them.
static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

fn note(bytes: isize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        note(layout.size() as isize);
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        note(-(layout.size() as isize));
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size as isize - layout.size() as isize);
        // SAFETY: passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// Grouped queries, an untied head: 3.9 million parameters.
const LLAMA: &str = r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": false,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "initializer_range": 0.02}"#;
/// Norms of the heads, a tied head, a vocabulary that outweighs the blocks: 3.5 million parameters.
const QWEN: &str = r#"{"model_type": "qwen3", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 48, "vocab_size": 12000, "tie_word_embeddings": true,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "initializer_range": 0.02}"#;
/// Biases of q, k and v.
const QWEN2: &str = r#"{"model_type": "qwen2", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 2000, "tie_word_embeddings": false,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "initializer_range": 0.02}"#;
/// Sandwich norms, two windows, capped logits.
const GEMMA: &str = r#"{"model_type": "gemma2", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4000, "sliding_window": 64,
    "max_position_embeddings": 4096, "rope_theta": 10000.0, "query_pre_attn_scalar": 64, "initializer_range": 0.02,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}"#;
/// Norms behind the sums, positions for 512 tokens: 3.9 million parameters.
const BERT: &str = r#"{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 256,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2000, "type_vocab_size": 2,
    "max_position_embeddings": 512, "hidden_dropout_prob": 0.0, "initializer_range": 0.02}"#;
/// The same with the dropout that most checkpoints have.
const BERT_DROPS: &str = r#"{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 256,
    "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 2000, "type_vocab_size": 2,
    "max_position_embeddings": 512, "hidden_dropout_prob": 0.1, "initializer_range": 0.02}"#;
/// Norms before the layers, 65 patches and tokens of an image: 2.4 million parameters.
const VIT: &str = r#"{"model_type": "vit", "architectures": ["ViTForImageClassification"], "hidden_size": 192,
    "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 6, "image_size": 128, "patch_size": 16,
    "num_channels": 3, "hidden_dropout_prob": 0.0, "initializer_range": 0.02}"#;

/// Name, `config.json` of the model, settings.
const CASES: &[(&str, &str, &str)] = &[
    ("full", LLAMA, "data.max_seq_length = 256"),
    ("full, long", LLAMA, "data.max_seq_length = 1536"),
    ("full, short", LLAMA, "data.max_seq_length = 32"),
    ("full, four rows", LLAMA, "data.max_seq_length = 128\ntraining.micro_batch_size = 4"),
    ("full, rebuilt blocks", LLAMA, "data.max_seq_length = 1024\ntraining.gradient_checkpointing = 'block'"),
    ("full, two micro batches", LLAMA, "data.max_seq_length = 256\ntraining.gradient_accumulation_steps = 2"),
    ("full, updated at once", LLAMA, "data.max_seq_length = 64\ntraining.max_grad_norm = 0"),
    ("full, one chunk", QWEN, "data.max_seq_length = 512\ntraining.head_chunk_tokens = 4096"),
    ("full, small chunks", QWEN, "data.max_seq_length = 512\ntraining.head_chunk_tokens = 64"),
    ("full, biases", QWEN2, "data.max_seq_length = 256"),
    ("full, sandwich", GEMMA, "data.max_seq_length = 256"),
    ("lora", LLAMA, "data.max_seq_length = 512\nadapter.lora.r = 8"),
    ("lora, long", LLAMA, "data.max_seq_length = 1536\nadapter.lora.r = 8"),
    ("lora, short", LLAMA, "data.max_seq_length = 64\nadapter.lora.r = 16"),
    (
        "lora, rebuilt blocks",
        LLAMA,
        "data.max_seq_length = 1024\nadapter.lora.r = 8\ntraining.gradient_checkpointing = 'block'",
    ),
    ("lora, dropout", LLAMA, "data.max_seq_length = 512\nadapter.lora = { r = 8, lora_dropout = 0.1 }"),
    (
        "lora, two modules",
        LLAMA,
        "data.max_seq_length = 512\nadapter.lora = { r = 8, target_modules = ['q_proj', 'v_proj'] }",
    ),
    ("lora, upper blocks", LLAMA, "data.max_seq_length = 512\nadapter.lora = { r = 8, layers_to_transform = [2, 3] }"),
    ("lora, large rank", LLAMA, "data.max_seq_length = 1024\nadapter.lora.r = 128"),
    ("lora, head saved", LLAMA, "data.max_seq_length = 256\nadapter.lora = { r = 8, modules_to_save = ['lm_head'] }"),
    ("lora, tied", QWEN, "data.max_seq_length = 384\nadapter.lora.r = 8"),
    ("lora, bf16", LLAMA, "data.max_seq_length = 256\nadapter.lora.r = 8\ndtype = 'bf16'"),
    ("dora", LLAMA, "data.max_seq_length = 512\nadapter.dora.r = 8"),
    ("dora, dropout", LLAMA, "data.max_seq_length = 512\nadapter.dora = { r = 8, lora_dropout = 0.1 }"),
    ("pissa", LLAMA, "data.max_seq_length = 512\nadapter.pissa.r = 8"),
    ("lora_xs", LLAMA, "data.max_seq_length = 512\nadapter.lora_xs.r = 16"),
    (
        "lora_sb",
        LLAMA,
        "data.max_seq_length = 512\nadapter.lora_sb = { r = 16, target_modules = ['q_proj', 'o_proj'] }",
    ),
    ("svfit", LLAMA, "data.max_seq_length = 512\nadapter.svfit.r = 64"),
    ("vera", LLAMA, "data.max_seq_length = 512\nadapter.vera.r = 64"),
    ("randlora", LLAMA, "data.max_seq_length = 512\nadapter.randlora.r = 32"),
    ("tucker", LLAMA, "data.max_seq_length = 512\nadapter.tucker = { r_in = 8, r_out = 8 }"),
    ("hra", LLAMA, "data.max_seq_length = 512\nadapter.hra.r = 8"),
    ("oft", LLAMA, "data.max_seq_length = 512\nadapter.oft.oft_block_size = 16"),
    ("qlora", LLAMA, "data.max_seq_length = 512\nadapter.lora.r = 8\nquantization.nf4 = {}"),
    (
        "qlora, rebuilt blocks",
        LLAMA,
        "data.max_seq_length = 512\nadapter.lora.r = 8\nquantization.nf4 = {}\ntraining.gradient_checkpointing = 'block'",
    ),
    ("galore", LLAMA, "data.max_seq_length = 256\noptimizer.galore = { rank = 32, update_proj_gap = 4 }"),
    ("galore, long", LLAMA, "data.max_seq_length = 1024\noptimizer.galore = { rank = 32, update_proj_gap = 4 }"),
    (
        "galore, all at once",
        LLAMA,
        "data.max_seq_length = 256\noptimizer.galore = { rank = 32, update_proj_gap = 4, stagger = false }",
    ),
    (
        "galore, output side",
        LLAMA,
        "data.max_seq_length = 512\noptimizer.galore = { rank = 32, update_proj_gap = 4, proj_type = 'output' }",
    ),
    (
        "galore, both sides",
        LLAMA,
        "data.max_seq_length = 512\noptimizer.galore = { rank = 32, update_proj_gap = 4, proj_type = 'full' }",
    ),
    (
        "galore, exact",
        LLAMA,
        "data.max_seq_length = 128\noptimizer.galore = { rank = 32, update_proj_gap = 4, exact = true }",
    ),
    (
        "galore, at once",
        LLAMA,
        "data.max_seq_length = 128\ntraining.max_grad_norm = 0\noptimizer.galore = { rank = 32, update_proj_gap = 4 }",
    ),
    (
        "galore, 8 bits",
        LLAMA,
        "data.max_seq_length = 128\noptimizer.galore = { rank = 64, update_proj_gap = 4, inner = 'adamw8bit' }",
    ),
    (
        "galore, lagged",
        LLAMA,
        "data.max_seq_length = 256\ntraining.gradient_accumulation_steps = 2\noptimizer.galore = { rank = 32, update_proj_gap = 4 }",
    ),
    (
        "galore, deferred",
        LLAMA,
        "data.max_seq_length = 256\noptimizer.galore = { rank = 32, update_proj_gap = 4, merge = 'deferred' }",
    ),
    (
        "galore, bf16 weights",
        LLAMA,
        "data.max_seq_length = 256\noptimizer.galore = { rank = 32, update_proj_gap = 4, weights = 'bf16' }",
    ),
    (
        "galore, muon",
        LLAMA,
        "data.max_seq_length = 128\noptimizer.galore = { rank = 64, update_proj_gap = 4, inner = 'muon' }",
    ),
    ("q_galore", LLAMA, "data.max_seq_length = 256\noptimizer.q_galore = { rank = 32, update_proj_gap = 4 }"),
    (
        "q_galore, output side",
        LLAMA,
        "data.max_seq_length = 128\noptimizer.q_galore = { rank = 32, update_proj_gap = 4, proj_type = 'output' }",
    ),
    (
        "q_galore, f32 weights",
        LLAMA,
        "data.max_seq_length = 256\noptimizer.q_galore = { rank = 32, update_proj_gap = 4, weights = 'f32' }",
    ),
    (
        "q_galore, at once",
        LLAMA,
        "data.max_seq_length = 64\ntraining.max_grad_norm = 0\ntraining.gradient_checkpointing = 'block'\n\
         optimizer.q_galore = { rank = 32, update_proj_gap = 4 }",
    ),
    (
        "galore, bf16 run",
        LLAMA,
        "data.max_seq_length = 256\ndtype = 'bf16'\noptimizer.galore = { rank = 32, update_proj_gap = 4 }",
    ),
    ("full, bf16 run", LLAMA, "data.max_seq_length = 256\ndtype = 'bf16'"),
    ("dct", LLAMA, "data.max_seq_length = 256\noptimizer.dct_adamw = { rank = 32 }"),
    (
        "dct, projected",
        LLAMA,
        "data.max_seq_length = 256\noptimizer.dct_adamw = { rank = 32, update_proj_gap = 4, projected = true }",
    ),
    ("intrinsic", LLAMA, "data.max_seq_length = 128\noptimizer.intrinsic = { dims = 500 }"),
    ("apollo", LLAMA, "data.max_seq_length = 256\noptimizer.apollo = { rank = 32, update_proj_gap = 4 }"),
    ("fira", LLAMA, "data.max_seq_length = 256\noptimizer.fira = { rank = 32, update_proj_gap = 4 }"),
    ("ldadam", LLAMA, "data.max_seq_length = 256\noptimizer.ldadam = { rank = 32 }"),
    ("bert, full", BERT, "data.max_seq_length = 256"),
    ("bert, full, long", BERT, "data.max_seq_length = 1024"),
    ("bert, full, short", BERT, "data.max_seq_length = 32"),
    ("bert, full, dropout", BERT_DROPS, "data.max_seq_length = 256"),
    ("bert, lora", BERT, "data.max_seq_length = 256\ntraining.micro_batch_size = 4\nadapter.lora.r = 8"),
    ("bert, lora, dropout", BERT_DROPS, "data.max_seq_length = 512\nadapter.lora = { r = 8, lora_dropout = 0.1 }"),
    (
        "bert, lora, rebuilt blocks",
        BERT,
        "data.max_seq_length = 512\nadapter.lora.r = 8\ntraining.gradient_checkpointing = 'block'",
    ),
    ("bert, lora, bf16", BERT, "data.max_seq_length = 256\nadapter.lora.r = 8\ndtype = 'bf16'"),
    ("bert, dora", BERT, "data.max_seq_length = 512\nadapter.dora.r = 8"),
    ("bert, qlora", BERT, "data.max_seq_length = 512\nadapter.lora.r = 8\nquantization.nf4 = {}"),
    ("bert, galore", BERT, "data.max_seq_length = 128\noptimizer.galore = { rank = 32, update_proj_gap = 4 }"),
    ("vit, full", VIT, "training.micro_batch_size = 4"),
    ("vit, lora", VIT, "training.micro_batch_size = 8\nadapter.lora.r = 8"),
    ("vit, qlora", VIT, "training.micro_batch_size = 8\nadapter.lora.r = 8\nquantization.nf4 = {}"),
];

/// The classifier of a case, as a run makes it.
fn classifier(folder: &std::path::Path, config: &RunConfig) -> Classifier {
    let device = lowrank_train::device::choose("cpu").unwrap().device;
    let dtype = if config.dtype == Dtype::Bf16 { FloatDType::BF16 } else { FloatDType::F32 };
    let packs = config.quantization.is_some();
    let quantise = |_: &str| packs.then_some(Quantisation::NF4);
    let mut model = classifier::random_quantised(folder, dtype, &quantise, 1, None, &device).unwrap();
    let Some(adapter) = &config.adapter else { return parameters::set_trained(model, |_| Some(true)) };
    let mut settings = attach::settings(config, adapter).unwrap();
    save_whole(&mut settings, &model.config, &[]).unwrap();
    attach::fresh(&mut model, settings, &Default::default(), folder, 1, ProgressStyle::None).unwrap();
    model
}

fn classifier_batch(config: &RunConfig, model: &ClassifierConfig) -> ClassifierBatch {
    let (rows, stream) = (config.training.micro_batch_size, Stream::new(1, "inputs"));
    let input = match model.image() {
        Some((channels, Some([height, width]))) => {
            let values = 0..(rows * channels * height * width) as u64;
            Input::Image { rows, channels, height, width, pixels: values.map(|i| stream.normal(i) as f32).collect() }
        }
        _ => {
            let cols = config.data.max_seq_length.min(model.max_tokens().unwrap());
            let ids = (0..(rows * cols) as u64).map(|i| (3 + stream.bits(i) % 1990) as i32).collect();
            Input::Text { rows, cols, ids, types: vec![0; rows * cols], mask: vec![1; rows * cols] }
        }
    };
    ClassifierBatch { input, labels: Labels::Classes((0..rows as i32).map(|row| row % 2).collect()), records: vec![] }
}

/// The decoder of a case, as a run makes it.
fn decoder(folder: &std::path::Path, config: &RunConfig) -> Decoder {
    let device = lowrank_train::device::choose("cpu").unwrap().device;
    let dtype = if config.dtype == Dtype::Bf16 { FloatDType::BF16 } else { FloatDType::F32 };
    let random = || load::random(folder, dtype, 1, &device).unwrap();
    let Some(adapter) = &config.adapter else { return parameters::set_trained(random(), |_| Some(true)) };
    let mut decoder = match &config.quantization {
        Some(QuantizationConfig::Nf4(_)) => {
            let form = Quantisation::NF4;
            let quantise = |module: &str| module.ends_with("_proj").then_some(form);
            load::load_quantised(folder, dtype, &quantise, &device, &mut |_, _, _| {}).unwrap()
        }
        _ => random(),
    };
    let settings = attach::settings(config, adapter).unwrap();
    let measured = attach::wanted(&decoder, &settings).unwrap().into_keys().map(|module| (module, statistics(&device)));
    let measured = measured.collect();
    attach::fresh(&mut decoder, settings, &measured, folder, 1, ProgressStyle::None).unwrap();
    decoder
}

/// A calibration of square layers: what it measured does not change what a step needs.
fn statistics(device: &burn::tensor::Device) -> Statistics {
    let gradient = Stream::new(1, "gradient").normal_tensor(256, 256, 1.0, device);
    Statistics { gradient: Some(gradient), ..Statistics::default() }
}

/// A checkpoint for what is quantised as it is read.
fn write_weights(folder: &std::path::Path) {
    let device = lowrank_train::device::choose("cpu").unwrap().device;
    let decoder = load::random(folder, FloatDType::F32, 1, &device).unwrap();
    let written = tempfile::tempdir().unwrap();
    save::save_model(&decoder, folder, written.path(), hf::Dtype::F32, 1 << 30).unwrap();
    std::fs::copy(written.path().join("model.safetensors"), folder.join("model.safetensors")).unwrap();
}

fn batch(config: &RunConfig, vocab: usize, key: u64) -> Batch {
    let stream = Stream::new(key, "tokens");
    let cols = config.data.max_seq_length;
    let token = |i: usize| (3 + stream.bits(i as u64) % (vocab as u64 - 3)) as i32;
    let row = |row: usize| (0..cols).map(|col| token(row * cols + col)).collect::<Vec<i32>>();
    let ids: Vec<Vec<i32>> = (0..config.training.micro_batch_size).map(row).collect();
    Batch::from_rows(&ids, &ids, None)
}

/// Most bytes of the first steps of a run, beyond those before its model was made.
fn peak<M: Network>(config: &RunConfig, make: impl Fn() -> M, batches: &[M::Batch], steps: u64) -> u64 {
    let before = LIVE.load(Ordering::Relaxed);
    let mut model = make();
    let mut optimizer = optimizer::build(config, &mut model).unwrap();
    let training = &config.training;
    let options = StepOptions {
        checkpointing: training.gradient_checkpointing,
        head_chunk_tokens: training.head_chunk_tokens.unwrap_or_else(|| model.default_head_chunk()),
        seed: 0,
    };
    let targets: usize = batches.iter().map(NetworkBatch::target_count).sum();
    PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
    for step in 0..steps {
        let plan = StepPlan {
            options,
            step,
            max_grad_norm: training.max_grad_norm,
            denominators: &vec![targets as f64; batches.len()],
            first_key: step * batches.len() as u64,
            rule: &|_, _, gradient_scale| StepRule { learning_rate: 1e-4, weight_decay: 0.0, gradient_scale },
            immediate: optimizer::updates_immediately(config),
        };
        let report = optimizer_step(&mut model, &mut optimizer, batches, &plan);
        assert!(report.applied, "{report:?}");
    }
    (PEAK.load(Ordering::Relaxed) - before) as u64
}

fn measured<M: Network>(config: &RunConfig, make: impl Fn() -> M, batches: &[M::Batch]) -> u64 {
    peak(config, &make, batches, 1); // leaves scratch of threads and libraries, which stays
    peak(config, &make, batches, STEPS)
}

/// Predicted and measured memory of a case. A model is a classifier where its architecture says so.
fn compare(model: &str, settings: &str) -> (Plan, u64) {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path();
    std::fs::write(place.join("config.json"), model).unwrap();
    let text = format!("{settings}\ntraining.max_steps = {STEPS}\ndata.train = 'none'\n");
    let config: RunConfig = toml::from_str(&text).unwrap();
    let predicted = |subject: Subject| plan::predict(&config, subject, Machine::Cpu { threads: 2 }).unwrap();
    if model.contains("Classification") {
        let model = ClassifierConfig::read(place, None).unwrap();
        let batches = [classifier_batch(&config, &model)];
        let plan = predicted(Subject::Classifier { config: &model, fresh: &[] });
        return (plan, measured(&config, || classifier(place, &config), &batches));
    }
    if config.quantization.is_some() {
        write_weights(place);
    }
    let model = DecoderConfig::read(place).unwrap();
    let micro_batches = config.training.gradient_accumulation_steps as u64;
    let batches: Vec<Batch> = (0..micro_batches).map(|key| batch(&config, model.vocab_size, key)).collect();
    (predicted(Subject::Decoder(&model)), measured(&config, || decoder(place, &config), &batches))
}

fn line(name: &str, plan: &Plan, measured: u64) -> String {
    let error = 100.0 * (plan.peak_bytes as f64 / measured as f64 - 1.0);
    let phases: Vec<String> =
        plan.phases.iter().map(|peak| format!("{} {}", peak.phase.name(), show(peak.bytes))).collect();
    format!(
        "{name:<26} predicted {:>10} measured {:>10} {error:>6.1} %  {}: {} [{}]",
        plan.peak_bytes,
        measured,
        plan.peak_phase.name(),
        plan.summary(),
        phases.join(", ")
    )
}

/// One test, because the counters belong to the process.
#[test]
fn predictions_are_within_a_tenth_of_what_is_allocated() {
    rayon::ThreadPoolBuilder::new().num_threads(2).build_global().unwrap();
    let wanted = std::env::var("PLAN_CASE").unwrap_or_default();
    let (mut lines, mut wrong) = (vec![], 0);
    for (name, model, settings) in CASES.iter().filter(|(name, ..)| name.contains(&wanted)) {
        let (plan, measured) = compare(model, settings);
        let error = (plan.peak_bytes as f64 / measured as f64 - 1.0).abs();
        wrong += usize::from(error > TOLERANCE);
        lines.push(line(name, &plan, measured));
    }
    if let Ok(path) = std::env::var("PLAN_TABLE") {
        std::fs::write(path, lines.join("\n")).unwrap();
    }
    assert!(wrong == 0 && !lines.is_empty(), "{wrong} of {} are wrong:\n{}", lines.len(), lines.join("\n"));
}
