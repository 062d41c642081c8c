//! Each kernel against the CPU.
//!
//! The inputs are rounded to the type of the kernel; the right result is the CPU's in f32 on these inputs. In f32 a result may
//! be off by 2e-5 of the largest value, since sums run in another order (measured between devices: below 1e-5), and by 2e-3
//! where matrices are multiplied with factors of ten bits (TF32, half an ulp is 5e-4). In 16 bits it may be off twice as much
//! as the CPU's own result in that type is, and two units in the last place of the largest value.

use std::panic::AssertUnwindSafe;

use anyhow::bail;
use burn::tensor::{Device, FloatDType};
use lowrank_train::device::ChosenDevice;
use serde_json::{Value, json};

use super::inputs::{Inputs, Values};
use super::rows::{Row, Sizes};

/// Compares the kernels of the list, one line a kernel, size and type.
///
/// # Errors
/// Some kernel is wrong.
pub fn run(
    chosen: &ChosenDevice,
    rows: &[&Row],
    sizes: &[Sizes],
    deliver: &mut dyn FnMut(Value) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let (mut failed, mut passed) = (vec![], 0);
    for dtype in [FloatDType::F32, FloatDType::BF16, FloatDType::F16] {
        if !chosen.device.supports_dtype(dtype) {
            continue;
        }
        for sizes in sizes {
            for row in rows.iter().filter(|row| row.is_repeatable && row.is_on(chosen, dtype)) {
                let compared = AssertUnwindSafe(|| compare(chosen, row, sizes, dtype));
                let result = std::panic::catch_unwind(compared).unwrap_or_else(|_| bail!("panicked, see above"));
                deliver(report(row, sizes, dtype, &result))?;
                match result.is_ok_and(|checks| checks.iter().all(Check::holds)) {
                    true => passed += 1,
                    false => failed.push(format!("{} {} {}", row.name, sizes.name, type_name(dtype))),
                }
            }
        }
    }
    if !failed.is_empty() {
        bail!("{} of {} checks failed: {}", failed.len(), failed.len() + passed, failed.join("; "));
    }
    Ok(())
}

fn type_name(dtype: FloatDType) -> String {
    format!("{dtype:?}").to_lowercase()
}

/// One output.
struct Check {
    error: f64,
    limit: f64,
}

impl Check {
    fn holds(&self) -> bool {
        self.error <= self.limit // false for NaN
    }
}

fn report(row: &Row, sizes: &Sizes, dtype: FloatDType, result: &anyhow::Result<Vec<Check>>) -> Value {
    let (errors, limits, problem) = match result {
        Ok(checks) => (checks.iter().map(|c| c.error).collect(), checks.iter().map(|c| c.limit).collect(), None),
        Err(problem) => (vec![], vec![], Some(format!("{problem:#}"))),
    };
    json!({
        "bench": "check",
        "kernel": row.name,
        "sizes": sizes.name,
        "dtype": type_name(dtype),
        "ok": result.as_ref().is_ok_and(|checks| checks.iter().all(Check::holds)),
        "errors": errors,
        "limits": limits,
        "problem": problem,
    })
}

/// The outputs of a kernel.
fn outputs(
    device: &Device,
    row: &Row,
    sizes: &Sizes,
    rounded: FloatDType,
    held: FloatDType,
) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut inputs = Inputs::new(device, held, Values::Repeatable { rounded });
    let mut work = (row.prepare)(&mut inputs, sizes)?;
    Ok((work.call)().into_iter().map(super::rows::Out::values).collect())
}

fn compare(chosen: &ChosenDevice, row: &Row, sizes: &Sizes, dtype: FloatDType) -> anyhow::Result<Vec<Check>> {
    let cpu = Device::flex();
    let right = outputs(&cpu, row, sizes, dtype, FloatDType::F32)?;
    let got = outputs(&chosen.device, row, sizes, dtype, dtype)?;
    let plain = match dtype {
        FloatDType::F32 => None,
        _ => Some(outputs(&cpu, row, sizes, dtype, dtype)?),
    };
    if got.len() != right.len() || right.is_empty() {
        bail!("{} outputs, expected {}", got.len(), right.len());
    }
    let limit = |i: usize, largest: f64| match &plain {
        None => largest * if chosen.description.starts_with("cuda") { 2e-3 } else { 2e-5 },
        Some(plain) => {
            let ulp = if dtype == FloatDType::BF16 { 2f64.powi(-8) } else { 2f64.powi(-11) };
            2.0 * distance(&plain[i], &right[i]) + 2.0 * ulp * largest
        }
    };
    let pairs = got.iter().zip(&right).enumerate();
    Ok(pairs
        .map(|(i, (got, right))| {
            let largest = right.iter().fold(0.0f64, |max, &value| max.max(f64::from(value).abs()));
            Check { error: distance(got, right), limit: limit(i, largest) }
        })
        .collect())
}

/// Largest difference; infinite where the sizes differ or a value is not finite.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let differences = a.iter().zip(b).map(|(&a, &b)| (f64::from(a) - f64::from(b)).abs());
    differences.fold(0.0, |max, d| if d.is_finite() { f64::max(max, d) } else { f64::INFINITY })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::kernels::rows::{ROWS, Work};

    /// The lines of a run on the CPU and how it ended.
    fn lines(rows: &[&Row]) -> (Vec<Value>, anyhow::Result<()>) {
        let (mut lines, chosen) = (vec![], lowrank_train::device::choose("cpu").unwrap());
        let ended = run(&chosen, rows, &[Sizes::ODD], &mut |line| {
            lines.push(line);
            Ok(())
        });
        (lines, ended)
    }

    #[test]
    fn every_kernel_agrees_with_itself() {
        let rows: Vec<&Row> = ROWS.iter().collect();
        let (lines, ended) = lines(&rows);
        let wrong: Vec<&Value> = lines.iter().filter(|line| line["ok"] != true).collect();
        assert!(wrong.is_empty() && ended.is_ok(), "{wrong:#?}");
        let elsewhere = ROWS.iter().filter(|row| row.needs_fragments || !row.is_repeatable).count();
        assert_eq!(lines.len(), 3 * (ROWS.len() - elsewhere));
    }

    /// `rms_norm` with a tenth more in one value on the second call, which is that of the device.
    fn wrong(inputs: &mut Inputs, sizes: &Sizes) -> anyhow::Result<Work> {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        let x = inputs.tensor([sizes.seq, sizes.hidden]);
        let factor = if CALLS.fetch_add(1, Ordering::Relaxed) == 1 { 1.1 } else { 1.0 };
        let call = Box::new(move || vec![super::super::rows::Out::D2(x.clone() * factor)]);
        Ok(Work { shape: String::new(), flops: 0.0, bytes: 0.0, is_product: false, call })
    }

    #[test]
    fn a_wrong_kernel_is_noticed() {
        let row = Row { name: "wrong", is_repeatable: true, needs_fragments: false, prepare: wrong };
        let (lines, ended) = lines(&[&row]);
        assert_eq!(ended.unwrap_err().to_string(), "1 of 3 checks failed: wrong odd f32");
        assert_eq!(lines.iter().map(|line| line["ok"] == true).collect::<Vec<_>>(), [false, true, true]);
    }
}
