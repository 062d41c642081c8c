//! Cases of bitsandbytes' 8-bit formats: blockwise quantisation, and AdamW on moments in that form.
//!
//! The reference ran on a CPU, where bitsandbytes rounds each quotient `x = value / absmax` to the grid
//! `2 i / 65535 - 1` before it looks for the nearest code; on a GPU, as here, it does not. So codes are compared twice:
//! those of the quotients themselves, which may differ where the middle of two map values is within half a step of that
//! grid, and those of the quotients on the grid, which must be the same.

use lowrank_core::quant::{Adam8, Blockwise8, Map, Moments8};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::bitsandbytes::{HALF_STEP, on_grid};
use super::case::Case;
use super::checks::Checks;
use super::tensors::{self, Tensors, Values};
use super::{Options, Stop, failed};

#[derive(Deserialize)]
struct Quant8 {
    items: Vec<Item>,
    tensors: String,
}

#[derive(Deserialize)]
struct Item {
    index: usize,
    blocksize: usize,
}

#[derive(Deserialize)]
struct Adam {
    steps: u32,
    optimizer: Optimizer,
    blocksize: usize,
    tensors: String,
}

#[derive(Deserialize)]
struct Optimizer {
    lr: f64,
    betas: (f64, f64),
    eps: f64,
    weight_decay: f64,
}

/// The settings of a case that only these kinds have.
pub(super) fn settings<T: DeserializeOwned>(case: &Case) -> Result<T, Stop> {
    let path = case.folder.join("case.json");
    let text = std::fs::read_to_string(&path).map_err(|error| failed(format!("{}: {error}", path.display())))?;
    serde_json::from_str(&text).map_err(|error| failed(format!("{}: {error}", path.display())))
}

pub(super) fn codes(values: &Values) -> Vec<u8> {
    values.data.iter().map(|code| *code as u8).collect()
}

/// Runs a case of the kind `quant_8bit_blockwise`.
///
/// # Errors
/// Files that cannot be used.
pub fn run_quant8(case: &Case, _options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let settings: Quant8 = settings(case)?;
    let tensors = tensors::read(&case.folder.join(&settings.tensors))?;
    let map = Map::signed();
    checks.largest("signed map", &tensors::get(&tensors, "code_signed")?.data, &map.values, 0.0);
    checks.largest("unsigned map", &tensors::get(&tensors, "code_unsigned")?.data, &Map::unsigned().values, 0.0);
    for item in &settings.items {
        let get = |what: &str| tensors::get(&tensors, &format!("{}.{what}", item.index));
        let (weight, absmax, dequantised) = (&get("weight")?.data, &get("absmax")?.data, &get("dequantized")?.data);
        let expected = codes(get("quantized")?);
        let got = Blockwise8::quantise(weight, map, item.blocksize);
        checks.largest("block maxima", absmax, &got.absmax, 0.0);

        for (i, (&expected, &got)) in expected.iter().zip(&got.codes).enumerate() {
            let quotient = weight[i] / absmax[i / item.blocksize];
            let value = |code: u8| f64::from(map.values[usize::from(code)]);
            let from_middle = match expected == got {
                true => 0.0,
                false => (f64::from(quotient) - (value(expected) + value(got)) / 2.0).abs(),
            };
            checks.add("distance from the middle where codes differ", from_middle, HALF_STEP + 1e-6, || {
                format!("item {}, element {i}: expected {expected}, got {got}", item.index)
            });
            let code = if quotient.is_nan() { 0 } else { map.nearest(on_grid(quotient)) }; // a block of zeros
            checks.equal("codes on the reference's grid", &expected, &code);
        }
        let limit = case.limit("dequantized_abs").unwrap_or(1e-6);
        let got = Blockwise8 { codes: expected, absmax: absmax.clone(), block: item.blocksize }.dequantise(map);
        checks.largest("dequantised values", dequantised, &got, limit);
    }
    Ok(())
}

/// The reference's moments after a step; zeros before the first.
fn moments(tensors: &Tensors, step: u32, len: usize, block: usize) -> Result<Moments8, Stop> {
    if step == 0 {
        return Ok(Moments8::zeros(len, block));
    }
    let part = |which: u32| -> Result<Blockwise8, Stop> {
        let codes = codes(tensors::get(tensors, &format!("state{which}.{step}"))?);
        let absmax = tensors::get(tensors, &format!("absmax{which}.{step}"))?.data.clone();
        Ok(Blockwise8 { codes, absmax, block })
    };
    Ok(Moments8 { first: part(1)?, second: part(2)? })
}

/// At most one code apart in at most one in a hundred elements.
fn check_codes(what: &str, expected: &[u8], got: &[u8], checks: &mut Checks) {
    let apart = |(a, b): (&u8, &u8)| f64::from(a.abs_diff(*b));
    let largest = expected.iter().zip(got).map(apart).fold(0.0, f64::max);
    let differing = expected.iter().zip(got).filter(|(a, b)| a != b).count() as f64 / expected.len().max(1) as f64;
    checks.add(&format!("{what}, largest difference"), largest, 1.0, String::new);
    checks.add(&format!("{what}, share that differs"), differing, 0.01, String::new);
}

/// Runs a case of the kind `adamw_8bit`: freely from the first parameter on, and each step from the reference's state
/// before it. In the latter the codes must be those of the moments, and the reference's those of the moments on its
/// grid.
///
/// # Errors
/// Files that cannot be used.
pub fn run_adamw8bit(case: &Case, _options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let settings: Adam = settings(case)?;
    let tensors = tensors::read(&case.folder.join(&settings.tensors))?;
    let values = |what: &str, step: u32| tensors::get(&tensors, &format!("{what}.{step}")).map(|found| &found.data);
    let (first_map, second_map) = (Map::signed(), Map::unsigned());
    checks.largest("signed map", &tensors::get(&tensors, "qmap1")?.data, &first_map.values, 0.0);
    checks.largest("unsigned map", &tensors::get(&tensors, "qmap2")?.data, &second_map.values, 0.0);
    let Optimizer { lr, betas, eps, weight_decay } = settings.optimizer;
    let block = settings.blocksize;
    let mut free = values("param", 0)?.clone();
    let mut free_moments = Moments8::zeros(free.len(), block);

    for step in 1..=settings.steps {
        let rule = Adam8 { learning_rate: lr, betas, eps, weight_decay, step };
        let (gradient, expected) = (values("grad", step)?, values("param", step)?);
        free_moments.step(&mut free, gradient, rule);
        let (key, default) = if step == 1 { ("param_abs_step1", 1e-6) } else { ("param_abs", 2e-3) };
        let what = if step == 1 { "parameter after the first step" } else { "parameter" };
        checks.largest(what, expected, &free, case.limit(key).unwrap_or(default));

        let before = moments(&tensors, step - 1, gradient.len(), block)?;
        let after = moments(&tensors, step, gradient.len(), block)?;
        let (mut parameter, mut got) = (values("param", step - 1)?.clone(), before.clone());
        got.step(&mut parameter, gradient, rule);
        checks.largest("parameter after one step", expected, &parameter, case.limit("param_abs_step1").unwrap_or(1e-6));
        let parts = [
            ("first moment", first_map, &before.first, &after.first, &got.first, betas.0, false),
            ("second moment", second_map, &before.second, &after.second, &got.second, betas.1, true),
        ];
        for (name, map, before, after, got, beta, is_squared) in parts {
            checks.largest(&format!("{name}, block maxima"), &after.absmax, &got.absmax, 1e-6);
            let exact = before.dequantise(map).into_iter().zip(gradient).map(|(old, g)| {
                let new = if is_squared { g * g } else { *g };
                beta as f32 * old + (1.0 - beta) as f32 * new
            });
            let quotients: Vec<f32> = exact.enumerate().map(|(i, value)| value / after.absmax[i / block]).collect();
            let nearest: Vec<u8> = quotients.iter().map(|x| map.nearest(*x)).collect();
            check_codes(&format!("{name}, codes"), &nearest, &got.codes, checks);
            let nearest: Vec<u8> = quotients.iter().map(|x| map.nearest(on_grid(*x))).collect();
            check_codes(&format!("{name}, codes on the reference's grid"), &after.codes, &nearest, checks);
        }
    }
    Ok(())
}
