//! The kernels, with what their launchers decide: size of a cube, sizes of vectors, element types, comptime values.
//!
//! Values are those that a Hopper card gets for the shapes of a language model in bf16; rows in f32 or f16 take the
//! other ways through a kernel, and go to WebGPU too.

use burn::tensor::FloatDType;
use cubecl::ir::{AddressType, ElemType, FloatKind, IntKind};
use cubecl::prelude::*;

use super::Offline;
use crate::gated::Activation;
use crate::gpu::attention::chunks::{self, PlaceCompilationArg};
use crate::gpu::attention::product::{Form, UNITS};
use crate::gpu::attention::tile::{LengthsCompilationArg, Tile};
use crate::gpu::attention::{rows, tiles_backward, tiles_forward};
use crate::gpu::codes::{self, CodesCompilationArg, Coding};
use crate::gpu::groups::Packing;
use crate::gpu::launch::RowCube;
use crate::gpu::thin::kernel::{self as thin, GROUPS, LANES, LeftCompilationArg, SizesCompilationArg, Sum};
use crate::gpu::top_columns::Stage;
use crate::gpu::{adam8, adamw, cross_entropy, gated, groups, reduce, rms_norm, rotary, stochastic_round, top_columns};
use crate::map8::Map;

pub(super) const BF16: ElemType = ElemType::Float(FloatKind::BF16);
pub(super) const F16: ElemType = ElemType::Float(FloatKind::F16);
pub(super) const F32: ElemType = ElemType::Float(FloatKind::F32);
const I32: ElemType = ElemType::Int(IntKind::I32);
const I64: ElemType = ElemType::Int(IntKind::I64);

/// A kernel.
pub(super) struct Row {
    pub function: &'static str,
    /// What tells it from the others of its function.
    pub label: &'static str,
    pub make: fn(&Offline, ExecutionMode, AddressType) -> Box<dyn CubeKernel>,
}

impl Row {
    pub fn name(&self) -> String {
        format!("{} {}", self.function, self.label)
    }

    /// WGSL has neither bf16 nor fragments nor integers of 64 bits.
    pub fn is_for_webgpu(&self) -> bool {
        !["bf16", "fragments", "i64"].iter().any(|word| self.label.contains(word))
    }
}

/// `row!(module => kernel function, its type, label, cube, (buffers and numbers), comptime values in order)`; sizes of
/// vectors come first of these, element types last.
macro_rules! row {
    ($($module:ident)::+ => $function:ident, $kernel:ident, $label:literal, $cube:expr,
        ($($argument:expr),*), $($comptime:expr),+) => {
        Row {
            function: stringify!($function),
            label: $label,
            make: |offline, mode, address| {
                let settings = KernelSettings::new($cube.into(), mode, address);
                let (device, target) = (offline.device.clone(), offline.target.clone());
                Box::new($($module)::+::$function::$kernel::new(
                    settings, device, target, $($argument,)* $($comptime),+
                ))
            },
        }
    };
}

/// An argument that is a buffer of its own; a number is `()`.
const B: BufferCompilationArg = BufferCompilationArg { inplace: None };

/// An output that takes the place of an input.
const fn over(input: usize) -> BufferCompilationArg {
    BufferCompilationArg { inplace: Some(input) }
}

/// Several arguments of one name.
fn list<T: LaunchArg, const N: usize>(arguments: [T::CompilationArg; N]) -> SequenceCompilationArg<T> {
    arguments.into_iter().collect()
}

const fn line(units: u32) -> CubeDim {
    CubeDim::new_1d(units)
}

/// A row that is folded in registers.
const fn planes(units: u32) -> RowCube {
    RowCube { units, planes: true }
}

/// A row that is folded in shared memory.
const fn shared(units: u32) -> RowCube {
    RowCube { units, planes: false }
}

fn zero(map: &Map) -> u32 {
    u32::from(map.zero())
}

const TABLE: CodesCompilationArg = CodesCompilationArg::Table { words: B, table: B, scale: B };
const NESTED: CodesCompilationArg =
    CodesCompilationArg::Nested { words: B, table: B, marks: B, map: B, absmax: B, offset: () };
const AFFINE: CodesCompilationArg = CodesCompilationArg::Affine { words: B, scale: B, zero: B };
const BITS4: Coding = Coding { bits: 4, block: 64, nested: 256 };
const BITS8: Coding = Coding { bits: 8, block: 64, nested: 1 };

const SIZES: SizesCompilationArg =
    SizesCompilationArg { rows: (), vectors: (), rank: (), part: (), row_stride: (), rank_stride: (), scale: () };

const fn thin_cube() -> CubeDim {
    CubeDim::new_2d(LANES as u32, GROUPS as u32)
}

const fn thin_tile(
    sum: Sum,
    columns: usize,
    steps: usize,
    size: usize,
    is_row_major: bool,
    coding: Coding,
) -> thin::Tile {
    thin::Tile { sum, columns, steps, size, is_row_major, coding }
}

const PLACE: PlaceCompilationArg =
    PlaceCompilationArg { first_query: (), first_key: (), queries: (), groups: (), repeats: (), span: () };
const LENGTHS: LengthsCompilationArg = LengthsCompilationArg { queries: (), keys: (), heads: (), groups: () };

/// One that a launcher could choose.
fn tile(form: Form, rows: usize, keys: usize, depth: usize, capped: bool) -> Tile {
    let tile = Tile { form, rows, keys, depth, width: depth.next_multiple_of(32), capped };
    assert!(tile.fits(), "{tile:?}");
    tile
}

#[rustfmt::skip]
pub(super) const ROWS: &[Row] = &[
    row!(adam8 => adam8_kernel, Adam8Kernel, "bf16", line(64),
        (B, B, B, B, B, over(0), over(1), over(2), (), (), (), (), (), (), ()),
        4, zero(Map::signed()), zero(Map::unsigned()), planes(64), BF16, BF16),
    row!(adam8 => adam8_kernel, Adam8Kernel, "f32", line(64),
        (B, B, B, B, B, B, B, B, (), (), (), (), (), (), ()),
        4, zero(Map::signed()), zero(Map::unsigned()), shared(64), F32, F32),
    row!(adam8 => adam8_kernel, Adam8Kernel, "f16, an odd number of values", line(64),
        (B, B, B, B, B, B, B, B, (), (), (), (), (), (), ()),
        1, zero(Map::signed()), zero(Map::unsigned()), shared(64), F16, F16),
    row!(adamw => adamw_kernel, AdamwKernel, "bf16 two", line(256),
        (list([B, B]), list([B, B]), list([B, B]), list([B, B]), list([B]), list([over(0), over(1)]),
        list([over(2), over(3)]), list([over(4), over(5)]), list([(), ()]), (), (), (), (), (), (), (), (), ()),
        4, BF16, BF16),
    row!(adamw => adamw_kernel, AdamwKernel, "f32", line(256),
        (list([B]), list([B]), list([B]), list([B]), list([]), list([B]), list([B]), list([B]), list([()]),
        (), (), (), (), (), (), (), (), ()), 4, F32, F32),

    row!(cross_entropy => cross_entropy_kernel, CrossEntropyKernel, "bf16", line(1024),
        (B, B, B, over(0), (), ()), 8, false, planes(1024), BF16, I32),
    row!(cross_entropy => cross_entropy_kernel, CrossEntropyKernel, "bf16 i64 capped", line(1024),
        (B, B, B, B, (), ()), 8, true, planes(1024), BF16, I64),
    row!(cross_entropy => cross_entropy_kernel, CrossEntropyKernel, "f32 capped", line(256),
        (B, B, B, B, (), ()), 1, true, shared(256), F32, I32),
    row!(reduce => sum_kernel, SumKernel, "bf16 squares of two", line(256), (list([B, B]), B, (), ()), 8,
        true, planes(256), BF16),
    row!(reduce => sum_kernel, SumKernel, "f32", line(256), (list([B]), B, (), ()), 4, false, shared(256), F32),
    row!(stochastic_round => stochastic_round_kernel, StochasticRoundKernel, "bf16", line(256),
        (B, B, (), ()), 4, FloatDType::BF16, BF16),
    row!(stochastic_round => stochastic_round_kernel, StochasticRoundKernel, "f16", line(256),
        (B, B, (), ()), 4, FloatDType::F16, F16),

    row!(gated => gated_kernel, GatedKernel, "bf16 silu", line(256), (B, B, B), 8, Activation::Silu, BF16),
    row!(gated => gated_kernel, GatedKernel, "f32 gelu", line(256), (B, B, B), 4, Activation::Gelu, F32),
    row!(gated => gated_kernel, GatedKernel, "f16 gelu_tanh", line(256), (B, B, B), 1, Activation::GeluTanh, F16),
    row!(gated => gated_backward_kernel, GatedBackwardKernel, "bf16 silu", line(256),
        (B, B, B, B, B), 8, Activation::Silu, BF16),
    row!(gated => gated_backward_kernel, GatedBackwardKernel, "f32 gelu_tanh", line(256),
        (B, B, B, B, B), 4, Activation::GeluTanh, F32),
    row!(gated => gated_backward_kernel, GatedBackwardKernel, "f16 gelu", line(256),
        (B, B, B, B, B), 4, Activation::Gelu, F16),
    row!(rms_norm => rms_norm_kernel, RmsNormKernel, "bf16", line(256),
        (B, B, B, (), (), (), ()), 8, planes(256), BF16, F32),
    row!(rms_norm => rms_norm_kernel, RmsNormKernel, "f32", line(32),
        (B, B, B, (), (), (), ()), 1, shared(32), F32, F32),
    row!(rms_norm => rms_norm_backward_kernel, RmsNormBackwardKernel, "bf16", line(256),
        (B, B, B, B, list([B]), (), (), (), ()), 4, planes(256), BF16, BF16),
    row!(rms_norm => rms_norm_backward_kernel, RmsNormBackwardKernel, "bf16 frozen", line(256),
        (B, B, B, B, list([]), (), (), (), ()), 8, planes(256), BF16, BF16),
    row!(rms_norm => rms_norm_backward_kernel, RmsNormBackwardKernel, "f32", line(32),
        (B, B, B, B, list([B]), (), (), (), ()), 1, shared(32), F32, F32),
    row!(rotary => rotary_kernel, RotaryKernel, "bf16", line(256), (B, B, B, over(0), (), (), ()), 4, BF16),
    row!(rotary => rotary_kernel, RotaryKernel, "f32", line(256), (B, B, B, B, (), (), ()), 1, F32),

    row!(codes => dequantise_kernel, DequantiseKernel, "bf16 table", line(256), (TABLE, B, ()), 8, BITS4, BF16),
    row!(codes => dequantise_kernel, DequantiseKernel, "bf16 nested", line(256), (NESTED, B, ()), 8, BITS4, BF16),
    row!(codes => dequantise_kernel, DequantiseKernel, "bf16 affine", line(256), (AFFINE, B, ()), 4, BITS8, BF16),
    row!(codes => dequantise_kernel, DequantiseKernel, "f32 table", line(256), (TABLE, B, ()), 1, BITS4, F32),
    row!(codes => dequantise_kernel, DequantiseKernel, "f32 nested", line(256), (NESTED, B, ()), 8, BITS4, F32),
    row!(codes => dequantise_kernel, DequantiseKernel, "f16 affine", line(256), (AFFINE, B, ()), 8, BITS4, F16),
    row!(groups => pack_groups_kernel, PackGroupsKernel, "int8 stochastic", line(32), (B, B, B, B, (), ()),
        4, Packing { bits: 8, words: 16, width: 4, is_stochastic: true, cube: planes(32) }),
    row!(groups => pack_groups_kernel, PackGroupsKernel, "int8 nearest, groups of 1024", line(128), (B, B, B, B, (), ()),
        4, Packing { bits: 8, words: 256, width: 4, is_stochastic: false, cube: planes(128) }),
    row!(groups => pack_groups_kernel, PackGroupsKernel, "int4 nearest", line(32), (B, B, B, B, (), ()),
        1, Packing { bits: 4, words: 8, width: 1, is_stochastic: false, cube: shared(32) }),
    row!(top_columns => top_columns_kernel, TopColumnsKernel, "rank", line(256), (B, B, ()), Stage::Rank),
    row!(top_columns => top_columns_kernel, TopColumnsKernel, "collect", line(256), (B, B, ()), Stage::Collect),
    row!(thin => thin_kernel, ThinKernel, "bf16 rows dense", thin_cube(), (LeftCompilationArg::Dense(B), B, B, SIZES),
        4, thin_tile(Sum::Rows, 16, 1, 4, false, BITS4), BF16, BF16, BF16),
    row!(thin => thin_kernel, ThinKernel, "bf16 rows table", thin_cube(),
        (LeftCompilationArg::Packed(TABLE), B, B, SIZES),
        8, thin_tile(Sum::Rows, 1, 4, 8, true, BITS4), BF16, BF16, BF16),
    row!(thin => thin_kernel, ThinKernel, "bf16 rows nested", thin_cube(),
        (LeftCompilationArg::Packed(NESTED), B, B, SIZES),
        8, thin_tile(Sum::Rows, 16, 1, 8, true, BITS4), BF16, BF16, F32),
    row!(thin => thin_kernel, ThinKernel, "f32 rows dense", thin_cube(), (LeftCompilationArg::Dense(B), B, B, SIZES),
        4, thin_tile(Sum::Rows, 8, 2, 4, true, BITS4), F32, F32, F32),
    row!(thin => thin_kernel, ThinKernel, "f16 rows affine", thin_cube(),
        (LeftCompilationArg::Packed(AFFINE), B, B, SIZES),
        4, thin_tile(Sum::Rows, 16, 1, 4, true, BITS8), F16, F16, F16),
    row!(thin => thin_kernel, ThinKernel, "bf16 columns dense", thin_cube(),
        (LeftCompilationArg::Dense(B), B, B, SIZES),
        4, thin_tile(Sum::Columns, 16, 1, 4, true, BITS4), BF16, BF16, F32),
    row!(thin => thin_kernel, ThinKernel, "bf16 columns nested", thin_cube(),
        (LeftCompilationArg::Packed(NESTED), B, B, SIZES),
        4, thin_tile(Sum::Columns, 16, 1, 4, false, BITS4), BF16, BF16, BF16),
    row!(thin => thin_kernel, ThinKernel, "bf16 columns table", thin_cube(),
        (LeftCompilationArg::Packed(TABLE), B, B, SIZES),
        8, thin_tile(Sum::Columns, 8, 1, 8, false, BITS4), BF16, BF16, BF16),
    row!(thin => thin_kernel, ThinKernel, "bf16 columns affine", thin_cube(),
        (LeftCompilationArg::Packed(AFFINE), B, B, SIZES),
        4, thin_tile(Sum::Columns, 2, 4, 4, false, BITS8), BF16, BF16, BF16),
    row!(thin => thin_kernel, ThinKernel, "f32 columns dense", thin_cube(), (LeftCompilationArg::Dense(B), B, B, SIZES),
        1, thin_tile(Sum::Columns, 16, 4, 1, true, BITS4), F32, F32, F32),
    row!(thin => thin_kernel, ThinKernel, "f32 columns table", thin_cube(),
        (LeftCompilationArg::Packed(TABLE), B, B, SIZES),
        8, thin_tile(Sum::Columns, 4, 2, 8, true, BITS4), F32, F32, F32),
    row!(thin => fold_kernel, FoldKernel, "bf16", line(256), (B, B, (), ()), BF16),
    row!(thin => fold_kernel, FoldKernel, "f32", line(256), (B, B, (), ()), F32),

    row!(rows => row_products, RowProducts, "bf16", line(256), (B, B, B, ()), 8, BF16),
    row!(rows => row_products, RowProducts, "f32", line(256), (B, B, B, ()), 4, F32),
    row!(chunks => softmax_kernel, SoftmaxKernel, "bf16", line(256),
        (B, B, B, B, PLACE, (), ()), false, planes(256), BF16, I32),
    row!(chunks => softmax_kernel, SoftmaxKernel, "f32 capped", line(32),
        (B, B, B, B, PLACE, (), ()), true, shared(32), F32, I32),
    row!(chunks => softmax_backward_kernel, SoftmaxBackwardKernel, "bf16", line(256),
        (B, B, B, B, B, B, B, PLACE, (), ()), false, BF16, I32),
    row!(chunks => softmax_backward_kernel, SoftmaxBackwardKernel, "f32 capped", line(256),
        (B, B, B, B, B, B, B, PLACE, (), ()), true, F32, I32),
    row!(tiles_forward => forward_kernel, ForwardKernel, "bf16 fragments", line(UNITS as u32),
        (B, B, B, B, B, B, LENGTHS, (), ()), 8, 8, tile(Form::Fragments, 64, 64, 128, false), BF16, I32),
    row!(tiles_forward => forward_kernel, ForwardKernel, "f16 fragments capped", line(UNITS as u32),
        (B, B, B, B, B, B, LENGTHS, (), ()), 8, 8, tile(Form::Fragments, 32, 32, 80, true), F16, I32),
    row!(tiles_forward => forward_kernel, ForwardKernel, "bf16 registers", line(UNITS as u32),
        (B, B, B, B, B, B, LENGTHS, (), ()), 8, 1, tile(Form::Registers, 64, 64, 64, false), BF16, I64),
    row!(tiles_forward => forward_kernel, ForwardKernel, "f32 registers capped", line(UNITS as u32),
        (B, B, B, B, B, B, LENGTHS, (), ()), 1, 1, tile(Form::Registers, 16, 16, 32, true), F32, I32),
    row!(tiles_backward => query_gradient_kernel, QueryGradientKernel, "bf16 fragments", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, LENGTHS, (), ()), 8, 8, tile(Form::Fragments, 64, 32, 128, false), BF16, I32),
    row!(tiles_backward => query_gradient_kernel, QueryGradientKernel, "f16 fragments capped", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, LENGTHS, (), ()), 8, 8, tile(Form::Fragments, 32, 32, 80, true), F16, I32),
    row!(tiles_backward => query_gradient_kernel, QueryGradientKernel, "bf16 registers", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, LENGTHS, (), ()), 8, 1, tile(Form::Registers, 64, 64, 64, false), BF16, I32),
    row!(tiles_backward => query_gradient_kernel, QueryGradientKernel, "f32 registers capped", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, LENGTHS, (), ()), 1, 1, tile(Form::Registers, 16, 16, 32, true), F32, I32),
    row!(tiles_backward => key_gradient_kernel, KeyGradientKernel, "bf16 fragments", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, B, LENGTHS, (), ()), 8, 8, tile(Form::Fragments, 64, 32, 128, false), BF16, I32),
    row!(tiles_backward => key_gradient_kernel, KeyGradientKernel, "f16 fragments capped", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, B, LENGTHS, (), ()), 4, 4, tile(Form::Fragments, 32, 32, 80, true), F16, I32),
    row!(tiles_backward => key_gradient_kernel, KeyGradientKernel, "bf16 registers", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, B, LENGTHS, (), ()), 8, 1, tile(Form::Registers, 64, 64, 64, false), BF16, I32),
    row!(tiles_backward => key_gradient_kernel, KeyGradientKernel, "f32 registers capped", line(UNITS as u32),
        (B, B, B, B, B, B, B, B, B, LENGTHS, (), ()), 1, 1, tile(Form::Registers, 16, 16, 32, true), F32, I32),
];
