//! The directions that a gradient is projected onto, as they are held between steps.

use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels::Packed;

use crate::lowrank::cast;

/// Columns `[rows, k]`: those of a basis, then perhaps others.
#[allow(clippy::large_enum_variant)] // two per layer
#[derive(Clone, Debug)]
pub enum Directions {
    /// The values.
    Dense(Tensor<2>),
    /// A basis that is held as codes, and the other columns. Its values exist while a product needs them.
    Packed {
        /// `[rows, r]`.
        basis: Packed,
        /// `[rows, k - r]`, in f32.
        others: Option<Tensor<2>>,
    },
}

impl From<Tensor<2>> for Directions {
    fn from(columns: Tensor<2>) -> Self {
        Self::Dense(columns)
    }
}

impl Directions {
    /// `[rows, k]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(columns) => columns.dims(),
            Self::Packed { basis, others } => {
                let [rows, rank] = basis.dims();
                [rows, rank + others.as_ref().map_or(0, |others| others.dims()[1])]
            }
        }
    }

    /// All columns.
    pub fn values(&self, dtype: FloatDType) -> Tensor<2> {
        match self {
            Self::Dense(columns) => cast(columns.clone(), dtype),
            Self::Packed { basis, others: None } => basis.dense(dtype),
            Self::Packed { basis, others: Some(others) } => {
                Tensor::cat(vec![basis.dense(dtype), cast(others.clone(), dtype)], 1)
            }
        }
    }

    /// The first `rank` columns, those of the basis, in f32.
    pub fn basis(&self, rank: usize) -> Tensor<2> {
        match self {
            Self::Dense(columns) => cast(columns.clone().slice([0..columns.dims()[0], 0..rank]), FloatDType::F32),
            Self::Packed { basis, .. } => basis.dense(FloatDType::F32),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let size = |columns: &Tensor<2>| columns.shape().num_elements() * columns.dtype().size();
        match self {
            Self::Dense(columns) => size(columns),
            Self::Packed { basis, others } => basis.bytes() + others.as_ref().map_or(0, size),
        }
    }
}
