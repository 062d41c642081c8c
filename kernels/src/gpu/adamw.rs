//! One AdamW step on a GPU; equations in `crate::adamw`. Elementwise, in place where the tensors are not shared.
//!
//! Memory bound. The moments are f32, parameter and gradient of any float type of `e` and `g` bytes: `16 + 2 e + g`
//! bytes a value. In f32 28 bytes; 4096 x 14336 on 4.8 TB/s: 1.6 GB, floor 343 us. 13 flops a value do not count. A 16-bit
//! parameter is rounded to nearest. Not measured yet.
//!
//! A LoRA factor of 4096 x 16 has a floor of 0.4 us, a tenth of what a launch takes, and a model of 8B has 448: one launch takes
//! [`MOST`] of them. Each cube belongs to one tensor; it finds out which by comparing its number with where each begins.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::ir::VectorSize;
use cubecl::prelude::*;

use super::launch::{InPlace, address_type, assert_dtype, assert_shape, dense, element, flat_vector_size};
use crate::adamw::{AdamW, Factors};

/// Most tensors of one launch.
const MOST: usize = 16;
/// Buffers of a parameter with its moments and gradient, where nothing can be written in place.
const BUFFERS: usize = 7;

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adamw_kernel<P: Float, G: Float, N: Size>(
    parameters: &Sequence<Box<[Vector<P, N>]>>,
    first: &Sequence<Box<[Vector<f32, N>]>>,
    second: &Sequence<Box<[Vector<f32, N>]>>,
    gradients: &Sequence<Box<[Vector<G, N>]>>,
    factor: &Sequence<Box<[f32]>>,
    parameters_out: &mut Sequence<Box<[Vector<P, N>]>>,
    first_out: &mut Sequence<Box<[Vector<f32, N>]>>,
    second_out: &mut Sequence<Box<[Vector<f32, N>]>>,
    starts: &Sequence<usize>,
    decay: f32,
    step_size: f32,
    root: f32,
    eps: f32,
    clip: f32,
    b1: f32,
    c1: f32,
    b2: f32,
    c2: f32,
    #[define(P)] _parameter_element: ElemType,
    #[define(G)] _gradient_element: ElemType,
) {
    let mut clip = clip;
    #[unroll]
    for one in 0..factor.len() {
        clip *= factor[one][0];
    }
    #[unroll]
    for tensor in 0..parameters.len() {
        if CUBE_POS >= starts[tensor] {
            // beyond the end in the cubes of the tensors that follow
            let i = (CUBE_POS - starts[tensor]) * CUBE_DIM as usize + UNIT_POS as usize;
            if i < parameters[tensor].len() {
                let g = Vector::<f32, N>::cast_from(gradients[tensor][i]) * Vector::new(clip);
                let m = first[tensor][i] * Vector::new(b1) + g * Vector::new(c1);
                let v = second[tensor][i] * Vector::new(b2) + g * g * Vector::new(c2);
                let update = m / (v.sqrt() * Vector::new(root) + Vector::new(eps));
                let p = Vector::<f32, N>::cast_from(parameters[tensor][i]);
                let p = Vector::cast_from(p * Vector::new(decay) - update * Vector::new(step_size));
                parameters_out.index_mut(tensor)[i] = p;
                first_out.index_mut(tensor)[i] = m;
                second_out.index_mut(tensor)[i] = v;
            }
        }
    }
}

/// A parameter, its moments and its gradient, dense.
type Set = [CubeTensor; 4];

fn checked([parameter, first, second, gradient]: Set) -> Set {
    let shape = gradient.meta.shape().to_vec();
    assert_shape("the parameter", &parameter, &shape);
    assert_shape("the first moment", &first, &shape);
    assert_shape("the second moment", &second, &shape);
    assert_dtype("the first moment", &first, DType::F32);
    assert_dtype("the second moment", &second, DType::F32);
    [parameter, first, second, gradient].map(dense)
}

/// What all tensors of a launch have in common.
fn kind(set: &Set) -> (DType, DType, VectorSize) {
    (set[0].dtype, set[3].dtype, flat_vector_size(&set.each_ref()))
}

/// Lists of parameters, first and second moments, gradients; returns the first three.
pub(crate) fn step(
    lists: [Vec<CubeTensor>; 4],
    factor: Option<CubeTensor>,
    rule: AdamW,
) -> (Vec<CubeTensor>, Vec<CubeTensor>, Vec<CubeTensor>) {
    let [parameters, first, second, gradients] = lists.map(Vec::into_iter);
    let sets = parameters.zip(first).zip(second).zip(gradients).map(|(((p, m), v), g)| checked([p, m, v, g]));
    let mut sets: Vec<Set> = sets.collect();
    let factor = factor.map(dense);
    let (mut p_out, mut m_out, mut v_out) = (vec![], vec![], vec![]);
    while let Some(head) = sets.first() {
        let (kind_of_head, bindings) = (kind(head), head[0].client.properties().hardware.max_bindings as usize);
        // one for the numbers, one for the factor
        let most = (bindings.saturating_sub(2) / BUFFERS).clamp(1, MOST);
        let alike = sets.iter().take(most).take_while(|set| kind(set) == kind_of_head).count();
        for [p, m, v] in launch(sets.drain(..alike).collect(), factor.as_ref(), rule) {
            p_out.push(p);
            m_out.push(m);
            v_out.push(v);
        }
    }
    (p_out, m_out, v_out)
}

/// One launch, of sets of one kind.
fn launch(sets: Vec<Set>, factor: Option<&CubeTensor>, rule: AdamW) -> Vec<[CubeTensor; 3]> {
    let (client, width) = (sets[0][0].client.clone(), flat_vector_size(&sets[0].each_ref()));
    let address = sets.iter().map(|set| address_type(&set.each_ref())).max().unwrap_or_default();
    let vectors = |set: &Set| set[0].meta.num_elements() / width;
    let dim = CubeDim::new(&client, sets.iter().map(vectors).sum());
    let units = dim.num_elems() as usize;
    let (mut starts, mut cubes) = (SequenceArg::new(), 0);
    for set in &sets {
        starts.push(cubes);
        cubes += vectors(set).div_ceil(units);
    }
    let count = calculate_cube_count_elemwise(&client, cubes * units, dim);
    let kinds = (element(&sets[0][0]), element(&sets[0][3]));
    let tensors = sets.len();
    // inputs and outputs of parameters, first and second moments
    let mut lists: [(Vec<BufferArg>, Vec<BufferArg>); 3] = Default::default();
    let (mut gradients, mut results) = (vec![], vec![]);
    for (index, [parameter, first, second, gradient]) in sets.into_iter().enumerate() {
        let mut list = 0;
        results.push([parameter, first, second].map(|tensor| {
            let InPlace { input, output, result } = InPlace::new(tensor, list * tensors + index);
            lists[list].0.push(input);
            lists[list].1.push(output);
            list += 1;
            result
        }));
        gradients.push(gradient.into_buffer_arg());
    }
    let [(parameters, parameters_out), (first, first_out), (second, second_out)] = lists;
    let factor = factor.into_iter().map(|factor| factor.clone().into_buffer_arg());
    let Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    // SAFETY: a unit checks that its vector exists in the parameter, and the other tensors of a set have its shape.
    unsafe {
        adamw_kernel::launch_unchecked(
            &client,
            count,
            dim,
            address,
            width,
            parameters.into_iter().collect(),
            first.into_iter().collect(),
            second.into_iter().collect(),
            gradients.into_iter().collect(),
            factor.collect(),
            parameters_out.into_iter().collect(),
            first_out.into_iter().collect(),
            second_out.into_iter().collect(),
            starts,
            decay,
            step_size,
            root,
            eps,
            clip,
            b1,
            c1,
            b2,
            c2,
            kinds.0,
            kinds.1,
        );
    }
    results
}
