//! Every linear map of a model: a base weight, perhaps a bias, perhaps a low-rank delta.
//!
//! | part | choices today |
//! | --- | --- |
//! | base | dense, f32, bf16 or f16 |
//! | delta | none, or [`LowRank`] |
//! | gradient | none (frozen), full `dW` (trained) |
//!
//! Models never name a method: they call [`Projection::forward`].

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels as kernels;

use crate::lowrank::{LowRank, cast};

/// `y = x W + b + delta(x)`.
#[derive(Module, Debug)]
pub struct Projection {
    /// W, `[d_in, d_out]`; after loading a view of the `[d_out, d_in]` matrix on disk.
    pub weight: Param<Tensor<2>>,
    /// b, `[d_out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What an adapter adds.
    pub delta: Option<LowRank>,
}

impl Projection {
    /// A frozen projection from `W [d_in, d_out]` and `b [d_out]`.
    pub fn frozen(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            delta: None,
        }
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }

    /// Applies the projection to `x [t, d_in]`; the result `[t, d_out]` has the type of x.
    ///
    /// # Panics
    /// As Burn does, where the width of x is not `d_in`.
    pub fn forward(&self, x: Tensor<2>, training: bool) -> Tensor<2> {
        let dtype: FloatDType = x.dtype().into();
        let weight = cast(self.weight.val(), dtype);
        let bias = self.bias.as_ref().map(|bias| cast(bias.val(), dtype));
        match &self.delta {
            None => kernels::linear(x, weight, bias),
            Some(delta) => delta.forward(x, weight, bias, training),
        }
    }

    /// Adds the delta to the weight and drops it. The sum is taken in f32 and rounded once to the weight's type.
    pub fn merge(&mut self) {
        let Some(delta) = self.delta.take() else { return };
        let weight = self.weight.clone();
        self.weight = weight.map(|weight| {
            let dtype = weight.dtype().into();
            cast(cast(weight, FloatDType::F32) + delta.delta(), dtype)
        });
    }
}
