//! Values to 8-bit or 4-bit codes in groups with a scale and a zero point, as Q-GaLore keeps weights and bases
//! (arXiv 2407.08296, section 3).
//!
//! Groups of consecutive values of the flattened matrix, with `q_max = 2^bits - 1`, lower and upper end `l <= 0 <= u`:
//! `s = max(u - l, 1e-5) / q_max`, `z = round(-l / s)`, `q = clamp(round(w / s) + z, 0, q_max)`, `w^ = (q - z) s`. Rounding
//! to nearest takes halves to even; stochastic rounding goes up with the probability of the fraction, by 24 random bits. The
//! draw of value i depends on the seed and i alone, and is the same on CPUs and GPUs; the reference draws from the device's
//! generator instead. A GPU may divide with an error of some units in the last place, so that a quotient that near to where
//! rounding changes gets the neighbouring code.
//!
//! Of a group with values that are not finite only this is certain: its codes are codes.
//!
//! Memory bound: 4 bytes read and `bits / 8 + 5 / group` written a value.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor, tensor::IntTensor};
use burn::tensor::{Distribution, FloatDType, Shape};

use crate::packed::Layout;
use crate::packed::reference::{pack, padded};
use crate::plain::Plain;
use crate::stochastic_round::{INCREMENT, random_high};

/// The smallest width of a group's range.
pub(crate) const SMALLEST_RANGE: f32 = 1e-5;
/// Between two neighbouring draws, which have 24 bits and are below 1.
pub(crate) const DRAW: f32 = 1.0 / (1u32 << 24) as f32;

/// How a value between two codes is decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest, halves to even.
    Nearest,
    /// Up with the probability of the fraction.
    Stochastic {
        /// Value i draws number i of the seed.
        seed: u64,
    },
}

impl Rounding {
    /// The same for the values from this index on.
    #[must_use]
    pub fn after(self, values: usize) -> Self {
        match self {
            Self::Nearest => self,
            Self::Stochastic { seed } => {
                Self::Stochastic { seed: seed.wrapping_add((values as u64).wrapping_mul(INCREMENT)) }
            }
        }
    }
}

/// The largest code.
pub fn top(bits: usize) -> f32 {
    ((1u32 << bits) - 1) as f32
}

/// The nearest whole number, halves to even, for magnitudes below 2^22: the sum has no room for a fraction. Unlike
/// `round_ties_even` it needs no library call on old processors.
#[inline(always)]
fn round(x: f32) -> f32 {
    const SHIFT: f32 = 1.5 * (1u32 << 23) as f32;
    (x + SHIFT) - SHIFT
}

/// Scale and zero point of a group on the host.
#[inline(always)]
pub fn grid(values: &[f32], top: f32) -> (f32, u8) {
    // Plain comparisons of independent lanes, which vectorise.
    let (mut low, mut high) = ([0.0f32; 16], [0.0f32; 16]);
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for ((low, high), value) in low.iter_mut().zip(&mut high).zip(chunk) {
            *low = if *value < *low { *value } else { *low };
            *high = if *value > *high { *value } else { *high };
        }
    }
    let low = rest.iter().copied().chain(low).fold(0.0, f32::min);
    let high = rest.iter().copied().chain(high).fold(0.0, f32::max);
    let scale = (high - low).max(SMALLEST_RANGE) / top;
    (scale, round(-low / scale).clamp(0.0, top) as u8)
}

/// The codes of a group on the host, one a byte.
#[inline(always)]
pub fn encode(values: &[f32], scale: f32, zero: u8, top: f32, rounding: Rounding, codes: &mut [u8]) {
    let shift = f32::from(zero);
    match rounding {
        Rounding::Nearest => {
            for (code, value) in codes.iter_mut().zip(values) {
                *code = (round(value / scale) + shift).clamp(0.0, top) as u8;
            }
        }
        Rounding::Stochastic { seed } => {
            for (i, (code, value)) in codes.iter_mut().zip(values).enumerate() {
                let exact = value / scale;
                let cut = exact as i32 as f32; // towards 0
                let below = if cut > exact { cut - 1.0 } else { cut };
                let draw = (random_high(seed, i as u64) >> 8) as f32 * DRAW;
                let up = if draw < exact - below { 1.0 } else { 0.0 };
                *code = (below + up + shift).clamp(0.0, top) as u8;
            }
        }
    }
}

/// Words of the codes, a scale for each group, words of the zero points; `values` as they are flattened.
pub(crate) fn reference<B: Backend>(
    values: FloatTensor<B>,
    layout: Layout,
    rounding: Rounding,
) -> (IntTensor<B>, FloatTensor<B>, IntTensor<B>) {
    let (len, block, blocks, bits) = (layout.len(), layout.block, layout.blocks(), layout.format.bits());
    let (top, whole) = (top(bits), [blocks, block]);
    let values = padded(Plain::<B>(values).f32().reshape(&[len]), blocks * block, 0.0).reshape(&whole);
    let high = values.clone().max_dim(1).clamp(0.0, f32::MAX);
    let below_zero = (values.clone() * -1.0).max_dim(1).clamp(0.0, f32::MAX);
    let range = (high + below_zero.clone()).clamp(SMALLEST_RANGE, f32::MAX);
    let scale = Plain::<B>(B::float_div_scalar(range.0, top.into()));
    let divided = |values: Plain<B>, scale: Plain<B>| Plain::<B>(B::float_div(values.0, scale.0));
    let zero = Plain::<B>(B::float_round(divided(below_zero, scale.clone()).0)).clamp(0.0, top);
    let exact = divided(values, scale.clone().expand(&whole));
    let rounded = match rounding {
        Rounding::Nearest => Plain(B::float_round(exact.0)),
        Rounding::Stochastic { seed } => {
            let device = exact.0.device();
            B::seed(&device, seed);
            let shape = Shape::new(whole);
            let uniform = Plain::<B>(B::float_random(shape, Distribution::Default, &device, FloatDType::F32));
            let below = Plain::<B>(B::float_floor(exact.0.clone()));
            let up = (exact - below.clone() - uniform).clamp(0.0, f32::MAX);
            below + Plain(B::float_sign(up.0))
        }
    };
    let codes = (rounded + zero.clone().expand(&whole)).clamp(0.0, top);
    let codes = codes.reshape(&[blocks * block]).narrow(0, 0..len);
    (pack(codes, bits, 0.0), scale.reshape(&[blocks]).0, pack(zero.reshape(&[blocks]), 8, 0.0))
}

#[cfg(feature = "flex")]
pub(crate) use cpu::groups as cpu;

#[cfg(feature = "flex")]
mod cpu {
    use burn_flex::FlexTensor;
    use rayon::prelude::*;

    use super::{Rounding, encode, grid, top};
    use crate::cpu::{assert_shape, dense, from_vec, from_words, values, vectorised};
    use crate::packed::Layout;

    /// Groups that a thread takes at a time, a multiple of the four whose zero points are a word.
    const TOGETHER: usize = 64;

    pub(crate) fn groups(
        tensor: FlexTensor,
        layout: Layout,
        rounding: Rounding,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        assert_shape("the values", &tensor, &layout.stored());
        let tensor = dense(tensor);
        let (block, blocks) = (layout.block, layout.blocks());
        let mut words = vec![0i32; layout.words()];
        let (mut scale, mut zero) = (vec![0.0f32; blocks], vec![0u8; blocks.next_multiple_of(4)]);
        let words_each = TOGETHER * block / layout.format.per_word();
        let values = values(&tensor).par_chunks(TOGETHER * block).zip(words.par_chunks_mut(words_each));
        let grids = scale.par_chunks_mut(TOGETHER).zip(zero.par_chunks_mut(TOGETHER));
        values.zip(grids).enumerate().for_each(|(i, ((values, words), (scale, zero)))| {
            let rounding = rounding.after(i * TOGETHER * block);
            vectorised(
                #[inline(always)]
                || run(values, words, scale, zero, layout, rounding),
            );
        });
        let zero: Vec<i32> = zero.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        (from_words(words), from_vec(scale, &[blocks]), from_words(zero))
    }

    /// Some whole groups, and the last one of the tensor.
    #[inline(always)]
    fn run(values: &[f32], words: &mut [i32], scale: &mut [f32], zero: &mut [u8], layout: Layout, rounding: Rounding) {
        let (block, bits) = (layout.block, layout.format.bits());
        // Words hold their codes from the lowest byte on, as the processors that this runs on store them.
        let bytes = bytemuck::cast_slice_mut::<i32, u8>(words);
        let mut halves = vec![0u8; if bits == 4 { block } else { 0 }];
        let groups = values.chunks(block).zip(bytes.chunks_mut(block * bits / 8)).zip(scale.iter_mut().zip(zero));
        for (index, ((values, bytes), (scale, zero))) in groups.enumerate() {
            (*scale, *zero) = grid(values, top(bits));
            let rounding = rounding.after(index * block);
            if bits == 8 {
                encode(values, *scale, *zero, top(bits), rounding, bytes);
                continue;
            }
            encode(values, *scale, *zero, top(bits), rounding, &mut halves);
            for (byte, pair) in bytes.iter_mut().zip(halves[..values.len()].chunks(2)) {
                *byte = pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
            }
        }
    }
}
