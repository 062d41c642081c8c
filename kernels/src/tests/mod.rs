//! Every operation on the CPU against its reference in plain tensor operations, and every hand-written backward against
//! automatic differentiation of the reference.
//!
//! An error is the largest difference divided by the largest magnitude of the expected tensor, or by 1, the magnitude of the
//! inputs, where that is larger (a gradient may vanish as a difference of larger terms).

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod adam8;
mod adamw;
mod attention;
mod block_rotation;
mod column_scale;
mod cross_entropy;
mod directed_linear;
mod gated;
mod gemm;
mod groups;
mod linear;
mod lowrank_linear;
mod packed;
mod precision;
mod projected_linear;
mod reduce;
mod rms_norm;
mod rotary;
mod route;
mod scaled_basis;
mod stochastic_round;
mod threads;
mod top_columns;

use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, AutodiffBackend, Flex, TensorMetadata};
use burn::tensor::{Bytes, DType, FloatDType, Shape};
use burn_flex::{FlexTensor, Layout};

/// The CPU with a tape.
pub(crate) type Tape = Autodiff<Flex>;

/// Bound in f32: 3.5 times the worst error of all cases, 5.6e-7 (`SHOW_ERRORS=1 cargo test -- --nocapture` prints each).
pub(crate) const F32: f64 = 2e-6;

/// Normally distributed numbers from a seed (xorshift and the Box-Muller transform).
pub(crate) struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }
    pub fn uniform(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }
    pub fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
    /// A contiguous tensor.
    pub fn tensor(&mut self, dims: &[usize]) -> FlexTensor {
        self.view(dims, View::Packed)
    }
    /// A tensor in the given memory layout.
    pub fn view(&mut self, dims: &[usize], view: View) -> FlexTensor {
        let values = self.values(dims.iter().product());
        place(&values, dims, view)
    }
}

/// Memory layouts of a tensor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum View {
    /// Row-major.
    Packed,
    /// Two axes are stored the other way round (the last two of a matrix, tokens and heads of four axes).
    Swapped,
    /// A window of a larger tensor, whose other values are NaN: reading outside the view shows.
    Window,
}

pub(crate) const VIEWS: [View; 3] = [View::Packed, View::Swapped, View::Window];

/// A tensor with the given values in the given memory layout.
pub(crate) fn place(values: &[f32], dims: &[usize], view: View) -> FlexTensor {
    let mut stored = dims.to_vec();
    let swapped = (dims.len().saturating_sub(2).min(1), dims.len().saturating_sub(2).min(1) + 1);
    if view == View::Swapped && dims.len() > 1 {
        stored.swap(swapped.0, swapped.1);
    }
    if view == View::Window {
        stored.iter_mut().for_each(|size| *size += 2);
    }
    let mut strides = vec![1isize; dims.len()];
    for axis in (0..dims.len().saturating_sub(1)).rev() {
        strides[axis] = strides[axis + 1] * stored[axis + 1] as isize;
    }
    let offset = if view == View::Window { strides.iter().sum::<isize>() as usize } else { 0 };
    if view == View::Swapped && dims.len() > 1 {
        strides.swap(swapped.0, swapped.1);
    }
    let mut buffer = vec![f32::NAN; stored.iter().product()];
    for (i, &value) in values.iter().enumerate() {
        let (mut rest, mut at) = (i, offset as isize);
        for axis in (0..dims.len()).rev() {
            at += (rest % dims[axis]) as isize * strides[axis];
            rest /= dims[axis];
        }
        buffer[at as usize] = value;
    }
    FlexTensor::new(Bytes::from_elems(buffer), Layout::new(Shape::from(dims.to_vec()), strides, offset), DType::F32)
}

/// A contiguous integer tensor.
pub(crate) fn integers(values: &[i32], dims: &[usize]) -> FlexTensor {
    FlexTensor::new(Bytes::from_elems(values.to_vec()), Layout::contiguous(Shape::from(dims.to_vec())), DType::I32)
}

/// The values in row-major order, widened to f32.
pub(crate) fn values_of(tensor: &FlexTensor) -> Vec<f32> {
    crate::cpu::values(&crate::cpu::dense(tensor.clone())).to_vec()
}

/// The tensor rounded to another float type.
pub(crate) fn cast(tensor: &FlexTensor, dtype: DType) -> FlexTensor {
    Flex::float_cast(tensor.clone(), FloatDType::from(dtype))
}

/// Largest difference over the largest magnitude expected (at least 1); infinite where shapes differ or a value is not finite.
pub(crate) fn error(got: &FlexTensor, want: &FlexTensor) -> f64 {
    if got.shape() != want.shape() {
        return f64::INFINITY;
    }
    let (got, want) = (values_of(got), values_of(want));
    let largest = want.iter().fold(1.0f64, |max, &w| max.max(f64::from(w).abs()));
    let mut worst = 0.0f64;
    for (&g, &w) in got.iter().zip(&want) {
        let difference = (f64::from(g) - f64::from(w)).abs();
        worst = if difference.is_finite() { worst.max(difference) } else { f64::INFINITY };
    }
    worst / largest
}

#[track_caller]
pub(crate) fn assert_close(what: &str, got: &FlexTensor, want: &FlexTensor, tolerance: f64) {
    let error = error(got, want);
    if std::env::var_os("SHOW_ERRORS").is_some() {
        eprintln!("{error:9.2e}  {what}");
    }
    assert_eq!(got.dtype(), want.dtype(), "{what}: element type");
    assert!(error <= tolerance, "{what}: error {error:.2e}, allowed {tolerance:.2e}, shape {:?}", want.shape());
}

/// Result of an operation on the tape, and one gradient per input (`None` where it got none), for `sum(out * dy)`.
pub(crate) fn differentiate(
    inputs: &[FlexTensor],
    tracked: &[bool],
    dy: &FlexTensor,
    operation: impl Fn(&[FloatTensor<Tape>]) -> FloatTensor<Tape>,
) -> (FlexTensor, Vec<Option<FlexTensor>>) {
    let leaves = leaves(inputs, tracked);
    let out = operation(&leaves);
    let result = Tape::inner(out.clone());
    let loss = Tape::float_sum(Tape::float_mul(out, Tape::from_inner(dy.clone())));
    let grads = Tape::backward(loss);
    (result, leaves.iter().map(|leaf| Tape::grad(leaf, &grads)).collect())
}

/// Leaves of the tape: those marked are trained.
pub(crate) fn leaves(inputs: &[FlexTensor], tracked: &[bool]) -> Vec<FloatTensor<Tape>> {
    let leaf = |(input, &tracked): (&FlexTensor, &bool)| {
        let leaf = Tape::from_inner(input.clone());
        if tracked { leaf.require_grad() } else { leaf }
    };
    inputs.iter().zip(tracked).map(leaf).collect()
}

/// An operation against its reference: result and every gradient, with all inputs trained.
#[track_caller]
pub(crate) fn assert_same_gradients(
    what: &str,
    inputs: &[FlexTensor],
    dy: &FlexTensor,
    tolerance: f64,
    operation: impl Fn(&[FloatTensor<Tape>]) -> FloatTensor<Tape>,
    reference: impl Fn(&[FloatTensor<Tape>]) -> FloatTensor<Tape>,
) {
    let all = vec![true; inputs.len()];
    let (got, got_grads) = differentiate(inputs, &all, dy, operation);
    let (want, want_grads) = differentiate(inputs, &all, dy, reference);
    assert_close(&format!("{what}: result"), &got, &want, tolerance);
    for (i, (got, want)) in got_grads.iter().zip(&want_grads).enumerate() {
        let (got, want) = (got.as_ref().expect("a gradient"), want.as_ref().expect("a gradient of the reference"));
        assert_close(&format!("{what}: gradient of input {i}"), got, want, tolerance);
    }
}

/// How many owners the memory of a tensor has besides `tensor` itself.
pub(crate) fn other_owners(tensor: &FlexTensor) -> usize {
    std::sync::Arc::strong_count(&tensor.data_arc()) - 2 // `tensor` and the handle that counts
}
