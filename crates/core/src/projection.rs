//! Every linear map of a model: a base weight, perhaps a bias, perhaps an adapter.
//!
//! | part | choices |
//! | --- | --- |
//! | base | [`Base`]: dense (f32, bf16 or f16), or packed codes (frozen, or trained by an optimiser that rounds) |
//! | delta | none, or [`Delta`] |
//! | gradient | none (frozen), full `dW`, projected `P^T dW Q`, or the factors of `dW` ([`Gradient`]) |
//!
//! Models never name a method: they call [`Projection::forward`].

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Gradients, Tensor};
use lowrank_kernels::{self as kernels, Weight};

use crate::base::{Base, PackedBase};
use crate::delta::Delta;
use crate::directions::Directions;
use crate::lowrank::cast;

/// What the backward pass makes of the gradient of a trained W. Low-rank optimisers say before each step what they want.
#[allow(clippy::large_enum_variant)] // one per layer, moved once a step
#[derive(Clone, Debug, Default)]
pub enum Gradient {
    /// `dW = x^T dy`, `[d_in, d_out]`.
    #[default]
    Full,
    /// `left^T dW right`, formed without `dW`; it arrives as the gradient of W, or of its placeholder where W is codes.
    Projected {
        /// P, `[d_in, r]`.
        left: Option<Directions>,
        /// Q, `[d_out, r]`.
        right: Option<Directions>,
        /// B, `[r, d_out]`, and c: the layer acts as `c W + P B`, an update that is not yet in W.
        pending: Option<(Tensor<2>, f32)>,
    },
    /// x and dy themselves, as the gradients of two placeholders.
    Factors {
        /// The layer acts as `keep W + down up`, an update that is not yet in W.
        offset: Option<kernels::Offset>,
        /// Made by [`Projection::lift_slots`].
        slots: Option<Slots>,
    },
}

impl Gradient {
    /// Both factors, of a layer that acts by its weight alone.
    pub fn factors() -> Self {
        Self::Factors { offset: None, slots: None }
    }
}

/// Placeholders on the tape that receive x and dy.
#[derive(Clone, Debug)]
pub struct Slots {
    /// Receives x, `[t, d_in]`.
    pub x: Tensor<2>,
    /// Receives dy, `[t, d_out]`.
    pub dy: Tensor<2>,
}

/// `y = x W + b + delta(x)`.
#[derive(Module, Debug)]
pub struct Projection {
    /// W, `[d_in, d_out]`.
    pub weight: Base,
    /// b, `[d_out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What an adapter does.
    pub delta: Option<Delta>,
    /// What a trained W receives in the backward pass.
    #[module(skip)]
    pub gradient: Gradient,
}

impl Projection {
    /// A frozen projection from `W [d_in, d_out]` and `b [d_out]`.
    pub fn frozen(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        Self::on(Base::dense(weight), bias)
    }

    /// A frozen projection on a weight that is held in some form.
    pub fn on(weight: Base, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight,
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            delta: None,
            gradient: Gradient::Full,
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
        let weight = self.weight.operand(dtype);
        let bias = self.bias.as_ref().map(|bias| cast(bias.val(), dtype));
        if let Some(delta) = &self.delta {
            return delta.forward(x, weight, bias, training);
        }
        match &self.gradient {
            Gradient::Full if matches!(weight, Weight::Packed(_)) && self.is_collecting() => {
                self.projected(x, weight, bias, [None, None], None)
            }
            // Bases are of no use then, and those that are held as codes are left alone.
            Gradient::Projected { pending: None, .. } if !self.is_collecting() => kernels::linear(x, weight, bias),
            Gradient::Full => kernels::linear(x, weight, bias),
            Gradient::Projected { left, right, pending } => {
                let bases = [left, right].map(|basis| basis.as_ref().map(|basis| basis.values(dtype)));
                let pending = pending.clone().map(|(up, keep)| (cast(up, dtype), keep));
                self.projected(x, weight, bias, bases, pending)
            }
            Gradient::Factors { offset, slots } => {
                let offset = offset.clone().map(|offset| kernels::Offset {
                    down: cast(offset.down, dtype),
                    up: cast(offset.up, dtype),
                    keep: offset.keep,
                });
                match (slots, offset) {
                    (Some(slots), offset) => {
                        kernels::factored_linear(x, weight, bias, offset, slots.x.clone(), slots.dy.clone())
                    }
                    (None, None) => kernels::linear(x, weight, bias),
                    (None, Some(kernels::Offset { down, up, keep })) => {
                        self.projected(x, weight, bias, [Some(down), None], Some((up, keep)))
                    }
                }
            }
        }
    }

    /// Whether W is on the tape, itself or by its placeholder.
    fn is_collecting(&self) -> bool {
        match &self.weight {
            Base::Dense(weight) => weight.val().is_require_grad(),
            Base::Packed(base) => base.slot.is_some(),
        }
    }

    fn projected(
        &self,
        x: Tensor<2>,
        weight: Weight,
        bias: Option<Tensor<1>>,
        [left, right]: [Option<Tensor<2>>; 2],
        pending: Option<(Tensor<2>, f32)>,
    ) -> Tensor<2> {
        match (weight, &self.weight) {
            (Weight::Packed(weight), Base::Packed(PackedBase { slot: Some(slot), .. })) => {
                kernels::packed_projected_linear(x, weight, bias, left, right, pending, slot.clone())
            }
            (Weight::Packed(weight), _) => {
                let nowhere = Tensor::zeros([1, 1], &x.device());
                kernels::packed_projected_linear(x, weight, bias, left, right, pending, nowhere)
            }
            (Weight::Dense(weight), _) => kernels::projected_linear(x, weight, bias, left, right, pending),
        }
    }

    /// Makes the placeholders of [`Gradient::Factors`], or that of trained codes, on a projection that was lifted onto the tape.
    pub fn lift_slots(&mut self) {
        let device = self.device().inner();
        let slot = || Tensor::from_inner(Tensor::<2>::zeros([1, 1], &device)).require_grad();
        match (&mut self.gradient, &mut self.weight) {
            (Gradient::Factors { slots, .. }, _) => *slots = Some(Slots { x: slot(), dy: slot() }),
            (_, Base::Packed(base)) if base.trained => base.slot = Some(slot()),
            _ => {}
        }
    }

    /// The gradient of trained codes after the backward pass, in f32: whole, or projected where that was asked for.
    pub fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<2>> {
        let slot = self.weight.trained_codes()?.slot.as_ref()?;
        Some(cast(slot.grad_remove(gradients)?, FloatDType::F32))
    }

    /// x and dy after the backward pass, in f32, where the projection hands over factors.
    pub fn take_factors(&self, gradients: &mut Gradients) -> Option<(Tensor<2>, Tensor<2>)> {
        let Gradient::Factors { slots: Some(slots), .. } = &self.gradient else { return None };
        let [x, dy] = [&slots.x, &slots.dy].map(|slot| slot.grad_remove(gradients));
        Some((cast(x?, FloatDType::F32), cast(dy?, FloatDType::F32)))
    }

    /// The device of the parameters.
    pub fn device(&self) -> burn::tensor::Device {
        self.weight.device()
    }

    /// Probability that an input of the adapter is dropped in training.
    pub fn dropout(&self) -> f64 {
        self.delta.as_ref().map_or(0.0, Delta::dropout)
    }

    /// Puts an adapter on the layer. One that starts from a part of the weight takes this part out of it: the base becomes
    /// `W - s A_0 B_0`, in f32 and rounded once.
    pub fn attach(&mut self, delta: Delta) {
        let full = self.weight.values();
        self.attach_over(delta, full);
    }

    /// The same with W at full precision, `[d_in, d_out]`, where the base holds it quantised.
    pub fn attach_over(&mut self, delta: Delta, full: Tensor<2>) {
        if let Some(lowrank) = delta.low_rank()
            && let Some(start) = &lowrank.start
        {
            let taken = start.down.val().matmul(start.up.val()) * lowrank.scale;
            self.weight = self.weight.with_values(full - taken);
        }
        self.delta = Some(delta);
    }

    /// Makes the adapter part of the weight and drops it. The sum is taken in f32 and rounded once to the weight's type; a packed
    /// weight becomes a dense one.
    pub fn merge(&mut self) {
        if let Some(delta) = self.delta.take() {
            self.weight = self.weight.with_dense_values(delta.merged(self.weight.values()));
        }
    }
}
