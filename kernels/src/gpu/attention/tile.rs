//! What the tiled kernels share: the sizes of a tile, and rows and ranges on their way into shared memory.

use cubecl::prelude::*;

use super::product::{Form, Product, UNITS, padded, padded_sums, scratch};
use super::rows::visible;

/// Alignment in bytes of what fragments are loaded from and stored to.
pub(super) const ALIGN: usize = 32;

/// Constants of a tiled kernel: `rows` queries against `keys` keys of `depth` numbers each, which zeros fill up to `width`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) struct Tile {
    pub form: Form,
    pub rows: usize,
    pub keys: usize,
    pub depth: usize,
    pub width: usize,
    pub capped: bool,
}

impl Tile {
    /// Distance of rows of queries, keys, values and their gradients in shared memory.
    pub const fn wide(&self) -> usize {
        padded(self.width, self.form)
    }
    /// Distance of rows of weights and of their gradients in shared memory.
    pub const fn narrow(&self) -> usize {
        padded(self.keys, self.form)
    }
    /// Distance of rows of f32 scores in shared memory.
    pub const fn narrow_sums(&self) -> usize {
        padded_sums(self.keys, self.form)
    }
    /// Values of a vector in shared memory and of results, where those of the inputs have `vector`.
    pub const fn piece(&self, vector: usize) -> usize {
        match self.form {
            Form::Registers => 1,
            Form::Fragments => vector,
        }
    }
    /// Numbers of a tile of f32 scores.
    pub const fn cells(&self) -> usize {
        self.rows * self.narrow_sums()
    }
    /// `Q K^T` and `dO V^T`.
    pub const fn scores(&self) -> Product {
        Product {
            form: self.form,
            rows: self.rows,
            columns: self.keys,
            inner: self.width,
            a_stride: self.wide(),
            b_stride: self.wide(),
            a_transposed: false,
            b_transposed: true,
        }
    }
    /// `P V` and `dS K`.
    pub const fn over_keys(&self) -> Product {
        Product {
            form: self.form,
            rows: self.rows,
            columns: self.width,
            inner: self.keys,
            a_stride: self.narrow(),
            b_stride: self.wide(),
            a_transposed: false,
            b_transposed: false,
        }
    }
    /// `P^T dO` and `dS^T Q`.
    pub const fn over_queries(&self) -> Product {
        Product {
            form: self.form,
            rows: self.keys,
            columns: self.width,
            inner: self.rows,
            a_stride: self.narrow(),
            b_stride: self.wide(),
            a_transposed: true,
            b_transposed: false,
        }
    }
    /// Whether units or planes share every product without a rest.
    pub const fn fits(&self) -> bool {
        self.scores().fits() && self.over_keys().fits() && self.over_queries().fits() && UNITS.is_multiple_of(self.rows)
    }
    /// Shared memory of the forward kernel with elements of `size` bytes.
    pub const fn forward_bytes(&self, size: usize) -> usize {
        let elements = (self.rows + self.keys) * self.wide() + self.rows * self.narrow();
        elements * size + 4 * (self.cells() + scratch(self.form, 1) + 5 * self.rows + 2 * UNITS) + 5 * ALIGN
    }
    /// Shared memory of the larger of the backward kernels.
    pub const fn backward_bytes(&self, size: usize) -> usize {
        let elements = 2 * (self.rows + self.keys) * self.wide() + 2 * self.rows * self.narrow();
        let factors = if self.rows > self.keys { self.rows } else { self.keys };
        elements * size + 4 * (2 * self.cells() + scratch(self.form, 1) + 4 * self.rows + factors) + 7 * ALIGN
    }
}

/// Lengths of the tensors, known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(in crate::gpu) struct Lengths {
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub groups: usize,
}

/// The key ranges of a tile's queries.
#[derive(CubeType)]
pub(super) struct Ranges {
    pub first: Shared<[i32]>,
    pub end: Shared<[i32]>,
}

#[cube]
impl Ranges {
    pub fn new(#[comptime] rows: usize) -> Ranges {
        Ranges { first: Shared::<[i32]>::new_slice(rows), end: Shared::<[i32]>::new_slice(rows) }
    }

    /// Reads those of `count` rows from `row` on; the rest of the tile sees nothing. The caller synchronises.
    pub fn load<I: Int>(&mut self, ranges: &[I], row: usize, count: usize, keys: usize, #[comptime] rows: usize) {
        let unit = UNIT_POS as usize;
        if unit < rows {
            let mut first = 0i32;
            let mut end = 0i32;
            if unit < count {
                let seen = visible::<I>(ranges, row + unit, 0, keys);
                first = seen.0;
                end = seen.1;
            }
            self.first[unit] = first;
            self.end[unit] = end;
        }
    }

    /// The smallest range that holds all of them, the same in every unit; `first >= end` where nothing is seen.
    pub fn span(&self, keys: usize, #[comptime] rows: usize) -> (usize, usize) {
        let mut first = i32::cast_from(keys);
        let mut end = 0i32;
        for row in 0..rows {
            if self.first[row] < self.end[row] {
                first = min(first, self.first[row]);
                end = max(end, self.end[row]);
            }
        }
        (first as usize, end as usize)
    }
}

/// Shared memory for `rows` queries or keys.
#[cube]
pub(super) fn tile_in_shared_memory<E: Float, P: Size>(
    #[comptime] rows: usize,
    #[comptime] t: Tile,
) -> Shared<[Vector<E, P>]> {
    let piece = P::value();
    Shared::<[Vector<E, P>]>::new_aligned_slice(comptime!(rows * t.wide() / piece), ALIGN)
}

/// What fragments are scaled and written through.
#[cube]
pub(super) fn scratch_in_shared_memory<P: Size>(#[comptime] t: Tile) -> Shared<[Vector<f32, P>]> {
    let piece = P::value();
    Shared::<[Vector<f32, P>]>::new_aligned_slice(comptime!(scratch(t.form, piece) / piece), ALIGN)
}

/// `count` rows of a tensor in global memory, `stride` numbers apart from `start` on, into shared memory; the rest becomes 0.
#[cube]
pub(super) fn load_rows<E: Float, N: Size, P: Size>(
    from: &[Vector<E, N>],
    into: &mut Shared<[Vector<E, P>]>,
    start: usize,
    stride: usize,
    count: usize,
    #[comptime] rows: usize,
    #[comptime] t: Tile,
) {
    let size = N::value();
    let piece = P::value();
    let vectors = comptime!(t.width / size);
    let mut i = UNIT_POS as usize;
    while i < comptime!(rows * vectors) {
        let row = i / vectors;
        let column = i % vectors;
        let mut value = Vector::<E, N>::new(E::from_int(0));
        if row < count && column * size < t.depth {
            value = from[(start + row * stride) / size + column];
        }
        let at = row * comptime!(t.wide() / piece) + column * comptime!(size / piece);
        #[unroll]
        for part in 0..comptime!(size / piece) {
            let mut values = Vector::<E, P>::empty();
            #[unroll]
            for n in 0..piece {
                values.insert(n, value.extract(comptime!(part * piece + n)));
            }
            into[at + part] = values;
        }
        i += UNITS;
    }
}

/// `count` numbers, `stride` apart, into shared memory; the rest becomes 0.
#[cube]
pub(super) fn load_numbers(
    from: &[f32],
    into: &mut Shared<[f32]>,
    start: usize,
    stride: usize,
    count: usize,
    #[comptime] rows: usize,
) {
    let unit = UNIT_POS as usize;
    if unit < rows {
        let mut value = 0.0f32;
        if unit < count {
            value = from[start + unit * stride];
        }
        into[unit] = value;
    }
}
