//! Rounds f32 values to bf16 or f16 so that the mean is kept: up or down with the probability of each neighbour's
//! distance.
//!
//! An update below half a unit in the last place of a 16-bit weight is lost for ever under rounding to nearest; under
//! stochastic rounding it arrives on average. The draw of element i depends on the seed and i alone,
//! and is the same on CPUs and GPUs; the reference draws from the device's generator instead.
//! Memory bound: reads 4 and writes 2 bytes a value.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Distribution, FloatDType};

use crate::plain::Plain;

/// `x` in `dtype`, drawn from the device's generator, which is seeded before.
pub(crate) fn reference<B: Backend>(x: FloatTensor<B>, dtype: FloatDType, seed: u64) -> FloatTensor<B> {
    let (shape, device) = (x.shape(), x.device());
    B::seed(&device, seed);
    let uniform = Plain::<B>(B::float_random(shape, Distribution::Default, &device, FloatDType::F32));
    // The nearest value c, and the neighbour on the side of x: a step of c 2^-bits, with bits the length of the
    // mantissa with its leading one, is between half a unit and a unit, so a little more than it always rounds to the
    // next value.
    let bits = if dtype == FloatDType::F16 { 11 } else { 8 };
    let x = Plain::<B>(x);
    let nearest = x.clone().cast(dtype).f32();
    let rest = x - nearest.clone();
    let sign = Plain::<B>(B::float_sign(rest.0.clone()));
    let step = nearest.clone().abs() * (2f32.powi(-bits) * 1.004);
    let next = (nearest.clone() + sign * step).cast(dtype).f32();
    let gap = (next.clone() - nearest.clone()).abs();
    let moved = Plain::<B>(B::float_sign((rest.abs() - uniform * gap).clamp(0.0, f32::MAX).0));
    (nearest.clone() + moved * (next - nearest)).cast(dtype).0
}

/// Added to the state of SplitMix64 for each value.
pub(crate) const INCREMENT: u64 = 0x9e37_79b9_7f4a_7c15;
/// Factors of its finaliser.
pub(crate) const MIXERS: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

#[cfg(feature = "flex")]
pub(crate) fn cpu(x: burn_flex::FlexTensor, dtype: FloatDType, seed: u64) -> burn_flex::FlexTensor {
    match dtype {
        FloatDType::BF16 => rounded(x, dtype, seed, to_bf16),
        FloatDType::F16 => rounded(x, dtype, seed, to_f16),
        _ => reference::<burn::backend::Flex>(x, dtype, seed),
    }
}

#[cfg(feature = "flex")]
fn rounded(
    x: burn_flex::FlexTensor,
    dtype: FloatDType,
    seed: u64,
    round: impl Fn(f32, u32) -> f32 + Send + Sync,
) -> burn_flex::FlexTensor {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;

    use crate::cpu::{Rows, dense, for_chunks, output, values};

    let dims = x.layout().shape().to_vec();
    let x = dense(x);
    let x = values(&x);
    let rounded = output(&dims, |out| {
        let out = Rows(out);
        for_chunks(
            x.len(),
            #[inline(always)]
            |range| {
                // SAFETY: chunks are disjoint.
                let out = unsafe { out.slice(range.start, range.len()) };
                for ((i, out), &x) in range.clone().zip(out).zip(&x[range]) {
                    *out = round(x, random16(seed, i as u64));
                }
            },
        );
    });
    Flex::float_cast(rounded, dtype) // exact, but for what is beyond the largest value
}

/// Adds the noise to the 16 bits that bf16 lacks.
#[cfg(feature = "flex")]
#[inline(always)]
fn to_bf16(x: f32, noise: u32) -> f32 {
    let rounded = f32::from_bits(x.to_bits().wrapping_add(noise) & 0xffff_0000);
    if x.is_finite() && rounded.is_finite() { rounded } else { x }
}

/// Adds the noise to the 13 bits that f16 lacks; its subnormal values, multiples of 2^-24, in fixed point.
#[cfg(feature = "flex")]
#[inline(always)]
fn to_f16(x: f32, noise: u32) -> f32 {
    let magnitude = x.abs();
    let steps = (magnitude * 16_777_216.0 + noise as f32 * (1.0 / 65_536.0)).floor();
    let normal = f32::from_bits((magnitude.to_bits().wrapping_add(noise >> 3)) & 0xffff_e000);
    let rounded = if magnitude < 6.103_515_6e-5 { steps * (1.0 / 16_777_216.0) } else { normal };
    let kept = if rounded <= 65_504.0 { rounded } else { magnitude };
    kept.copysign(x)
}

/// 16 random bits of a counter under a seed.
#[cfg(feature = "flex")]
#[inline(always)]
fn random16(seed: u64, index: u64) -> u32 {
    random_high(seed, index) >> 16
}

/// Random bits of a counter under a seed: the high word of SplitMix64 before its last shift, which changes the lowest bit
/// of that word alone.
#[inline(always)]
pub(crate) fn random_high(seed: u64, index: u64) -> u32 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(INCREMENT));
    z = (z ^ (z >> 30)).wrapping_mul(MIXERS[0]);
    z = (z ^ (z >> 27)).wrapping_mul(MIXERS[1]);
    (z >> 32) as u32
}
