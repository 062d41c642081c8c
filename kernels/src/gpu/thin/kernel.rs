//! The kernels of thin products; see the parent module.

use cubecl::prelude::*;

use super::super::codes::{Codes, Coding, TABLE, decode, load_table};

/// Units of a cube along the vectors of L.
pub(crate) const LANES: usize = 32;
/// Units of a cube along its rows.
pub(crate) const GROUPS: usize = 8;
/// Rows of L for each unit of the rows kernel.
pub(crate) const ROWS: usize = 4;
/// Rows of M that the columns kernel holds in shared memory.
pub(crate) const CHUNK: usize = 64;
/// Sums that are added over the lanes at the same time.
const BATCH: usize = 8;

/// The large matrix, row-major, in vectors.
#[allow(dead_code)] // kernels get it as an argument, from `LeftArgs`
#[derive(CubeType, CubeLaunch)]
pub(crate) enum Left<T: CubePrimitive> {
    /// The values themselves.
    Dense(Box<[T]>),
    /// Codes.
    Packed(Codes),
}

/// Along what a kernel sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Sum {
    /// The rows of L: `L M`.
    Rows,
    /// Its columns: `L^T M`.
    Columns,
}

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Tile {
    pub sum: Sum,
    /// Columns of M for each cube.
    pub columns: usize,
    /// Vectors of L a lane reads between two synchronisations of the rows kernel.
    pub steps: usize,
    /// Values of a vector of L.
    pub size: usize,
    /// Whether the values of a row of M lie beside each other, rather than those of a column.
    pub is_row_major: bool,
    /// How a packed L is coded.
    pub coding: Coding,
}

/// What a kernel is told when it runs.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Sizes {
    /// Of L.
    pub rows: u32,
    /// Vectors of a row of L.
    pub vectors: u32,
    /// Columns of M.
    pub rank: u32,
    /// Terms of a part of the sum: vectors of L for sums along rows, else its rows.
    pub part: u32,
    /// Between the results of two rows of the sum.
    pub row_stride: u32,
    /// Between the results of two columns of M.
    pub rank_stride: u32,
    pub scale: f32,
}

#[cube]
fn read<F: Float, N: Size>(
    left: &Left<Vector<F, N>>,
    table: &Shared<[f32]>,
    i: usize,
    #[comptime] coding: Coding,
) -> Vector<f32, N> {
    match left {
        Left::Dense(values) => Vector::cast_from(values[i]),
        Left::Packed(codes) => decode::<N>(codes, table, i * N::value(), coding),
    }
}

#[cube]
fn prepare<F: Float, N: Size>(left: &Left<Vector<F, N>>, table: &mut Shared<[f32]>) {
    match left {
        Left::Dense(_values) => {}
        Left::Packed(codes) => load_table(codes, table),
    }
}

/// Adds the `sums` of every unit over the lanes; `totals[group * count + i]` gets sum i of a group of rows.
#[cube]
fn add_lanes(
    sums: &Array<f32>,
    memory: &mut Shared<[Vector<f32, Const<1>>]>,
    totals: &mut Shared<[f32]>,
    #[comptime] count: usize,
) {
    let (lane, group, unit) = (UNIT_POS_X as usize, UNIT_POS_Y as usize, UNIT_POS as usize);
    let batch = comptime!(count.min(BATCH));
    let pitch = comptime!(LANES + 1); // lanes of one sum and sums of one lane both in different banks
    #[unroll]
    for first in 0..comptime!(count / batch) {
        sync_cube();
        #[unroll]
        for i in 0..batch {
            memory[(group * batch + i) * pitch + lane] = Vector::new(sums[first * batch + i]);
        }
        sync_cube();
        if unit < comptime!(GROUPS * batch) {
            let mut sum = 0.0f32;
            for lane in 0..LANES {
                sum += memory[unit * pitch + lane].extract(0usize);
            }
            totals[unit / batch * count + first * batch + unit % batch] = sum;
        }
    }
    sync_cube();
}

/// A piece of M as f32 in shared memory: `depth` rows from row `at` of `rows` on, the columns of the cube from `first_column`
/// on, 0 beyond the ends. Rows lie below each other in vectors of columns; for sums along rows, which have vectors of one, the
/// lanes that will read them lie beside each other. The caller synchronises.
#[cube]
fn load_right<G: Float, W: Size>(
    right: &[G],
    memory: &mut Shared<[Vector<f32, W>]>,
    at: usize,
    rows: usize,
    first_column: usize,
    rank: usize,
    #[comptime] depth: usize,
    #[comptime] tile: Tile,
) {
    let width = W::value();
    let vectors = comptime!(tile.columns / width);
    let mut i = UNIT_POS as usize;
    while i < comptime!(depth * vectors) {
        let (row, vector) = index_of(i, depth, vectors, tile.is_row_major);
        let mut values = Vector::<f32, W>::new(0.0);
        #[unroll]
        for n in 0..width {
            let column = first_column + vector * width + n;
            if at + row < rows && column < rank {
                let from = place(at + row, column, rows, rank, tile.is_row_major);
                values.insert(n, f32::cast_from(right[from]));
            }
        }
        let to = if comptime!(tile.sum == Sum::Rows) {
            let (lane, n) = (row / tile.size, row % tile.size);
            ((lane / LANES * tile.size + n) * vectors + vector) * LANES + lane % LANES
        } else {
            row * vectors + vector
        };
        memory[to] = values;
        i += CUBE_DIM as usize;
    }
}

/// `L M` for rows of L. Grid: columns of M, rows of L, parts of the sum.
#[cube]
fn along_rows<F: Float, G: Float, O: Float, N: Size>(
    left: &Left<Vector<F, N>>,
    right: &[G],
    out: &mut [O],
    sizes: &Sizes,
    #[comptime] tile: Tile,
) {
    let columns = comptime!(tile.columns);
    let steps = comptime!(tile.steps);
    let size = comptime!(tile.size);
    let stage = comptime!(LANES * steps * size);
    let mut memory =
        Shared::<[Vector<f32, Const<1>>]>::new_slice(comptime!((stage * columns).max(GROUPS * BATCH * (LANES + 1))));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(GROUPS * ROWS * columns));
    let mut table = Shared::<[f32]>::new_slice(TABLE);
    prepare::<F, N>(left, &mut table);
    let (rows, vectors, rank) = (sizes.rows as usize, sizes.vectors as usize, sizes.rank as usize);
    let (lane, unit) = (UNIT_POS_X as usize, UNIT_POS as usize);
    let first_row = (CUBE_POS_Y as usize * GROUPS + UNIT_POS_Y as usize) * ROWS;
    let first_column = CUBE_POS_X as usize * columns;
    let mut at = CUBE_POS_Z as usize * sizes.part as usize;
    let end = (at + sizes.part as usize).min(vectors);
    let mut sums = Array::<f32>::new(comptime!(ROWS * columns));
    #[unroll]
    for i in 0..comptime!(ROWS * columns) {
        sums[i] = 0.0;
    }
    while at < end {
        sync_cube();
        load_right::<G, Const<1>>(right, &mut memory, at * size, vectors * size, first_column, rank, stage, tile);
        sync_cube();
        #[unroll]
        for step in 0..steps {
            let vector = at + step * LANES + lane;
            let mut x = Array::<Vector<f32, N>>::new(ROWS);
            #[unroll]
            for i in 0..ROWS {
                x[i] = Vector::new(0.0);
                if vector < end && first_row + i < rows {
                    x[i] = read::<F, N>(left, &table, (first_row + i) * vectors + vector, tile.coding);
                }
            }
            #[unroll]
            for n in 0..size {
                #[unroll]
                for j in 0..columns {
                    let m = memory[((step * size + n) * columns + j) * LANES + lane].extract(0usize);
                    #[unroll]
                    for i in 0..ROWS {
                        sums[i * columns + j] += x[i].extract(n) * m;
                    }
                }
            }
        }
        at += comptime!(LANES * steps);
    }
    add_lanes(&sums, &mut memory, &mut totals, comptime!(ROWS * columns));
    let mut i = unit;
    while i < comptime!(GROUPS * ROWS * columns) {
        let (row, column) = (CUBE_POS_Y as usize * comptime!(GROUPS * ROWS) + i / columns, first_column + i % columns);
        if row < rows && column < rank {
            let to = CUBE_POS_Z as usize * rows * rank
                + row * sizes.row_stride as usize
                + column * sizes.rank_stride as usize;
            out[to] = O::cast_from(totals[i] * sizes.scale);
        }
        i += CUBE_DIM as usize;
    }
}

/// Element `i` of a piece of M as (row, column), in the order in which they lie in memory.
#[cube]
fn index_of(
    i: usize,
    #[comptime] rows: usize,
    #[comptime] columns: usize,
    #[comptime] is_row_major: bool,
) -> (usize, usize) {
    if comptime!(is_row_major) { (i / columns, i % columns) } else { (i % rows, i / rows) }
}

/// Where an element of M lies.
#[cube]
fn place(row: usize, column: usize, rows: usize, columns: usize, #[comptime] is_row_major: bool) -> usize {
    if comptime!(is_row_major) { row * columns + column } else { column * rows + row }
}

/// `L^T M` for columns of L. Grid: columns of M, columns of L, parts of the sum. W divides the columns of a cube.
#[cube]
fn along_columns<F: Float, G: Float, O: Float, N: Size, W: Size>(
    left: &Left<Vector<F, N>>,
    right: &[G],
    out: &mut [O],
    sizes: &Sizes,
    #[comptime] tile: Tile,
) {
    let columns = comptime!(tile.columns);
    let size = comptime!(tile.size);
    let width = comptime!(LANES * size);
    let wide = W::value();
    let mut memory = Shared::<[Vector<f32, W>]>::new_slice(comptime!(CHUNK * columns / wide));
    let mut totals = Shared::<[f32]>::new_slice(comptime!(columns * width));
    let mut table = Shared::<[f32]>::new_slice(TABLE);
    prepare::<F, N>(left, &mut table);
    let (rows, vectors, rank) = (sizes.rows as usize, sizes.vectors as usize, sizes.rank as usize);
    let (lane, group, unit) = (UNIT_POS_X as usize, UNIT_POS_Y as usize, UNIT_POS as usize);
    let first_vector = CUBE_POS_Y as usize * LANES;
    let first_column = CUBE_POS_X as usize * columns;
    let mut at = CUBE_POS_Z as usize * sizes.part as usize;
    let end = (at + sizes.part as usize).min(rows);
    let mut sums = Array::<Vector<f32, N>>::new(columns);
    #[unroll]
    for j in 0..columns {
        sums[j] = Vector::new(0.0);
    }
    while at < end {
        sync_cube();
        load_right::<G, W>(right, &mut memory, at, rows, first_column, rank, CHUNK, tile);
        sync_cube();
        #[unroll]
        for step in 0..comptime!(CHUNK / GROUPS) {
            let row = step * GROUPS + group;
            if at + row < end && first_vector + lane < vectors {
                let x = read::<F, N>(left, &table, (at + row) * vectors + first_vector + lane, tile.coding);
                #[unroll]
                for vector in 0..comptime!(columns / wide) {
                    let m = memory[row * comptime!(columns / wide) + vector];
                    #[unroll]
                    for n in 0..wide {
                        sums[comptime!(vector * wide + n)] += x * Vector::new(m.extract(n));
                    }
                }
            }
        }
        at += CHUNK;
    }
    // lanes beside each other, so that they meet all banks
    for turn in 0..GROUPS {
        if group == turn {
            #[unroll]
            for j in 0..columns {
                #[unroll]
                for n in 0..size {
                    let to = comptime!(j * width + n * LANES) + lane;
                    let before = if turn == 0 { 0.0f32.runtime() } else { totals[to] };
                    totals[to] = before + sums[j].extract(n);
                }
            }
        }
        sync_cube();
    }
    let mut i = unit;
    while i < comptime!(columns * width) {
        let (row, column) = (first_vector * size + i % width, first_column + i / width);
        if row < vectors * size && column < rank {
            let to = CUBE_POS_Z as usize * vectors * size * rank;
            out[to + row * sizes.row_stride as usize + column * sizes.rank_stride as usize] =
                O::cast_from(totals[i / width * width + i % size * LANES + i % width / size] * sizes.scale);
        }
        i += CUBE_DIM as usize;
    }
}

#[cube(launch)]
pub(crate) fn thin_kernel<F: Float, G: Float, O: Float, N: Size>(
    left: &Left<Vector<F, N>>,
    right: &[G],
    out: &mut [O],
    sizes: &Sizes,
    #[comptime] tile: Tile,
    #[define(F)] _left_element: ElemType,
    #[define(G)] _right_element: ElemType,
    #[define(O)] _out_element: ElemType,
) {
    if comptime!(tile.sum == Sum::Rows) {
        along_rows::<F, G, O, N>(left, right, out, sizes, tile);
    } else if comptime!(tile.columns.is_multiple_of(4)) {
        along_columns::<F, G, O, N, Const<4>>(left, right, out, sizes, tile);
    } else {
        along_columns::<F, G, O, N, Const<1>>(left, right, out, sizes, tile);
    }
}

/// `scale` times the sum of the parts.
#[cube(launch)]
pub(crate) fn fold_kernel<O: Float>(
    parts: &[f32],
    out: &mut [O],
    count: u32,
    scale: f32,
    #[define(O)] _element: ElemType,
) {
    let i = ABSOLUTE_POS;
    if i < out.len() {
        let mut sum = 0.0f32;
        for part in 0..count {
            sum += parts[part as usize * out.len() + i];
        }
        out[i] = O::cast_from(sum * scale);
    }
}
