//! A thin reading aid for the references: a float primitive of any backend with operators and short method names.
//!
//! Nothing here computes anything itself; every method is one call of Burn's tensor operations.

use std::ops::{Add, Mul, Sub};

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{BoolDType, FloatDType, Shape, Slice};

/// A float tensor primitive with operators.
pub(crate) struct Plain<B: Backend>(pub FloatTensor<B>);

impl<B: Backend> Clone for Plain<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Backend> Add for Plain<B> {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(B::float_add(self.0, other.0))
    }
}

impl<B: Backend> Sub for Plain<B> {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(B::float_sub(self.0, other.0))
    }
}

impl<B: Backend> Mul for Plain<B> {
    type Output = Self;
    fn mul(self, other: Self) -> Self {
        Self(B::float_mul(self.0, other.0))
    }
}

impl<B: Backend> Mul<f32> for Plain<B> {
    type Output = Self;
    fn mul(self, factor: f32) -> Self {
        Self(B::float_mul_scalar(self.0, factor.into()))
    }
}

impl<B: Backend> Add<f32> for Plain<B> {
    type Output = Self;
    fn add(self, term: f32) -> Self {
        Self(B::float_add_scalar(self.0, term.into()))
    }
}

impl<B: Backend> Plain<B> {
    /// The integer tensor as f32 (exact below 2^24).
    pub fn from_int(values: IntTensor<B>) -> Self {
        Self(B::int_into_float(values, FloatDType::F32))
    }
    pub fn dims(&self) -> Vec<usize> {
        self.0.shape().to_vec()
    }
    pub fn dtype(&self) -> FloatDType {
        self.0.dtype().into()
    }
    pub fn cast(self, dtype: FloatDType) -> Self {
        if self.dtype() == dtype { self } else { Self(B::float_cast(self.0, dtype)) }
    }
    pub fn f32(self) -> Self {
        self.cast(FloatDType::F32)
    }
    pub fn matmul(self, other: Self) -> Self {
        Self(B::float_matmul(self.0, other.0))
    }
    /// Swaps the last two axes.
    pub fn t(self) -> Self {
        Self(B::float_transpose(self.0))
    }
    pub fn swap(self, a: usize, b: usize) -> Self {
        Self(B::float_swap_dims(self.0, a, b))
    }
    pub fn reshape(self, dims: &[usize]) -> Self {
        Self(B::float_reshape(self.0, Shape::from(dims.to_vec())))
    }
    pub fn expand(self, dims: &[usize]) -> Self {
        Self(B::float_expand(self.0, Shape::from(dims.to_vec())))
    }
    /// Keeps `range` of the axis `dim`.
    pub fn narrow(self, dim: usize, range: std::ops::Range<usize>) -> Self {
        let dims = self.dims();
        let slices: Vec<Slice> = (0..dims.len())
            .map(|d| if d == dim { Slice::from(range.clone()) } else { Slice::from(0..dims[d]) })
            .collect();
        Self(B::float_slice(self.0, &slices))
    }
    pub fn sum_dim(self, dim: usize) -> Self {
        Self(B::float_sum_dim(self.0, dim))
    }
    pub fn mean_dim(self, dim: usize) -> Self {
        Self(B::float_mean_dim(self.0, dim))
    }
    pub fn max_dim(self, dim: usize) -> Self {
        Self(B::float_max_dim(self.0, dim))
    }
    pub fn exp(self) -> Self {
        Self(B::float_exp(self.0))
    }
    pub fn log(self) -> Self {
        Self(B::float_log(self.0))
    }
    pub fn tanh(self) -> Self {
        Self(B::float_tanh(self.0))
    }
    pub fn erf(self) -> Self {
        Self(B::float_erf(self.0))
    }
    pub fn sqrt(self) -> Self {
        Self(B::float_sqrt(self.0))
    }
    pub fn recip(self) -> Self {
        Self(B::float_recip(self.0))
    }
    pub fn abs(self) -> Self {
        Self(B::float_abs(self.0))
    }
    pub fn clamp(self, min: f32, max: f32) -> Self {
        Self(B::float_clamp(self.0, min.into(), max.into()))
    }
    /// The type of a comparison's result.
    pub fn bools(&self) -> BoolDType {
        burn::backend::get_device_settings::<B>(&self.0.device()).bool_dtype
    }
    /// 1 where the mask is true, 0 elsewhere, in the type of these values.
    pub fn flag(&self, mask: BoolTensor<B>) -> Self {
        Self(B::bool_into_float(mask, self.dtype()))
    }
    /// 1 where it is greater, 0 elsewhere.
    pub fn greater(&self, other: &Self) -> Self {
        self.flag(B::float_greater(self.0.clone(), other.0.clone(), self.bools()))
    }
    /// 1 where both are equal, 0 elsewhere.
    pub fn equal(&self, other: &Self) -> Self {
        self.flag(B::float_equal(self.0.clone(), other.0.clone(), self.bools()))
    }
    /// The values where the flag is 1, 0 elsewhere, whatever is there.
    pub fn only(self, keep: &Self) -> Self {
        let drop = B::float_equal_elem(keep.0.clone(), 0f32.into(), keep.bools());
        Self(B::float_mask_fill(self.0, drop, 0f32.into()))
    }
    /// `0, 1, .. n-1` as f32 on the same device.
    pub fn arange_like(&self, n: usize) -> Self {
        let data = burn::tensor::TensorData::new((0..n).map(|i| i as f32).collect::<Vec<_>>(), [n]);
        Self(B::float_from_data(data, &self.0.device()))
    }
}
