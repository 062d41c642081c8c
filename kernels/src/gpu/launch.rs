//! What launchers share: output buffers, vector sizes, cubes for rows and for elements, and folds over a cube.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::client::Client;
use cubecl::features::Plane;
use cubecl::ir::{AddressType, ElemType, VectorSize};
use cubecl::prelude::*;
use cubecl::tensor_vector_size_parallel;

/// Cubes that every device takes in one dimension.
const MOST_CUBES: usize = 65535;

/// Without gaps, in row-major order; a copy only where it is not so yet.
pub(crate) fn dense(tensor: CubeTensor) -> CubeTensor {
    into_contiguous(tensor)
}

/// A new buffer on the device of `like`, not initialised.
pub(crate) fn empty(like: &CubeTensor, shape: Shape, dtype: DType) -> CubeTensor {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}

pub(crate) fn empty_like(like: &CubeTensor) -> CubeTensor {
    empty(like, like.shape(), like.dtype)
}

/// The element type of a kernel's tensor.
pub(crate) fn element(tensor: &CubeTensor) -> ElemType {
    burn::backend::cubecl::dtype_to_storage_type(tensor.dtype)
}

/// The integers that reach every value of these tensors.
pub(crate) fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

/// Stops where a tensor has another shape than the kernel assumes, which does not check again.
#[track_caller]
pub(crate) fn assert_shape(what: &str, tensor: &CubeTensor, expected: &[usize]) {
    let shape = tensor.shape().to_vec();
    assert!(shape == expected, "shape of {what}: expected {expected:?}, got {shape:?}");
}

/// Stops where a tensor has another element type than the kernel assumes.
#[track_caller]
pub(crate) fn assert_dtype(what: &str, tensor: &CubeTensor, expected: DType) {
    assert!(tensor.dtype == expected, "type of {what}: expected {expected:?}, got {:?}", tensor.dtype);
}

/// The widest vector that divides the last dimension of every one of these dense tensors.
pub(crate) fn vector_size(tensors: &[&CubeTensor]) -> VectorSize {
    let widest = |tensor: &&CubeTensor| {
        let sizes = tensor.client.io_optimized_vector_sizes(tensor.dtype.size());
        let meta = &tensor.meta;
        tensor_vector_size_parallel(sizes, meta.shape(), meta.strides(), meta.num_dims() - 1)
    };
    tensors.iter().map(widest).min().unwrap_or(1)
}

/// The widest vector that divides these dense tensors where rows do not matter.
pub(crate) fn flat_vector_size(tensors: &[&CubeTensor]) -> VectorSize {
    let widest = |tensor: &&CubeTensor| {
        let sizes = tensor.client.io_optimized_vector_sizes(tensor.dtype.size());
        sizes.filter(|size| tensor.meta.num_elements().is_multiple_of(*size)).max().unwrap_or(1)
    };
    tensors.iter().map(widest).min().unwrap_or(1)
}

/// One unit per item; the last cubes may be beyond the end.
pub(crate) fn per_item(client: &Client, items: usize) -> (CubeCount, CubeDim) {
    let dim = CubeDim::new(client, items);
    (calculate_cube_count_elemwise(client, items, dim), dim)
}

/// At most one cube per row: a cube goes on with the row that is [`CUBE_COUNT`] further.
pub(crate) fn per_row(rows: usize) -> CubeCount {
    CubeCount::Static(rows.min(MOST_CUBES) as u32, 1, 1)
}

/// A dense tensor that a kernel may overwrite: what it reads, what it writes, and the result. It is one buffer where
/// nothing else holds it.
pub(crate) struct InPlace {
    pub input: BufferArg,
    pub output: BufferArg,
    pub result: CubeTensor,
}

impl InPlace {
    /// `position` counts the kernel's buffers; all inputs come before the outputs. The tensor must be dense.
    pub fn new(tensor: CubeTensor, position: usize) -> Self {
        if tensor.can_mut() {
            let output = BufferArg::alias(position, tensor.meta.num_elements());
            Self { input: tensor.clone().into_buffer_arg(), output, result: tensor }
        } else {
            let result = empty_like(&tensor);
            Self { input: tensor.into_buffer_arg(), output: result.clone().into_buffer_arg(), result }
        }
    }
}

/// The units of a cube that folds rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RowCube {
    /// A power of two.
    pub units: u32,
    /// Whether planes fold in registers. Only where all planes have one size: the order of a sum must not vary.
    pub planes: bool,
}

impl RowCube {
    /// For rows of so many vectors, with at most `most` units, a power of two.
    pub fn new(client: &Client, vectors: usize, most: u32) -> Self {
        let limit = 1u32 << most.min(client.properties().hardware.max_units_per_cube).max(1).ilog2();
        let units = vectors.min(limit as usize).next_power_of_two().max(32).min(limit as usize) as u32;
        Self::exactly(client, units)
    }

    /// With so many units, a power of two.
    pub fn exactly(client: &Client, units: u32) -> Self {
        let properties = client.properties();
        let plane = properties.hardware.plane_size_min;
        let is_fixed = plane > 1 && plane == properties.hardware.plane_size_max && units.is_multiple_of(plane);
        Self { units, planes: is_fixed && properties.features.plane.contains(Plane::Ops) }
    }

    pub fn dim(self) -> CubeDim {
        CubeDim::new_1d(self.units)
    }
}

/// How values are folded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fold {
    Sum,
    Max,
}

#[cube]
fn combine(a: f32, b: f32, #[comptime] fold: Fold) -> f32 {
    match fold {
        Fold::Sum => a + b,
        Fold::Max => max(a, b),
    }
}

#[cube]
fn plane_fold(value: f32, #[comptime] fold: Fold) -> f32 {
    match fold {
        Fold::Sum => plane_sum(value),
        Fold::Max => plane_max(value),
    }
}

/// `value` folded over the units of the cube, the same in every unit. `shared` has a place for each unit.
#[cube]
pub(crate) fn cube_fold(
    value: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] cube: RowCube,
    #[comptime] fold: Fold,
) -> f32 {
    let unit = UNIT_POS as usize;
    if comptime!(cube.planes) {
        let folded = plane_fold(value, fold);
        if UNIT_POS_PLANE == 0 {
            shared[PLANE_POS as usize] = folded;
        }
        sync_cube();
        let mut all = shared[0];
        let mut plane = comptime!(1usize).runtime();
        while plane < (CUBE_DIM / PLANE_DIM) as usize {
            all = combine(all, shared[plane], fold);
            plane += 1;
        }
        sync_cube();
        all
    } else {
        shared[unit] = value;
        let mut width = comptime!(cube.units as usize / 2).runtime();
        while width > 0 {
            sync_cube();
            if unit < width {
                shared[unit] = combine(shared[unit], shared[unit + width], fold);
            }
            width /= 2;
        }
        sync_cube();
        let all = shared[0];
        sync_cube();
        all
    }
}

/// Sum over the elements of a vector.
#[cube]
pub(crate) fn sum_of<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for i in 0..N::value() {
        sum += vector.extract(i);
    }
    sum
}

/// Largest element of a vector.
#[cube]
pub(crate) fn max_of<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut largest = vector.extract(0usize);
    #[unroll]
    for i in 1..N::value() {
        largest = max(largest, vector.extract(i));
    }
    largest
}
