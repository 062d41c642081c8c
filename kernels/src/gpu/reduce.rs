//! Sums, of squares or of values, on a GPU: partial sums by a fixed number of cubes, then one cube adds those. No atomics: the order of a sum
//! depends on the sizes of the tensors alone, so that a resumed run repeats it to the bit.
//!
//! Memory bound: `e` bytes a value are read. A bf16 gradient of 4096 x 14336 on 4.8 TB/s: 117 MB, floor 24 us; `2 t d`
//! = 0.1 GFLOP do not count. Large tensors need two launches each; of small ones, the factors of LoRA above all, one launch takes
//! [`MOST`], a cube each. Not measured yet.

use burn::tensor::{DType, Shape};
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{Fold, RowCube, address_type, cube_fold, dense, element, empty, flat_vector_size, sum_of};

/// Cubes of the first launch: four for each multiprocessor of the largest devices.
const CUBES: usize = 512;
/// Vectors that one cube alone adds in about the time of a second launch.
const ALONE: usize = 1 << 14;
/// Most tensors of one launch.
const MOST: usize = 32;

/// As many cubes for each tensor as there are sums of it; those of all tensors stand one after another from `first` on.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn sum_kernel<F: Float, N: Size>(
    tensors: &Sequence<Box<[Vector<F, N>]>>,
    sums: &mut [f32],
    first: usize,
    cubes: usize,
    #[comptime] square: bool,
    #[comptime] cube: RowCube,
    #[define(F)] _element: ElemType,
) {
    let mut shared = Shared::<[f32]>::new_slice(comptime!(cube.units as usize));
    let mut sum = Vector::<f32, N>::new(0.0);
    let (mine, share) = (CUBE_POS / cubes, CUBE_POS % cubes);
    #[unroll]
    for tensor in 0..tensors.len() {
        if mine == comptime!(tensor) {
            let mut i = share * CUBE_DIM as usize + UNIT_POS as usize;
            while i < tensors[tensor].len() {
                let x = Vector::<f32, N>::cast_from(tensors[tensor][i]);
                if comptime!(square) {
                    sum += x * x;
                } else {
                    sum += x;
                }
                i += cubes * CUBE_DIM as usize;
            }
        }
    }
    let sum = cube_fold(sum_of::<N>(sum), &mut shared, cube, Fold::Sum);
    if UNIT_POS == 0 {
        sums[first + CUBE_POS] = sum;
    }
}

/// Writes so many sums of each tensor (all of one kind) from `first` on.
fn launch(tensors: Vec<CubeTensor>, into: &CubeTensor, first: usize, cubes: usize, square: bool) {
    let (head, all) = (&tensors[0], tensors.iter().collect::<Vec<_>>());
    let (client, width, kind, address) =
        (head.client.clone(), flat_vector_size(&all), element(head), address_type(&all));
    let longest = tensors.iter().map(|x| x.meta.num_elements()).max().unwrap_or_default();
    let cube = RowCube::new(&client, longest / width / cubes, 256);
    let count = CubeCount::Static((tensors.len() * cubes) as u32, 1, 1);
    // SAFETY: units read below the length of their tensor, and there is a sum for each cube.
    unsafe {
        sum_kernel::launch_unchecked(
            &client,
            count,
            cube.dim(),
            address,
            width,
            tensors.into_iter().map(CubeTensor::into_buffer_arg).collect(),
            into.clone().into_buffer_arg(),
            first,
            cubes,
            square,
            cube,
            kind,
        );
    }
}

/// One number for each tensor: the sum of its values or of their squares.
pub(crate) fn sums(tensors: Vec<CubeTensor>, squared: bool) -> CubeTensor {
    let mut tensors: Vec<CubeTensor> = tensors.into_iter().map(dense).collect();
    let (client, total) = (tensors[0].client.clone(), tensors.len());
    let sums = empty(&tensors[0], Shape::new([total]), DType::F32);
    // one binding for the numbers, one for the sums
    let most = (client.properties().hardware.max_bindings as usize).saturating_sub(2).clamp(1, MOST);
    let kind = |x: &CubeTensor| (x.dtype, flat_vector_size(&[x]));
    let is_small = |x: &CubeTensor| x.meta.num_elements() / flat_vector_size(&[x]) <= ALONE;
    while let Some(head) = tensors.first() {
        let first = total - tensors.len();
        if is_small(head) {
            let of_head = kind(head);
            let alike = tensors.iter().take(most).take_while(|x| is_small(x) && kind(x) == of_head).count();
            launch(tensors.drain(..alike).collect(), &sums, first, 1, squared);
        } else {
            let parts = empty(head, Shape::new([CUBES]), DType::F32);
            launch(tensors.drain(..1).collect(), &parts, 0, CUBES, squared);
            launch(vec![parts], &sums, first, 1, false);
        }
    }
    sums
}
