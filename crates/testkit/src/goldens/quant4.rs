//! Cases of bitsandbytes' 4-bit formats: codes, scales and values, on the host and as packed weights on the device.
//!
//! Scales that are quantised themselves are compared as in the 8-bit cases: the reference rounds their quotients to a grid.

use burn::tensor::FloatDType;
use lowrank_core::quant::{Blockwise4, Blockwise8, Codebook, Format, Map, Scale4, nf4, packed};
use lowrank_models::save::host_values;
use serde::Deserialize;

use super::bitsandbytes::{self, HALF_STEP, on_grid};
use super::case::Case;
use super::checks::Checks;
use super::quant::{codes, settings};
use super::tensors::{self, Tensors, Values};
use super::{Options, Stop, failed};

/// How far a quotient may be from the middle of two values where the reference took the other one.
const FROM_MIDDLE: f64 = 1e-6;

#[derive(Deserialize)]
struct Quant4 {
    items: Vec<Item>,
    tensors: String,
}

#[derive(Deserialize)]
struct Item {
    index: usize,
    quant_type: String,
    shape: [usize; 2],
    blocksize: usize,
    double_quant: bool,
    dtype: String,
}

impl Item {
    fn get<'a>(&self, tensors: &'a Tensors, what: &str) -> Result<&'a Values, Stop> {
        tensors::get(tensors, &format!("{}.{what}", self.index))
    }

    fn format(&self) -> Result<(Format, &'static Codebook), Stop> {
        match self.quant_type.as_str() {
            "nf4" => Ok((Format::Nf4, Codebook::nf4())),
            "fp4" => Ok((Format::Fp4, Codebook::fp4())),
            other => Err(Stop::Unsupported(format!("the format {other} is not implemented"))),
        }
    }

    /// The reference's scales.
    fn scale(&self, tensors: &Tensors) -> Result<Scale4, Stop> {
        if !self.double_quant {
            return Ok(Scale4::Plain(self.get(tensors, "absmax")?.data.clone()));
        }
        let absmax = self.get(tensors, "absmax_absmax")?.data.clone();
        let offset = self.get(tensors, "absmax_offset")?.data.first().copied().unwrap_or(f32::NAN);
        let codes = Blockwise8 { codes: codes(self.get(tensors, "absmax_q")?), absmax, block: nf4::NESTED_BLOCK };
        Ok(Scale4::Double { codes, offset })
    }
}

/// Runs a case of the kind `quant_4bit`.
///
/// # Errors
/// Files that cannot be used; a format that is not known.
pub fn run(case: &Case, options: &Options, checks: &mut Checks) -> Result<(), Stop> {
    let settings: Quant4 = settings(case)?;
    let tensors = tensors::read(&case.folder.join(&settings.tensors))?;
    for item in &settings.items {
        let (format, book) = item.format()?;
        checks.largest("values of the codes", &item.get(&tensors, "code")?.data, &book.values, 0.0);
        check_codes(item, book, &tensors, checks)?;
        let scale = item.scale(&tensors)?;
        if let Scale4::Double { .. } = &scale {
            check_scales(item, &scale, &tensors, checks)?;
        }
        let bytes = codes(item.get(&tensors, "packed")?);
        let len = item.shape.iter().product();
        let [d_out, d_in] = item.shape;
        let reference = Blockwise4::from_bitsandbytes(&bytes, scale, item.blocksize, len);
        let reference = bitsandbytes::as_its_cpu_reads(reference, d_in);
        let expected = &item.get(&tensors, "dequantized")?.data;
        // The reference's values are rounded to its type.
        let unit = match item.dtype.as_str() {
            "float32" => 0.0,
            "float16" => f32::powi(2.0, -11),
            "bfloat16" => f32::powi(2.0, -8),
            other => return Err(Stop::Unsupported(format!("the type {other} is not implemented"))),
        };
        let largest = expected.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let limit = case.limit("dequantized_abs").unwrap_or(1e-6) + f64::from(unit * largest);
        checks.largest("dequantised values", expected, &reference.dequantise(book), limit);
        let weight = packed::from_blockwise4(format, &reference, [d_in, d_out], &options.device.device);
        let got = host_values(weight.rows(0..d_out, FloatDType::F32));
        checks.largest("dequantised values of the packed weight", expected, &got, limit);
    }
    Ok(())
}

/// The codes of the weight, and its block maxima where they are in the case.
fn check_codes(item: &Item, book: &Codebook, tensors: &Tensors, checks: &mut Checks) -> Result<(), Stop> {
    let weight = &item.get(tensors, "weight")?.data;
    let got = Blockwise4::quantise(weight, book, item.blocksize, false);
    let absmax = got.scale.values();
    if !item.double_quant {
        checks.largest("block maxima", &item.get(tensors, "absmax")?.data, &absmax, 0.0);
    }
    let expected = codes(item.get(tensors, "packed")?);
    let packed = got.to_bitsandbytes();
    checks.equal("bytes of codes", &expected.len(), &packed.len());
    let code = |bytes: &[u8], i: usize| bytes.get(i / 2).map_or(0, |byte| byte >> (4 * (1 - i % 2)) & 15);
    for (i, value) in weight.iter().enumerate() {
        let (expected, got) = (code(&expected, i), code(&packed, i));
        let values = [expected, got].map(|code| f64::from(book.values[usize::from(code)]));
        let quotient = f64::from(value / absmax[i / item.blocksize]);
        // FP4 has two zeros.
        let is_same = values[0] == values[1];
        let off = if is_same { 0.0 } else { (quotient - (values[0] + values[1]) / 2.0).abs() };
        checks.add("distance from the middle where codes differ", off, FROM_MIDDLE, || {
            format!("item {}, element {i}: expected {expected}, got {got}", item.index)
        });
    }
    Ok(())
}

/// The codes of the scales.
fn check_scales(item: &Item, reference: &Scale4, tensors: &Tensors, checks: &mut Checks) -> Result<(), Stop> {
    let restored = &item.get(tensors, "absmax_restored")?.data;
    checks.largest("restored scales", restored, &reference.values(), 1e-6);
    let weight = &item.get(tensors, "weight")?.data;
    let plain = Blockwise4::quantise(weight, Codebook::nf4(), item.blocksize, false).scale.values();
    let (Scale4::Double { codes: expected, offset }, Scale4::Double { codes: got, offset: got_offset }) =
        (reference, Scale4::double(&plain))
    else {
        return Err(failed("double quantisation left plain scales"));
    };
    let map = Map::signed();
    checks.largest("values of the scale codes", &item.get(tensors, "absmax_code")?.data, &map.values, 0.0);
    checks.largest("mean of the scales", &[*offset], &[got_offset], 1e-6);
    checks.largest("maxima of the scales", &expected.absmax, &got.absmax, 1e-6);
    for (i, (&expected, &got)) in expected.codes.iter().zip(&got.codes).enumerate() {
        let quotient = (plain[i] - offset) / restored_scale(reference, i);
        let value = |code: u8| f64::from(map.values[usize::from(code)]);
        let off = match expected == got {
            true => 0.0,
            false => (f64::from(quotient) - (value(expected) + value(got)) / 2.0).abs(),
        };
        checks.add("distance from the middle where scale codes differ", off, HALF_STEP + 1e-6, || {
            format!("item {}, block {i}: expected {expected}, got {got}", item.index)
        });
        checks.equal("scale codes on the reference's grid", &expected, &map.nearest(on_grid(quotient)));
    }
    Ok(())
}

/// The scale of the scale of a block.
fn restored_scale(scale: &Scale4, block: usize) -> f32 {
    match scale {
        Scale4::Double { codes, .. } => codes.absmax[block / codes.block],
        Scale4::Plain(_) => 1.0,
    }
}
