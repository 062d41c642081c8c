//! `lowrank-bench step`: what a training step takes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, bail};
use burn::tensor::{Device, Tensor};
use lowrank_core::adapters::Statistics;
use lowrank_core::linalg::gaussian;
use lowrank_core::optim::Optimizer;
use lowrank_core::optim::adamw::StepRule;
use lowrank_core::quant::Quantisation;
use lowrank_core::random::Stream;
use lowrank_kernels::launches::Launches;
use lowrank_models::{Batch, Decoder, Network, adapters, load, parameters};
use lowrank_train::attach;
use lowrank_train::calibrate::Measured;
use lowrank_train::config::{AdapterConfig, GradientCheckpointing, ProgressStyle, RunConfig};
use lowrank_train::memory::device_memory;
use lowrank_train::metrics::process_memory;
use lowrank_train::session::Session;
use lowrank_train::step::StepOptions;
use lowrank_train::train_loop::{Reading, StepPlan};
use lowrank_train::update::{Measured as Outcome, Unread, read_all, take_step};
use lowrank_train::{device, optimizer};

use crate::flops::{self, Trained};
use crate::timing::{Timing, wait};

#[derive(clap::Args)]
pub struct Arguments {
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
    /// Start from random weights: the model needs nothing but its config.json. A graphics card draws them itself.
    #[arg(long)]
    random: bool,
    /// Hold the frozen linear layers in this format.
    #[arg(long, value_parser = ["nf4", "int8", "int4"], requires = "random", conflicts_with = "optimizer")]
    quantization: Option<String>,
    #[arg(long, default_value = "f32", value_parser = ["f32", "bf16", "f16"])]
    dtype: String,
    /// Name of the work in the tables, the same as the peer's.
    #[arg(long)]
    workload: Option<String>,
    /// Also tell how often a step launches each kernel.
    #[arg(long)]
    list_kernels: bool,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    rayon::ThreadPoolBuilder::new().num_threads(arguments.threads).build_global()?;
    if arguments.steps == 0 {
        bail!("--steps is 0: nothing would be timed");
    }
    let config = config_of(&arguments)?;
    let (decoder, description) = model_of(&arguments, &config)?;
    time_steps(decoder, &description, &arguments, config)
}

/// What a configuration file would say.
fn config_of(arguments: &Arguments) -> anyhow::Result<RunConfig> {
    let mut config = RunConfig { dtype: super::run_dtype(&arguments.dtype), ..RunConfig::default() };
    (config.training.micro_batch_size, config.data.max_seq_length) = (arguments.batch, arguments.seq);
    if let Some(text) = &arguments.optimizer {
        config.optimizer = toml::from_str(text).context("--optimizer")?;
    }
    Ok(config)
}

/// The model on a device, and what the device is.
fn model_of(arguments: &Arguments, config: &RunConfig) -> anyhow::Result<(Decoder, String)> {
    let dtype = super::run_dtype(&arguments.dtype);
    if !arguments.random {
        let session = Session::open(&arguments.model, &arguments.device, dtype, ProgressStyle::None)?;
        return Ok((session.decoder, session.device.description));
    }
    let chosen = device::choose(&arguments.device)?;
    let (compute, folder) = (device::compute_type(dtype, &chosen)?, Path::new(&arguments.model));
    let format = match arguments.quantization.as_deref() {
        Some("nf4") => Some(Quantisation::NF4),
        Some("int8") => Some(Quantisation::INT8),
        Some(_) => Some(Quantisation::INT4),
        // What training holds as codes is never drawn in more bits.
        None => optimizer::trained_codes(config)?.map(|(_, format)| format),
    };
    let decoder = match device_memory(&chosen.device).is_some() || format.is_some() {
        true => {
            let quantise = |module: &str| format.filter(|_| module.ends_with("_proj"));
            load::random_on_device(folder, compute, 0, &quantise, &chosen.device)?
        }
        false => load::random(folder, compute, 0, &chosen.device)?,
    };
    Ok((decoder, chosen.description))
}

/// The adapter that is timed where none is named.
const DEFAULT_ADAPTER: &str = "lora = { r = 16, lora_alpha = 32 }";

fn attach_adapter(decoder: &mut Decoder, config: &RunConfig, adapter: &AdapterConfig) -> anyhow::Result<()> {
    let settings = attach::settings(config, adapter)?;
    let device = decoder.device();
    let mut measured = Measured::new();
    for (module, sizes) in adapters::targets(decoder, &settings)? {
        if attach::needs_calibration(&settings.method) {
            let [d_in, d_out] = sizes.matrix();
            let statistics = Statistics {
                covariance: Some(Tensor::eye(d_in, &device)),
                gradient: Some(gaussian(0, &module, d_in, d_out, 1.0, &device)),
                samples: 1,
            };
            measured.insert(module, statistics);
        }
    }
    attach::fresh(decoder, settings, &measured, Path::new(""), 0, ProgressStyle::None)?;
    Ok(())
}

/// Random tokens, every position a target.
fn batches(vocab: usize, rows: usize, cols: usize) -> Vec<Batch> {
    let stream = Stream::new(0, "tokens");
    let token = |i: usize| (3 + stream.bits(i as u64) % (vocab as u64 - 3)) as i32;
    let row = |first: usize| (0..cols).map(|c| token(first * cols + c)).collect::<Vec<i32>>();
    (0..4)
        .map(|b| {
            let ids: Vec<Vec<i32>> = (0..rows).map(|r| row(b * rows + r)).collect();
            Batch::from_rows(&ids, &ids, None)
        })
        .collect()
}

/// Numbers of the steps that count.
struct Numbers {
    timing: Timing,
    /// Until the host had issued everything. With `launches`, tells whether a card waits for its host.
    host: Timing,
    /// A step, by kernel.
    launches: BTreeMap<&'static str, f64>,
    loss: f64,
    gradient_bytes: usize,
    first_refresh: f64,
    /// Most that the pools of the device held, without what tuning took.
    device_bytes: Option<u64>,
}

fn time_steps(mut decoder: Decoder, description: &str, arguments: &Arguments, config: RunConfig) -> anyhow::Result<()> {
    match &arguments.optimizer {
        Some(_) => decoder = parameters::set_trained(decoder, |_| Some(true)),
        None => {
            let adapter = arguments.adapter.as_deref().unwrap_or(DEFAULT_ADAPTER);
            let adapter = toml::from_str(adapter).context("--adapter")?;
            attach_adapter(&mut decoder, &config, &adapter)?;
        }
    }
    let mut state = optimizer::build(&config, &mut decoder)?;
    let measured = measure(&mut decoder, &mut state, arguments)?;
    let trained = parameters::trained(&decoder);
    let numbers = trained.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    let trained = if arguments.optimizer.is_some() { Trained::Everything } else { Trained::Adapter(numbers) };
    let tokens = (arguments.batch * arguments.seq) as f64;
    let flops = flops::per_token(&decoder.config, arguments.seq, trained) * tokens;
    let what = arguments.optimizer.as_deref().or(arguments.adapter.as_deref()).unwrap_or("LoRA r=16");
    let base = arguments.quantization.as_ref().map_or(String::new(), |format| format!(" on {format}"));
    let (gib, mib) = ((1u64 << 30) as f64, (1u64 << 20) as f64);
    let Numbers { timing, host, launches, loss, gradient_bytes, first_refresh, device_bytes } = measured;
    crate::deliver(
        description,
        serde_json::json!({
            "bench": "step",
            "program": format!("lowrank, {what}{base}, gradient_checkpointing = {}", arguments.checkpointing),
            "workload": arguments.workload,
            "batch": arguments.batch,
            "seq": arguments.seq,
            "dtype": arguments.dtype,
            "s_per_step": timing.median,
            "s_min": timing.min,
            "s_max": timing.max,
            "host_s": host.median,
            "launches": launches.values().sum::<f64>(),
            "kernels": arguments.list_kernels.then_some(launches),
            "tokens_per_s": tokens / timing.median,
            "model_tflops": flops / timing.median / 1e12,
            "trainable": numbers,
            "peak_rss_gib": process_memory().peak_bytes as f64 / gib,
            "peak_device_gib": device_bytes.map(|bytes| bytes as f64 / gib),
            "gradient_mib": gradient_bytes as f64 / mib,
            "optimizer_mib": state.state_bytes() as f64 / mib,
            "refresh_all_s": first_refresh,
            "loss_last": loss,
        }),
    )
}

/// No clipping: the work of `scripts/bench/peer_cpu.py` and `peer_gpu.py`.
fn measure(decoder: &mut Decoder, state: &mut Optimizer, arguments: &Arguments) -> anyhow::Result<Numbers> {
    let batches = batches(decoder.config.vocab_size, arguments.batch, arguments.seq);
    let mode = match arguments.checkpointing.as_str() {
        "block" => GradientCheckpointing::Block,
        _ => GradientCheckpointing::None,
    };
    let options = StepOptions { checkpointing: mode, head_chunk_tokens: decoder.default_head_chunk(), seed: 0 };
    let device: Device = decoder.device();
    // As a run does: a card is not asked for the loss in every step.
    let reading = if device_memory(&device).is_some() { Reading::Later } else { Reading::EveryStep };
    let (mut times, mut loss, mut gradient_bytes, mut first_refresh) = (vec![], 0.0, 0, 0.0);
    let (mut device_bytes, mut last, mut host_times) = (None, None::<Unread>, vec![]);
    let mut launched = None;
    for step in 0..arguments.warmup + arguments.steps {
        if step == arguments.warmup {
            wait(&device)?;
            device.memory_cleanup(); // what tuning took
            launched = Launches::watch();
        }
        let batch = &batches[step % batches.len()];
        let started = Instant::now();
        let plan = StepPlan {
            options,
            step: step as u64,
            max_grad_norm: 0.0,
            denominators: &[batch.target_count() as f64],
            first_key: step as u64,
            rule: &|_, _, gradient_scale| StepRule { learning_rate: 1e-4, weight_decay: 0.0, gradient_scale },
            immediate: arguments.optimizer.is_some(),
        };
        let outcome = take_step(decoder, state, std::slice::from_ref(batch), &plan, 1.0, reading);
        let issued = started.elapsed().as_secs_f64();
        wait(&device)?;
        let seconds = started.elapsed().as_secs_f64();
        match outcome {
            Outcome::Read(report) => (loss, gradient_bytes) = (report.loss, gradient_bytes.max(report.gradient_bytes)),
            Outcome::Unread(unread) => last = Some(*unread),
        }
        if step == 0 {
            first_refresh = state.reports().values().map(|report| report.refresh_seconds).sum::<f64>() + 0.0; // not -0
        }
        if step >= arguments.warmup {
            times.push(seconds);
            host_times.push(issued);
            device_bytes = device_bytes.max(device_memory(&device).map(|memory| memory.reserved_bytes));
        }
    }
    let launches = launched.map_or_else(BTreeMap::new, |launched| launched.by_kernel());
    let launches =
        launches.into_iter().map(|(kernel, count)| (kernel, count as f64 / arguments.steps as f64)).collect();
    for report in read_all(last.into_iter().collect()) {
        (loss, gradient_bytes) = (report.loss, gradient_bytes.max(report.gradient_bytes));
    }
    let (timing, host) = (Timing::of(times)?, Timing::of(host_times)?);
    Ok(Numbers { timing, host, launches, loss, gradient_bytes, first_refresh, device_bytes })
}
