//! One AdamW step on a GPU; equations in `crate::adamw`. Elementwise, in place where the tensors are not shared.
//!
//! Memory bound. The moments are f32, parameter and gradient of any float type of `e` and `g` bytes: `16 + 2 e + g`
//! bytes a value. In f32 28 bytes; 4096 x 14336 on 4.8 TB/s: 1.6 GB, floor 343 us; a LoRA factor of 4096 x 16: floor
//! 0.4 us, so that its launch decides. 13 flops a value do not count. A 16-bit parameter is rounded to nearest. Not
//! measured yet.

use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::launch::{InPlace, address_type, assert_dtype, dense, element, flat_vector_size, per_item};
use crate::adamw::{AdamW, Factors};

#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn adamw_kernel<P: Float, G: Float, N: Size>(
    parameter: &[Vector<P, N>],
    first: &[Vector<f32, N>],
    second: &[Vector<f32, N>],
    gradient: &[Vector<G, N>],
    parameter_out: &mut [Vector<P, N>],
    first_out: &mut [Vector<f32, N>],
    second_out: &mut [Vector<f32, N>],
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
    let i = ABSOLUTE_POS;
    if i < parameter.len() {
        let g = Vector::<f32, N>::cast_from(gradient[i]) * Vector::new(clip);
        let m = first[i] * Vector::new(b1) + g * Vector::new(c1);
        let v = second[i] * Vector::new(b2) + g * g * Vector::new(c2);
        let update = m / (v.sqrt() * Vector::new(root) + Vector::new(eps));
        let p = Vector::<f32, N>::cast_from(parameter[i]);
        parameter_out[i] = Vector::cast_from(p * Vector::new(decay) - update * Vector::new(step_size));
        first_out[i] = m;
        second_out[i] = v;
    }
}

pub(crate) fn step(
    parameter: CubeTensor,
    first: CubeTensor,
    second: CubeTensor,
    gradient: CubeTensor,
    rule: AdamW,
) -> (CubeTensor, CubeTensor, CubeTensor) {
    let (parameter, first, second, gradient) = (dense(parameter), dense(first), dense(second), dense(gradient));
    for (what, tensor) in [("the parameter", &parameter), ("the first moment", &first), ("the second moment", &second)]
    {
        assert_eq!(tensor.meta.shape(), gradient.meta.shape(), "shape of {what} and of its gradient");
    }
    assert_dtype("the first moment", &first, DType::F32);
    assert_dtype("the second moment", &second, DType::F32);
    let all = [&parameter, &first, &second, &gradient];
    let (client, width, address) = (parameter.client.clone(), flat_vector_size(&all), address_type(&all));
    let (count, dim) = per_item(&client, parameter.meta.num_elements() / width);
    let kinds = (element(&parameter), element(&gradient));
    let Factors { decay, step_size, root, eps, clip, kept: [b1, b2], added: [c1, c2] } = rule.factors();
    let [parameter, first, second] =
        [(parameter, 0), (first, 1), (second, 2)].map(|(tensor, position)| InPlace::new(tensor, position));
    // SAFETY: a unit checks that its vector exists in the parameter, and the other tensors have its shape.
    unsafe {
        adamw_kernel::launch_unchecked(
            &client,
            count,
            dim,
            address,
            width,
            parameter.input,
            first.input,
            second.input,
            gradient.into_buffer_arg(),
            parameter.output,
            first.output,
            second.output,
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
    (parameter.result, first.result, second.result)
}
