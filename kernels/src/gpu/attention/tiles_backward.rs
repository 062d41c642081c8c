//! The tiled backward kernels. Gradients of queries: one cube per tile of queries of one head, a loop over keys. Gradients of keys
//! and values: one cube per tile of keys of one group, a loop over the queries that see them and over the heads of the group.
//!
//! Both rebuild scores and probabilities tile by tile, `P = exp(S - lse)`, and write every gradient once: no atomics, so the order
//! of every sum is fixed. Five products forward again: S and dP twice, dQ, dK, dV once: 14 b h d N flops of which 4 are rebuilding.

use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::super::launch::{element, empty_like, vector_size};
use super::Sizes;
use super::product::{Accumulator, UNITS, WIDEST};
use super::rows::{cap, delta};
use super::tile::{
    ALIGN, Lengths, LengthsLaunch, Ranges, Tile, load_numbers, load_rows, scratch_in_shared_memory,
    tile_in_shared_memory,
};

/// What a tile of queries brings along.
#[derive(CubeType)]
struct Queries<E: Float, P: Size> {
    q: Shared<[Vector<E, P>]>,
    d_out: Shared<[Vector<E, P>]>,
    lse: Shared<[f32]>,
    delta: Shared<[f32]>,
    ranges: Ranges,
}

#[cube]
impl<E: Float, P: Size> Queries<E, P> {
    fn new(#[comptime] t: Tile) -> Queries<E, P> {
        Queries::<E, P> {
            q: tile_in_shared_memory::<E, P>(t.rows, t),
            d_out: tile_in_shared_memory::<E, P>(t.rows, t),
            lse: Shared::<[f32]>::new_slice(t.rows),
            delta: Shared::<[f32]>::new_slice(t.rows),
            ranges: Ranges::new(t.rows),
        }
    }

    /// Everything but the ranges, of `count` rows of one head from `row` of `[b sq]` on. The caller synchronises.
    fn load<N: Size>(
        &mut self,
        q: &[Vector<E, N>],
        d_out: &[Vector<E, N>],
        lse: &[f32],
        delta: &[f32],
        row: usize,
        head: usize,
        count: usize,
        sizes: &Lengths,
        #[comptime] t: Tile,
    ) {
        let start = row * sizes.heads + head;
        let stride = sizes.heads * t.depth;
        load_rows::<E, N, P>(q, &mut self.q, start * t.depth, stride, count, t.rows, t);
        load_rows::<E, N, P>(d_out, &mut self.d_out, start * t.depth, stride, count, t.rows, t);
        load_numbers(lse, &mut self.lse, start, sizes.heads, count, t.rows);
        load_numbers(delta, &mut self.delta, start, sizes.heads, count, t.rows);
    }

    /// `(P, dS / scale)` of row `row` and column `column` of the tile whose keys start at `key`, from `Q K^T` and `dO V^T`.
    fn cell(
        &self,
        row: usize,
        column: usize,
        key: usize,
        score: f32,
        d_weight: f32,
        scale: f32,
        softcap: f32,
        #[comptime] t: Tile,
    ) -> (f32, f32) {
        let at = (key + column) as i32;
        let seen = at >= self.ranges.first[row] && at < self.ranges.end[row];
        let (score, slope) = cap(score * scale, softcap, t.capped);
        let weight = select(seen, (score - self.lse[row]).exp(), 0.0);
        (weight, weight * (d_weight - self.delta[row]) * slope)
    }

    /// Raw tiles `Q K^T` and `dO V^T`.
    fn products(
        &self,
        keys: &Keys<E, P>,
        scores: &mut Shared<[f32]>,
        d_weights: &mut Shared<[f32]>,
        #[comptime] t: Tile,
    ) {
        let mut raw = Accumulator::zeros(comptime!(t.scores()));
        raw.add::<E, P, P>(&self.q, &keys.k, comptime!(t.scores()));
        raw.store(scores, comptime!(t.narrow_sums()), comptime!(t.scores()));
        let mut raw = Accumulator::zeros(comptime!(t.scores()));
        raw.add::<E, P, P>(&self.d_out, &keys.v, comptime!(t.scores()));
        raw.store(d_weights, comptime!(t.narrow_sums()), comptime!(t.scores()));
    }
}

/// A tile of keys and their values.
#[derive(CubeType)]
struct Keys<E: Float, P: Size> {
    k: Shared<[Vector<E, P>]>,
    v: Shared<[Vector<E, P>]>,
}

#[cube]
impl<E: Float, P: Size> Keys<E, P> {
    fn new(#[comptime] t: Tile) -> Keys<E, P> {
        Keys::<E, P> { k: tile_in_shared_memory::<E, P>(t.keys, t), v: tile_in_shared_memory::<E, P>(t.keys, t) }
    }

    /// Up to a tile of one group from `key` of a sequence on; says where they start in memory and how many there are. The caller
    /// synchronises.
    fn load<N: Size>(
        &mut self,
        k: &[Vector<E, N>],
        v: &[Vector<E, N>],
        sequence: usize,
        key: usize,
        group: usize,
        sizes: &Lengths,
        #[comptime] t: Tile,
    ) -> (usize, usize) {
        let start = ((sequence * sizes.keys + key) * sizes.groups + group) * t.depth;
        let count = min(sizes.keys - key, t.keys.runtime());
        let stride = sizes.groups * t.depth;
        load_rows::<E, N, P>(k, &mut self.k, start, stride, count, t.keys, t);
        load_rows::<E, N, P>(v, &mut self.v, start, stride, count, t.keys, t);
        (start, count)
    }
}

#[cube(launch)]
pub(in crate::gpu) fn query_gradient_kernel<E: Float, I: Int, N: Size, P: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    d_out: &[Vector<E, N>],
    lse: &[f32],
    delta: &[f32],
    ranges: &[I],
    dq: &mut [Vector<E, P>],
    sizes: Lengths,
    scale: f32,
    softcap: f32,
    #[comptime] t: Tile,
    #[define(E)] _element: ElemType,
    #[define(I)] _int: ElemType,
) {
    let mut queries = Queries::<E, P>::new(t);
    let mut keys = Keys::<E, P>::new(t);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(t.cells()), ALIGN);
    let mut d_weights = Shared::<[f32]>::new_aligned_slice(comptime!(t.cells()), ALIGN);
    let mut d_scores = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(t.rows * t.narrow()), ALIGN);
    let mut scratch = scratch_in_shared_memory::<P>(t);
    let mut factors = Shared::<[f32]>::new_slice(t.rows);

    let sequence = CUBE_POS_Y as usize / sizes.heads;
    let head = CUBE_POS_Y as usize % sizes.heads;
    let group = head / (sizes.heads / sizes.groups);
    let query = ((sizes.queries - 1) / t.rows - CUBE_POS_X as usize) * t.rows;
    let row = sequence * sizes.queries + query;
    let count = min(sizes.queries - query, t.rows.runtime());
    let unit = UNIT_POS as usize;

    queries.ranges.load::<I>(ranges, row, count, sizes.keys, t.rows);
    queries.load::<N>(q, d_out, lse, delta, row, head, count, &sizes, t);
    if unit < t.rows {
        factors[unit] = scale;
    }
    sync_cube();
    let (first, end) = queries.ranges.span(sizes.keys, t.rows);
    let mut sums = Accumulator::zeros(comptime!(t.over_keys()));
    let mut key = first;
    while key < end {
        keys.load::<N>(k, v, sequence, key, group, &sizes, t);
        sync_cube();
        queries.products(&keys, &mut scores, &mut d_weights, t);
        sync_cube();
        let mut i = unit;
        while i < comptime!(t.rows * t.keys) {
            let row = i / t.keys;
            let column = i % t.keys;
            let at = row * comptime!(t.narrow_sums()) + column;
            let (_weight, d_score) = queries.cell(row, column, key, scores[at], d_weights[at], scale, softcap, t);
            d_scores[row * comptime!(t.narrow()) + column] = Vector::new(E::cast_from(d_score));
            i += UNITS;
        }
        sync_cube();
        sums.add::<E, Const<1>, P>(&d_scores, &keys.k, comptime!(t.over_keys()));
        sync_cube();
        key += t.keys;
    }
    let start = (row * sizes.heads + head) * t.depth;
    sums.write::<E, P>(
        dq,
        start,
        sizes.heads * t.depth,
        count,
        &factors,
        &mut scratch,
        t.depth,
        comptime!(t.over_keys()),
    );
}

#[cube(launch)]
pub(in crate::gpu) fn key_gradient_kernel<E: Float, I: Int, N: Size, P: Size>(
    q: &[Vector<E, N>],
    k: &[Vector<E, N>],
    v: &[Vector<E, N>],
    d_out: &[Vector<E, N>],
    lse: &[f32],
    delta: &[f32],
    ranges: &[I],
    dk: &mut [Vector<E, P>],
    dv: &mut [Vector<E, P>],
    sizes: Lengths,
    scale: f32,
    softcap: f32,
    #[comptime] t: Tile,
    #[define(E)] _element: ElemType,
    #[define(I)] _int: ElemType,
) {
    let mut queries = Queries::<E, P>::new(t);
    let mut keys = Keys::<E, P>::new(t);
    let mut scores = Shared::<[f32]>::new_aligned_slice(comptime!(t.cells()), ALIGN);
    let mut d_weights = Shared::<[f32]>::new_aligned_slice(comptime!(t.cells()), ALIGN);
    let mut weights = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(t.rows * t.narrow()), ALIGN);
    let mut d_scores = Shared::<[Vector<E, Const<1>>]>::new_aligned_slice(comptime!(t.rows * t.narrow()), ALIGN);
    let mut scratch = scratch_in_shared_memory::<P>(t);
    let mut factors = Shared::<[f32]>::new_slice(t.keys);

    let sequence = CUBE_POS_Y as usize / sizes.groups;
    let group = CUBE_POS_Y as usize % sizes.groups;
    let repeats = sizes.heads / sizes.groups;
    let key = CUBE_POS_X as usize * t.keys;
    let stride = sizes.groups * t.depth;
    let unit = UNIT_POS as usize;

    let (start, key_count) = keys.load::<N>(k, v, sequence, key, group, &sizes, t);
    let mut dk_sums = Accumulator::zeros(comptime!(t.over_queries()));
    let mut dv_sums = Accumulator::zeros(comptime!(t.over_queries()));
    let mut query = 0usize.runtime();
    while query < sizes.queries {
        let row = sequence * sizes.queries + query;
        let count = min(sizes.queries - query, t.rows.runtime());
        queries.ranges.load::<I>(ranges, row, count, sizes.keys, t.rows);
        sync_cube();
        let (first, end) = queries.ranges.span(sizes.keys, t.rows);
        // the same answer in every unit of the cube
        if first < key + key_count && key < end {
            for repeat in 0..repeats {
                let head = group * repeats + repeat;
                queries.load::<N>(q, d_out, lse, delta, row, head, count, &sizes, t);
                sync_cube();
                queries.products(&keys, &mut scores, &mut d_weights, t);
                sync_cube();
                let mut i = unit;
                while i < comptime!(t.rows * t.keys) {
                    let row = i / t.keys;
                    let column = i % t.keys;
                    let at = row * comptime!(t.narrow_sums()) + column;
                    let (weight, d_score) =
                        queries.cell(row, column, key, scores[at], d_weights[at], scale, softcap, t);
                    let at = row * comptime!(t.narrow()) + column;
                    weights[at] = Vector::new(E::cast_from(weight));
                    d_scores[at] = Vector::new(E::cast_from(d_score));
                    i += UNITS;
                }
                sync_cube();
                dv_sums.add::<E, Const<1>, P>(&weights, &queries.d_out, comptime!(t.over_queries()));
                dk_sums.add::<E, Const<1>, P>(&d_scores, &queries.q, comptime!(t.over_queries()));
                sync_cube();
            }
        }
        sync_cube();
        query += t.rows;
    }
    if unit < t.keys {
        factors[unit] = scale;
    }
    sync_cube();
    dk_sums.write::<E, P>(dk, start, stride, key_count, &factors, &mut scratch, t.depth, comptime!(t.over_queries()));
    sync_cube();
    if unit < t.keys {
        factors[unit] = 1.0;
    }
    sync_cube();
    dv_sums.write::<E, P>(dv, start, stride, key_count, &factors, &mut scratch, t.depth, comptime!(t.over_queries()));
}

pub(super) fn backward(
    s: Sizes,
    t: Tile,
    [q, k, v, ranges]: [CubeTensor; 4],
    [out, lse, d_out]: [CubeTensor; 3],
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let delta = delta(&out, &d_out);
    let (dq, dk, dv) = (empty_like(&q), empty_like(&k), empty_like(&v));
    let (client, kinds) = (q.client.clone(), (element(&q), element(&ranges)));
    let vector = vector_size(&[&q, &k, &v, &d_out]).min(WIDEST);
    let lengths = || LengthsLaunch::new(s.queries, s.keys, s.heads, s.groups);
    query_gradient_kernel::launch(
        &client,
        CubeCount::Static(s.queries.div_ceil(t.rows) as u32, (s.sequences * s.heads) as u32, 1),
        CubeDim::new_1d(UNITS as u32),
        vector,
        t.piece(vector),
        q.clone().into_buffer_arg(),
        k.clone().into_buffer_arg(),
        v.clone().into_buffer_arg(),
        d_out.clone().into_buffer_arg(),
        lse.clone().into_buffer_arg(),
        delta.clone().into_buffer_arg(),
        ranges.clone().into_buffer_arg(),
        dq.clone().into_buffer_arg(),
        lengths(),
        s.scale,
        s.softcap,
        t,
        kinds.0,
        kinds.1,
    );
    key_gradient_kernel::launch(
        &client,
        CubeCount::Static(s.keys.div_ceil(t.keys) as u32, (s.sequences * s.groups) as u32, 1),
        CubeDim::new_1d(UNITS as u32),
        vector,
        t.piece(vector),
        q.into_buffer_arg(),
        k.into_buffer_arg(),
        v.into_buffer_arg(),
        d_out.into_buffer_arg(),
        lse.into_buffer_arg(),
        delta.into_buffer_arg(),
        ranges.into_buffer_arg(),
        dk.clone().into_buffer_arg(),
        dv.clone().into_buffer_arg(),
        lengths(),
        s.scale,
        s.softcap,
        t,
        kinds.0,
        kinds.1,
    );
    (dq, dk, dv)
}
