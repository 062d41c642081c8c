//! Products with one thin side on a GPU, for dense and for packed matrices: `L M` and `L^T M`, where M has a few columns.
//!
//! | product | L | M | kernel |
//! | --- | --- | --- | --- |
//! | `x A`, `dy B^T` (`x P`, `dy Q`) | x, dy `[t, d]` | `[d, r]` | rows |
//! | `x^T u`, `(h^T dy)^T` | x, dy `[t, d]` | u, h `[t, r]` | columns |
//! | `(x W)^T = W^T x^T`, t small | `W^T [d_out, d_in]`, packed | `x^T [d_in, t]` | rows |
//! | `(dy W^T)^T = W dy^T`, t small | `W^T [d_out, d_in]`, packed | `dy^T [d_out, t]` | columns |
//!
//! (A weight that is packed as `W [d_in, d_out]` swaps the last two kernels.)
//!
//! Bound by memory up to r = 8, then by f32 arithmetic: L is read once, `2 r` flops for each of its values. bf16, 4096 x 4096, r = 16:
//! 34 MB, 7 us; 0.54 Gflop, 8 us on 67 TFLOP/s (H200, f32 without tensor cores). nf4, 4096 x 14336, t = 1: 33 MB, 7 us.
//!
//! Why not a matmul: cubek's plane routines give a problem with n <= 64 four planes and a stage of 64 x 64, so `[4096, 4096] x
//! [4096, 16]` is 64 cubes on 132 multiprocessors with one or two stages of 64 x 32 values (4 KB) in flight each. At 700 ns of
//! latency 64 cubes x 8 KB are 0.75 TB/s, 45 us for 34 MB (a matmul of the full weight: 139 us). No routine splits k.
//! Here L goes straight to registers, 16 to 32 KB in flight on a multiprocessor, and a third grid axis splits the sum until there
//! are two cubes for each multiprocessor. ptxas 12.9 gives units up to 128 registers for sm_90a, which lets both run at a time.
//!
//! For that the columns kernel holds 64 sums a unit at most, so with 16 columns of M (more than the 8 tokens that go by codes unless
//! told to) it reads half a word of 4-bit codes: two lanes share a word, and memory is read once still. The floor stays: 16 tokens,
//! nf4, 4096 x 14336 are 7 us of memory and 28 us of f32. But a scale is looked up for 4 values, not 8: by the PTX 31
//! instructions a value of which 16 are the sums, where a whole word took 27 (and 170 registers, one cube): 61 us of issue
//! slots on 132 multiprocessors at 1.75 GHz against 53, which two cubes fill better than one.
//!
//! f32 accumulation. Deterministic: the order of every sum depends on shapes and the device only; parts of a split sum go to an
//! f32 buffer that `fold_kernel` adds up in order. Outputs are overwritten. Not measured yet.

pub(super) mod kernel;

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use self::kernel::{CHUNK, GROUPS, LANES, LeftArgs, ROWS, SizesLaunch, Sum, Tile, fold_kernel, thin_kernel};
use super::codes::{self, Coding};
use super::launch::{dense, element, empty, vector_size};
use crate::packed::{Order, PackedParts};

/// Values of M that the rows kernel holds in shared memory: 8 KB.
const STAGE: usize = 2048;
/// The widest vector of a dense L.
const WIDEST: usize = 4;
/// Sums that a unit of the columns kernel holds: with 16 columns of M it reads half a word of codes of 4 bits.
const SUMS: usize = 64;
/// Columns of M for each cube.
const COLUMNS: usize = 16;

/// L on the host side: `[rows, width]`.
struct Large {
    source: Source,
    rows: usize,
    width: usize,
    place: CubeTensor,
}

#[allow(clippy::large_enum_variant)] // one per launch
enum Source {
    Dense(CubeTensor),
    Packed(PackedParts<CubeBackend>),
}

impl Large {
    /// A row-major matrix.
    fn dense(tensor: CubeTensor) -> Self {
        let (rows, width) = (tensor.meta.shape()[0], tensor.meta.shape()[1]);
        Self { place: tensor.clone(), source: Source::Dense(tensor), rows, width }
    }

    /// The flattened matrix, as it is packed.
    fn packed(w: PackedParts<CubeBackend>) -> Self {
        let [rows, width] = w.layout().stored();
        Self { place: codes::place(&w).clone(), source: Source::Packed(w), rows, width }
    }
}

/// M, `[rows, columns]`.
struct Small {
    tensor: CubeTensor,
    rows: usize,
    columns: usize,
    is_row_major: bool,
}

impl Small {
    fn of(tensor: CubeTensor) -> Self {
        let (rows, columns) = (tensor.meta.shape()[0], tensor.meta.shape()[1]);
        match lies_transposed(&tensor) {
            true => Self { tensor: transposed(tensor), rows, columns, is_row_major: false },
            false => Self { tensor: dense(tensor), rows, columns, is_row_major: true },
        }
    }
}

/// Whether the columns of a matrix are what lies without gaps.
fn lies_transposed(tensor: &CubeTensor) -> bool {
    let (shape, strides) = (tensor.meta.shape(), tensor.meta.strides());
    shape[1] > 1 && strides[0] == 1 && strides[1] == shape[0]
}

fn transposed(tensor: CubeTensor) -> CubeTensor {
    CubeBackend::float_transpose(tensor)
}

/// Parts of a sum of `length` (in steps of `step`), so that there are two cubes for each multiprocessor.
fn parts(place: &CubeTensor, cubes: usize, length: usize, step: usize) -> (usize, usize) {
    /// Where a device does not say how many multiprocessors it has.
    const TYPICAL: u32 = 64;
    let multiprocessors = place.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(TYPICAL);
    let wanted = (2 * multiprocessors as usize).div_ceil(cubes);
    let steps = length.div_ceil(step);
    let part = steps.div_ceil(wanted.min(steps)) * step;
    (length.div_ceil(part), part)
}

/// What a product is compiled for, and the grid it runs on.
struct Plan {
    /// Values of a vector of L.
    size: usize,
    columns: usize,
    steps: usize,
    cubes: CubeCount,
    /// Parts of the sum, and terms of each.
    parts: usize,
    part: usize,
}

impl Plan {
    fn new(sum: Sum, left: &Large, rank: usize) -> Self {
        let size = match &left.source {
            Source::Dense(tensor) => vector_size(&[tensor]).min(WIDEST),
            Source::Packed(w) => w.layout().format.per_word(),
        };
        assert!(left.width.is_multiple_of(size), "rows of {} packed values end inside a word", left.width);
        let columns = rank.next_power_of_two().min(COLUMNS);
        let size = match sum {
            Sum::Rows => size,
            Sum::Columns => size.min(SUMS / columns),
        };
        let steps = (STAGE / (LANES * size * columns)).clamp(1, 4);
        let vectors = left.width / size;
        let (blocks, terms, step) = match sum {
            Sum::Rows => (left.rows.div_ceil(GROUPS * ROWS), vectors, LANES * steps),
            Sum::Columns => (vectors.div_ceil(LANES), left.rows, CHUNK),
        };
        let column_blocks = rank.div_ceil(columns);
        let (parts, part) = parts(&left.place, blocks * column_blocks, terms, step);
        let cubes = CubeCount::Static(column_blocks as u32, blocks as u32, parts as u32);
        Self { size, columns, steps, cubes, parts, part }
    }
}

/// `scale L M` or `scale L^T M`, `[m, r]`, or its transpose.
fn run(sum: Sum, left: Large, right: CubeTensor, scale: f32, dtype: DType, is_transposed: bool) -> CubeTensor {
    let right = Small::of(right);
    let (length, depth, rank) = match sum {
        Sum::Rows => (left.rows, left.width, right.columns),
        Sum::Columns => (left.width, left.rows, right.columns),
    };
    assert_eq!(right.rows, depth, "inner sizes of a product");
    let shape = if is_transposed { Shape::new([rank, length]) } else { Shape::new([length, rank]) };
    if length * rank * depth == 0 {
        return CubeBackend::float_zeros(shape, &left.place.device(), dtype.into());
    }
    let out = empty(&left.place, shape, dtype);
    let plan = Plan::new(sum, &left, rank);
    let strides = if is_transposed { (1, length) } else { (rank, 1) };
    if plan.parts == 1 {
        launch(sum, left, right, out.clone(), &plan, strides, scale);
    } else {
        let parts = empty(&left.place, Shape::new([plan.parts, length * rank]), DType::F32);
        launch(sum, left, right, parts.clone(), &plan, strides, 1.0);
        fold(parts, &out, plan.parts, scale);
    }
    out
}

/// `strides`: between the results of two rows of the sum, and of two columns of M.
fn launch(sum: Sum, left: Large, right: Small, out: CubeTensor, plan: &Plan, strides: (usize, usize), scale: f32) {
    let (client, right_kind, out_kind) = (out.client.clone(), element(&right.tensor), element(&out));
    let (argument, left_kind, coding) = match left.source {
        Source::Dense(tensor) => {
            let kind = element(&tensor);
            (LeftArgs::Dense(tensor.into_buffer_arg()), kind, Coding { bits: 4, block: 8, nested: 1 })
        }
        Source::Packed(w) => {
            let (codes, coding) = codes::arguments(w);
            (LeftArgs::Packed(codes), out_kind, coding)
        }
    };
    let Plan { size, columns, steps, .. } = *plan;
    let sizes = SizesLaunch::new(
        left.rows as u32,
        (left.width / size) as u32,
        right.columns as u32,
        plan.part as u32,
        strides.0 as u32,
        strides.1 as u32,
        scale,
    );
    thin_kernel::launch(
        &client,
        plan.cubes.clone(),
        CubeDim::new_2d(LANES as u32, GROUPS as u32),
        size,
        argument,
        right.tensor.into_buffer_arg(),
        out.into_buffer_arg(),
        sizes,
        Tile { sum, columns, steps, size, is_row_major: right.is_row_major, coding },
        left_kind,
        right_kind,
        out_kind,
    );
}

fn fold(parts: CubeTensor, out: &CubeTensor, count: usize, scale: f32) {
    let (client, units) = (out.client.clone(), out.meta.num_elements());
    let dim = CubeDim::new(&client, units);
    let cubes = calculate_cube_count_elemwise(&client, units, dim);
    let (parts, kind) = (parts.into_buffer_arg(), element(out));
    fold_kernel::launch(&client, cubes, dim, parts, out.clone().into_buffer_arg(), count as u32, scale, kind);
}

/// `alpha a b`, where one of the two outer sizes is small: that side is M, the other L, each as it lies in memory.
pub(crate) fn product(a: CubeTensor, b: CubeTensor, alpha: f32) -> CubeTensor {
    let dtype = a.dtype;
    match a.meta.shape()[0] >= b.meta.shape()[1] {
        true => with_large(a, b, alpha, dtype, false),
        // a b = (b^T a^T)^T
        false => with_large(transposed(b), transposed(a), alpha, dtype, true),
    }
}

/// `alpha large small`, or its transpose.
fn with_large(large: CubeTensor, small: CubeTensor, alpha: f32, dtype: DType, is_transposed: bool) -> CubeTensor {
    match lies_transposed(&large) {
        true => run(Sum::Columns, Large::dense(transposed(large)), small, alpha, dtype, is_transposed),
        false => run(Sum::Rows, Large::dense(dense(large)), small, alpha, dtype, is_transposed),
    }
}

/// `x W` for few rows of x.
pub(crate) fn packed(x: CubeTensor, w: PackedParts<CubeBackend>) -> CubeTensor {
    let dtype = x.dtype;
    let sum = match w.layout().order {
        Order::Outputs => Sum::Rows,
        Order::Inputs => Sum::Columns,
    };
    run(sum, Large::packed(w), transposed(dense(x)), 1.0, dtype, true)
}

/// `dy W^T` for few rows of dy.
pub(crate) fn packed_backward(dy: CubeTensor, w: PackedParts<CubeBackend>) -> CubeTensor {
    let dtype = dy.dtype;
    let sum = match w.layout().order {
        Order::Outputs => Sum::Columns,
        Order::Inputs => Sum::Rows,
    };
    run(sum, Large::packed(w), transposed(dense(dy)), 1.0, dtype, true)
}
