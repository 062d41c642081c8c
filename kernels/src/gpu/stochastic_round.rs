//! Stochastic rounding on a GPU; rule and random bits are those of `crate::stochastic_round`, so that a seed gives the
//! same bits as on the CPU. Only 32-bit integers: not every device has wider ones.
//!
//! Memory bound: reads 4 and writes 2 bytes a value. 4096 x 14336 on 4.8 TB/s: 352 MB, floor 73 us. About 30 integer
//! operations a value, half of them multiplications: 30 us at 64 a clock and multiprocessor. Not measured yet.

use burn::tensor::{DType, FloatDType};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{address_type, assert_dtype, dense, element, empty, flat_vector_size, per_item};
use crate::stochastic_round::{INCREMENT, MIXERS};

/// The low word of `a b`, then the high one.
#[cube]
fn multiply(low: u32, high: u32, #[comptime] factor: u64) -> (u32, u32) {
    let factor_low = comptime!(factor as u32).runtime();
    let factor_high = comptime!((factor >> 32) as u32).runtime();
    (low * factor_low, low.mul_hi(factor_low) + low * factor_high + high * factor_low)
}

/// `z ^ (z >> shift)`
#[cube]
fn fold_down(low: u32, high: u32, #[comptime] shift: u32) -> (u32, u32) {
    (low ^ ((low >> shift) | (high << comptime!(32 - shift))), high ^ (high >> shift))
}

/// 32 random bits of the value at `index`: SplitMix64 in words of 32 bits, see `crate::stochastic_round::random_high`.
#[cube]
pub(super) fn random_high(seed_low: u32, seed_high: u32, index: u32) -> u32 {
    let count = index + 1;
    let (low, high) = multiply(count, select(count == 0, 1u32, 0u32), comptime!(INCREMENT));
    let sum = seed_low + low;
    let carry = select(sum < low, 1u32, 0u32);
    let (low, high) = fold_down(sum, seed_high + high + carry, 30u32);
    let (low, high) = multiply(low, high, comptime!(MIXERS[0]));
    let (low, high) = fold_down(low, high, 27u32);
    let (_low, high) = multiply(low, high, comptime!(MIXERS[1]));
    high
}

#[cube]
fn is_finite(bits: u32) -> bool {
    (bits & 0x7f80_0000u32) != 0x7f80_0000u32
}

#[cube]
fn to_bf16(x: f32, noise: u32) -> f32 {
    let bits = u32::reinterpret(x);
    let rounded = (bits + noise) & 0xffff_0000u32;
    f32::reinterpret(select(is_finite(bits) && is_finite(rounded), rounded, bits))
}

#[cube]
fn to_f16(x: f32, noise: u32) -> f32 {
    let bits = u32::reinterpret(x);
    let magnitude = bits & 0x7fff_ffffu32;
    // Subnormal: a fixed distance of 2^-24 between neighbours. Products with powers of two are exact.
    let whole = f32::reinterpret(magnitude) * 16_777_216.0f32;
    let steps = (whole + f32::cast_from(noise) * comptime!(1.0f32 / 65_536.0).runtime()).floor();
    let small = u32::reinterpret(steps * comptime!(1.0f32 / 16_777_216.0).runtime());
    let normal = (magnitude + (noise >> 3)) & 0xffff_e000u32;
    let rounded = select(magnitude < 0x3880_0000u32, small, normal);
    let kept = select(rounded > 0x477f_e000u32, magnitude, rounded); // 65504 is the largest
    f32::reinterpret(kept | (bits & 0x8000_0000u32))
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn stochastic_round_kernel<F: Float, N: Size>(
    x: &[Vector<f32, N>],
    y: &mut [Vector<F, N>],
    seed_low: u32,
    seed_high: u32,
    #[comptime] dtype: FloatDType,
    #[define(F)] _element: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i < x.len() {
        let values = x[i];
        let mut rounded = Vector::<f32, N>::new(0.0);
        #[unroll]
        for j in 0..N::value() {
            let noise = random_high(seed_low, seed_high, (i * N::value() + j) as u32) >> 16;
            let value = values.extract(j);
            if comptime!(dtype == FloatDType::BF16) {
                rounded.insert(j, to_bf16(value, noise));
            } else {
                rounded.insert(j, to_f16(value, noise));
            }
        }
        y[i] = Vector::cast_from(rounded);
    }
}

/// To bf16 or f16.
pub(crate) fn round(x: CubeTensor, dtype: FloatDType, seed: u64) -> CubeTensor {
    let x = dense(x);
    assert_dtype("what is rounded", &x, DType::F32);
    let len = x.meta.num_elements();
    assert!(u32::try_from(len).is_ok(), "{len} values are more than there are random numbers");
    let y = empty(&x, x.meta.shape().clone(), dtype.into());
    let (client, width, address) = (x.client.clone(), flat_vector_size(&[&x, &y]), address_type(&[&x]));
    let (count, dim) = per_item(&client, len / width);
    let kind = element(&y);
    // SAFETY: a unit checks that its vector exists, and y has the shape of x.
    unsafe {
        stochastic_round_kernel::launch_unchecked(
            &client,
            count,
            dim,
            address,
            width,
            x.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            seed as u32,
            (seed >> 32) as u32,
            dtype,
            kind,
        );
    }
    y
}
