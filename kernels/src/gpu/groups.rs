//! Values to int8 or int4 codes in groups on a GPU; equations in `crate::groups`. A cube takes four groups, whose zero points are
//! one word: it folds their ends, then reads the values again, from its cache, and writes whole words of codes.
//!
//! Memory bound: 4 bytes read and `bits / 8 + 5 / group` written a value. 4096 x 14336 to int8 on 4.8 TB/s: 295 MB, floor 61 us.
//! Stochastic rounding takes about 40 integer operations a value for the draw, half of them multiplications: 30 us at 64 a clock
//! and multiprocessor, beside the reading. Not measured yet. Groups below `32 x 32 / bits` values leave units of a cube idle
//! (half of them in int8 with groups of 64).

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{RowCube, address_type, assert_dtype, assert_shape, dense, empty, flat_vector_size, per_row};
use super::stochastic_round::random_high;
use crate::groups::{DRAW, Rounding, SMALLEST_RANGE, top};
use crate::packed::Layout;

/// Groups of a cube.
const TOGETHER: usize = 4;
/// The most units of a cube.
const MOST_UNITS: u32 = 128;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Packing {
    /// Of a code.
    pub bits: usize,
    /// Words of a group.
    pub words: usize,
    /// Values of a vector.
    pub width: usize,
    /// Rather than to the nearest.
    pub is_stochastic: bool,
    pub cube: RowCube,
}

/// The largest of each element over the units of the cube; `shared` has four places for each unit.
#[cube]
fn largest(
    values: Vector<f32, Const<4>>,
    shared: &mut Shared<[f32]>,
    #[comptime] cube: RowCube,
) -> Vector<f32, Const<4>> {
    let unit = UNIT_POS as usize;
    let mut all = Vector::<f32, Const<4>>::new(0.0);
    if comptime!(cube.planes) {
        #[unroll]
        for i in 0..4usize {
            all.insert(i, plane_max(values.extract(i)));
        }
        if UNIT_POS_PLANE == 0 {
            #[unroll]
            for i in 0..4usize {
                shared[PLANE_POS as usize * 4 + i] = all.extract(i);
            }
        }
        sync_cube();
        let mut plane = comptime!(0usize).runtime();
        while plane < (CUBE_DIM / PLANE_DIM) as usize {
            #[unroll]
            for i in 0..4usize {
                all.insert(i, max(all.extract(i), shared[plane * 4 + i]));
            }
            plane += 1;
        }
    } else {
        #[unroll]
        for i in 0..4usize {
            shared[unit * 4 + i] = values.extract(i);
        }
        let mut width = comptime!(cube.units as usize / 2).runtime();
        while width > 0 {
            sync_cube();
            if unit < width {
                #[unroll]
                for i in 0..4usize {
                    shared[unit * 4 + i] = max(shared[unit * 4 + i], shared[(unit + width) * 4 + i]);
                }
            }
            width /= 2;
        }
        sync_cube();
        #[unroll]
        for i in 0..4usize {
            all.insert(i, shared[i]);
        }
    }
    sync_cube();
    all
}

/// The nearest whole number, halves to even.
#[cube]
fn round(x: f32) -> f32 {
    let below = x.floor();
    let rest = x - below;
    let is_odd = below - 2.0 * (below * 0.5).floor() == 1.0;
    select(rest > 0.5 || (rest == 0.5 && is_odd), below + 1.0, below)
}

/// The code of a rounded quotient; 0 for what is not a number.
#[cube]
fn code(rounded: f32, zero: f32, #[comptime] last: f32) -> u32 {
    let last = comptime!(last).runtime();
    let shifted = rounded + zero;
    let above = select(shifted > 0.0, shifted, 0.0f32);
    u32::cast_from(select(above < last, above, last))
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn pack_groups_kernel<N: Size>(
    values: &[Vector<f32, N>],
    words: &mut [i32],
    scale: &mut [f32],
    zero: &mut [i32],
    seed_low: u32,
    seed_high: u32,
    #[comptime] packing: Packing,
) {
    let units = comptime!(packing.cube.units as usize);
    let mut shared = Shared::<[f32]>::new_slice(comptime!(4 * packing.cube.units as usize));
    let unit = UNIT_POS as usize;
    // Vectors of a word, passes of the cube over a group.
    let vectors = comptime!(32 / packing.bits / packing.width);
    let passes = comptime!(packing.words.div_ceil(packing.cube.units as usize));
    let last = comptime!(top(packing.bits));
    let mut four = CUBE_POS;
    while four < zero.len() {
        let mut below_zero = Vector::<f32, Const<4>>::new(0.0);
        let mut above_zero = Vector::<f32, Const<4>>::new(0.0);
        #[unroll]
        for g in 0..4usize {
            let mut low = 0.0f32;
            let mut high = 0.0f32;
            #[unroll(passes <= 2)]
            for pass in 0..passes {
                let word = pass * units + unit;
                if word < comptime!(packing.words) {
                    let first = ((four * 4 + g) * comptime!(packing.words) + word) * vectors;
                    #[unroll]
                    for i in 0..vectors {
                        if first + i < values.len() {
                            let vector = values[first + i];
                            #[unroll]
                            for j in 0..comptime!(packing.width) {
                                let value = vector.extract(j);
                                low = select(value < low, value, low);
                                high = select(value > high, value, high);
                            }
                        }
                    }
                }
            }
            below_zero.insert(g, -low);
            above_zero.insert(g, high);
        }
        let below_zero = largest(below_zero, &mut shared, packing.cube);
        let above_zero = largest(above_zero, &mut shared, packing.cube);
        let mut zeros = 0u32;
        #[unroll]
        for g in 0..4usize {
            let group = four * 4 + g;
            let range = max(above_zero.extract(g) + below_zero.extract(g), comptime!(SMALLEST_RANGE).runtime());
            let step = range / comptime!(last).runtime();
            let shift = code(round(below_zero.extract(g) / step), 0.0f32, last);
            if unit == 0 && group < scale.len() {
                scale[group] = step;
            }
            zeros |= shift << comptime!(8 * g as u32).runtime();
            let shift = f32::cast_from(shift);
            #[unroll(passes <= 2)]
            for pass in 0..passes {
                let place = pass * units + unit;
                let word = group * comptime!(packing.words) + place;
                if place < comptime!(packing.words) && word < words.len() {
                    let mut codes = 0u32;
                    #[unroll]
                    for i in 0..vectors {
                        if word * vectors + i < values.len() {
                            let vector = values[word * vectors + i];
                            #[unroll]
                            for j in 0..comptime!(packing.width) {
                                let exact = vector.extract(j) / step;
                                let at = comptime!((i * packing.width + j) as u32);
                                let rounded = if comptime!(packing.is_stochastic) {
                                    let number = word as u32 * comptime!(32 / packing.bits as u32) + at;
                                    let draw = f32::cast_from(random_high(seed_low, seed_high, number) >> 8);
                                    let below = exact.floor();
                                    let goes_up = draw * comptime!(DRAW).runtime() < exact - below;
                                    select(goes_up, below + 1.0, below)
                                } else {
                                    round(exact)
                                };
                                codes |= code(rounded, shift, last) << comptime!(at * packing.bits as u32).runtime();
                            }
                        }
                    }
                    words[word] = i32::reinterpret(codes);
                }
            }
        }
        if unit == 0 {
            zero[four] = i32::reinterpret(zeros);
        }
        four += CUBE_COUNT;
    }
}

/// Words of the codes, scales, words of the zero points.
pub(crate) fn pack(values: CubeTensor, layout: Layout, rounding: Rounding) -> (CubeTensor, CubeTensor, CubeTensor) {
    let values = dense(values);
    assert_shape("the values", &values, &layout.stored());
    assert_dtype("the values", &values, DType::F32);
    assert!(u32::try_from(layout.len()).is_ok(), "{} values are more than there are random numbers", layout.len());
    let blocks = layout.blocks();
    let vector = |len: usize, dtype| empty(&values, Shape::new([len]), dtype);
    let (words, scale) = (vector(layout.words(), DType::I32), vector(blocks, DType::F32));
    let zero = vector(blocks.div_ceil(TOGETHER), DType::I32);
    if blocks == 0 {
        return (words, scale, zero);
    }
    let client = values.client.clone();
    let (per_word, address) = (layout.format.per_word(), address_type(&[&values]));
    let (width, group) = (flat_vector_size(&[&values]).min(per_word), layout.block / per_word);
    let (is_stochastic, seed) = match rounding {
        Rounding::Nearest => (false, 0),
        Rounding::Stochastic { seed } => (true, seed),
    };
    let cube = RowCube::new(&client, group, MOST_UNITS);
    let packing = Packing { bits: layout.format.bits(), words: group, width, is_stochastic, cube };
    // SAFETY: vectors, words and groups are checked against the lengths of their buffers, and a cube takes a word of zero points
    // that exists.
    unsafe {
        pack_groups_kernel::launch_unchecked(
            &client,
            per_row(blocks.div_ceil(TOGETHER)),
            cube.dim(),
            address,
            width,
            values.into_buffer_arg(),
            words.clone().into_buffer_arg(),
            scale.clone().into_buffer_arg(),
            zero.clone().into_buffer_arg(),
            seed as u32,
            (seed >> 32) as u32,
            packing,
        );
    }
    (words, scale, zero)
}
