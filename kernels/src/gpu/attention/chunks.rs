//! Attention by chunks of queries: batched products by Burn (its tuner picks tensor cores where there are any), and between them
//! one kernel that turns a row of f32 scores into probabilities, or into probabilities and their gradient.
//!
//! Memory: one chunk of scores, `b h c sk` in f32 and in the tensors' type (twice that in the backward), never `sq x sk`.
//! Query heads of a group are rows of one product, `[b, g, c h/g, d] x [b, g, d, sk]`, so K and V are read once a group and never
//! repeated. With a known band, a chunk meets only the keys it can see: about half of the products of a causal sequence.
//! Gradients of K and V are summed over the chunks in f32, from the last chunk on: where it sees every key, the sum starts with it.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape, Slice};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};
use burn_cubecl::ops::{permute, reshape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::super::launch::{Fold, RowCube, cube_fold, dense, element, empty, empty_like};
use super::Sizes;
use super::rows::{cap, delta, visible};
use crate::attention::{KnownKeys, NOTHING_SEEN};

/// Bytes of f32 scores that a chunk may take.
const SCORE_BYTES: usize = 128 << 20;

/// Units of a cube that works on a row of scores, at most.
const ROW_UNITS: u32 = 256;

/// Where a chunk lies: its first query, its first key, and the sizes that turn a row into a query and a head.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(in crate::gpu) struct Place {
    pub first_query: usize,
    pub first_key: usize,
    pub queries: usize,
    pub groups: usize,
    pub repeats: usize,
    pub span: usize,
}

#[cube]
impl Place {
    /// Row of `ranges` of this cube.
    fn query_row(&self) -> usize {
        let sequence = CUBE_POS_Y as usize / self.groups;
        sequence * self.queries + self.first_query + CUBE_POS_X as usize / self.repeats
    }
    /// Index of this cube's row in `[b, sq, h]`.
    fn head_row(&self) -> usize {
        let head = (CUBE_POS_Y as usize % self.groups) * self.repeats + CUBE_POS_X as usize % self.repeats;
        self.query_row() * self.groups * self.repeats + head
    }
    /// Start of this cube's row in `[b, g, c h/g, span]`.
    fn score_row(&self) -> usize {
        (CUBE_POS_Y as usize * CUBE_COUNT_X as usize + CUBE_POS_X as usize) * self.span
    }
}

#[cube(launch)]
pub(in crate::gpu) fn softmax_kernel<F: Float, I: Int>(
    scores: &[f32],
    ranges: &[I],
    weights: &mut [F],
    lse: &mut [f32],
    place: Place,
    scale: f32,
    softcap: f32,
    #[comptime] capped: bool,
    #[comptime] cube: RowCube,
    #[define(F)] _element: ElemType,
    #[define(I)] _int: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let (first, end) = visible::<I>(ranges, place.query_row(), place.first_key, place.span);
    let start = place.score_row();
    let mut largest = NOTHING_SEEN.runtime();
    let mut sum = 0.0f32;
    let mut i = first + UNIT_POS as i32;
    while i < end {
        let (score, _slope) = cap(scores[start + i as usize] * scale, softcap, capped);
        let next = max(largest, score);
        sum = sum * (largest - next).exp() + (score - next).exp();
        largest = next;
        i += CUBE_DIM as i32;
    }
    let row_largest = cube_fold(largest, &mut shared, cube, Fold::Max);
    let total = cube_fold(sum * (largest - row_largest).exp(), &mut shared, cube, Fold::Sum);
    let inverse = select(total > 0.0, 1.0 / total, 0.0);
    let mut i = UNIT_POS as usize;
    while i < place.span {
        let seen = i as i32 >= first && (i as i32) < end;
        let (score, _slope) = cap(scores[start + i] * scale, softcap, capped);
        let weight = select(seen, (score - row_largest).exp() * inverse, 0.0);
        weights[start + i] = F::cast_from(weight);
        i += CUBE_DIM as usize;
    }
    if UNIT_POS == 0 {
        lse[place.head_row()] = select(total > 0.0, row_largest + total.ln(), NOTHING_SEEN.runtime());
    }
}

#[cube(launch)]
pub(in crate::gpu) fn softmax_backward_kernel<F: Float, I: Int>(
    scores: &[f32],
    d_weights: &[f32],
    lse: &[f32],
    delta: &[f32],
    ranges: &[I],
    weights: &mut [F],
    d_scores: &mut [F],
    place: Place,
    scale: f32,
    softcap: f32,
    #[comptime] capped: bool,
    #[define(F)] _element: ElemType,
    #[define(I)] _int: ElemType,
) {
    let (first, end) = visible::<I>(ranges, place.query_row(), place.first_key, place.span);
    let start = place.score_row();
    let lse = lse[place.head_row()];
    let delta = delta[place.head_row()];
    let mut i = UNIT_POS as usize;
    while i < place.span {
        let seen = i as i32 >= first && (i as i32) < end;
        let (score, slope) = cap(scores[start + i] * scale, softcap, capped);
        let weight = select(seen, (score - lse).exp(), 0.0);
        weights[start + i] = F::cast_from(weight);
        d_scores[start + i] = F::cast_from(weight * (d_weights[start + i] - delta) * slope * scale);
        i += CUBE_DIM as usize;
    }
}

/// `[b, s, h, d]` as dense `[b, g, s h/g, d]`: the heads of a group are neighbouring rows of one query.
fn by_group(x: CubeTensor, groups: usize) -> CubeTensor {
    let d = x.meta.shape().to_vec();
    let x = reshape(x, Shape::new([d[0], d[1], groups, d[2] / groups, d[3]]));
    reshape(dense(permute(x, &[0, 2, 1, 3, 4])), Shape::new([d[0], groups, d[1] * d[2] / groups, d[3]]))
}

/// The inverse of [`by_group`], as a view.
fn by_token(x: CubeTensor, repeats: usize) -> CubeTensor {
    let d = x.meta.shape().to_vec();
    let x = permute(reshape(x, Shape::new([d[0], d[1], d[2] / repeats, repeats, d[3]])), &[0, 2, 1, 3, 4]);
    reshape(x, Shape::new([d[0], d[2] / repeats, d[1] * repeats, d[3]]))
}

/// Rows `first..end` of `[b, g, rows, d]`; a view where the device's alignment allows it.
fn rows(x: &CubeTensor, first: usize, end: usize) -> CubeTensor {
    CubeBackend::float_slice(x.clone(), &row_slices(x, first, end))
}

fn row_slices(x: &CubeTensor, first: usize, end: usize) -> [Slice; 4] {
    let d = x.meta.shape();
    [0..d[0], 0..d[1], first..end, 0..d[3]].map(Slice::from)
}

/// `a b` into dense memory of the given type, accumulated in f32.
fn product(a: CubeTensor, b: CubeTensor, dtype: DType) -> CubeTensor {
    let (left, right) = (a.meta.shape(), b.meta.shape());
    let out = empty(&a, Shape::new([left[0], left[1], left[2], right[3]]), dtype);
    // the error is a refusal of shapes or types, which Burn's own products do not return to their caller either
    matmul(a, b, Some(out), MatmulStrategy::default(), dtype).unwrap_or_else(|error| unreachable!("{error:?}"))
}

fn transposed(x: CubeTensor) -> CubeTensor {
    permute(x, &[0, 1, 3, 2])
}

/// One chunk of queries and the keys it may see.
#[derive(Clone, Copy)]
struct Chunk {
    first_query: usize,
    end_query: usize,
    first_key: usize,
    end_key: usize,
}

/// All chunks of `length` queries, or of as many as [`SCORE_BYTES`] allow for 0.
fn chunks(s: &Sizes, keys: KnownKeys, length: usize) -> Vec<Chunk> {
    let fits = SCORE_BYTES / (4 * s.sequences * s.heads * s.keys).max(1);
    let length = if length > 0 { length } else { (fits / 16 * 16).clamp(16, 2048) };
    let chunk = |first_query: usize| {
        let end_query = (first_query + length).min(s.queries);
        let known = keys.of(first_query..end_query, s.keys);
        // a product over no key at all would be no product
        let (first_key, end_key) = if known.is_empty() { (0, 1) } else { (known.start, known.end) };
        Chunk { first_query, end_query, first_key, end_key }
    };
    (0..s.queries).step_by(length).map(chunk).collect()
}

impl Chunk {
    fn place(&self, s: &Sizes) -> PlaceLaunch {
        let span = self.end_key - self.first_key;
        PlaceLaunch::new(self.first_query, self.first_key, s.queries, s.groups, s.repeats(), span)
    }
    /// One cube a row of scores.
    fn cubes(&self, s: &Sizes) -> CubeCount {
        let rows = (self.end_query - self.first_query) * s.repeats();
        CubeCount::Static(rows as u32, (s.sequences * s.groups) as u32, 1)
    }
    fn queries(&self, s: &Sizes, x: &CubeTensor) -> CubeTensor {
        rows(x, self.first_query * s.repeats(), self.end_query * s.repeats())
    }
    fn keys(&self, x: &CubeTensor) -> CubeTensor {
        rows(x, self.first_key, self.end_key)
    }
}

pub(super) fn forward(
    s: Sizes,
    [q, k, v, ranges]: [CubeTensor; 4],
    known: KnownKeys,
    length: usize,
) -> (CubeTensor, CubeTensor) {
    let dtype = q.dtype;
    let lse = empty(&q, Shape::new([s.sequences, s.queries, s.heads]), DType::F32);
    let (q, k, v) = (by_group(q, s.groups), by_group(k, s.groups), by_group(v, s.groups));
    let part = |chunk: Chunk| {
        let scores = product(chunk.queries(&s, &q), transposed(chunk.keys(&k)), DType::F32);
        let weights = empty(&q, scores.meta.shape().clone(), dtype);
        let (client, kinds) = (q.client.clone(), (element(&weights), element(&ranges)));
        let cube = RowCube::new(&client, chunk.end_key - chunk.first_key, ROW_UNITS);
        softmax_kernel::launch(
            &client,
            chunk.cubes(&s),
            cube.dim(),
            scores.into_buffer_arg(),
            ranges.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            lse.clone().into_buffer_arg(),
            chunk.place(&s),
            s.scale,
            s.softcap,
            s.softcap > 0.0,
            cube,
            kinds.0,
            kinds.1,
        );
        by_token(product(weights, chunk.keys(&v), dtype), s.repeats())
    };
    let parts = chunks(&s, known, length).into_iter().map(part).collect();
    (joined(parts), lse)
}

/// Parts one after another, by token.
fn joined(mut parts: Vec<CubeTensor>) -> CubeTensor {
    if parts.len() == 1 { dense(parts.remove(0)) } else { CubeBackend::float_cat(parts, 1) }
}

/// Adds `part` to the rows from `first` on of a sum of so many, which this call alone holds.
fn add_rows(sum: Option<CubeTensor>, part: CubeTensor, first: usize, end: usize, count: usize) -> CubeTensor {
    let sum = match sum {
        None if end - first == count => return part,
        None => {
            let mut dims = part.meta.shape().clone();
            dims[2] = count;
            CubeBackend::float_zeros(dims, &part.device, part.dtype.into())
        }
        Some(sum) => sum,
    };
    let slices = row_slices(&sum, first, end);
    let total = CubeBackend::float_add(CubeBackend::float_slice(sum.clone(), &slices), part);
    CubeBackend::float_slice_assign(sum, &slices, total)
}

pub(super) fn backward(
    s: Sizes,
    [q, k, v, ranges]: [CubeTensor; 4],
    [out, lse, d_out]: [CubeTensor; 3],
    known: KnownKeys,
    length: usize,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let dtype = q.dtype;
    let delta = delta(&out, &d_out);
    let (q, d_out) = (by_group(q, s.groups), by_group(d_out, s.groups));
    let (k, v) = (by_group(k, s.groups), by_group(v, s.groups));
    let (mut dk, mut dv, mut dq) = (None, None, Vec::new());
    for chunk in chunks(&s, known, length).into_iter().rev() {
        let (q, d_out, keys) = (chunk.queries(&s, &q), chunk.queries(&s, &d_out), chunk.keys(&k));
        let scores = product(q.clone(), transposed(keys.clone()), DType::F32);
        let d_weights = product(d_out.clone(), transposed(chunk.keys(&v)), DType::F32);
        let weights = empty(&q, scores.meta.shape().clone(), dtype);
        let d_scores = empty_like(&weights);
        let (client, kinds) = (q.client.clone(), (element(&weights), element(&ranges)));
        softmax_backward_kernel::launch(
            &client,
            chunk.cubes(&s),
            CubeDim::new_1d(ROW_UNITS),
            scores.into_buffer_arg(),
            d_weights.into_buffer_arg(),
            lse.clone().into_buffer_arg(),
            delta.clone().into_buffer_arg(),
            ranges.clone().into_buffer_arg(),
            weights.clone().into_buffer_arg(),
            d_scores.clone().into_buffer_arg(),
            chunk.place(&s),
            s.scale,
            s.softcap,
            s.softcap > 0.0,
            kinds.0,
            kinds.1,
        );
        let (first, end) = (chunk.first_key, chunk.end_key);
        dv = Some(add_rows(dv, product(transposed(weights), d_out, DType::F32), first, end, s.keys));
        dk = Some(add_rows(dk, product(transposed(d_scores.clone()), q, DType::F32), first, end, s.keys));
        dq.push(by_token(product(d_scores, keys, dtype), s.repeats()));
    }
    dq.reverse();
    let cast = |x: Option<_>| {
        let x = x.unwrap_or_else(|| unreachable!("there is a chunk"));
        CubeBackend::float_cast(by_token(x, 1), dtype.into())
    };
    (joined(dq), cast(dk), cast(dv))
}
