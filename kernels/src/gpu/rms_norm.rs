//! RMS normalisation on a GPU; equations in `crate::rms_norm`. One cube per row, with units for one vector each up to
//! 256: rows of 128 (norms of heads) get 32 units, so that as many rows are in work as a multiprocessor has places for
//! cubes.
//!
//! Memory bound. Bytes in types of `e` bytes: forward `2 e t d`, backward `3 e t d` (+ a partial sum of dgamma per
//! cube, see below). 4096 x 4096 bf16 on 4.8 TB/s: floor 14 us forward, 21 us backward. The row is read twice; the
//! second time from cache. dgamma, where gamma is trained: a cube sums over its rows into its own row of a `[cubes, d]` f32
//! buffer, which Burn's sum then folds, so that the order of the sum never varies. Not measured yet.

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{
    Fold, RowCube, address_type, assert_dtype, assert_shape, cube_fold, dense, element, empty, empty_like, per_row,
    sum_of, vector_size,
};

/// Cubes of the backward, each with a row of partial sums of dgamma: at most four rows of 256 units on a
/// multiprocessor of the largest devices, and `512 d` values to fold.
const BACKWARD_CUBES: usize = 512;
/// Units of a cube.
const MOST_UNITS: u32 = 256;

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn rms_norm_kernel<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    gamma: &[Vector<G, N>],
    y: &mut [Vector<F, N>],
    eps: f32,
    offset: f32,
    width: u32,
    rows: u32,
    #[comptime] cube: RowCube,
    #[define(F)] _x_element: ElemType,
    #[define(G)] _gamma_element: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let columns = gamma.len();
    let mut row = CUBE_POS;
    while row < rows as usize {
        let start = row * columns;
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let x = Vector::<f32, N>::cast_from(x[start + i]);
            squares += x * x;
            i += CUBE_DIM as usize;
        }
        let sum = cube_fold(sum_of::<N>(squares), &mut shared, cube, Fold::Sum);
        let inverse = 1.0 / (sum / f32::cast_from(width) + eps).sqrt();
        let mut i = UNIT_POS as usize;
        while i < columns {
            let x = Vector::<f32, N>::cast_from(x[start + i]);
            let weight = Vector::<f32, N>::cast_from(gamma[i]) + Vector::new(offset);
            y[start + i] = Vector::cast_from(x * Vector::new(inverse) * weight);
            i += CUBE_DIM as usize;
        }
        row += CUBE_COUNT;
    }
}

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn rms_norm_backward_kernel<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    gamma: &[Vector<G, N>],
    dy: &[Vector<F, N>],
    dx: &mut [Vector<F, N>],
    d_gamma: &mut Sequence<Box<[Vector<f32, N>]>>,
    eps: f32,
    offset: f32,
    width: u32,
    rows: u32,
    #[comptime] cube: RowCube,
    #[define(F)] _x_element: ElemType,
    #[define(G)] _gamma_element: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let columns = gamma.len();
    let partial = CUBE_POS * columns;
    #[unroll]
    for wanted in 0..d_gamma.len() {
        let mut i = UNIT_POS as usize;
        while i < columns {
            d_gamma.index_mut(wanted)[partial + i] = Vector::new(0.0);
            i += CUBE_DIM as usize;
        }
    }
    let mut row = CUBE_POS;
    while row < rows as usize {
        let start = row * columns;
        let mut squares = Vector::<f32, N>::new(0.0);
        let mut products = Vector::<f32, N>::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let x = Vector::<f32, N>::cast_from(x[start + i]);
            let dy = Vector::<f32, N>::cast_from(dy[start + i]);
            let weight = Vector::<f32, N>::cast_from(gamma[i]) + Vector::new(offset);
            squares += x * x;
            products += x * dy * weight;
            i += CUBE_DIM as usize;
        }
        let sum = cube_fold(sum_of::<N>(squares), &mut shared, cube, Fold::Sum);
        let inverse = 1.0 / (sum / f32::cast_from(width) + eps).sqrt();
        // mean(h n) = inverse mean(h x)
        let mean = cube_fold(sum_of::<N>(products), &mut shared, cube, Fold::Sum) * inverse / f32::cast_from(width);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let n = Vector::<f32, N>::cast_from(x[start + i]) * Vector::new(inverse);
            let dy = Vector::<f32, N>::cast_from(dy[start + i]);
            let weight = Vector::<f32, N>::cast_from(gamma[i]) + Vector::new(offset);
            dx[start + i] = Vector::cast_from((dy * weight - n * Vector::new(mean)) * Vector::new(inverse));
            #[unroll]
            for wanted in 0..d_gamma.len() {
                let sum = d_gamma[wanted][partial + i] + dy * n;
                d_gamma.index_mut(wanted)[partial + i] = sum;
            }
            i += CUBE_DIM as usize;
        }
        row += CUBE_COUNT;
    }
}

fn rows_and_width(x: &CubeTensor, gamma: &CubeTensor) -> (usize, usize) {
    let (rows, width) = (x.meta.shape()[0], x.meta.shape()[1]);
    assert_shape("gamma", gamma, &[width]);
    (rows, width)
}

pub(crate) fn forward(x: CubeTensor, gamma: CubeTensor, eps: f32, offset: f32) -> CubeTensor {
    let (x, gamma) = (dense(x), dense(gamma));
    let (rows, width) = rows_and_width(&x, &gamma);
    let y = empty_like(&x);
    let (client, kinds, address) = (x.client.clone(), (element(&x), element(&gamma)), address_type(&[&x]));
    let vector = vector_size(&[&x, &gamma, &y]);
    let cube = RowCube::new(&client, width / vector, MOST_UNITS);
    // SAFETY: the loops end at the last row and at the length of gamma, which is that of a row; y has the shape of x.
    unsafe {
        rms_norm_kernel::launch_unchecked(
            &client,
            per_row(rows),
            cube.dim(),
            address,
            vector,
            x.into_buffer_arg(),
            gamma.into_buffer_arg(),
            y.clone().into_buffer_arg(),
            eps,
            offset,
            width as u32,
            rows as u32,
            cube,
            kinds.0,
            kinds.1,
        );
    }
    y
}

/// `(dx, dgamma)`.
pub(crate) fn backward(
    x: CubeTensor,
    gamma: CubeTensor,
    dy: CubeTensor,
    eps: f32,
    offset: f32,
) -> (CubeTensor, CubeTensor) {
    use burn::backend::ops::FloatTensorOps;

    let (width, dtype) = (x.meta.shape()[1], gamma.dtype);
    // as many partial sums as cubes, and four rows at a time on the largest devices
    let cubes = x.meta.shape()[0].min(BACKWARD_CUBES);
    let partial = empty(&x, Shape::new([cubes, width]), DType::F32);
    let dx = launch_backward([x, gamma, dy], cubes, Some(partial.clone()), eps, offset);
    let d_gamma = CubeBackend::float_reshape(CubeBackend::float_sum_dim(partial, 0), Shape::new([width]));
    (dx, CubeBackend::float_cast(d_gamma, dtype.into()))
}

/// dx, for a frozen gamma.
pub(crate) fn input_gradient(x: CubeTensor, gamma: CubeTensor, dy: CubeTensor, eps: f32, offset: f32) -> CubeTensor {
    let rows = x.meta.shape()[0];
    launch_backward([x, gamma, dy], rows, None, eps, offset)
}

/// At most one cube per row.
fn launch_backward(
    tensors: [CubeTensor; 3],
    cubes: usize,
    partial: Option<CubeTensor>,
    eps: f32,
    offset: f32,
) -> CubeTensor {
    let [x, gamma, dy] = tensors.map(dense);
    let (rows, width) = rows_and_width(&x, &gamma);
    assert_shape("dy", &dy, &[rows, width]);
    assert_dtype("dy", &dy, x.dtype);
    let dx = empty_like(&x);
    let (client, kinds) = (x.client.clone(), (element(&x), element(&gamma)));
    let all: Vec<&CubeTensor> = [&x, &gamma, &dy].into_iter().chain(&partial).collect();
    let (vector, address) = (vector_size(&all), address_type(&all));
    let cube = RowCube::new(&client, width / vector, MOST_UNITS);
    // SAFETY: the loops end at the last row and at the length of gamma, which is that of a row; dy and dx have the
    // shape of x, and each cube has a row of its own in the partial sums.
    unsafe {
        rms_norm_backward_kernel::launch_unchecked(
            &client,
            per_row(cubes),
            cube.dim(),
            address,
            vector,
            x.into_buffer_arg(),
            gamma.into_buffer_arg(),
            dy.into_buffer_arg(),
            dx.clone().into_buffer_arg(),
            partial.into_iter().map(CubeTensor::into_buffer_arg).collect(),
            eps,
            offset,
            width as u32,
            rows as u32,
            cube,
            kinds.0,
            kinds.1,
        );
    }
    dx
}
