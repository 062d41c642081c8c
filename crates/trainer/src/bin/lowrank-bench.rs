//! `lowrank-bench`: what the benchmark and interoperability scripts measure.
//!
//! `cpu` times training steps of LoRA r=16 on all linear layers and prints one JSON line; `logits` writes the logits of a model,
//! with an adapter or without, as safetensors.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use clap::{Parser, Subcommand};
use lowrank_core::optim::adamw::StepRule;
use lowrank_models::hf::{Dtype, OutTensor, peft, write_safetensors};
use lowrank_models::{Batch, Inputs, adapters, hf, save};
use lowrank_train::config::{Dtype as RunDtype, GradientCheckpointing, ProgressStyle};
use lowrank_train::metrics::process_memory;
use lowrank_train::session::Session;
use lowrank_train::step::{StepOptions, default_head_chunk};
use lowrank_train::train_loop::{StepPlan, optimizer_step};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time training steps
    Cpu {
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
    },
    /// Write the logits of one sequence
    Logits {
        #[arg(long)]
        model: String,
        #[arg(long)]
        adapter: Option<PathBuf>,
        #[arg(long, value_delimiter = ',')]
        ids: Vec<i32>,
        #[arg(long)]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    lowrank_train::device::prepare_process();
    match Cli::parse().command {
        Command::Cpu { model, batch, seq, threads, warmup, steps, checkpointing, device } => {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
            time_steps(&model, &device, [batch, seq], warmup, steps, &checkpointing)
        }
        Command::Logits { model, adapter, ids, out } => write_logits(&model, adapter, ids, &out),
    }
}

fn one_row(ids: Vec<i32>) -> Batch {
    Batch::from_rows(&[ids], &[], None)
}

fn write_logits(model: &str, adapter: Option<PathBuf>, ids: Vec<i32>, out: &std::path::Path) -> anyhow::Result<()> {
    let mut session = Session::open(model, "cpu", RunDtype::F32, ProgressStyle::None)?;
    if let Some(folder) = adapter {
        session.load_adapter(&folder)?;
    }
    let inputs = Inputs::new(&one_row(ids), &session.decoder.config, 0, &session.device.device);
    let logits = session.decoder.logits(session.decoder.hidden(&inputs, None));
    let dims = logits.dims();
    let tensor = OutTensor::from_f32("logits", Dtype::F32, &dims, save::host_values(logits));
    Ok(write_safetensors(out, vec![tensor], &[])?)
}

/// Random tokens, every position a target, AdamW at 1e-4: the work of `scripts/bench/peer_cpu.py`.
fn time_steps(
    model: &str,
    device: &str,
    [rows, cols]: [usize; 2],
    warmup: usize,
    steps: usize,
    checkpointing: &str,
) -> anyhow::Result<()> {
    let mut session = Session::open(model, device, RunDtype::F32, ProgressStyle::None)?;
    let lora = hf::AdapterConfig::new(16, 32.0, peft::Modules::AllLinear);
    adapters::attach_lora(&mut session.decoder, &lora, 0)?;
    let vocab = session.decoder.config.vocab_size;
    let stream = lowrank_core::random::Stream::new(0, "tokens");
    let token = |i: usize| (3 + stream.bits(i as u64) % (vocab as u64 - 3)) as i32;
    let batches: Vec<Batch> = (0..4)
        .map(|b| {
            let row = |r: usize| (0..cols).map(|c| token((b * rows + r) * cols + c)).collect::<Vec<i32>>();
            let ids: Vec<Vec<i32>> = (0..rows).map(row).collect();
            Batch::from_rows(&ids, &ids, None)
        })
        .collect();
    let mode = if checkpointing == "block" { GradientCheckpointing::Block } else { GradientCheckpointing::None };
    let options = StepOptions { checkpointing: mode, head_chunk_tokens: default_head_chunk(vocab), seed: 0 };
    let mut optimizer = lowrank_core::optim::AdamW::new(Default::default());
    let mut times = vec![];
    let mut loss = 0.0;
    for step in 0..warmup + steps {
        let batch = &batches[step % 4];
        let started = Instant::now();
        let plan = StepPlan {
            options,
            max_grad_norm: 0.0,
            denominators: &[batch.target_count() as f64],
            first_key: step as u64,
            rule: &|_, gradient_scale| StepRule { learning_rate: 1e-4, weight_decay: 0.0, gradient_scale },
            immediate: false,
        };
        loss = optimizer_step(&mut session.decoder, &mut optimizer, std::slice::from_ref(batch), &plan).loss;
        times.push(started.elapsed().as_secs_f64());
    }
    let mut timed = times.split_off(warmup.min(times.len() - 1));
    timed.sort_by(f64::total_cmp);
    let median = timed[timed.len() / 2];
    let line = serde_json::json!({
        "program": format!("lowrank, gradient_checkpointing = {checkpointing}"),
        "s_per_step": median,
        "s_min": timed[0],
        "s_max": timed[timed.len() - 1],
        "tokens_per_s": (rows * cols) as f64 / median,
        "peak_rss_gib": process_memory().peak_bytes as f64 / (1u64 << 30) as f64,
        "loss_last": loss,
        "device": session.device.description,
        "commit": lowrank_train::cli::VERSION,
    });
    writeln!(std::io::stdout(), "{line}").context("cannot write the result")
}
