//! `lowrank-train doctor`: the devices of this machine, what they can do, and what is wrong.

use std::fmt::Write;
use std::time::Instant;

use burn::tensor::{Device, FloatDType, Tensor};

use crate::cli::{DoctorArgs, VERSION};
use crate::device;
use crate::error::Problem;

/// Runs the command and prints a report.
///
/// # Errors
/// The device that was asked for is not there.
pub fn run(args: &DoctorArgs) -> anyhow::Result<()> {
    let mut text = format!("lowrank-train {VERSION}\nbackends in this build: {}\n\n", device::names().join(", "));
    match &args.device {
        Some(name) => {
            let chosen = device::choose(name)?;
            report(&mut text, &chosen.description, &chosen.device);
        }
        None => {
            for name in device::names() {
                let devices = device::list(name);
                if devices.is_empty() {
                    let _ = writeln!(text, "{name}: no device{}", advice(name));
                }
                for (index, found) in devices.iter().enumerate() {
                    report(&mut text, &device::describe(name, index, found), found);
                }
            }
            let _ = writeln!(text, "\ndevice = \"auto\" takes {}", device::choose("auto")?.description);
        }
    }
    for (kind, methods) in [("adapter", lowrank_core::adapters::METHODS), ("optimizer", lowrank_core::optim::METHODS)] {
        for (name, paper, _) in methods {
            let _ = writeln!(text, "[{kind}.{name}] {paper}");
        }
    }
    Ok(super::deliver(&text, None)?)
}

/// What is probably missing where a backend finds nothing.
fn advice(name: &str) -> &'static str {
    match name {
        "cuda" => " (is the NVIDIA driver loaded? nvidia-smi tells)",
        "vulkan" | "wgpu" => " (a Vulkan driver is missing; Debian: mesa-vulkan-drivers or the vendor's)",
        _ => "",
    }
}

fn report(text: &mut String, description: &str, device: &Device) {
    let types = [("f32", FloatDType::F32), ("bf16", FloatDType::BF16), ("f16", FloatDType::F16)];
    let able: Vec<&str> =
        types.iter().filter(|(_, dtype)| device.supports_dtype(*dtype)).map(|(name, _)| *name).collect();
    let _ = writeln!(text, "{description}: computes in {}", able.join(", "));
    match throughput(device) {
        Ok(rate) => {
            let _ = writeln!(text, "  f32 matrix product 512: {rate:.1} GFLOP/s, result checked");
        }
        Err(problem) => {
            let _ = writeln!(text, "  PROBLEM: {problem}");
        }
    }
}

/// Rate of a small matrix product, after its result was compared with the known one.
fn throughput(device: &Device) -> Result<f64, Problem> {
    const N: usize = 512;
    let ones = Tensor::<2>::ones([N, N], device);
    let product = |x: &Tensor<2>| x.clone().matmul(x.clone());
    let values = product(&ones).slice([0..1, 0..2]).into_data();
    if values.iter::<f32>().any(|value| value != N as f32) {
        return Err(Problem::run("a matrix product gives wrong values: this driver cannot be used"));
    }
    let started = Instant::now();
    const REPEATS: usize = 5;
    for _ in 0..REPEATS {
        let _ = product(&ones).slice([0..1, 0..1]).into_data();
    }
    Ok(2.0 * (N * N * N * REPEATS) as f64 / started.elapsed().as_secs_f64() / 1e9)
}
