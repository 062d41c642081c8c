//! What an adapter can sit on: a linear map or a convolution, for what treats both alike.

use crate::conv::ConvProjection;
use crate::projection::Projection;

/// A layer of a model, as a walk over all of them hands it over.
#[derive(Debug)]
pub enum Layer<'a> {
    /// A linear map.
    Linear(&'a mut Projection),
    /// A convolution.
    Conv(&'a mut ConvProjection),
}

/// The sizes of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// `[d_in, d_out]`.
    Linear([usize; 2]),
    /// `[out, in, kh, kw]`.
    Conv([usize; 4]),
}

impl Layer<'_> {
    /// Its sizes.
    pub fn sizes(&self) -> Sizes {
        match self {
            Self::Linear(projection) => Sizes::Linear(projection.dims()),
            Self::Conv(conv) => Sizes::Conv(conv.weight.dims()),
        }
    }

    /// Makes the adapter part of the weight and drops it.
    pub fn merge(&mut self) {
        match self {
            Self::Linear(projection) => projection.merge(),
            Self::Conv(conv) => conv.merge(),
        }
    }

    /// Changes the dropout of the adapter, where there is one.
    pub fn set_dropout(&mut self, dropout: f64) {
        match self {
            Self::Linear(projection) => projection.delta.iter_mut().for_each(|delta| delta.set_dropout(dropout)),
            Self::Conv(conv) => conv.delta.iter_mut().for_each(|delta| delta.set_dropout(dropout)),
        }
    }
}

impl Sizes {
    /// Input and output width of the matrix that the layer applies: of a convolution, to the values under its kernel.
    pub fn matrix(self) -> [usize; 2] {
        match self {
            Self::Linear(dims) => dims,
            Self::Conv([d_out, d_in, kh, kw]) => [d_in * kh * kw, d_out],
        }
    }

    /// Whether it is a convolution.
    pub fn is_conv(self) -> bool {
        matches!(self, Self::Conv(_))
    }
}
