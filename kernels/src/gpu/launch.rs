//! What launchers share: output buffers, vector sizes, cube counts, and a sum and a maximum over a cube.

use burn::backend::TensorMetadata;
use burn::tensor::{DType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::ir::{ElemType, VectorSize};
use cubecl::prelude::*;
use cubecl::tensor_vector_size_parallel;

/// Units of a cube that works on one row.
pub(crate) const ROW_UNITS: u32 = 256;

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

/// The widest vector that divides the last dimension of every one of these dense tensors.
pub(crate) fn vector_size(tensors: &[&CubeTensor]) -> VectorSize {
    let widest = |tensor: &&CubeTensor| {
        let sizes = tensor.client.io_optimized_vector_sizes(tensor.dtype.size());
        let meta = &tensor.meta;
        tensor_vector_size_parallel(sizes, meta.shape(), meta.strides(), meta.num_dims() - 1)
    };
    tensors.iter().map(widest).min().unwrap_or(1)
}

/// Sum of `value` over the units of a cube of [`ROW_UNITS`], the same in every unit.
#[cube]
pub(crate) fn cube_sum(value: f32, shared: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    let mut width = comptime!(ROW_UNITS as usize / 2).runtime();
    while width > 0 {
        sync_cube();
        if unit < width {
            shared[unit] += shared[unit + width];
        }
        width /= 2;
    }
    sync_cube();
    let sum = shared[0];
    sync_cube();
    sum
}

/// Largest `value` of the units of a cube of [`ROW_UNITS`], the same in every unit.
#[cube]
pub(crate) fn cube_max(value: f32, shared: &mut Shared<[f32]>) -> f32 {
    let unit = UNIT_POS as usize;
    shared[unit] = value;
    let mut width = comptime!(ROW_UNITS as usize / 2).runtime();
    while width > 0 {
        sync_cube();
        if unit < width {
            shared[unit] = max(shared[unit], shared[unit + width]);
        }
        width /= 2;
    }
    sync_cube();
    let largest = shared[0];
    sync_cube();
    largest
}
