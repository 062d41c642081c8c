//! `lowrank-bench`: what the benchmark, GPU and interoperability scripts measure. Results are JSON, one object a line.
//!
//! | file | subcommand |
//! | --- | --- |
//! | `step` | training steps: an adapter, or the whole model with any optimiser |
//! | `gemm` | Burn's matrix product on the shapes of the Llama models |
//! | `kernels` | each kernel beside its floor, or each against the CPU |
//! | `logits` | the logits of a model, with an adapter or without, as safetensors |

mod flops;
mod gemm;
mod kernels;
mod logits;
mod step;
mod timing;

use std::io::Write;

use anyhow::Context;
use clap::{Parser, Subcommand};
use lowrank_train::config::Dtype;

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Time training steps
    Step(step::Arguments),
    /// Time Burn's matrix product: forward, input gradient and weight gradient of the layers of Llama 1B and 8B
    Gemm(gemm::Arguments),
    /// Time each kernel beside its floor; with --check, compare each with the CPU instead
    Kernels(kernels::Arguments),
    /// Write the logits of one sequence, or of images
    Logits(logits::Arguments),
}

fn main() -> anyhow::Result<()> {
    lowrank_train::device::prepare_process();
    match Cli::parse().command {
        Command::Step(arguments) => step::run(arguments),
        Command::Gemm(arguments) => gemm::run(&arguments),
        Command::Kernels(arguments) => kernels::run(&arguments),
        Command::Logits(arguments) => logits::run(arguments),
    }
}

/// The number format behind the value of a `--dtype`.
fn run_dtype(name: &str) -> Dtype {
    match name {
        "bf16" => Dtype::Bf16,
        "f16" => Dtype::F16,
        _ => Dtype::F32,
    }
}

/// What turns kernels into code for a device.
fn compiler(device: &str) -> &'static str {
    match device.split(':').next() {
        Some("cuda") if cfg!(feature = "cuda-cpp") => "CUDA C++",
        Some("cuda") => "LLVM",
        Some("vulkan") => "SPIR-V",
        Some("wgpu") if cfg!(feature = "vulkan") => "SPIR-V or WGSL",
        Some("wgpu") => "WGSL",
        Some("metal") => "MSL",
        _ => "rustc",
    }
}

/// One result, as a line on standard output, with what all results have.
fn deliver(device: &str, mut line: serde_json::Value) -> anyhow::Result<()> {
    line["device"] = device.into();
    line["compiler"] = compiler(device).into();
    line["commit"] = lowrank_train::cli::VERSION.into();
    writeln!(std::io::stdout(), "{line}").context("cannot write the result")
}
