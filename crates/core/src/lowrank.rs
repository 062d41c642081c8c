//! The additive low-rank layer that most adapters share: `delta(x) = s (((D(x) A) M) B) * c`.
//!
//! Methods differ only in which factors exist, how they start and which of them are trained. The core M and the output scale c
//! are folded into the output factor (`M B diag(c)`, `2 r^2 d_out` flops), so one kernel serves every method, no dense delta is
//! ever built, and nothing of the size of x is saved unless A is trained.

use burn::module::{Module, Param};
use burn::tensor::{Device, Distribution, FloatDType, Tensor};
use lowrank_kernels::{self as kernels, Weight};

/// A low-rank delta beside a base weight.
#[derive(Module, Debug)]
pub struct LowRank {
    /// A, `[d_in, r]`.
    pub down: Param<Tensor<2>>,
    /// M: dense `[r_in, r_out]`, or `[1, r]` for a diagonal; absent for the identity.
    pub core: Option<Param<Tensor<2>>>,
    /// M_0, frozen: what acts is `M - M_0`.
    pub core_start: Option<Param<Tensor<2>>>,
    /// B, `[r, d_out]`.
    pub up: Param<Tensor<2>>,
    /// c, `[1, d_out]`; absent for ones.
    pub out_scale: Option<Param<Tensor<2>>>,
    /// A_0 and B_0 of a start that moved a part of the base into the factors: the base is `W - s A_0 B_0`.
    pub start: Option<Start>,
    /// s.
    #[module(skip)]
    pub scale: f32,
    /// Probability that an input of the delta is dropped in training.
    #[module(skip)]
    pub dropout: f64,
}

/// The factors that a delta started from, frozen.
#[derive(Module, Debug)]
pub struct Start {
    /// A_0, `[d_in, r]`.
    pub down: Param<Tensor<2>>,
    /// B_0, `[r, d_out]`.
    pub up: Param<Tensor<2>>,
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::from_tensor(tensor).set_require_grad(false)
}

impl LowRank {
    /// A delta with identity core and trained factors, as LoRA has.
    pub fn new(down: Tensor<2>, up: Tensor<2>, scale: f32, dropout: f64) -> Self {
        let [down, up] = [down, up].map(Param::from_tensor);
        Self { down, core: None, core_start: None, up, out_scale: None, start: None, scale, dropout }
    }

    /// The same with a trained core, dense `[r_in, r_out]` or diagonal `[1, r]`.
    pub fn with_core(self, core: Tensor<2>) -> Self {
        Self { core: Some(Param::from_tensor(core)), ..self }
    }

    /// The same with a core that counts from `origin`.
    pub fn with_core_start(self, origin: Tensor<2>) -> Self {
        Self { core_start: Some(frozen(origin)), ..self }
    }

    /// The same with a trained scale of every output, `[1, d_out]`.
    pub fn with_out_scale(self, scale: Tensor<2>) -> Self {
        Self { out_scale: Some(Param::from_tensor(scale)), ..self }
    }

    /// The same with its factors kept as the start, which the base loses: see [`Projection::attach`](crate::Projection::attach).
    pub fn with_start(self) -> Self {
        let start = Start { down: frozen(self.down.val()), up: frozen(self.up.val()) };
        Self { start: Some(start), ..self }
    }

    /// The same with A and B frozen; core and output scale stay as they are.
    pub fn frozen_factors(self) -> Self {
        let [down, up] = [self.down, self.up].map(|factor| factor.set_require_grad(false));
        Self { down, up, ..self }
    }

    /// The same with nothing trained.
    pub fn frozen(self) -> Self {
        let off = |part: Option<Param<Tensor<2>>>| part.map(|part| part.set_require_grad(false));
        let (core, out_scale) = (off(self.core.clone()), off(self.out_scale.clone()));
        Self { core, out_scale, ..self }.frozen_factors()
    }

    /// The width of A.
    pub fn rank(&self) -> usize {
        self.down.dims()[1]
    }

    /// `(M - M_0) B diag(c)`, `[r, d_out]`.
    fn folded_up(&self) -> Tensor<2> {
        let mut up = self.up.val();
        if let Some(core) = &self.core {
            let core = match &self.core_start {
                Some(origin) => core.val() - origin.val(),
                None => core.val(),
            };
            let is_diagonal = core.dims()[0] == 1 && self.rank() == core.dims()[1];
            up = if is_diagonal { core.transpose() * up } else { core.matmul(up) };
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
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, training: bool) -> Tensor<2> {
        let dtype = x.dtype().into();
        let mask = (training && self.dropout > 0.0).then(|| dropout_mask(x.dims(), self.dropout, dtype, &x.device()));
        let down = cast(self.down.val(), dtype);
        let up = cast(self.folded_up(), dtype);
        kernels::lowrank_linear(x, weight, bias, mask, down, up, self.scale)
    }

    /// A and `(M - M_0) B diag(c)` in f32: their product times s is the delta.
    pub fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        (cast(self.down.val(), FloatDType::F32), cast(self.folded_up(), FloatDType::F32))
    }

    /// The dense delta `s A (M - M_0) B diag(c)`, `[d_in, d_out]` in f32: for merging, never in a training step.
    pub fn delta(&self) -> Tensor<2> {
        let (down, up) = self.factors();
        down.matmul(up) * self.scale
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
