//! What the CPU kernels of bitsandbytes 0.50.2, which made the cases, do otherwise than its GPU kernels and this program.
//!
//! * 8-bit codes: each quotient `x = value / absmax` is rounded to the grid `2 i / 65535 - 1` before the nearest code is looked for.
//!   This also holds for scales that are quantised.
//! * 4-bit values: codes and scales are made from blocks of the flattened `[d_out, d_in]` matrix, but when values are read back,
//!   the block of element (row, col) is taken to be `row (d_in / block) + col / block`, both quotients rounded down. Where
//!   `block` does not divide `d_in`, that is the scale of another block, and the error of the values is three times as large.
//!
//! A case whose base was held in NF4 has such values where its layers are so shaped (176 inputs, blocks of 64). They are built
//! here, so that the rest of the case can be compared.

use lowrank_core::Base;
use lowrank_core::base::PackedBase;
use lowrank_core::quant::{Blockwise4, Blockwise8, Codebook, Map, Scale4, packed};
use lowrank_models::hf::Checkpoint;
use lowrank_models::{Decoder, Network};

use super::{Stop, failed};

/// Half a step of the grid.
pub const HALF_STEP: f64 = 1.0 / 65535.0;

/// The quotient on the grid, with the reference's arithmetic.
pub fn on_grid(x: f32) -> f32 {
    let index = ((x + 1.0) * 0.5 * 65535.0 + 0.5).trunc();
    (f64::from(index) / 65535.0 * 2.0 - 1.0) as f32
}

/// Quantised scales with codes of quotients on the grid.
fn double_on_grid(plain: &[f32]) -> Scale4 {
    match Scale4::double(plain) {
        Scale4::Double { codes, offset } => {
            let code = |(i, scale): (usize, &f32)| {
                Map::signed().nearest(on_grid((scale - offset) / codes.absmax[i / codes.block]))
            };
            let on_grid = plain.iter().enumerate().map(code).collect();
            Scale4::Double { codes: Blockwise8 { codes: on_grid, ..codes }, offset }
        }
        plain => plain,
    }
}

fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// A weight whose values are those that the reference reads from these codes and scales: the same codes, in blocks so small that
/// none straddles rows.
pub fn as_its_cpu_reads(weight: Blockwise4, d_in: usize) -> Blockwise4 {
    if d_in.is_multiple_of(weight.block) {
        return weight;
    }
    let (scale, block) = (weight.scale.values(), greatest_common_divisor(d_in, weight.block));
    let read = |at: usize| scale[at / d_in * (d_in / weight.block) + at % d_in / weight.block];
    let scale = (0..weight.len).step_by(block).map(read).collect();
    Blockwise4 { scale: Scale4::Plain(scale), block, ..weight }
}

/// Replaces the packed weights whose values the reference reads otherwise.
pub fn hold_as_its_cpu_reads(decoder: &mut Decoder, checkpoint: &Checkpoint) -> Result<(), Stop> {
    let mut result = Ok(());
    decoder.for_each_projection(&mut |module, projection| {
        let (Base::Packed(base), [d_in, d_out]) = (&projection.weight, projection.dims()) else { return };
        let quantisation = base.quantisation;
        if d_in.is_multiple_of(quantisation.block) && !quantisation.double {
            return;
        }
        let values = match checkpoint.get(&format!("{module}.weight")) {
            Ok(view) => view.to_f32(),
            Err(error) => return result = Err(failed(error)),
        };
        let mut weight = Blockwise4::quantise(&values, Codebook::nf4(), quantisation.block, false);
        if quantisation.double {
            weight.scale = double_on_grid(&weight.scale.values());
        }
        let weight = as_its_cpu_reads(weight, d_in);
        let weight = packed::from_blockwise4(quantisation.format, &weight, [d_in, d_out], &base.weight.device());
        projection.weight = Base::Packed(PackedBase { weight, ..base.clone() });
    });
    result
}
