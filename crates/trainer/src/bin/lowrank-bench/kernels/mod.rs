//! `lowrank-bench kernels`: each kernel beside its floor, or against the CPU.

mod check;
mod inputs;
mod peaks;
mod rows;

use std::panic::AssertUnwindSafe;

use anyhow::bail;
use burn::tensor::FloatDType;
use lowrank_train::device::{self, ChosenDevice};

use crate::timing::{Effort, time};
use inputs::{Inputs, Values};
use peaks::Peaks;
use rows::{ROWS, Row, Sizes};

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of the activations and weights of kernels that work in several.
    #[arg(long, default_value = "bf16", value_parser = ["bf16", "f16", "f32"])]
    dtype: String,
    /// Only kernels whose name contains this; may be repeated.
    #[arg(long, value_name = "PART")]
    only: Vec<String>,
    /// Compare results with the CPU in every type that the device has, instead of timing; status 1 if any is wrong.
    #[arg(long)]
    check: bool,
    /// Small shapes, few repeats: a look at whether everything runs.
    #[arg(long)]
    quick: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let chosen = device::choose(&arguments.device)?;
    let is_meant =
        |row: &&Row| arguments.only.is_empty() || arguments.only.iter().any(|part| row.name.contains(part.as_str()));
    let rows: Vec<&Row> = ROWS.iter().filter(is_meant).collect();
    if rows.is_empty() {
        let names: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("no kernel is called {}; there are {}", arguments.only.join(" or "), names.join("; "));
    }
    let mut deliver = |line| crate::deliver(&chosen.description, line);
    match (arguments.check, arguments.quick) {
        (true, true) => check::run(&chosen, &rows, &[Sizes::ODD], &mut deliver),
        (true, false) => check::run(&chosen, &rows, &[Sizes::ODD, Sizes::EVEN], &mut deliver),
        (false, true) => time_all(&chosen, &rows, &[Sizes::ODD], arguments),
        (false, false) => time_all(&chosen, &rows, &[Sizes::LLAMA_1B, Sizes::LLAMA_8B], arguments),
    }
}

fn time_all(chosen: &ChosenDevice, rows: &[&Row], sizes: &[Sizes], arguments: &Arguments) -> anyhow::Result<()> {
    let dtype = device::compute_type(super::run_dtype(&arguments.dtype), chosen)?;
    let effort = if arguments.quick { Effort::QUICK } else { Effort::FULL };
    let peaks = Peaks::measure(&chosen.device, dtype, arguments.quick)?;
    crate::deliver(
        &chosen.description,
        serde_json::json!({
            "bench": "peaks",
            "dtype": arguments.dtype,
            "gb_per_s": peaks.bytes / 1e9,
            "tflops": peaks.flops / 1e12,
        }),
    )?;
    let mut failed = vec![];
    for sizes in sizes {
        for row in rows.iter().filter(|row| row.is_on(chosen, dtype)) {
            let timed = AssertUnwindSafe(|| time_one(chosen, row, sizes, dtype, effort, &peaks));
            // One kernel that a device cannot run does not take the numbers of the others with it.
            match std::panic::catch_unwind(timed).unwrap_or_else(|_| bail!("panicked, see above")) {
                Ok(line) => crate::deliver(&chosen.description, line)?,
                Err(problem) => failed.push(format!("{} {}: {problem:#}", row.name, sizes.name)),
            }
        }
    }
    if !failed.is_empty() {
        bail!("{} kernels could not be timed: {}", failed.len(), failed.join("; "));
    }
    Ok(())
}

/// The line of one kernel.
fn time_one(
    chosen: &ChosenDevice,
    row: &Row,
    sizes: &Sizes,
    dtype: FloatDType,
    effort: Effort,
    peaks: &Peaks,
) -> anyhow::Result<serde_json::Value> {
    let mut inputs = Inputs::new(&chosen.device, dtype, Values::Drawn);
    let mut work = (row.prepare)(&mut inputs, sizes)?;
    let timing = time(inputs.device(), effort, 1, &mut work.call)?;
    let (moving, computing) = (work.bytes / peaks.bytes, work.flops / peaks.flops);
    let bound = if work.is_product && computing > moving { "arithmetic" } else { "memory" };
    let floor = if bound == "memory" { moving } else { computing };
    Ok(serde_json::json!({
        "bench": "kernel",
        "kernel": row.name,
        "sizes": sizes.name,
        "shape": work.shape,
        "dtype": format!("{dtype:?}").to_lowercase(),
        "us": timing.median * 1e6,
        "us_min": timing.min * 1e6,
        "us_max": timing.max * 1e6,
        "floor_us": floor * 1e6,
        "share_of_floor": floor / timing.median,
        "bound": bound,
        "gb_per_s": work.bytes / timing.median / 1e9,
        "tflops": work.flops / timing.median / 1e12,
    }))
}
