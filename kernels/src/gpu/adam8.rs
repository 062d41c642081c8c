//! The AdamW step on 8-bit moments, on a GPU; equations and formats in `crate::adam8`. One cube per block of values,
//! four values (a word of codes) a unit, as one vector where their number is a multiple of four; in place where the
//! tensors are not shared.
//!
//! Memory bound in DRAM: with f32 parameter and gradient 16 bytes a value (12 for the two, 4 for codes in and out),
//! with a GaLore matrix of 1024 x 4096 on 4.8 TB/s: 67 MB, floor 14 us. But the codes come by a search in shared
//! memory: 8 reads a code, 18 a value with decoding; at 32 a clock and multiprocessor and four-fold conflicts that is
//! 42 us. Not measured yet. ptxas 12.9 gives units 37 registers in bf16 for sm_90a; a plane reads 256 bytes of parameter
//! and of gradient by one instruction each. A cube goes on to further blocks, so that the 4 KiB of maps are read once a
//! cube, not once a block.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{
    Fold, InPlace, RowCube, address_type, assert_dtype, assert_shape, cube_fold, dense, element, flat_vector_size,
    per_row,
};
use crate::adam8::{Adam8, Factors};
use crate::map8::Map;

/// Cubes that share the blocks: 16 of 64 units for each multiprocessor of the largest devices.
const MOST_CUBES: usize = 2112;

/// Whether the kernel can take blocks of this size; others run as plain tensor operations.
pub(crate) fn takes(block: usize) -> bool {
    block.is_power_of_two() && (4..=1024).contains(&block)
}

/// The code of `x`: how many of the bounds from `start` on are below it.
#[cube]
fn search(maps: &Shared<[f32]>, start: usize, x: f32) -> u32 {
    let mut code = 0u32;
    #[unroll]
    for round in 0..8u32 {
        let half = comptime!(128u32 >> round).runtime();
        let bound = maps[start + (code + half) as usize - 1];
        code = select(x > bound, code + half, code);
    }
    code
}

/// Nearest code of a quotient, but not that of 0 for a negative one.
#[cube]
fn encode(maps: &Shared<[f32]>, start: usize, value: f32, scale: f32, #[comptime] zero: u32) -> u32 {
    let quotient = select(scale == 0.0, 0.0f32, value / scale);
    let code = search(maps, start, quotient);
    select(code == zero && quotient < 0.0, code - 1, code)
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adam8_kernel<P: Float, G: Float, N: Size>(
    parameter: &[Vector<P, N>],
    codes: &[i32],
    absmax: &[f32],
    gradient: &[Vector<G, N>],
    maps: &[f32],
    parameter_out: &mut [Vector<P, N>],
    codes_out: &mut [i32],
    absmax_out: &mut [f32],
    decay: f32,
    step_size: f32,
    eps: f32,
    b1: f32,
    c1: f32,
    b2: f32,
    c2: f32,
    #[comptime] first_zero: u32,
    #[comptime] second_zero: u32,
    #[comptime] cube: RowCube,
    #[define(P)] _parameter_element: ElemType,
    #[define(G)] _gradient_element: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let mut table = Shared::<[f32]>::new_slice(1024usize);
    let unit = UNIT_POS as usize;
    let mut i = unit;
    while i < 1024 {
        table[i] = maps[i];
        i += CUBE_DIM as usize;
    }
    sync_cube();
    let words = codes.len() / 2;
    let blocks = absmax.len() / 2;
    let mut block = CUBE_POS;
    while block < blocks {
        let word = block * CUBE_DIM as usize + unit;
        let first_scale = absmax[block];
        let second_scale = absmax[blocks + block];
        let mut m = Vector::<f32, Const<4>>::new(0.0);
        let mut v = Vector::<f32, Const<4>>::new(0.0);
        let mut first_largest = 0.0f32;
        let mut second_largest = 0.0f32;
        if word < words {
            let first_codes = u32::reinterpret(codes[word]);
            let second_codes = u32::reinterpret(codes[words + word]);
            let size = N::value();
            #[unroll]
            for part in 0..comptime!(4 / size) {
                let at = word * comptime!(4 / size) + part;
                if at < parameter.len() {
                    let gradients = Vector::<f32, N>::cast_from(gradient[at]);
                    let parameters = Vector::<f32, N>::cast_from(parameter[at]);
                    let mut all_updated = Vector::<f32, N>::empty();
                    #[unroll]
                    for n in 0..size {
                        let j = comptime!(part * size + n);
                        let shift = comptime!(8 * j as u32).runtime();
                        let g = gradients.extract(n);
                        let old_m = table[((first_codes >> shift) & 255u32) as usize] * first_scale;
                        let old_v = table[512 + ((second_codes >> shift) & 255u32) as usize] * second_scale;
                        let new_m = b1 * old_m + c1 * g;
                        let new_v = b2 * old_v + c2 * g * g;
                        let keep = (u32::reinterpret(new_v) & 0x7f80_0000u32) != 0x7f80_0000u32;
                        let p = parameters.extract(n);
                        let updated = p * decay - step_size * (new_m / (new_v.sqrt() + eps));
                        all_updated.insert(n, select(keep, updated, p));
                        let kept_m = select(keep, new_m, 0.0f32);
                        let kept_v = select(keep, new_v, 0.0f32);
                        first_largest = max(first_largest, kept_m.abs());
                        second_largest = max(second_largest, kept_v);
                        m.insert(j, kept_m);
                        v.insert(j, kept_v);
                    }
                    parameter_out[at] = Vector::cast_from(all_updated);
                }
            }
        }
        // What is beyond the end is 0 and gets the code of 0.
        let first_scale = cube_fold(first_largest, &mut shared, cube, Fold::Max);
        let second_scale = cube_fold(second_largest, &mut shared, cube, Fold::Max);
        if word < words {
            let mut first_codes = 0u32;
            let mut second_codes = 0u32;
            #[unroll]
            for j in 0..4usize {
                let shift = comptime!(8 * j as u32).runtime();
                first_codes |= encode(&table, 256usize, m.extract(j), first_scale, first_zero) << shift;
                second_codes |= encode(&table, 768usize, v.extract(j), second_scale, second_zero) << shift;
            }
            codes_out[word] = i32::reinterpret(first_codes);
            codes_out[words + word] = i32::reinterpret(second_codes);
        }
        if unit == 0 {
            absmax_out[block] = first_scale;
            absmax_out[blocks + block] = second_scale;
        }
        block += CUBE_COUNT;
    }
}

pub(crate) fn step(
    parameter: CubeTensor,
    gradient: CubeTensor,
    codes: CubeTensor,
    absmax: CubeTensor,
    maps: CubeTensor,
    block: usize,
    rule: Adam8,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let (parameter, gradient, codes) = (dense(parameter), dense(gradient), dense(codes));
    let (absmax, maps) = (dense(absmax), dense(maps));
    let len = gradient.meta.num_elements();
    assert_shape("the parameter", &parameter, gradient.meta.shape());
    assert_shape("the codes", &codes, &[2, len.div_ceil(4)]);
    assert_shape("the scales", &absmax, &[2, len.div_ceil(block)]);
    assert_shape("the maps", &maps, &[4, 256]);
    for (what, tensor, dtype) in
        [("the codes", &codes, DType::I32), ("the scales", &absmax, DType::F32), ("the maps", &maps, DType::F32)]
    {
        assert_dtype(what, tensor, dtype);
    }
    let (client, address) = (parameter.client.clone(), address_type(&[&parameter, &gradient]));
    let cube = RowCube::exactly(&client, (block / 4) as u32);
    let vector = flat_vector_size(&[&parameter, &gradient]).min(4);
    let kinds = (element(&parameter), element(&gradient));
    let zeros = [Map::signed(), Map::unsigned()].map(|map| u32::from(map.zero()));
    let Factors { decay, step_size, eps, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let [parameter, codes, absmax] =
        [(parameter, 0), (codes, 1), (absmax, 2)].map(|(tensor, position)| InPlace::new(tensor, position));
    // SAFETY: vectors divide the parameter and are checked against its length, words and blocks against those of codes
    // and scales; the shapes above belong together, and a code is below 256.
    unsafe {
        adam8_kernel::launch_unchecked(
            &client,
            per_row(len.div_ceil(block).min(MOST_CUBES)),
            cube.dim(),
            address,
            vector,
            parameter.input,
            codes.input,
            absmax.input,
            gradient.into_buffer_arg(),
            maps.into_buffer_arg(),
            parameter.output,
            codes.output,
            absmax.output,
            decay,
            step_size,
            eps,
            b1,
            c1,
            b2,
            c2,
            zeros[0],
            zeros[1],
            cube,
            kinds.0,
            kinds.1,
        );
    }
    (parameter.result, codes.result, absmax.result)
}
