//! `lowrank-bench`: what the benchmark and interoperability scripts measure.
//!
//! `step` times training steps of LoRA r=16 on all linear layers, or of the whole model with any optimiser, and prints one JSON
//! line; `logits` writes the logits of a model, with an adapter or without, as safetensors.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use burn::tensor::Tensor;
use clap::{Parser, Subcommand};
use lowrank_core::adapters::Statistics;
use lowrank_core::linalg::gaussian;
use lowrank_core::optim::adamw::StepRule;
use lowrank_models::classifier::{self, ClassifierBatch, Input, Labels};
use lowrank_models::hf::{Checkpoint, Dtype, OutTensor, write_safetensors};
use lowrank_models::{Batch, Decoder, Inputs, Network, adapters, load, parameters, save};
use lowrank_train::attach;
use lowrank_train::calibrate::Measured;
use lowrank_train::classification::stored_classes;
use lowrank_train::config::{AdapterConfig, Dtype as RunDtype, GradientCheckpointing, ProgressStyle, RunConfig};
use lowrank_train::metrics::process_memory;
use lowrank_train::session::Session;
use lowrank_train::step::StepOptions;
use lowrank_train::train_loop::{StepPlan, optimizer_step};
use lowrank_train::{device, optimizer};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time training steps
    Step {
        #[arg(long)]
        model: String,
        #[arg(long, default_value_t = 2)]
        batch: usize,
        #[arg(long, default_value_t = 256)]
        seq: usize,
        #[arg(long, default_value_t = 2)]
        threads: usize,
        #[arg(long, default_value_t = 2)]
        warmup: usize,
        #[arg(long, default_value_t = 8)]
        steps: usize,
        #[arg(long, default_value = "none", value_parser = ["none", "block"])]
        checkpointing: String,
        #[arg(long, default_value = "cpu")]
        device: String,
        /// Train the whole model with this optimiser, as in a configuration: `galore = { rank = 128 }`. Without it: LoRA.
        #[arg(long)]
        optimizer: Option<String>,
        /// Train this adapter, as in a configuration: `dora = { r = 16 }`. Without it: LoRA of rank 16. What a calibration pass
        /// would measure is made up, which changes no time.
        #[arg(long, conflicts_with = "optimizer")]
        adapter: Option<String>,
        /// Start from random weights: the model needs nothing but its config.json.
        #[arg(long)]
        random: bool,
        #[arg(long, default_value = "f32", value_parser = ["f32", "bf16"])]
        dtype: String,
    },
    /// Write the logits of one sequence, or of images
    Logits {
        #[arg(long)]
        model: String,
        #[arg(long)]
        adapter: Option<PathBuf>,
        #[arg(long, value_delimiter = ',', required_unless_present = "pixels")]
        ids: Vec<i32>,
        /// A safetensors file with `pixel_values`, `[images, channels, height, width]`, for a classifier of images.
        #[arg(long, conflicts_with = "ids")]
        pixels: Option<PathBuf>,
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    lowrank_train::device::prepare_process();
    match Cli::parse().command {
        Command::Step {
            model,
            batch,
            seq,
            threads,
            warmup,
            steps,
            checkpointing,
            device,
            optimizer,
            adapter,
            random,
            dtype,
        } => {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
            let dtype = if dtype == "bf16" { RunDtype::Bf16 } else { RunDtype::F32 };
            let (decoder, device) = model_of(&model, &device, dtype, random)?;
            let work = Work { rows: batch, cols: seq, warmup, steps, checkpointing: checkpointing == "block" };
            time_steps(decoder, &device, optimizer.as_deref(), adapter.as_deref(), work)
        }
        Command::Logits { model, adapter, pixels: Some(pixels), out, .. } => {
            save_logits(class_logits(&model, adapter.as_deref(), &pixels)?, &out)
        }
        Command::Logits { model, adapter, ids, out, .. } => save_logits(token_logits(&model, adapter, ids)?, &out),
    }
}

fn one_row(ids: Vec<i32>) -> Batch {
    Batch::from_rows(&[ids], &[], None)
}

fn token_logits(model: &str, adapter: Option<PathBuf>, ids: Vec<i32>) -> anyhow::Result<Tensor<2>> {
    let mut session = Session::open(model, "cpu", RunDtype::F32, ProgressStyle::None)?;
    if let Some(folder) = adapter {
        session.load_adapter(&folder)?;
    }
    let inputs = Inputs::new(&one_row(ids), &session.decoder.config, 0, &session.device.device);
    Ok(session.decoder.logits(session.decoder.hidden(&inputs, None)))
}

fn class_logits(model: &str, adapter: Option<&Path>, pixels: &Path) -> anyhow::Result<Tensor<2>> {
    let device = device::choose("cpu")?;
    let compute = device::compute_type(RunDtype::F32, &device)?;
    let classes = adapter.map(stored_classes).transpose()?.flatten().map(|names| names.len());
    let folder = Path::new(model);
    let (mut classifier, _) = classifier::load(folder, compute, &device.device, classes, 0, &mut |_, _, _| {})?;
    if let Some(adapter) = adapter {
        attach::stored(&mut classifier, adapter, folder)?;
    }
    let file = Checkpoint::open_file(pixels)?;
    let view = file.get("pixel_values")?;
    let [rows, channels, height, width] =
        <[usize; 4]>::try_from(view.shape).with_context(|| format!("pixel_values has shape {:?}", view.shape))?;
    let input = Input::Image { rows, channels, height, width, pixels: view.to_f32() };
    let batch = ClassifierBatch { input, labels: Labels::Classes(vec![0; rows]), records: vec![] };
    Ok(classifier.logits(&batch))
}

fn save_logits(logits: Tensor<2>, out: &Path) -> anyhow::Result<()> {
    let dims = logits.dims();
    let tensor = OutTensor::from_f32("logits", Dtype::F32, &dims, save::host_values(logits));
    Ok(write_safetensors(out, vec![tensor], &[])?)
}

/// The size of what is timed.
struct Work {
    rows: usize,
    cols: usize,
    warmup: usize,
    steps: usize,
    checkpointing: bool,
}

/// The model on a device, and what the device is.
fn model_of(model: &str, device: &str, dtype: RunDtype, random: bool) -> anyhow::Result<(Decoder, String)> {
    if !random {
        let session = Session::open(model, device, dtype, ProgressStyle::None)?;
        return Ok((session.decoder, session.device.description));
    }
    let device = device::choose(device)?;
    let compute = device::compute_type(dtype, &device)?;
    let decoder = load::random(std::path::Path::new(model), compute, 0, &device.device)?;
    Ok((decoder, device.description))
}

/// The adapter that is timed where none is named.
const DEFAULT_ADAPTER: &str = "lora = { r = 16, lora_alpha = 32 }";

fn attach_adapter(decoder: &mut Decoder, config: &RunConfig, adapter: &AdapterConfig) -> anyhow::Result<()> {
    let settings = attach::settings(config, adapter)?;
    let device = decoder.device();
    let mut measured = Measured::new();
    for (module, sizes) in adapters::targets(decoder, &settings)? {
        let [d_in, d_out] = sizes.matrix();
        let statistics = Statistics {
            covariance: Some(Tensor::eye(d_in, &device)),
            gradient: Some(gaussian(0, &module, d_in, d_out, 1.0, &device)),
            samples: 1,
        };
        if attach::needs_calibration(&settings.method) {
            measured.insert(module, statistics);
        }
    }
    attach::fresh(decoder, settings, &measured, std::path::Path::new(""), 0, ProgressStyle::None)?;
    Ok(())
}

/// Random tokens, every position a target, no clipping: the work of `scripts/bench/peer_cpu.py`.
fn time_steps(
    mut decoder: Decoder,
    device: &str,
    optimizer: Option<&str>,
    adapter: Option<&str>,
    work: Work,
) -> anyhow::Result<()> {
    let Work { rows, cols, warmup, steps, checkpointing } = work;
    let mut config = RunConfig::default();
    (config.training.micro_batch_size, config.data.max_seq_length) = (rows, cols);
    match optimizer {
        Some(text) => {
            config.optimizer = toml::from_str(text).context("--optimizer")?;
            decoder = parameters::set_trained(decoder, |_| Some(true));
        }
        None => {
            let adapter = toml::from_str(adapter.unwrap_or(DEFAULT_ADAPTER)).context("--adapter")?;
            attach_adapter(&mut decoder, &config, &adapter)?;
        }
    }
    let mut state = optimizer::build(&config, &mut decoder)?;
    let vocab = decoder.config.vocab_size;
    let stream = lowrank_core::random::Stream::new(0, "tokens");
    let token = |i: usize| (3 + stream.bits(i as u64) % (vocab as u64 - 3)) as i32;
    let batches: Vec<Batch> = (0..4)
        .map(|b| {
            let row = |r: usize| (0..cols).map(|c| token((b * rows + r) * cols + c)).collect::<Vec<i32>>();
            let ids: Vec<Vec<i32>> = (0..rows).map(row).collect();
            Batch::from_rows(&ids, &ids, None)
        })
        .collect();
    let mode = if checkpointing { GradientCheckpointing::Block } else { GradientCheckpointing::None };
    let options = StepOptions { checkpointing: mode, head_chunk_tokens: decoder.default_head_chunk(), seed: 0 };
    let (mut times, mut loss, mut gradient_bytes, mut first_refresh) = (vec![], 0.0, 0, 0.0);
    for step in 0..warmup + steps {
        let batch = &batches[step % 4];
        let started = Instant::now();
        let plan = StepPlan {
            options,
            step: step as u64,
            max_grad_norm: 0.0,
            denominators: &[batch.target_count() as f64],
            first_key: step as u64,
            rule: &|_, _, gradient_scale| StepRule { learning_rate: 1e-4, weight_decay: 0.0, gradient_scale },
            immediate: config.adapter.is_none() && optimizer.is_some(),
        };
        let report = optimizer_step(&mut decoder, &mut state, std::slice::from_ref(batch), &plan);
        (loss, gradient_bytes) = (report.loss, gradient_bytes.max(report.gradient_bytes));
        times.push(started.elapsed().as_secs_f64());
        if step == 0 {
            first_refresh = state.reports().values().map(|report| report.refresh_seconds).sum();
        }
    }
    let mut timed = times.split_off(warmup.min(times.len() - 1));
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    let what = optimizer.or(adapter).unwrap_or("LoRA r=16");
    let line = serde_json::json!({
        "program": format!("lowrank, {what}, gradient_checkpointing = {}", if checkpointing { "block" } else { "none" }),
        "s_per_step": median,
        "s_min": timed[0],
        "s_max": timed[timed.len() - 1],
        "tokens_per_s": (rows * cols) as f64 / median,
        "peak_rss_gib": process_memory().peak_bytes as f64 / (1u64 << 30) as f64,
        "gradient_mib": gradient_bytes as f64 / (1u64 << 20) as f64,
        "optimizer_mib": state.state_bytes() as f64 / (1u64 << 20) as f64,
        "refresh_all_s": first_refresh,
        "loss_last": loss,
        "device": device,
        "commit": lowrank_train::cli::VERSION,
    });
    writeln!(std::io::stdout(), "{line}").context("cannot write the result")
}
