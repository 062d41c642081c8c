//! Two-dimensional convolutions with a low-rank delta: LoRA's (arXiv 2106.09685) and FLoRA's Tucker core (arXiv 2405.14739).
//!
//! `y = conv(x, W) + b + s conv(D(x), dW)`, with the stride, padding and dilation of the base; dW is never formed:
//!
//! ```text
//! LoRA:    dW[o, i, h, w] = sum_a B[o, a] A[a, i, h, w]
//!          conv by A (in -> r), then 1 x 1 by B (r -> out)
//! Tucker:  dW[i, o, h, w] = sum_abcd G[a, b, c, d] P0[i, a] P1[o, b] P2[h, c] P3[w, d]        (then [out, in, h, w])
//!          1 x 1 by P0 (in -> r0), conv by K[b, a, h, w] = sum_cd G[a, b, c, d] P2[h, c] P3[w, d], 1 x 1 by P1 (r1 -> out)
//! ```
//!
//! Zero padding commutes with a 1 x 1 convolution without bias, so the second form is exact.
//!
//! | symbol | field | shape |
//! | --- | --- | --- |
//! | W | `weight` | `[out, in, kh, kw]` |
//! | A, B | [`LoraConv`] `down`, `up` | `[r, in, kh, kw]`, `[out, r, 1, 1]` |
//! | G | [`TuckerConv`] `core` | `[r0, r1, r2, r3]` |
//! | P0, P1, P2, P3 | `inputs`, `outputs`, `rows`, `columns` | `[in, r0]`, `[out, r1]`, `[kh, r2]`, `[kw, r3]` |
//!
//! | | trained values | flops of a position, beside the base |
//! | --- | --- | --- |
//! | LoRA | `r (in kh kw + out)` | `2 r (in kh kw + out)` |
//! | Tucker | `r0 r1 r2 r3 + in r0 + out r1 + kh r2 + kw r3` | `2 (in r0 + r0 r1 kh kw + r1 out)` |
//!
//! Starts: B = 0 and A as a linear LoRA's (Kaiming uniform, fan-in `in kh kw`); `G = 0` and `P_i ~ N(0, 0.5 / r_i)`. The first
//! output is the base's to the bit. The references of Tucker form dW in every step and fail with groups; adapters here take
//! convolutions of one group and refuse others.

use burn::module::{Module, Param};
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Distribution, FloatDType, Tensor};

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
    /// G, `[r0, r1, r2, r3]`.
    pub core: Param<Tensor<4>>,
    /// P0, `[in, r0]`.
    pub inputs: Param<Tensor<2>>,
    /// P1, `[out, r1]`.
    pub outputs: Param<Tensor<2>>,
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
}

/// A Tucker core of a convolution, as settings.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TuckerConvSettings {
    /// Ranks of inputs, outputs, rows and columns.
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
        let fan = d_in * kh * kw;
        let down = Stream::new(seed, module).uniform_tensor(r, fan, 1.0 / (fan as f64).sqrt(), &device);
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
        let ranks = settings.ranks;
        let names = ["r_in", "r_out", "r_rows", "r_columns"];
        tucker::check_ranks(module, &[0, 1, 2, 3].map(|axis| (names[axis], ranks[axis])))?;
        let device = self.weight.device();
        let sizes = [d_in, d_out, kh, kw];
        let [inputs, outputs, rows, columns] = [0, 1, 2, 3].map(|axis: usize| {
            let stream = Stream::new(seed, &format!("{module}.tucker.{axis}"));
            Param::from_tensor(stream.normal_tensor(sizes[axis], ranks[axis], tucker::deviation(ranks[axis]), &device))
        });
        let core = Param::from_tensor(Tensor::zeros(ranks, &device));
        let TuckerConvSettings { scale, dropout, .. } = settings;
        self.delta = Some(ConvDelta::Tucker(TuckerConv { core, inputs, outputs, rows, columns, scale, dropout }));
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
                let (p0, p1) = (tucker.inputs.val(), tucker.outputs.val());
                let ([d_in, _], [d_out, _]) = (p0.dims(), p1.dims());
                let wide = p1.matmul(kernel.reshape([r1, r0 * kh * kw])).reshape([d_out, r0, kh * kw]);
                let full = p0.reshape([1, d_in, r0]).matmul(wide);
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
}

impl LoraConvSettings {
    /// Trained values on a `[out, in, kh, kw]` kernel.
    pub fn parameters(&self, [d_out, d_in, kh, kw]: [usize; 4]) -> usize {
        self.r * (d_in * kh * kw + d_out)
    }
}

impl TuckerConvSettings {
    /// Trained values on a `[out, in, kh, kw]` kernel.
    ///
    /// ```
    /// use lowrank_core::conv::TuckerConvSettings;
    /// assert_eq!(TuckerConvSettings::default().parameters([128, 64, 3, 3]), 4108);
    /// ```
    pub fn parameters(&self, [d_out, d_in, kh, kw]: [usize; 4]) -> usize {
        let [r0, r1, r2, r3] = self.ranks;
        r0 * r1 * r2 * r3 + d_in * r0 + d_out * r1 + kh * r2 + kw * r3
    }
}

impl TuckerConv {
    /// The three kernels: `P0^T [r0, in, 1, 1]`, `K [r1, r0, kh, kw]`, `P1 [out, r1, 1, 1]`.
    fn kernels(&self) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
        let [r0, r1, r2, r3] = self.core.dims();
        let ([d_in, _], [d_out, _]) = (self.inputs.dims(), self.outputs.dims());
        let ([kh, _], [kw, _]) = (self.rows.dims(), self.columns.dims());
        let wide = self.core.val().reshape([r0 * r1 * r2, r3]).matmul(self.columns.val().transpose());
        let tall = wide.reshape([r0 * r1, r2, kw]).swap_dims(1, 2).reshape([r0 * r1 * kw, r2]);
        let kernel = tall.matmul(self.rows.val().transpose()).reshape([r0, r1, kw, kh]).permute([1, 0, 3, 2]);
        let first = self.inputs.val().transpose().reshape([r0, d_in, 1, 1]);
        (first, kernel, self.outputs.val().reshape([d_out, r1, 1, 1]))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, trained_values};

    const LORA: LoraConvSettings = LoraConvSettings { r: 3, scale: 1.5, dropout: 0.0 };
    const TUCKER: TuckerConvSettings = TuckerConvSettings { ranks: [3, 2, 2, 1], scale: 4.0, dropout: 0.0 };

    fn random(name: &str, dims: [usize; 4]) -> Tensor<4> {
        normal(name, 1, dims.iter().product()).reshape(dims)
    }

    /// Kernels of 3 x 2, with every combination of geometries.
    fn bases() -> Vec<ConvProjection> {
        let bias: Tensor<1> = Tensor::from_floats([0.1, -0.2, 0.3, 0.4, -0.5], &Device::flex());
        let base = || ConvProjection::frozen(random("w", [5, 4, 3, 2]), Some(bias.clone()));
        vec![
            base(),
            ConvProjection { stride: [2, 1], ..base() },
            ConvProjection { padding: [1, 2], ..base() },
            ConvProjection { dilation: [2, 3], ..base() },
            ConvProjection { stride: [2, 2], padding: [1, 1], dilation: [2, 1], ..base() },
        ]
    }

    fn moved(mut conv: ConvProjection) -> ConvProjection {
        conv.delta = Some(match conv.delta.take().unwrap() {
            ConvDelta::Lora(lora) => {
                let up = random("up", lora.up.dims());
                ConvDelta::Lora(LoraConv { up: lora.up.map(|_| up), ..lora })
            }
            ConvDelta::Tucker(tucker) => {
                let core = random("core", tucker.core.dims());
                ConvDelta::Tucker(TuckerConv { core: tucker.core.map(|_| core), ..tucker })
            }
        });
        conv
    }

    fn attached(mut conv: ConvProjection, is_tucker: bool) -> ConvProjection {
        if is_tucker {
            conv.attach_tucker(TUCKER, "layer", 1).unwrap();
            assert_eq!(trained_values(&conv), TUCKER.parameters([5, 4, 3, 2]));
        } else {
            conv.attach_lora(LORA, "layer", 1).unwrap();
            assert_eq!(trained_values(&conv), LORA.parameters([5, 4, 3, 2]));
        }
        conv
    }

    #[test]
    fn starts_as_the_base_and_cheap_forms_equal_the_merged_kernel() {
        let x = random("x", [2, 4, 9, 8]);
        for base in bases() {
            let plain = base.forward(x.clone(), true);
            for is_tucker in [false, true] {
                let conv = attached(base.clone(), is_tucker);
                assert_close(conv.forward(x.clone(), true), plain.clone(), 0.0);
                let conv = moved(conv);
                let y = conv.forward(x.clone(), false);
                let mut merged = conv;
                merged.merge();
                assert!(merged.delta.is_none());
                assert_close(merged.forward(x.clone(), false), y.clone(), 2e-6);
                let distance = host((y - plain.clone()).abs().max().reshape([1, 1]))[0];
                assert!(distance > 0.1);
            }
        }
    }

    #[test]
    fn the_tucker_kernel_is_its_sum() {
        let conv = moved(attached(bases().remove(0), true));
        let Some(ConvDelta::Tucker(tucker)) = &conv.delta else { unreachable!() };
        let flat = |t: Tensor<4>| {
            let n = t.shape().num_elements();
            host(t.reshape([1, n]))
        };
        let [r0, r1, r2, r3] = tucker.core.dims();
        let core = flat(tucker.core.val());
        let [p0, p1, p2, p3] = [&tucker.inputs, &tucker.outputs, &tucker.rows, &tucker.columns].map(|p| host(p.val()));
        let mut want = vec![];
        for at in 0..5 * 4 * 3 * 2 {
            let (o, i, h, w) = (at / 24, at / 6 % 4, at / 2 % 3, at % 2);
            let mut sum = 0.0f64;
            for (index, &value) in core.iter().enumerate() {
                let (a, b, c, d) = (index / (r1 * r2 * r3), index / (r2 * r3) % r1, index / r3 % r2, index % r3);
                let factors = [value, p0[i * r0 + a], p1[o * r1 + b], p2[h * r2 + c], p3[w * r3 + d]];
                sum += factors.into_iter().map(f64::from).product::<f64>();
            }
            want.push((4.0 * sum) as f32);
        }
        let want = Tensor::<1>::from_data(want.as_slice(), &Device::flex()).reshape([5, 4, 3, 2]);
        assert_close(conv.delta.unwrap().delta(), want, 2e-6);
    }

    fn tucker_with(mut conv: ConvProjection, change: impl FnOnce(TuckerConv) -> TuckerConv) -> ConvProjection {
        conv.delta = conv.delta.map(|delta| match delta {
            ConvDelta::Tucker(tucker) => ConvDelta::Tucker(change(tucker)),
            ConvDelta::Lora(_) => unreachable!(),
        });
        conv
    }

    fn tucker_of(conv: &ConvProjection) -> TuckerConv {
        match &conv.delta {
            Some(ConvDelta::Tucker(tucker)) => tucker.clone(),
            _ => unreachable!(),
        }
    }

    fn lora_of(conv: &ConvProjection) -> LoraConv {
        match &conv.delta {
            Some(ConvDelta::Lora(lora)) => lora.clone(),
            _ => unreachable!(),
        }
    }

    fn lora_with(conv: ConvProjection, change: impl FnOnce(LoraConv) -> LoraConv) -> ConvProjection {
        let lora = change(lora_of(&conv));
        ConvProjection { delta: Some(ConvDelta::Lora(lora)), ..conv }
    }

    #[test]
    fn gradients_agree_with_differences_and_the_base_has_none() {
        let x = random("x", [2, 4, 7, 6]);
        let run = |conv: &ConvProjection| conv.forward(x.clone(), false);
        let base = bases().remove(4);
        let lora = moved(attached(base.clone(), false));
        check_gradient(
            &lora,
            run,
            |c| lora_of(c).down,
            |c, v| lora_with(c, |l| LoraConv { down: l.down.map(|_| v), ..l }),
        );
        check_gradient(&lora, run, |c| lora_of(c).up, |c, v| lora_with(c, |l| LoraConv { up: l.up.map(|_| v), ..l }));
        let tucker = moved(attached(base, true));
        check_gradient(
            &tucker,
            run,
            |c| tucker_of(c).core,
            |c, v| tucker_with(c, |t| TuckerConv { core: t.core.map(|_| v), ..t }),
        );
        check_gradient(
            &tucker,
            run,
            |c| tucker_of(c).inputs,
            |c, v| tucker_with(c, |t| TuckerConv { inputs: t.inputs.map(|_| v), ..t }),
        );
        check_gradient(
            &tucker,
            run,
            |c| tucker_of(c).outputs,
            |c, v| tucker_with(c, |t| TuckerConv { outputs: t.outputs.map(|_| v), ..t }),
        );
        check_gradient(
            &tucker,
            run,
            |c| tucker_of(c).rows,
            |c, v| tucker_with(c, |t| TuckerConv { rows: t.rows.map(|_| v), ..t }),
        );
        check_gradient(
            &tucker,
            run,
            |c| tucker_of(c).columns,
            |c, v| tucker_with(c, |t| TuckerConv { columns: t.columns.map(|_| v), ..t }),
        );
        for conv in [lora, tucker] {
            let lifted = conv.train();
            let gradients = lifted.forward(x.clone(), false).sum().backward();
            assert!(lifted.weight.val().grad(&gradients).is_none());
            assert!(lifted.bias.unwrap().val().grad(&gradients).is_none());
        }
    }

    #[test]
    fn dropout_is_of_the_deltas_input_alone() {
        let x = random("x", [2, 4, 9, 8]);
        for is_tucker in [false, true] {
            let base = bases().remove(0);
            let mut conv = moved(attached(base.clone(), is_tucker));
            match conv.delta.as_mut().unwrap() {
                ConvDelta::Lora(lora) => lora.dropout = 1.0,
                ConvDelta::Tucker(tucker) => tucker.dropout = 1.0,
            }
            assert_close(conv.forward(x.clone(), true), base.forward(x.clone(), true), 0.0);
            let full = conv.forward(x.clone(), false);
            assert!(host((full - base.forward(x.clone(), true)).abs().max().reshape([1, 1]))[0] > 0.1);
        }
    }

    #[test]
    fn groups_and_empty_ranks_are_refused() {
        let mut conv = ConvProjection { groups: 2, ..ConvProjection::frozen(random("w", [4, 2, 3, 3]), None) };
        let error = conv.attach_lora(LORA, "stem.conv", 1).unwrap_err();
        assert_eq!(
            error.to_string(),
            "stem.conv: lora cannot adapt a convolution of 2 groups, only of 1; exclude the module"
        );
        assert_eq!(conv.forward(random("x", [1, 4, 5, 5]), false).dims(), [1, 4, 3, 3]); // the base itself has groups
        let mut conv = ConvProjection::frozen(random("w", [4, 2, 3, 3]), None);
        let settings = TuckerConvSettings { ranks: [2, 2, 0, 1], ..TUCKER };
        let error = conv.attach_tucker(settings, "stem", 1).unwrap_err();
        assert_eq!(error.to_string(), "stem: r_rows of tucker is 0, expected at least 1");
    }
}
