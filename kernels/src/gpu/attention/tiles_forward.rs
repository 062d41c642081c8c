//! The tiled forward kernel: one cube per tile of queries of one head, an online softmax over tiles of keys.
//!
//! Only keys between the smallest and the largest of the tile's ranges are visited. The maximum that a row is taken relative to is
//! raised only when a score exceeds it by [`SLACK`]: the result is the same to rounding, and sums held in fragments, which can
//! only be scaled through shared memory, are scaled a few times a row instead of once a tile.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::super::launch::{element, empty, empty_like, vector_size};
use super::Sizes;
use super::product::{Accumulator, UNITS, WIDEST};
use super::rows::cap;
use super::tile::{
    ALIGN, Lengths, LengthsLaunch, Ranges, Tile, load_rows, scratch_in_shared_memory, tile_in_shared_memory,
};
use crate::attention::NOTHING_SEEN;

/// How far a score may exceed the maximum in use: `exp(8)` = 2981 is far from the largest f16.
const SLACK: f32 = 8.0;

/// Running state of the softmax of every row of the tile.
#[derive(CubeType)]
struct Rows {
    /// The maximum in use.
    largest: Shared<[f32]>,
    /// Sum of the weights relative to it.
    total: Shared<[f32]>,
    /// What earlier sums are multiplied by.
    factor: Shared<[f32]>,
    /// A number of each unit, twice: units that share a row read each other's.
    partial_largest: Shared<[f32]>,
    partial_total: Shared<[f32]>,
}

#[cube]
impl Rows {
    fn new(#[comptime] rows: usize) -> Rows {
        let mut largest = Shared::<[f32]>::new_slice(rows);
        let mut total = Shared::<[f32]>::new_slice(rows);
        let unit = UNIT_POS as usize;
        if unit < rows {
            largest[unit] = NOTHING_SEEN;
            total[unit] = 0.0;
        }
        Rows {
            largest,
            total,
            factor: Shared::<[f32]>::new_slice(rows),
            partial_largest: Shared::<[f32]>::new_slice(UNITS),
            partial_total: Shared::<[f32]>::new_slice(UNITS),
        }
    }

    /// Turns raw scores against the keys from `key` on into weights. Starts and ends with other units still at work on what it
    /// reads and wrote, except that all have passed the synchronisations inside.
    fn weigh<E: Float>(
        &mut self,
        scores: &mut Shared<[f32]>,
        weights: &mut Shared<[Vector<E, Const<1>>]>,
        ranges: &Ranges,
        key: usize,
        scale: f32,
        softcap: f32,
        #[comptime] t: Tile,
    ) {
        let sharing = comptime!(UNITS / t.rows);
        let steps = comptime!(t.keys / sharing);
        let unit = UNIT_POS as usize;
        let row = unit / sharing;
        let part = unit % sharing;
        let start = row * comptime!(t.narrow_sums());
        let first = ranges.first[row] - key as i32;
        let end = ranges.end[row] - key as i32;
        let mut own = NOTHING_SEEN.runtime();
        for step in 0..steps {
            let column = part + step * sharing;
            let (score, _slope) = cap(scores[start + column] * scale, softcap, t.capped);
            scores[start + column] = score;
            if column as i32 >= first && (column as i32) < end {
                own = max(own, score);
            }
        }
        self.partial_largest[unit] = own;
        sync_cube();
        let mut next = NOTHING_SEEN.runtime();
        for i in 0..sharing {
            next = max(next, self.partial_largest[row * sharing + i]);
        }
        let before = self.largest[row];
        let used = select(next > before + SLACK, next, before);
        let factor = (before - used).exp();
        let mut sum = 0.0f32;
        for step in 0..steps {
            let column = part + step * sharing;
            let seen = column as i32 >= first && (column as i32) < end;
            let weight = select(seen, (scores[start + column] - used).exp(), 0.0);
            weights[row * comptime!(t.narrow()) + column] = Vector::new(E::cast_from(weight));
            sum += weight;
        }
        self.partial_total[unit] = sum;
        if part == 0 {
            self.factor[row] = factor;
        }
        sync_cube();
        if part == 0 {
            let mut total = self.total[row] * factor;
            for i in 0..sharing {
                total += self.partial_total[unit + i];
            }
            self.total[row] = total;
            self.largest[row] = used;
        }
    }
}

#[cube(launch)]
pub(in crate::gpu) fn forward_kernel<E: Float, I: Int, N: Size, P: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    ranges: &[I],
    out: &mut [Vector<E, P>],
    lse: &mut [f32],
    sizes: Lengths,
    scale: f32,
    softcap: f32,
    #[comptime] t: Tile,
    #[define(E)] _element: ElemType,
    #[define(I)] _int: ElemType,
) {
    let mut queries = tile_in_shared_memory::<E, P>(t.rows, t);
    // keys, then values: a tile of keys is done with before its values are wanted
    let mut loaded = tile_in_shared_memory::<E, P>(t.keys, t);
    let mut weights = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(t.rows * t.narrow()), ALIGN);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(t.cells()), ALIGN);
    let mut scratch = scratch_in_shared_memory::<P>(t);
    let mut rows = Rows::new(t.rows);
    let mut seen = Ranges::new(t.rows);

    let sequence = CUBE_POS_Y as usize / sizes.heads;
    let head = CUBE_POS_Y as usize % sizes.heads;
    let group = head / (sizes.heads / sizes.groups);
    // the last queries of a causal sequence have the most keys: they start first
    let query = ((sizes.queries - 1) / t.rows - CUBE_POS_X as usize) * t.rows;
    let row = sequence * sizes.queries + query;
    let count = min(sizes.queries - query, t.rows.runtime());
    let query_start = (row * sizes.heads + head) * t.depth;
    let query_stride = sizes.heads * t.depth;
    let key_stride = sizes.groups * t.depth;

    seen.load::<I>(ranges, row, count, sizes.keys, t.rows);
    load_rows::<E, N, P>(q, &mut queries, query_start, query_stride, count, t.rows, t);
    sync_cube();
    let (first, end) = seen.span(sizes.keys, t.rows);
    let mut sums = Accumulator::zeros(comptime!(t.over_keys()));
    let mut key = first;
    while key < end {
        let start = ((sequence * sizes.keys + key) * sizes.groups + group) * t.depth;
        let keys = min(sizes.keys - key, t.keys.runtime());
        load_rows::<E, N, P>(k, &mut loaded, start, key_stride, keys, t.keys, t);
        sync_cube();
        let mut raw = Accumulator::zeros(comptime!(t.scores()));
        raw.add::<E, P, P>(&queries, &loaded, comptime!(t.scores()));
        raw.store(&mut scores, comptime!(t.narrow_sums()), comptime!(t.scores()));
        sync_cube();
        load_rows::<E, N, P>(v, &mut loaded, start, key_stride, keys, t.keys, t);
        rows.weigh::<E>(&mut scores, &mut weights, &seen, key, scale, softcap, t);
        sums.scale_rows::<P>(&rows.factor, &mut scratch, comptime!(t.over_keys()));
        sums.add::<E, Const<1>, P>(&weights, &loaded, comptime!(t.over_keys()));
        sync_cube();
        key += t.keys;
    }
    let unit = UNIT_POS as usize;
    if unit < t.rows {
        let total = rows.total[unit];
        rows.factor[unit] = select(total > 0.0, 1.0 / total, 0.0);
        if unit < count {
            let log_sum = select(total > 0.0, rows.largest[unit] + total.ln(), NOTHING_SEEN.runtime());
            lse[(row + unit) * sizes.heads + head] = log_sum;
        }
    }
    sync_cube();
    sums.write::<E, P>(
        out,
        query_start,
        query_stride,
        count,
        &rows.factor,
        &mut scratch,
        t.depth,
        comptime!(t.over_keys()),
    );
}

pub(super) fn forward(s: Sizes, t: Tile, [q, k, v, ranges]: [CubeTensor; 4]) -> (CubeTensor, CubeTensor) {
    let out = empty_like(&q);
    let lse = empty(&q, Shape::new([s.sequences, s.queries, s.heads]), DType::F32);
    let (client, kinds, vector) =
        (q.client.clone(), (element(&q), element(&ranges)), vector_size(&[&q, &k, &v]).min(WIDEST));
    forward_kernel::launch(
        &client,
        CubeCount::Static(s.queries.div_ceil(t.rows) as u32, (s.sequences * s.heads) as u32, 1),
        CubeDim::new_1d(UNITS as u32),
        vector,
        t.piece(vector),
        q.into_buffer_arg(),
        k.into_buffer_arg(),
        v.into_buffer_arg(),
        ranges.into_buffer_arg(),
        out.clone().into_buffer_arg(),
        lse.clone().into_buffer_arg(),
        LengthsLaunch::new(s.queries, s.keys, s.heads, s.groups),
        s.scale,
        s.softcap,
        t,
        kinds.0,
        kinds.1,
    );
    (out, lse)
}
