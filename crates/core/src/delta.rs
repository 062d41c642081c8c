//! What an adapter does to a projection: one type for all methods.

use burn::module::Module;
use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels::Weight;

use crate::adapters::dora::Dora;
use crate::adapters::hra::Hra;
use crate::adapters::oft::Oft;
use crate::adapters::randlora::RandLora;
use crate::lowrank::{LowRank, cast};

/// The adapter of one projection. Most methods are a [`LowRank`]; the others are in the file of their method.
#[allow(clippy::large_enum_variant)] // one per layer
#[derive(Module, Debug)]
pub enum Delta {
    /// `y = x W + b + s (((D(x) A) M) B) * c`
    LowRank(LowRank),
    /// `y = (x (W + s A B)) * (m / n) + b`
    Dora(Dora),
    /// `y = x (W + s sum_b A_b diag(lambda_b) B_b) + b`, scaled random bases.
    RandLora(RandLora),
    /// `y = x R W + b`, R a product of reflections.
    Hra(Hra),
    /// `y = x R W + b`, R a block-diagonal rotation.
    Oft(Oft),
}

impl Delta {
    /// The adapted `x W + b`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x.
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, training: bool) -> Tensor<2> {
        match self {
            Self::LowRank(delta) => delta.forward(x, weight, bias, training),
            Self::Dora(delta) => delta.forward(x, weight, bias, training),
            Self::RandLora(delta) => delta.forward(x, weight, bias, training),
            Self::Hra(delta) => delta.forward(x, weight, bias, training),
            Self::Oft(delta) => delta.forward(x, weight, bias, training),
        }
    }

    /// The weight that acts as base and adapter together, in f32.
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let weight = cast(weight, FloatDType::F32);
        match self {
            Self::LowRank(delta) => weight + delta.delta(),
            Self::Dora(delta) => delta.merged(weight),
            Self::RandLora(delta) => delta.merged(weight),
            Self::Hra(delta) => delta.merged(weight),
            Self::Oft(delta) => delta.merged(weight),
        }
    }

    /// Probability that an input of the adapter is dropped in training.
    pub fn dropout(&self) -> f64 {
        match self {
            Self::LowRank(delta) => delta.dropout,
            Self::Dora(delta) => delta.lowrank.dropout,
            Self::RandLora(delta) => delta.dropout,
            Self::Hra(_) | Self::Oft(_) => 0.0,
        }
    }

    /// Changes the dropout, where the method has one.
    pub fn set_dropout(&mut self, dropout: f64) {
        match self {
            Self::LowRank(delta) => delta.dropout = dropout,
            Self::Dora(delta) => delta.lowrank.dropout = dropout,
            Self::RandLora(delta) => delta.dropout = dropout,
            Self::Hra(_) | Self::Oft(_) => {}
        }
    }

    /// The same inside the constraint of its method, where it has one: to be taken over after every step.
    #[must_use]
    pub fn constrained(self) -> Self {
        match self {
            Self::Oft(delta) => Self::Oft(delta.constrained()),
            other => other,
        }
    }

    /// The additive form, where the method has one.
    pub fn low_rank(&self) -> Option<&LowRank> {
        match self {
            Self::LowRank(delta) => Some(delta),
            Self::Dora(_) | Self::RandLora(_) | Self::Hra(_) | Self::Oft(_) => None,
        }
    }
}
