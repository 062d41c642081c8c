//! The indices of the largest scores on a GPU, in two launches of one kernel, which counts for each of d numbers how many come
//! before it. First that is its rank; the numbers are then replaced by whether they are taken, and the count is the place of the
//! index in the result.
//!
//! A cube counts for 32 numbers, with eight units for each, which divide what it is compared with. `2 d^2` comparisons, from
//! shared memory: 0.5 G of them for d = 16384, 40 us at 128 a clock and multiprocessor with three operations each; 3 us for
//! d = 4096, where the launches and the latency of `d / 8` dependent sums in a unit decide (estimated 5 us each). `12 d` bytes do not
//! count. Not measured yet.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{address_type, assert_dtype, dense, empty, per_row};

/// Numbers that a cube counts for.
const ROWS: usize = 32;
/// Units for each.
const PARTS: usize = 8;
/// Numbers in shared memory, and units of a cube.
const TILE: usize = ROWS * PARTS;

/// What the numbers are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Stage {
    /// Scores; the result is the rank of each.
    Rank,
    /// Ranks; the result is the indices of those below the count.
    Collect,
}

/// What number `i` is compared by. Beyond the last there is 0, which comes before nothing.
#[cube]
fn key(numbers: &[u32], i: usize, count: u32, #[comptime] stage: Stage) -> u32 {
    let mut key = 0u32;
    if i < numbers.len() {
        let bits = numbers[i];
        match stage {
            Stage::Rank => {
                // As unsigned numbers these have the order of the scores: -0 is 0, and what is no number is the least.
                let magnitude = bits & 0x7fff_ffffu32;
                let is_negative = bits > 0x8000_0000u32;
                let ordered = select(is_negative, !bits, magnitude | 0x8000_0000u32);
                key = select(magnitude > 0x7f80_0000u32, 0u32, ordered);
            }
            Stage::Collect => key = select(bits < count, 1u32, 0u32),
        }
    }
    key
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn top_columns_kernel(numbers: &[u32], result: &mut [i32], count: u32, #[comptime] stage: Stage) {
    let mut tile = Shared::<[u32]>::new_slice(TILE);
    let mut counts = Shared::<[u32]>::new_slice(TILE);
    let unit = UNIT_POS as usize;
    let part = unit / ROWS;
    let mut cube = CUBE_POS;
    while cube * ROWS < numbers.len() {
        let row = cube * ROWS + unit % ROWS;
        let mine = key(numbers, row, count, stage);
        let mut before = 0u32;
        let mut first = comptime!(0usize).runtime();
        while first < numbers.len() {
            tile[unit] = key(numbers, first + unit, count, stage);
            sync_cube();
            for i in 0..ROWS {
                let other = tile[part * ROWS + i];
                let is_before = other > mine || (other == mine && first + part * ROWS + i < row);
                before += select(is_before, 1u32, 0u32);
            }
            sync_cube();
            first += TILE;
        }
        counts[unit] = before;
        sync_cube();
        if unit < ROWS && row < numbers.len() {
            let mut all = 0u32;
            #[unroll]
            for i in 0..PARTS {
                all += counts[i * ROWS + unit];
            }
            match stage {
                Stage::Rank => result[row] = i32::reinterpret(all),
                Stage::Collect => {
                    if mine == 1 {
                        result[all as usize] = row as i32;
                    }
                }
            }
        }
        sync_cube();
        cube += CUBE_COUNT;
    }
}

fn launch(numbers: CubeTensor, results: usize, count: usize, stage: Stage) -> CubeTensor {
    let (client, address, d) = (numbers.client.clone(), address_type(&[&numbers]), numbers.meta.num_elements());
    let result = empty(&numbers, Shape::new([results]), DType::I32);
    // SAFETY: a row is checked against the number of rows, which is that of the ranks; as many indices are collected as there are
    // places.
    unsafe {
        top_columns_kernel::launch_unchecked(
            &client,
            per_row(d.div_ceil(ROWS)),
            CubeDim::new_1d(TILE as u32),
            address,
            numbers.into_buffer_arg(),
            result.clone().into_buffer_arg(),
            count as u32,
            stage,
        );
    }
    result
}

/// The first `count` of the scores, i32.
pub(crate) fn largest(scores: CubeTensor, count: usize) -> CubeTensor {
    let scores = dense(scores);
    assert_dtype("the scores", &scores, DType::F32);
    let d = scores.meta.num_elements();
    assert!(count <= d, "{count} of {d} scores");
    assert!(i32::try_from(d).is_ok(), "{d} scores are more than an index can count");
    if count == 0 {
        return empty(&scores, Shape::new([0]), DType::I32);
    }
    launch(launch(scores, d, count, Stage::Rank), count, count, Stage::Collect)
}
