//! How the weight of a projection is held.

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_kernels::{Packed, Weight};

use crate::lowrank::cast;
use crate::quant::{Quantisation, Rounding};

/// W, `[d_in, d_out]`.
#[allow(clippy::large_enum_variant)] // one per layer
#[derive(Module, Debug)]
pub enum Base {
    /// The values; after loading a view of the `[d_out, d_in]` matrix on disk.
    Dense(Param<Tensor<2>>),
    /// Codes; frozen, or trained by an optimiser that rounds to codes after each step.
    Packed(PackedBase),
}

/// A weight that is held as codes.
#[derive(Module, Debug)]
pub struct PackedBase {
    /// The codes.
    #[module(skip)]
    pub weight: Packed,
    /// How other values would be packed.
    #[module(skip)]
    pub quantisation: Quantisation,
    /// The type that values have where they are no codes any more.
    #[module(skip)]
    pub dtype: FloatDType,
    /// Whether an optimiser changes the values.
    #[module(skip)]
    pub trained: bool,
    /// Receives the gradient on the tape, where the weight is trained: codes are no parameter that could.
    #[module(skip)]
    pub slot: Option<Tensor<2>>,
}

impl PackedBase {
    /// Codes that stay as they are.
    pub fn frozen(weight: Packed, quantisation: Quantisation, dtype: FloatDType) -> Self {
        Self { weight, quantisation, dtype, trained: false, slot: None }
    }

    /// Codes that an optimiser trains, from values in f32 that are rounded to the nearest.
    pub fn trained(values: Tensor<2>, quantisation: Quantisation, dtype: FloatDType) -> Self {
        Self { trained: true, ..Self::frozen(quantisation.pack_tensor(values), quantisation, dtype) }
    }

    /// The same with other values, given in f32 and rounded in this way.
    #[must_use]
    pub fn rounded(&self, values: Tensor<2>, rounding: Rounding) -> Self {
        Self { weight: self.quantisation.pack_rounded(values, rounding), ..self.clone() }
    }
}

impl Base {
    /// Frozen values.
    pub fn dense(weight: Tensor<2>) -> Self {
        Self::Dense(Param::from_tensor(weight).set_require_grad(false))
    }

    /// Whether the values are held with less precision than a float type has.
    pub fn is_quantised(&self) -> bool {
        match self {
            Self::Dense(_) => false,
            Self::Packed(_) => true,
        }
    }

    /// The codes, where they are trained.
    pub fn trained_codes(&self) -> Option<&PackedBase> {
        match self {
            Self::Packed(base) if base.trained => Some(base),
            _ => None,
        }
    }

    /// `[d_in, d_out]`.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(weight) => weight.dims(),
            Self::Packed(base) => base.weight.dims(),
        }
    }

    /// The operand of a linear layer whose input has this type.
    pub fn operand(&self, dtype: FloatDType) -> Weight {
        match self {
            Self::Dense(weight) => Weight::Dense(cast(weight.val(), dtype)),
            Self::Packed(base) => Weight::Packed(base.weight.clone()),
        }
    }

    /// The values in f32.
    pub fn values(&self) -> Tensor<2> {
        self.operand(FloatDType::F32).dense(FloatDType::F32)
    }

    /// The type that merged values are stored in.
    pub fn dtype(&self) -> FloatDType {
        match self {
            Self::Dense(weight) => weight.val().dtype().into(),
            Self::Packed(base) => base.dtype,
        }
    }

    /// The same kind of weight with other values, given in f32 and rounded or quantised once.
    pub fn with_values(&self, values: Tensor<2>) -> Self {
        match self {
            Self::Dense(weight) => {
                let dtype = self.dtype();
                Self::Dense(weight.clone().map(|_| cast(values, dtype)))
            }
            Self::Packed(base) => {
                Self::Packed(PackedBase { weight: base.quantisation.pack_tensor(values), ..base.clone() })
            }
        }
    }

    /// Other values, given in f32 and rounded once to [`Base::dtype`]; what was packed is so no more.
    pub fn with_dense_values(&self, values: Tensor<2>) -> Self {
        match self {
            Self::Dense(_) => self.with_values(values),
            Self::Packed(base) => Self::dense(cast(values, base.dtype)),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> Device {
        match self {
            Self::Dense(weight) => weight.device(),
            Self::Packed(base) => base.weight.device(),
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Dense(weight) => weight.dims().iter().product::<usize>() * weight.val().dtype().size(),
            Self::Packed(base) => base.weight.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Gradients;

    use super::*;
    use crate::linalg::{gaussian, host};
    use crate::{Delta, LowRank, Projection};

    fn packed(weight: &Tensor<2>) -> Base {
        let quantisation = Quantisation::NF4;
        let weight = quantisation.pack_tensor(weight.clone());
        Base::Packed(PackedBase::frozen(weight, quantisation, FloatDType::F32))
    }

    fn error(got: &[f32], want: &[f32]) -> f64 {
        assert_eq!(got.len(), want.len());
        let largest = want.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
        let off = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
        f64::from(off / largest)
    }

    fn tensors(seed: u64) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
        let device = Device::flex();
        let weight = gaussian(seed, "weight", 70, 33, 1.0, &device);
        (weight, gaussian(seed, "down", 70, 4, 1.0, &device), gaussian(seed, "up", 4, 33, 1.0, &device))
    }

    /// Gradients on codes are those on the values that the codes stand for.
    #[test]
    fn adapters_train_alike_on_codes_and_on_their_values() {
        let (weight, down, up) = tensors(1);
        let base = packed(&weight);
        let dense = Base::dense(base.values());
        let gradients = |base: Base| -> Vec<Vec<f32>> {
            let mut projection = Projection::on(base, None);
            projection.attach(Delta::LowRank(LowRank::new(down.clone(), up.clone(), 0.5, 0.0)));
            let lifted = projection.train();
            let x = Tensor::<2>::from_inner(gaussian(2, "x", 9, 70, 1.0, &Device::flex())).require_grad();
            let y = lifted.forward(x.clone(), true);
            let mut gradients: Gradients = (y.clone() * y.clone()).sum().backward();
            let Some(Delta::LowRank(delta)) = &lifted.delta else { unreachable!("attached above") };
            let of = |tensor: Tensor<2>, gradients: &mut Gradients| host(tensor.grad_remove(gradients).unwrap());
            let (down, up) = (delta.down.val(), delta.up.val());
            vec![host(y.inner()), of(x, &mut gradients), of(down, &mut gradients), of(up, &mut gradients)]
        };
        for (got, want) in gradients(base).iter().zip(&gradients(dense)) {
            assert!(error(got, want) < 2e-6, "{}", error(got, want));
        }
    }

    #[test]
    fn merging_ends_in_a_dense_weight_of_the_type_of_the_run() {
        let (weight, down, up) = tensors(3);
        let Base::Packed(base) = packed(&weight) else { unreachable!("packed above") };
        let base = Base::Packed(PackedBase { dtype: FloatDType::BF16, ..base });
        let values = base.values();
        let mut projection = Projection::on(base, None);
        projection.attach(Delta::LowRank(LowRank::new(down.clone(), up.clone(), 0.5, 0.0)));
        projection.merge();
        assert!(matches!(projection.weight, Base::Dense(_)));
        assert_eq!(projection.weight.dtype(), FloatDType::BF16);
        let want = values + down.matmul(up) * 0.5;
        assert!(error(&host(projection.weight.values()), &host(want)) < 0.004);
    }

    #[test]
    fn other_values_are_quantised_again() {
        let (weight, ..) = tensors(4);
        let base = packed(&weight);
        let again = base.with_values(base.values());
        assert!(matches!(again, Base::Packed(_)));
        assert!(error(&host(again.values()), &host(base.values())) < 0.02); // the scales are codes themselves
        assert_eq!((again.dims(), again.bytes()), (base.dims(), base.bytes()));
        assert!(base.bytes() < 33 * 70 + 64, "{}", base.bytes());
    }
}
