//! The numbers of a packed weight inside a kernel, and the kernel that writes a panel of its values.
//!
//! [`decode`] is what every kernel on packed weights reads them with: a word of codes, the table of their values in shared memory,
//! and the scale of the block, resolved on the spot where scales are codes too (one byte, one look-up, one multiply-add a word).
//!
//! Dequantising to a panel is bound by memory: `bits / 8 + e` bytes a value of an `e`-byte type. 4096 x 14336 from nf4 to bf16:
//! 147 MB, floor 31 us on 4.8 TB/s. One word per unit: 4 bytes read, 16 written, both without gaps between units. The panel of a
//! product is `reference::PANEL` values at most (2^26: 128 MiB in bf16). That holds every matrix of an 8B model, so its product is one
//! matmul that writes y once; a smaller panel would cost a pass over y to join the parts.
//!
//! The product then reads the panel once more, as it would read a dense weight. What packing adds to a product of t tokens is
//! the panel's writing, `2.5 / 4.8e12` s a value, against `2 t / 989e12` s of arithmetic: 25 % at 1024 tokens, 13 % at 2048, 6 % at
//! 4096, and below 5 % from 5200 on. It is never hidden, since both run on one stream; for that the product would have to decode
//! inside its tile loads. Not measured yet.

use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::launch::{dense, empty};
use crate::packed::{Layout, PackedParts};

/// Units of a cube of the dequantising kernel; at least the values of a table.
const UNITS: u32 = 256;
/// Values of a table.
pub(super) const TABLE: usize = 16;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Coding {
    /// Bits of a code.
    pub bits: usize,
    /// Values that share a scale.
    pub block: usize,
    /// Scales that share a scale.
    pub nested: usize,
}

impl Coding {
    pub fn of(layout: &Layout) -> Self {
        let nested = layout.nested.map_or(1, |nested| nested.block);
        Self { bits: layout.format.bits(), block: layout.block, nested }
    }
}

/// The buffers of a packed weight; see `crate::packed` for their meaning.
#[allow(dead_code)] // kernels get it as an argument, from `CodesArgs`
#[derive(CubeType, CubeLaunch)]
pub(crate) enum Codes {
    /// `table[q] scale`.
    Table { words: Box<[u32]>, table: Box<[f32]>, scale: Box<[f32]> },
    /// `table[q] (map[p] absmax + offset)`.
    Nested { words: Box<[u32]>, table: Box<[f32]>, marks: Box<[u32]>, map: Box<[f32]>, absmax: Box<[f32]>, offset: f32 },
    /// `(q - zero) scale`.
    Affine { words: Box<[u32]>, scale: Box<[f32]>, zero: Box<[u32]> },
}

/// Byte `i` of some words.
#[cube]
fn byte(words: &[u32], i: usize) -> u32 {
    (words[i / 4] >> (u32::cast_from(i % 4) * 8)) & 255
}

/// Copies the values of the codes to shared memory, by the first units of a cube. The caller synchronises.
#[cube]
pub(crate) fn load_table(codes: &Codes, shared: &mut Shared<[f32]>) {
    let unit = UNIT_POS as usize;
    if unit < TABLE {
        match codes {
            Codes::Table { words: _, table, scale: _ } => shared[unit] = table[unit],
            Codes::Nested { words: _, table, marks: _, map: _, absmax: _, offset: _ } => shared[unit] = table[unit],
            Codes::Affine { words: _, scale: _, zero: _ } => shared[unit] = 0.0,
        }
    }
}

/// The codes from `shift` on, as numbers.
#[cube]
fn unpack<N: Size>(word: u32, shift: u32, #[comptime] bits: usize) -> Vector<u32, N> {
    let mut codes = Vector::<u32, N>::empty();
    #[unroll]
    for i in 0..N::value() {
        let here = comptime!((i * bits) as u32);
        codes.insert(i, (word >> (shift + here)) & comptime!((1u32 << bits) - 1));
    }
    codes
}

#[cube]
fn look_up<N: Size>(codes: Vector<u32, N>, table: &Shared<[f32]>) -> Vector<f32, N> {
    let mut values = Vector::<f32, N>::empty();
    #[unroll]
    for i in 0..N::value() {
        values.insert(i, table[codes.extract(i) as usize]);
    }
    values
}

/// The values from number `at` on, a multiple of N; N divides the codes of a word.
#[cube]
pub(crate) fn decode<N: Size>(
    codes: &Codes,
    table: &Shared<[f32]>,
    at: usize,
    #[comptime] coding: Coding,
) -> Vector<f32, N> {
    let per_word = comptime!(32 / coding.bits);
    let shift = u32::cast_from(at % per_word) * comptime!(coding.bits as u32);
    let block = at / comptime!(coding.block);
    match codes {
        Codes::Table { words, table: _, scale } => {
            look_up::<N>(unpack::<N>(words[at / per_word], shift, coding.bits), table) * Vector::new(scale[block])
        }
        Codes::Nested { words, table: _, marks, map, absmax, offset } => {
            let scale = map[byte(marks, block) as usize] * absmax[block / comptime!(coding.nested)] + *offset;
            look_up::<N>(unpack::<N>(words[at / per_word], shift, coding.bits), table) * Vector::new(scale)
        }
        Codes::Affine { words, scale, zero } => {
            let codes = Vector::<f32, N>::cast_from(unpack::<N>(words[at / per_word], shift, coding.bits));
            (codes - Vector::new(f32::cast_from(byte(zero, block)))) * Vector::new(scale[block])
        }
    }
}

#[cube(launch)]
pub(super) fn dequantise_kernel<F: Float, N: Size>(
    codes: &Codes,
    values: &mut [Vector<F, N>],
    first: u32,
    #[comptime] coding: Coding,
    #[define(F)] _element: ElemType,
) {
    let mut table = Shared::<[f32]>::new_slice(TABLE);
    load_table(codes, &mut table);
    sync_cube();
    let i = ABSOLUTE_POS;
    if i < values.len() {
        values[i] = Vector::cast_from(decode::<N>(codes, &table, first as usize + i * N::value(), coding));
    }
}

/// The buffers of a packed weight as a kernel's argument, and how they are coded.
pub(crate) fn arguments(w: PackedParts<CubeBackend>) -> (CodesArgs, Coding) {
    let (layout, arg) = (w.layout(), |tensor: CubeTensor| dense(tensor).into_buffer_arg());
    let codes = match w {
        PackedParts::Table { codes, table, scale, .. } => {
            CodesArgs::Table { words: arg(codes), table: arg(table), scale: arg(scale) }
        }
        PackedParts::Nested { codes, table, scale_codes, map, absmax, .. } => CodesArgs::Nested {
            words: arg(codes),
            table: arg(table),
            marks: arg(scale_codes),
            map: arg(map),
            absmax: arg(absmax),
            offset: layout.nested.map_or(0.0, |nested| nested.offset),
        },
        PackedParts::Affine { codes, scale, zero, .. } => {
            CodesArgs::Affine { words: arg(codes), scale: arg(scale), zero: arg(zero) }
        }
    };
    (codes, Coding::of(&layout))
}

/// Some buffer of the weight: says where it lies.
pub(crate) fn place(w: &PackedParts<CubeBackend>) -> &CubeTensor {
    match w {
        PackedParts::Table { codes, .. } | PackedParts::Nested { codes, .. } | PackedParts::Affine { codes, .. } => {
            codes
        }
    }
}

/// The values of rows `first..first + rows` of the flattened matrix.
pub(crate) fn dequantise(w: PackedParts<CubeBackend>, first: usize, rows: usize, dtype: FloatDType) -> CubeTensor {
    let layout = w.layout();
    let [all, columns] = layout.stored();
    assert!(first + rows <= all, "rows {first} and {rows} more of {all}");
    assert!(u32::try_from(layout.len()).is_ok(), "a packed weight of {} values; at most 2^32", layout.len());
    let dtype: DType = dtype.into();
    let values = empty(place(&w), Shape::new([rows, columns]), dtype);
    let (from, count) = (first * columns, rows * columns);
    if count == 0 {
        return values;
    }
    let per_word = layout.format.per_word();
    // Whole words, or value by value where a row begins or ends inside a word.
    let width = if from.is_multiple_of(per_word) && count.is_multiple_of(per_word) { per_word } else { 1 };
    let (client, units) = (values.client.clone(), count / width);
    let dim = CubeDim::new_1d(UNITS);
    let cubes = calculate_cube_count_elemwise(&client, units, dim);
    let kind = super::launch::element(&values);
    let (codes, coding) = arguments(w);
    dequantise_kernel::launch(
        &client,
        cubes,
        dim,
        width,
        codes,
        values.clone().into_buffer_arg(),
        from as u32,
        coding,
        kind,
    );
    values
}
