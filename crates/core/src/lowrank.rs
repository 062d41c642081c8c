//! The additive low-rank layer that most adapters share: `delta(x) = s (((D(x) A) M) B) * c`.
//!
//! Methods differ only in which factors exist, how they start and which of them are trained. The core M and the output scale c
//! are folded into the output factor (`M B diag(c)`, `2 r^2 d_out` flops), so one kernel serves every method, no dense delta is
//! ever built, and nothing of the size of x is saved unless A is trained.

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use lowrank_kernels as kernels;

/// A low-rank delta beside a base weight.
#[derive(Module, Debug)]
pub struct LowRank {
    /// A, `[d_in, r]`.
    pub down: Param<Tensor<2>>,
    /// M: dense `[r, r]`, or `[1, r]` for a diagonal; absent for the identity.
    pub core: Option<Param<Tensor<2>>>,
    /// B, `[r, d_out]`.
    pub up: Param<Tensor<2>>,
    /// c, `[1, d_out]`; absent for ones.
    pub out_scale: Option<Param<Tensor<2>>>,
    /// s.
    #[module(skip)]
    pub scale: f32,
    /// Probability that an input of the delta is dropped in training.
    #[module(skip)]
    pub dropout: f64,
}

impl LowRank {
    /// A delta with identity core and trained factors, as LoRA has.
    pub fn new(down: Tensor<2>, up: Tensor<2>, scale: f32, dropout: f64) -> Self {
        Self { down: Param::from_tensor(down), core: None, up: Param::from_tensor(up), out_scale: None, scale, dropout }
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.down.dims()[1]
    }

    /// `M B diag(c)`, `[r, d_out]`.
    fn folded_up(&self) -> Tensor<2> {
        let mut up = self.up.val();
        if let Some(core) = &self.core {
            let core = core.val();
            up = if core.dims()[0] == 1 { core.transpose() * up } else { core.matmul(up) };
        }
        match &self.out_scale {
            Some(scale) => up * scale.val(),
            None => up,
        }
    }

    /// `x W + b + delta(x)`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x. Dropout is drawn from the
    /// device's generator when `training` is set: seed it before, to repeat a forward pass.
    pub fn forward(&self, x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>, training: bool) -> Tensor<2> {
        let dtype = x.dtype().into();
        let mask = (training && self.dropout > 0.0).then(|| dropout_mask(x.dims(), self.dropout, dtype, &x.device()));
        let down = cast(self.down.val(), dtype);
        let up = cast(self.folded_up(), dtype);
        kernels::lowrank_linear(x, weight, bias, mask, down, up, self.scale)
    }

    /// The dense delta `s A M B diag(c)`, `[d_in, d_out]` in f32: for merging, never in a training step.
    pub fn delta(&self) -> Tensor<2> {
        let down = cast(self.down.val(), FloatDType::F32);
        down.matmul(cast(self.folded_up(), FloatDType::F32)) * self.scale
    }
}

/// Inverted dropout multipliers: 0 with probability `p`, else `1 / (1 - p)`.
pub fn dropout_mask(dims: [usize; 2], p: f64, dtype: FloatDType, device: &Device) -> Tensor<2> {
    let device = device.clone().inner();
    if p >= 1.0 {
        return Tensor::<2>::zeros(dims, &device).cast(dtype);
    }
    (Tensor::<2>::random(dims, Distribution::Bernoulli(1.0 - p), &device) * (1.0 / (1.0 - p))).cast(dtype)
}

/// The tensor in another float type, itself where it has it already.
pub fn cast<const D: usize>(tensor: Tensor<D>, dtype: FloatDType) -> Tensor<D> {
    if FloatDType::from(tensor.dtype()) == dtype { tensor } else { tensor.cast(dtype) }
}
