//! Products of tiles in shared memory: `acc += op(a) op(b)`, by tensor cores or by registers.
//!
//! Both forms share one interface, so that a kernel is written once and the form is a constant of it: [`Form::Registers`] gives every
//! unit a grid of f32 sums and runs on every device; [`Form::Fragments`] gives every plane 16 x 16 fragments of `cmma`
//! (wmma, cooperative matrices, simdgroup matrices) and needs planes of 32 and the type pair in the device's list.
//! Sums are f32 in both. Layouts of fragments are unknown to a kernel, so rows are scaled and written through a scratch of one
//! fragment a plane.
//!
//! Operands lie in shared memory as vectors: single values for registers, which read a row value by value, and for fragments
//! the vectors of global memory, 128 bits where the width of a head allows it, so that a tile is filled by as wide stores.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

/// Units of a cube: four planes of 32.
pub(in crate::gpu) const UNITS: usize = 128;
/// Register form: units side by side along the rows and along the columns of a product.
const UNIT_ROWS: usize = 8;
const UNIT_COLUMNS: usize = 16;
/// Fragment form: planes of a cube, and the side of a fragment.
const PLANES: usize = 4;
const SIDE: usize = 16;
/// Numbers of the scratch of fragments.
const SCRATCH: usize = PLANES * SIDE * SIDE;
/// Values of the widest vector: those of a fragment for each unit of a plane.
pub(super) const WIDEST: usize = SIDE * SIDE / 32;

/// How products are formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) enum Form {
    Registers,
    Fragments,
}

/// Distance of rows in shared memory: off the power of two that would put a column into one bank, and for fragments a multiple
/// of 16 bytes; an odd one, as `width` is a multiple of 16, so that eight rows of 16 bytes meet all banks once.
pub(super) const fn padded(width: usize, form: Form) -> usize {
    match form {
        Form::Registers => width + 1,
        Form::Fragments => width + 8,
    }
}

/// The same for f32.
pub(super) const fn padded_sums(width: usize, form: Form) -> usize {
    match form {
        Form::Registers => width + 1,
        Form::Fragments => width + 4,
    }
}

/// Numbers of the scratch that [`Accumulator::scale_rows`] and [`Accumulator::write`] need, in vectors of `piece`.
pub(super) const fn scratch(form: Form, piece: usize) -> usize {
    match form {
        Form::Registers => piece,
        Form::Fragments => SCRATCH,
    }
}

/// The sizes of one product `[rows, inner] x [inner, columns]` and how its operands lie in shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::gpu) struct Product {
    pub form: Form,
    pub rows: usize,
    pub columns: usize,
    pub inner: usize,
    /// Distance of rows as stored.
    pub a_stride: usize,
    pub b_stride: usize,
    /// Stored as `[inner, rows]`.
    pub a_transposed: bool,
    /// Stored as `[columns, inner]`.
    pub b_transposed: bool,
}

impl Product {
    /// Rows of the result that a unit or a plane holds.
    pub const fn own_rows(&self) -> usize {
        match self.form {
            Form::Registers => self.rows / UNIT_ROWS,
            Form::Fragments => self.rows / SIDE / self.plane_rows(),
        }
    }
    pub const fn own_columns(&self) -> usize {
        match self.form {
            Form::Registers => self.columns / UNIT_COLUMNS,
            Form::Fragments => self.columns / SIDE / (PLANES / self.plane_rows()),
        }
    }
    /// Planes side by side along the rows.
    const fn plane_rows(&self) -> usize {
        if self.rows / SIDE < PLANES { self.rows / SIDE } else { PLANES }
    }
    /// Whether units or planes share the result without a rest.
    pub const fn fits(&self) -> bool {
        match self.form {
            Form::Registers => self.rows.is_multiple_of(UNIT_ROWS) && self.columns.is_multiple_of(UNIT_COLUMNS),
            Form::Fragments => {
                self.rows >= 2 * SIDE
                    && self.rows.is_multiple_of(SIDE * self.plane_rows())
                    && PLANES.is_multiple_of(self.plane_rows())
                    && self.columns.is_multiple_of(SIDE * PLANES / self.plane_rows())
                    && self.inner.is_multiple_of(SIDE)
            }
        }
    }
}

/// The result of a product, spread over the units of the cube. Only one of the two is in use.
#[derive(CubeType)]
pub(super) struct Accumulator {
    sums: Array<f32>,
    fragments: Sequence<Matrix<f32>>,
}

/// First row of the result in this unit's or plane's part `i`.
#[cube]
fn own_row(i: usize, #[comptime] p: Product) -> usize {
    if comptime!(p.form == Form::Registers) {
        UNIT_POS as usize / UNIT_COLUMNS + i * UNIT_ROWS
    } else {
        (PLANE_POS as usize % comptime!(p.plane_rows()) + i * comptime!(p.plane_rows())) * SIDE
    }
}

/// First column of part `j`.
#[cube]
fn own_column(j: usize, #[comptime] p: Product) -> usize {
    if comptime!(p.form == Form::Registers) {
        UNIT_POS as usize % UNIT_COLUMNS + j * UNIT_COLUMNS
    } else {
        (PLANE_POS as usize / comptime!(p.plane_rows()) + j * comptime!(PLANES / p.plane_rows())) * SIDE
    }
}

/// Row and column in a fragment of vector `turn` of a unit of its plane, in row-major order.
#[cube]
fn place_in_fragment(unit: usize, #[comptime] turn: usize, #[comptime] size: usize) -> (usize, usize) {
    let vector = unit + comptime!(turn * 32);
    let across = comptime!(SIDE / size);
    (vector / across, vector % across * size)
}

/// The fragment at number `at` of a tile in shared memory.
#[cube]
fn fragment<E: Float, N: Size>(
    tile: &[Vector<E, N>],
    at: usize,
    #[comptime] stride: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
) -> Matrix<E> {
    // SAFETY: filled on the next line.
    let mut out = unsafe { Matrix::<E>::uninitialized(ident, SIDE, SIDE, SIDE, layout) };
    cmma::load(&mut out, &tile[at / N::value()..tile.len()], stride as u32);
    out
}

#[cube]
impl Accumulator {
    /// All zeros.
    pub fn zeros(#[comptime] p: Product) -> Accumulator {
        let count = comptime!(p.own_rows() * p.own_columns());
        let mut fragments = Sequence::<Matrix<f32>>::new();
        let mut sums = Array::<f32>::new(comptime!(if p.form == Form::Registers { count } else { 1 }));
        if comptime!(p.form == Form::Registers) {
            #[unroll]
            for i in 0..count {
                sums[i] = 0.0;
            }
        } else {
            #[unroll]
            for _i in 0..count {
                fragments.push(Matrix::<f32>::from_value(
                    MatrixIdent::Accumulator,
                    SIDE,
                    SIDE,
                    SIDE,
                    MatrixLayout::Undefined,
                    0.0,
                ));
            }
        }
        Accumulator { sums, fragments }
    }

    /// `self += op(a) op(b)`; `a` and `b` are single values for registers.
    pub fn add<E: Float, A: Size, B: Size>(&mut self, a: &[Vector<E, A>], b: &[Vector<E, B>], #[comptime] p: Product) {
        if comptime!(p.form == Form::Registers) {
            self.add_registers::<E, A, B>(a, b, p);
        } else {
            self.add_fragments::<E, A, B>(a, b, p);
        }
    }

    fn add_registers<E: Float, A: Size, B: Size>(
        &mut self,
        a: &[Vector<E, A>],
        b: &[Vector<E, B>],
        #[comptime] p: Product,
    ) {
        let rows = comptime!(p.own_rows());
        let columns = comptime!(p.own_columns());
        for k in 0..p.inner {
            let mut left = Array::<f32>::new(rows);
            #[unroll]
            for i in 0..rows {
                let row = own_row(i, p);
                let at = if comptime!(p.a_transposed) { k * p.a_stride + row } else { row * p.a_stride + k };
                left[i] = f32::cast_from(a[at].extract(0usize));
            }
            #[unroll]
            for j in 0..columns {
                let column = own_column(j, p);
                let at = if comptime!(p.b_transposed) { column * p.b_stride + k } else { k * p.b_stride + column };
                let right = f32::cast_from(b[at].extract(0usize));
                #[unroll]
                for i in 0..rows {
                    self.sums[i * columns + j] += left[i] * right;
                }
            }
        }
    }

    fn add_fragments<E: Float, A: Size, B: Size>(
        &mut self,
        a: &[Vector<E, A>],
        b: &[Vector<E, B>],
        #[comptime] p: Product,
    ) {
        let rows = comptime!(p.own_rows());
        let columns = comptime!(p.own_columns());
        let a_layout = comptime!(if p.a_transposed { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
        let b_layout = comptime!(if p.b_transposed { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
        for step in 0..comptime!(p.inner / SIDE) {
            let k = step * SIDE;
            let mut left = Sequence::<Matrix<E>>::new();
            #[unroll]
            for i in 0..rows {
                let row = own_row(i, p);
                let at = if comptime!(p.a_transposed) { k * p.a_stride + row } else { row * p.a_stride + k };
                left.push(fragment::<E, A>(a, at, p.a_stride, MatrixIdent::A, a_layout));
            }
            #[unroll]
            for j in 0..columns {
                let column = own_column(j, p);
                let at = if comptime!(p.b_transposed) { column * p.b_stride + k } else { k * p.b_stride + column };
                let right = fragment::<E, B>(b, at, p.b_stride, MatrixIdent::B, b_layout);
                #[unroll]
                for i in 0..rows {
                    let index = comptime!(i * columns + j);
                    cmma::execute(&left[i], &right, &self.fragments[index], &self.fragments[index]);
                }
            }
        }
    }

    /// Overwrites the tile `out` in shared memory.
    pub fn store(&self, out: &mut [f32], #[comptime] stride: usize, #[comptime] p: Product) {
        let rows = comptime!(p.own_rows());
        let columns = comptime!(p.own_columns());
        #[unroll]
        for i in 0..rows {
            #[unroll]
            for j in 0..columns {
                let at = own_row(i, p) * stride + own_column(j, p);
                let index = comptime!(i * columns + j);
                if comptime!(p.form == Form::Registers) {
                    out[at] = self.sums[index];
                } else {
                    let end = out.len();
                    cmma::store(
                        &mut out[at..end],
                        &self.fragments[index],
                        comptime!(stride as u32),
                        MatrixLayout::RowMajor,
                    );
                }
            }
        }
    }

    /// Multiplies every row by its factor, fragments by way of `scratch`, which no one else uses meanwhile.
    pub fn scale_rows<N: Size>(&mut self, factors: &[f32], scratch: &mut [Vector<f32, N>], #[comptime] p: Product) {
        let size = N::value();
        let vectors = comptime!(SIDE * SIDE / size);
        let rows = comptime!(p.own_rows());
        let columns = comptime!(p.own_columns());
        #[unroll]
        for i in 0..rows {
            let row = own_row(i, p);
            if comptime!(p.form == Form::Registers) {
                let factor = factors[row];
                #[unroll]
                for j in 0..columns {
                    self.sums[i * columns + j] *= factor;
                }
            } else {
                // the same answer in every unit of the plane, and rarely yes
                let mut scaled = false;
                for r in 0..SIDE {
                    scaled = scaled || factors[row + r] != 1.0;
                }
                if scaled {
                    #[unroll]
                    for j in 0..columns {
                        let index = comptime!(i * columns + j);
                        let start = PLANE_POS as usize * vectors;
                        let end = start + vectors;
                        cmma::store(
                            &mut scratch[start..end],
                            &self.fragments[index],
                            SIDE as u32,
                            MatrixLayout::RowMajor,
                        );
                        sync_plane();
                        #[unroll]
                        for turn in 0..comptime!(vectors / 32) {
                            let unit = UNIT_POS_PLANE as usize;
                            let (r, _column) = place_in_fragment(unit, turn, size);
                            scratch[start + unit + comptime!(turn * 32)] *= Vector::new(factors[row + r]);
                        }
                        sync_plane();
                        cmma::load_with_layout(
                            &mut self.fragments[index],
                            &scratch[start..end],
                            SIDE as u32,
                            MatrixLayout::RowMajor,
                        );
                        sync_plane();
                    }
                }
            }
        }
    }

    /// Overwrites rows `0..count` of `out`, `depth` numbers each, which start at number `start` and are `stride` apart, with
    /// `factor[row] * self`. Vectors divide all three; for registers they are single values.
    pub fn write<E: Float, N: Size>(
        &self,
        out: &mut [Vector<E, N>],
        start: usize,
        stride: usize,
        count: usize,
        factors: &[f32],
        scratch: &mut [Vector<f32, N>],
        #[comptime] depth: usize,
        #[comptime] p: Product,
    ) {
        if comptime!(p.form == Form::Registers) {
            let rows = comptime!(p.own_rows());
            let columns = comptime!(p.own_columns());
            #[unroll]
            for i in 0..rows {
                let row = own_row(i, p);
                #[unroll]
                for j in 0..columns {
                    let column = own_column(j, p);
                    if row < count && column < depth {
                        let value = self.sums[i * columns + j] * factors[row];
                        out[start + row * stride + column] = Vector::new(E::cast_from(value));
                    }
                }
            }
        } else {
            self.write_fragments::<E, N>(out, start, stride, count, factors, scratch, depth, p);
        }
    }

    fn write_fragments<E: Float, N: Size>(
        &self,
        out: &mut [Vector<E, N>],
        start: usize,
        stride: usize,
        count: usize,
        factors: &[f32],
        scratch: &mut [Vector<f32, N>],
        #[comptime] depth: usize,
        #[comptime] p: Product,
    ) {
        let size = N::value();
        let vectors = comptime!(SIDE * SIDE / size);
        let own = PLANE_POS as usize * vectors;
        let rows = comptime!(p.own_rows());
        let columns = comptime!(p.own_columns());
        #[unroll]
        for i in 0..rows {
            #[unroll]
            for j in 0..columns {
                let index = comptime!(i * columns + j);
                cmma::store(
                    &mut scratch[own..own + vectors],
                    &self.fragments[index],
                    SIDE as u32,
                    MatrixLayout::RowMajor,
                );
                sync_plane();
                #[unroll]
                for turn in 0..comptime!(vectors / 32) {
                    let unit = UNIT_POS_PLANE as usize;
                    let (row, column) = place_in_fragment(unit, turn, size);
                    let (row, column) = (own_row(i, p) + row, own_column(j, p) + column);
                    if row < count && column < depth {
                        let value = scratch[own + unit + comptime!(turn * 32)] * Vector::new(factors[row]);
                        out[(start + row * stride + column) / size] = Vector::cast_from(value);
                    }
                }
                sync_plane();
            }
        }
    }
}

#[cfg(test)]
mod tests;
