//! Cross-entropy of a chunk of logits with its gradient, on a GPU; equations in `crate::cross_entropy`. One cube per
//! row.
//!
//! A row is read twice: largest value and sum of exponentials in one sweep (each unit rescales its sum when its
//! maximum grows), then the gradient, which takes the place of the logits where nothing else holds them. Rows to
//! ignore are not read.
//!
//! Memory bound. Bytes in a type of `e` bytes: `2 e n v`; the second read comes from the second-level cache where the
//! rows in work fit into it, else `3 e n v`. So a cube is as large as can be: 1024 units leave two rows on a
//! multiprocessor, 69 MB in all on an H200 (50 MB of cache) for a row of 128256 in bf16. 2048 x 128256 bf16 on 4.8
//! TB/s: 1.05 GB, floor 219 us (328 us without the cache). About 10 flops and two exponentials a value: 3e12 of these
//! per second are possible, 175 us. Not measured yet. A vocabulary that is odd (GPT-2's 50257) is read value by value.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{
    Fold, InPlace, RowCube, address_type, assert_shape, cube_fold, dense, element, empty, max_of, per_row, sum_of,
    vector_size,
};

/// Below every logit, and finite: the difference of two of these is 0.
const LOWEST: f32 = -3.0e38;

#[cube]
fn capped_logits<N: Size>(raw: Vector<f32, N>, softcap: f32, #[comptime] capped: bool) -> Vector<f32, N> {
    if comptime!(capped) { (raw / Vector::new(softcap)).tanh() * Vector::new(softcap) } else { raw }
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn cross_entropy_kernel<F: Float, I: Int, N: Size>(
    logits: &[Vector<F, N>],
    targets: &[I],
    losses: &mut [f32],
    gradient: &mut [Vector<F, N>],
    softcap: f32,
    columns: usize,
    #[comptime] capped: bool,
    #[comptime] cube: RowCube,
    #[define(F)] _logits_element: ElemType,
    #[define(I)] _targets_element: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let unit = UNIT_POS as usize;
    let mut row = CUBE_POS;
    while row < targets.len() {
        let target = i32::cast_from(targets[row]);
        let counts = target >= 0;
        let column = select(counts, target, 0) as usize;
        let (target_vector, lane) = (column / N::value(), column % N::value());
        let start = row * columns;

        // No early exit for an ignored row: the folds below need all units.
        let scanned = select(counts, columns, 0);
        let mut largest = comptime!(LOWEST).runtime();
        let mut total = 0.0f32;
        let mut i = unit;
        while i < scanned {
            let z = capped_logits::<N>(Vector::cast_from(logits[start + i]), softcap, capped);
            let top = max(largest, max_of::<N>(z));
            total = total * (largest - top).exp() + sum_of::<N>((z - Vector::new(top)).exp());
            largest = top;
            i += CUBE_DIM as usize;
        }
        // Before the folds: after them the logits may be overwritten. A target beyond the vocabulary is never found.
        let mut target_logit = comptime!(LOWEST).runtime();
        if unit == 0 && target_vector < scanned {
            let z = capped_logits::<N>(Vector::cast_from(logits[start + target_vector]), softcap, capped);
            #[unroll]
            for j in 0..N::value() {
                target_logit = select(j == lane, z.extract(j), target_logit);
            }
        }
        let top = cube_fold(largest, &mut shared, cube, Fold::Max);
        let total = cube_fold(total * (largest - top).exp(), &mut shared, cube, Fold::Sum);
        if unit == 0 {
            losses[row] = select(counts, total.ln() - (target_logit - top), 0.0f32);
        }

        let inverse = 1.0 / total;
        let mut i = unit;
        while i < columns {
            let mut g = Vector::<f32, N>::new(0.0);
            if counts {
                let z = capped_logits::<N>(Vector::cast_from(logits[start + i]), softcap, capped);
                g = (z - Vector::new(top)).exp() * Vector::new(inverse);
                if i == target_vector {
                    #[unroll]
                    for j in 0..N::value() {
                        let value = g.extract(j);
                        g.insert(j, select(j == lane, value - 1.0f32, value));
                    }
                }
                if comptime!(capped) {
                    let t = z / Vector::new(softcap);
                    g *= Vector::new(1.0) - t * t;
                }
            }
            gradient[start + i] = Vector::cast_from(g);
            i += CUBE_DIM as usize;
        }
        row += CUBE_COUNT;
    }
}

/// Losses in f32 and the gradient of their sum. A target beyond the vocabulary cannot be refused here: its row has a
/// loss of about 3e38.
pub(crate) fn forward(logits: CubeTensor, targets: CubeTensor, softcap: f32) -> (CubeTensor, CubeTensor) {
    let (logits, targets) = (dense(logits), dense(targets));
    let (rows, vocab) = (logits.meta.shape()[0], logits.meta.shape()[1]);
    assert_shape("the targets", &targets, &[rows]);
    let losses = empty(&logits, Shape::new([rows]), DType::F32);
    let (client, width, address) = (logits.client.clone(), vector_size(&[&logits]), address_type(&[&logits]));
    let (columns, kinds) = (vocab / width, (element(&logits), element(&targets)));
    let cube = RowCube::new(&client, columns, 1024);
    let InPlace { input, output, result } = InPlace::new(logits, 0);
    // SAFETY: rows and columns are those of the logits, and the cap on both loops; a target is read where it is below
    // them.
    unsafe {
        cross_entropy_kernel::launch_unchecked(
            &client,
            per_row(rows),
            cube.dim(),
            address,
            width,
            input,
            targets.into_buffer_arg(),
            losses.clone().into_buffer_arg(),
            output,
            softcap,
            columns,
            softcap > 0.0,
            cube,
            kinds.0,
            kinds.1,
        );
    }
    (losses, result)
}
