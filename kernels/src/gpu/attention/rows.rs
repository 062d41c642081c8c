//! What a row of scores goes through in every kernel here: its range of keys, its cap, and the sum over its output and gradient.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::super::launch::{element, empty, vector_size};

/// `(first, end)` of the keys that a row of `ranges [rows, 2]` sees, counted from `first_key` and cut to `0..span`; `(0, 0)` for none.
#[cube]
pub(super) fn visible<I: Int>(ranges: &[I], row: usize, first_key: usize, span: usize) -> (i32, i32) {
    let origin = i32::cast_from(first_key);
    let first = max(i32::cast_from(ranges[2 * row]) - origin, 0);
    let end = min(i32::cast_from(ranges[2 * row + 1]) - origin, i32::cast_from(span));
    let seen = first < end;
    (select(seen, first, 0), select(seen, end, 0))
}

/// `(cap(s), cap'(s))` of a scaled score; the identity and 1 where nothing is capped.
#[cube]
pub(super) fn cap(score: f32, softcap: f32, #[comptime] capped: bool) -> (f32, f32) {
    if comptime!(capped) {
        // a division a kernel, not one a score: for odd numbers it calls a subroutine, and registers are spilled around it
        let t = (score * (1.0 / softcap)).tanh();
        (t * softcap, 1.0 - t * t)
    } else {
        (score, 1.0f32.runtime())
    }
}

/// `D = rowsum(out * d_out)` in f32; one unit a row, a row being one or two cache lines.
#[cube(launch)]
pub(in crate::gpu) fn row_products<F: Float, N: Size>(
    out: &[Vector<F, N>],
    d_out: &[Vector<F, N>],
    delta: &mut [f32],
    vectors: usize,
    #[define(F)] _element: ElemType,
) {
    let row = ABSOLUTE_POS;
    if row < delta.len() {
        let mut sum = Vector::<f32, N>::new(0.0);
        for i in 0..vectors {
            let at = row * vectors + i;
            sum += Vector::<f32, N>::cast_from(out[at]) * Vector::<f32, N>::cast_from(d_out[at]);
        }
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..N::value() {
            total += sum.extract(i);
        }
        delta[row] = total;
    }
}

/// `D [b, sq, h]` of dense `out` and `d_out` `[b, sq, h, d]`.
pub(super) fn delta(out: &CubeTensor, d_out: &CubeTensor) -> CubeTensor {
    let dims = out.meta.shape();
    let (rows, width) = (dims[0] * dims[1] * dims[2], dims[3]);
    let delta = empty(out, Shape::new([dims[0], dims[1], dims[2]]), DType::F32);
    let (client, vector) = (out.client.clone(), vector_size(&[out, d_out]));
    let dim = CubeDim::new(&client, rows);
    let count = calculate_cube_count_elemwise(&client, rows, dim);
    row_products::launch(
        &client,
        count,
        dim,
        vector,
        out.clone().into_buffer_arg(),
        d_out.clone().into_buffer_arg(),
        delta.clone().into_buffer_arg(),
        width / vector,
        element(out),
    );
    delta
}
