//! The weight operand of a linear layer, in whatever form it is held.

use burn::tensor::{FloatDType, Tensor};

use crate::Packed;

/// A weight `[d_in, d_out]` as the linear operations take it.
#[allow(clippy::large_enum_variant)] // one per layer
#[derive(Clone, Debug)]
pub enum Weight {
    /// The values themselves; a transposed view costs nothing.
    Dense(Tensor<2>),
    /// Codes, dequantised panel by panel; they get no gradient.
    Packed(Packed),
}

impl Weight {
    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(weight) => weight.dims(),
        }
    }

    /// The values in a float type.
    pub fn dense(&self, dtype: FloatDType) -> Tensor<2> {
        match self {
            Self::Dense(weight) if FloatDType::from(weight.dtype()) == dtype => weight.clone(),
            Self::Dense(weight) => weight.clone().cast(dtype),
            Self::Packed(weight) => weight.dense(dtype),
        }
    }
}

impl From<Tensor<2>> for Weight {
    fn from(weight: Tensor<2>) -> Self {
        Self::Dense(weight)
    }
}

impl From<Packed> for Weight {
    fn from(weight: Packed) -> Self {
        Self::Packed(weight)
    }
}
