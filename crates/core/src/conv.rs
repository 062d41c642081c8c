//! Two-dimensional convolutions with a low-rank delta: LoRA's (arXiv 2106.09685) and FLoRA's Tucker core (arXiv 2405.14739).
//!
//! `y = conv(x, W) + b + s conv(D(x), dW)`, with the stride, padding and dilation of the base; dW is never formed:
//!
//! ```text
//! LoRA:    dW[o, i, h, w] = sum_a B[o, a] A[a, i, h, w]
//!          conv by A (in -> r), then 1 x 1 by B (r -> out)
//! Tucker:  dW[o, i, h, w] = sum_abcd G[b, a, c, d] P0[i, a] P1[o, b] P2[h, c] P3[w, d]
//!          1 x 1 by P0 (in -> r0), conv by K[b, a, h, w] = sum_cd G[b, a, c, d] P2[h, c] P3[w, d], 1 x 1 by P1 (r1 -> out)
//! ```
//!
//! Zero padding commutes with a 1 x 1 convolution without bias, so the second form is exact.
//!
//! | symbol | field | shape |
//! | --- | --- | --- |
//! | W | `weight` | `[out, in, kh, kw]` |
//! | A, B | [`LoraConv`] `down`, `up` | `[r, in, kh, kw]`, `[out, r, 1, 1]` |
//! | G | [`TuckerConv`] `core` | `[r1, r0, r2, r3]` |
//! | P0 (transposed), P1, P2, P3 | `down`, `up`, `rows`, `columns` | `[r0, in]`, `[out, r1]`, `[kh, r2]`, `[kw, r3]` |
//!
//! Every part lies as in the files of adapters: outputs before inputs, as in torch.
//!
//! | | trained values | flops of a position, beside the base |
//! | --- | --- | --- |
//! | LoRA | `r (in kh kw + out)` | `2 r (in kh kw + out)` |
//! | Tucker | `r0 r1 r2 r3 + in r0 + out r1 + kh r2 + kw r3` | `2 (in r0 + r0 r1 kh kw + r1 out)` |
//!
//! Starts: B = 0 and A as a linear LoRA's (Kaiming uniform, fan-in `in kh kw`); `G = 0` and `P_i ~ N(0, 0.5 / r_i)`. The first
//! output is the base's to the bit. The references of Tucker form dW in every step and fail with groups; adapters here take
//! convolutions of one group and refuse others. Ranks of rows and columns end at the size of the kernel, so that one setting
//! serves kernels of several sizes. LoRA is that of PEFT, which forgets the dilation of the base; here A has it.

use burn::module::{Module, Param};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Distribution, FloatDType, Tensor};

use crate::adapters::lora::LoraInit;
use crate::adapters::{StartError, tucker};
use crate::lowrank::cast;
use crate::random::Stream;

/// A frozen convolution, perhaps with a delta.
#[derive(Module, Debug)]
pub struct ConvProjection {
    /// W, `[out, in / groups, kh, kw]`.
    pub weight: Param<Tensor<4>>,
    /// b, `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What an adapter adds.
    pub delta: Option<ConvDelta>,
    /// Step over rows and columns.
    #[module(skip)]
    pub stride: [usize; 2],
    /// Zeros around rows and columns.
    #[module(skip)]
    pub padding: [usize; 2],
    /// Distance of the kernel's rows and columns.
    #[module(skip)]
    pub dilation: [usize; 2],
    /// Groups of channels.
    #[module(skip)]
    pub groups: usize,
}

/// The adapter of a convolution.
#[allow(clippy::large_enum_variant)] // one per layer
#[derive(Module, Debug)]
pub enum ConvDelta {
    /// A Tucker core.
    Tucker(TuckerConv),
    /// A low-rank product.
    Lora(LoraConv),
}

/// LoRA on a convolution.
#[derive(Module, Debug)]
pub struct LoraConv {
    /// A, `[r, in, kh, kw]`.
    pub down: Param<Tensor<4>>,
    /// B, `[out, r, 1, 1]`.
    pub up: Param<Tensor<4>>,
    /// s.
    #[module(skip)]
    pub scale: f32,
    /// Probability that an input of the delta is dropped in training.
    #[module(skip)]
    pub dropout: f64,
}

/// A Tucker core on a convolution.
#[derive(Module, Debug)]
pub struct TuckerConv {
    /// P0, `[r0, in]`.
    pub down: Param<Tensor<2>>,
    /// G, `[r1, r0, r2, r3]`.
    pub core: Param<Tensor<4>>,
    /// P1, `[out, r1]`.
    pub up: Param<Tensor<2>>,
    /// P2, `[kh, r2]`.
    pub rows: Param<Tensor<2>>,
    /// P3, `[kw, r3]`.
    pub columns: Param<Tensor<2>>,
    /// s.
    #[module(skip)]
    pub scale: f32,
    /// Probability that an input of the delta is dropped in training.
    #[module(skip)]
    pub dropout: f64,
}

/// LoRA of a convolution, as settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraConvSettings {
    /// Rank.
    pub r: usize,
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
    /// How A starts.
    pub init: LoraInit,
}

/// A Tucker core of a convolution, as settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TuckerConvSettings {
    /// Ranks of inputs, outputs, rows and columns; the last two at most as large as the kernel.
    pub ranks: [usize; 4],
    /// s.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl Default for TuckerConvSettings {
    fn default() -> Self {
        Self { ranks: [16, 16, 2, 2], scale: 4.0, dropout: 0.01 }
    }
}

impl ConvProjection {
    /// A frozen convolution of stride 1, without padding, dilation or groups.
    pub fn frozen(weight: Tensor<4>, bias: Option<Tensor<1>>) -> Self {
        Self {
            weight: Param::from_tensor(weight).set_require_grad(false),
            bias: bias.map(|bias| Param::from_tensor(bias).set_require_grad(false)),
            delta: None,
            stride: [1, 1],
            padding: [0, 0],
            dilation: [1, 1],
            groups: 1,
        }
    }

    /// The base's options for a kernel of one group.
    fn options(&self, groups: usize) -> ConvOptions<2> {
        ConvOptions::new(self.stride, self.padding, self.dilation, groups)
    }

    /// `[out, in, kh, kw]`, for adapters of convolutions of one group.
    fn adaptable(&self, method: &'static str, module: &str) -> Result<[usize; 4], StartError> {
        match self.groups {
            1 => Ok(self.weight.dims()),
            groups => Err(StartError::Groups { method, module: module.to_owned(), groups }),
        }
    }

    /// Puts a LoRA on the layer.
    ///
    /// # Errors
    /// The convolution has groups, or the rank is 0.
    pub fn attach_lora(&mut self, settings: LoraConvSettings, module: &str, seed: u64) -> Result<(), StartError> {
        let [d_out, d_in, kh, kw] = self.adaptable("lora", module)?;
        let r = settings.r;
        if r == 0 {
            return Err(StartError::ZeroRank { method: "lora", module: module.to_owned(), name: "r" });
        }
        let device = self.weight.device();
        let (fan, stream) = (d_in * kh * kw, Stream::new(seed, module));
        let down = match settings.init {
            LoraInit::KaimingUniform => stream.uniform_tensor(r, fan, 1.0 / (fan as f64).sqrt(), &device),
            LoraInit::Gaussian => stream.normal_tensor(r, fan, 1.0 / r as f64, &device),
        };
        self.delta = Some(ConvDelta::Lora(LoraConv {
            down: Param::from_tensor(down.reshape([r, d_in, kh, kw])),
            up: Param::from_tensor(Tensor::zeros([d_out, r, 1, 1], &device)),
            scale: settings.scale,
            dropout: settings.dropout,
        }));
        Ok(())
    }

    /// Puts a Tucker core on the layer.
    ///
    /// # Errors
    /// The convolution has groups, or a rank is 0.
    pub fn attach_tucker(&mut self, settings: TuckerConvSettings, module: &str, seed: u64) -> Result<(), StartError> {
        let [d_out, d_in, kh, kw] = self.adaptable("tucker", module)?;
        let names = ["r_in", "r_out", "r_rows", "r_columns"];
        tucker::check_ranks(module, &[0, 1, 2, 3].map(|axis| (names[axis], settings.ranks[axis])))?;
        let device = self.weight.device();
        let [r0, r1, r2, r3] = settings.ranks_on([kh, kw]);
        let factor = |axis: usize, [rows, cols]: [usize; 2], r: usize| {
            let stream = Stream::new(seed, &format!("{module}.tucker.{axis}"));
            Param::from_tensor(stream.normal_tensor(rows, cols, tucker::deviation(r), &device))
        };
        self.delta = Some(ConvDelta::Tucker(TuckerConv {
            down: factor(0, [r0, d_in], r0),
            core: Param::from_tensor(Tensor::zeros([r1, r0, r2, r3], &device)),
            up: factor(1, [d_out, r1], r1),
            rows: factor(2, [kh, r2], r2),
            columns: factor(3, [kw, r3], r3),
            scale: settings.scale,
            dropout: settings.dropout,
        }));
        Ok(())
    }

    /// Applies the convolution.
    ///
    /// # Shapes
    /// `x [batch, in, height, width]`; result `[batch, out, height', width']` in the type of x.
    ///
    /// # Panics
    /// As Burn does, where the channels of x are not `in`.
    pub fn forward(&self, x: Tensor<4>, training: bool) -> Tensor<4> {
        let dtype: FloatDType = x.dtype().into();
        let bias = self.bias.as_ref().map(|bias| cast(bias.val(), dtype));
        let y = conv2d(x.clone(), cast(self.weight.val(), dtype), bias, self.options(self.groups));
        let Some(delta) = &self.delta else { return y };
        let p = delta.dropout();
        let x = if training && p > 0.0 { x.clone() * dropout_mask(&x, p) } else { x };
        let one_by_one = || ConvOptions::new([1, 1], [0, 0], [1, 1], 1);
        match delta {
            ConvDelta::Lora(lora) => {
                let h = conv2d(x, cast(lora.down.val(), dtype), None, self.options(1));
                y + conv2d(h, cast(lora.up.val(), dtype) * lora.scale, None, one_by_one())
            }
            ConvDelta::Tucker(tucker) => {
                let (first, kernel, last) = tucker.kernels();
                let h = conv2d(x, cast(first, dtype), None, one_by_one());
                let h = conv2d(h, cast(kernel, dtype), None, self.options(1));
                y + conv2d(h, cast(last * tucker.scale, dtype), None, one_by_one())
            }
        }
    }

    /// Adds the delta to the weight and drops it. The sum is taken in f32 and rounded once to the weight's type.
    pub fn merge(&mut self) {
        let Some(delta) = self.delta.take() else { return };
        self.weight = self.weight.clone().map(|weight| {
            let dtype = weight.dtype().into();
            cast(cast(weight, FloatDType::F32) + delta.delta(), dtype)
        });
    }
}

/// Inverted dropout multipliers of the shape of x, off the tape.
fn dropout_mask(x: &Tensor<4>, p: f64) -> Tensor<4> {
    let (dims, device) = (x.dims(), x.device().inner());
    let mask = if p >= 1.0 {
        Tensor::<4>::zeros(dims, &device)
    } else {
        Tensor::<4>::random(dims, Distribution::Bernoulli(1.0 - p), &device) * (1.0 / (1.0 - p))
    };
    mask.cast(FloatDType::from(x.dtype()))
}

impl ConvDelta {
    /// The dense `s dW`, `[out, in, kh, kw]` in f32: for merging.
    pub fn delta(&self) -> Tensor<4> {
        match self {
            Self::Lora(lora) => {
                let ([r, d_in, kh, kw], [d_out, ..]) = (lora.down.dims(), lora.up.dims());
                let up = lora.up.val().reshape([d_out, r]);
                up.matmul(lora.down.val().reshape([r, d_in * kh * kw])).reshape([d_out, d_in, kh, kw]) * lora.scale
            }
            Self::Tucker(tucker) => {
                let (_, kernel, _) = tucker.kernels();
                let [r1, r0, kh, kw] = kernel.dims();
                let (p0, p1) = (tucker.down.val(), tucker.up.val());
                let ([_, d_in], [d_out, _]) = (p0.dims(), p1.dims());
                let wide = p1.matmul(kernel.reshape([r1, r0 * kh * kw])).reshape([d_out, r0, kh * kw]);
                let full = p0.transpose().reshape([1, d_in, r0]).matmul(wide);
                full.reshape([d_out, d_in, kh, kw]) * tucker.scale
            }
        }
    }

    /// Probability that an input of the delta is dropped in training.
    pub fn dropout(&self) -> f64 {
        match self {
            Self::Lora(lora) => lora.dropout,
            Self::Tucker(tucker) => tucker.dropout,
        }
    }

    /// Changes the dropout.
    pub fn set_dropout(&mut self, dropout: f64) {
        match self {
            Self::Lora(lora) => lora.dropout = dropout,
            Self::Tucker(tucker) => tucker.dropout = dropout,
        }
    }
}

impl LoraConvSettings {
    /// Trained values on a `[out, in, kh, kw]` kernel.
    pub fn parameters(&self, [d_out, d_in, kh, kw]: [usize; 4]) -> usize {
        self.r * (d_in * kh * kw + d_out)
    }
}

impl TuckerConvSettings {
    /// The ranks on a kernel of this height and width.
    fn ranks_on(&self, [kh, kw]: [usize; 2]) -> [usize; 4] {
        let [r0, r1, r2, r3] = self.ranks;
        [r0, r1, r2.min(kh), r3.min(kw)]
    }

    /// Trained values on a `[out, in, kh, kw]` kernel.
    ///
    /// ```
    /// use lowrank_core::conv::TuckerConvSettings;
    /// assert_eq!(TuckerConvSettings::default().parameters([128, 64, 3, 3]), 4108);
    /// ```
    pub fn parameters(&self, [d_out, d_in, kh, kw]: [usize; 4]) -> usize {
        let [r0, r1, r2, r3] = self.ranks_on([kh, kw]);
        r0 * r1 * r2 * r3 + d_in * r0 + d_out * r1 + kh * r2 + kw * r3
    }
}

impl TuckerConv {
    /// The three kernels: `P0^T [r0, in, 1, 1]`, `K [r1, r0, kh, kw]`, `P1 [out, r1, 1, 1]`.
    fn kernels(&self) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [r1, r0, r2, r3] = self.core.dims();
        let ([_, d_in], [d_out, _]) = (self.down.dims(), self.up.dims());
        let ([kh, _], [kw, _]) = (self.rows.dims(), self.columns.dims());
        let wide = self.core.val().reshape([r1 * r0 * r2, r3]).matmul(self.columns.val().transpose());
        let tall = wide.reshape([r1 * r0, r2, kw]).swap_dims(1, 2).reshape([r1 * r0 * kw, r2]);
        let kernel = tall.matmul(self.rows.val().transpose()).reshape([r1, r0, kw, kh]).swap_dims(2, 3);
        let first = self.down.val().reshape([r0, d_in, 1, 1]);
        (first, kernel, self.up.val().reshape([d_out, r1, 1, 1]))
    }
}

#[cfg(test)]
mod tests;
