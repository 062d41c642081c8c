//! Rounds f32 values to bf16 or f16 so that the mean is kept: up or down with the probability of each neighbour's distance.
//!
//! An update below half a unit in the last place of a 16-bit weight is lost for ever under rounding to nearest; under
//! stochastic rounding it arrives on average. The draw of element i depends on the seed and i alone.
//! Memory bound: reads 4 and writes 2 bytes a value.

use burn::backend::{Backend, TensorMetadata, tensor::FloatTensor};
use burn::tensor::{Distribution, FloatDType};

use crate::plain::Plain;

/// `x` in `dtype`, drawn from the device's generator, which is seeded before.
pub(crate) fn reference<B: Backend>(x: FloatTensor<B>, dtype: FloatDType, seed: u64) -> FloatTensor<B> {
    let (shape, device) = (x.shape(), x.device());
    B::seed(&device, seed);
    let uniform = Plain::<B>(B::float_random(shape, Distribution::Default, &device, FloatDType::F32));
    // The nearest value c, and the neighbour on the side of x: a step of c 2^-bits, with bits the length of the mantissa with
    // its leading one, is between half a unit and a unit, so a little more than it always rounds to the next value.
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

#[cfg(feature = "flex")]
pub(crate) fn cpu(x: burn_flex::FlexTensor, dtype: FloatDType, seed: u64) -> burn_flex::FlexTensor {
    use burn::backend::Flex;
    use burn::backend::ops::FloatTensorOps;

    use crate::cpu::{Rows, dense, for_chunks, output, values};

    if dtype != FloatDType::BF16 {
        return reference::<Flex>(x, dtype, seed);
    }
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
                    let noise = random16(seed, i as u64);
                    let bits = x.to_bits();
                    let rounded = f32::from_bits(bits.wrapping_add(noise) & 0xffff_0000);
                    *out = if x.is_finite() && rounded.is_finite() { rounded } else { x };
                }
            },
        );
    });
    Flex::float_cast(rounded, dtype) // exact: the lower half of every value is zero
}

/// 16 random bits of a counter under a seed (the finaliser of SplitMix64).
#[cfg(feature = "flex")]
#[inline(always)]
fn random16(seed: u64, index: u64) -> u32 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z >> 48) as u32
}
