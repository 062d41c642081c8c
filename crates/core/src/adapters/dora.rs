//! DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv 2402.09353, section 4).
//!
//! `y = (x V) * (m / n) + b`, `V = W + s A B`, `n_j = ||V_j||` over the inputs: the adapted weight is split into the
//! directions of its columns, which LoRA changes, and their lengths m, which are trained. n gets no gradient (section 4.3).
//! With dropout, as the authors' and peft's code: `y = x W + b + (m/n - 1) * (D(x) W) + (m/n) * s (D(x) A) B`, computed as
//! `(x - D(x)) W + b + (m/n) * (D(x) W + s (D(x) A) B)`.
//!
//! | paper (there transposed) | field | shape |
//! | --- | --- | --- |
//! | A, B | `lowrank.down`, `lowrank.up` | `[d_in, r]`, `[r, d_out]` |
//! | m | `magnitude` | `[d_out]` |
//! | `\|\|W_j\|\|^2` | `weight_squares`, of the base | `[1, d_out]` |
//!
//! Trained: A, B and m, `r (d_in + d_out) + d_out` values. Start: A and B as LoRA, m = n.
//!
//! Two forms, chosen by counting ([`Form`]), with the same exact norm. With many rows on a CPU, `V diag(m / n)` is built for the
//! time of a product: see [`lowrank_kernels::directed_linear`](mod@lowrank_kernels::directed_linear) for what it costs. Else no V
//! is built: `n_j^2 = ||W_j||^2 + 2 s <(A^T W)_j, B_j> + s^2 <(A^T A B)_j, B_j>`, and the outputs are scaled. Cost of a pass then
//! beside LoRA: `2 r d_in d_out` flops (one read of W) for `A^T W`, `2 r^2 (d_in + d_out)` for the rest, and the scaling,
//! `8 t d_out` bytes forward and `12 t d_out` backward.
//!
//! Saved beside what LoRA saves: `[t, d_out]` for the gradient of m, which on the CPU is the output itself where it has no bias:
//! free where the next operation keeps that output too (gate and up projections, values). With dropout one more product with W.
//! The references form `A B` every step. `A^T W` is taken in the type of the run (whose rounding reaches n only through what A B
//! adds to W) and everything else in f32. n is at least 1e-12: a column of zeros divides by that and not by 0.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels::{self as kernels, Weight};

use super::lora::Lora;
use super::{Site, StartError};
use crate::LowRank;
use crate::lowrank::{cast, dropout_mask};

/// Least squared length of a column.
const LEAST_SQUARE: f64 = 1e-24;

/// How the adapted product is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// By a weight that is built for it.
    Built,
    /// By W and the factors, with scaled outputs.
    Scaled,
}

impl Form {
    /// For `t` rows and `W [m, n]`. A weight is built on a CPU alone, of dense f32 values.
    pub fn of(is_dense_on_cpu: bool, t: usize, [m, n]: [usize; 2]) -> Self {
        match is_dense_on_cpu && kernels::directed_linear::builds_are_cheaper(t, m, n) {
            true => Self::Built,
            false => Self::Scaled,
        }
    }
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DoraConfig {
    /// The directions.
    pub lora: Lora,
}

impl DoraConfig {
    /// Trained values of a `[d_in, d_out]` projection.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        self.lora.r * (d_in + d_out) + d_out
    }

    /// The adapter of a site; its norms are those of the base as it is held.
    ///
    /// # Errors
    /// None today.
    pub fn init(&self, site: &Site<'_>) -> Result<Dora, StartError> {
        let [d_in, d_out] = site.dims();
        let lowrank = self.lora.init(d_in, d_out, site.stream, &site.weight.device());
        let base = match &site.residual {
            Some(lost) => site.weight.clone() - lost.clone(),
            None => site.weight.clone(),
        };
        Ok(Dora::starting(lowrank, base))
    }
}

/// `y = (x (W + s A B)) * (m / n) + b`
#[derive(Module, Debug)]
pub struct Dora {
    /// A, B, s and the dropout.
    pub lowrank: LowRank,
    /// m, `[d_out]`.
    pub magnitude: Param<Tensor<1>>,
    /// `||W_j||^2` of the base, `[1, d_out]` in f32.
    #[module(skip)]
    pub weight_squares: Tensor<2>,
}

impl Dora {
    /// An adapter with the length of every column as it is: m = n.
    ///
    /// # Shapes
    /// `base [d_in, d_out]`: W as the layer holds it.
    pub fn starting(lowrank: LowRank, base: Tensor<2>) -> Self {
        let base = cast(base, FloatDType::F32);
        let d_out = base.dims()[1];
        let stored = Self::stored(lowrank, Tensor::zeros([d_out], &base.device()), &base);
        let length = stored.column_lengths(&Weight::Dense(base), FloatDType::F32);
        Self { magnitude: Param::from_tensor(length.reshape([d_out])), ..stored }
    }

    /// An adapter with given lengths, `[d_out]`.
    pub fn stored(lowrank: LowRank, magnitude: Tensor<1>, base: &Tensor<2>) -> Self {
        let weight_squares = cast(base.clone(), FloatDType::F32).square().sum_dim(0);
        Self { lowrank, magnitude: Param::from_tensor(magnitude), weight_squares }
    }

    /// n, `[1, d_out]` in f32, through which no gradient flows. `dtype` is the type of the run.
    ///
    /// # Shapes
    /// `weight [d_in, d_out]`, the base this adapter was made for.
    pub fn column_lengths(&self, weight: &Weight, dtype: FloatDType) -> Tensor<2> {
        let constant = |factor: &Param<Tensor<2>>| factor.val().set_require_grad(false);
        let (down, up) = (constant(&self.lowrank.down), constant(&self.lowrank.up));
        let (across, scale) = (down.clone().transpose(), self.lowrank.scale);
        let cross = cast(kernels::linear(cast(across.clone(), dtype), weight.clone(), None), FloatDType::F32);
        let square = across.matmul(down).matmul(up.clone());
        let added = ((cross * 2.0 + square * scale) * up).sum_dim(0) * scale;
        (self.weight_squares.clone() + added).clamp_min(LEAST_SQUARE).sqrt()
    }

    /// m / n, `[d_out]` in the type of the run.
    fn ratio(&self, weight: &Weight, dtype: FloatDType) -> Tensor<1> {
        let magnitude = self.magnitude.val();
        let d_out = magnitude.dims()[0];
        cast(magnitude / self.column_lengths(weight, dtype).reshape([d_out]), dtype)
    }

    /// The adapted `x W + b`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x. Dropout is drawn from the
    /// device's generator when `training` is set.
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, training: bool) -> Tensor<2> {
        let dtype = x.dtype().into();
        let dropout = self.lowrank.dropout;
        if !training || dropout == 0.0 {
            return self.adapted(x, weight, bias);
        }
        let dropped = x.clone() * dropout_mask(x.dims(), dropout, dtype, &x.device());
        let rest = kernels::linear(x - dropped.clone(), weight.clone(), bias);
        rest + self.adapted(dropped, weight, None)
    }

    /// The same without dropout.
    fn adapted(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>) -> Tensor<2> {
        let dtype: FloatDType = x.dtype().into();
        let LowRank { down, up, scale, .. } = &self.lowrank;
        let (down, up) = (cast(down.val(), dtype), cast(up.val(), dtype));
        let is_plain = dtype == FloatDType::F32 && bias.is_none() && kernels::is_cpu(&x.device());
        match weight {
            Weight::Dense(w) if Form::of(is_plain, x.dims()[0], w.dims()) == Form::Built => {
                kernels::directed_linear(x, w, down, up, self.magnitude.val(), *scale)
            }
            weight => {
                let ratio = self.ratio(&weight, dtype);
                kernels::column_scale(kernels::lowrank_linear(x, weight, None, None, down, up, *scale), ratio, bias)
            }
        }
    }

    /// `(W + s A B) * (m / n)` in f32, with n of the sum itself.
    ///
    /// # Shapes
    /// `weight [d_in, d_out]` in f32.
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let sum = weight + self.lowrank.delta();
        let length = sum.clone().square().sum_dim(0).clamp_min(LEAST_SQUARE).sqrt();
        let magnitude = self.magnitude.val();
        let d_out = magnitude.dims()[0];
        sum * (magnitude.reshape([1, d_out]) / length)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::TensorData;

    use super::super::lora::LoraInit;
    use super::super::start::row;
    use super::super::testing::{assert_near, device, norm, normal, site, t, weight};
    use super::*;
    use crate::linalg::{self, svd};

    fn dora(weight: &Tensor<2>, r: usize, scale: f32) -> Dora {
        let lora = Lora { r, scale, dropout: 0.0, init: LoraInit::KaimingUniform };
        let start = DoraConfig { lora }.init(&site(weight, None, None)).unwrap();
        let up = normal("up", r, weight.dims()[1]) * 0.4;
        Dora { lowrank: LowRank { up: Param::from_tensor(up), ..start.lowrank.clone() }, ..start }
    }

    #[test]
    fn dora_keeps_lengths_apart_from_directions() {
        for [d_in, d_out] in [[24, 24], [20, 33], [33, 20]] {
            let weight = weight(d_in, d_out);
            let adapter = dora(&weight, 4, 1.5);
            let columns = |w: &Tensor<2>| w.clone().square().sum_dim(0).sqrt();
            let sum = weight.clone() + adapter.lowrank.delta();
            let dense = Weight::Dense(weight.clone());
            let lengths = adapter.column_lengths(&dense, FloatDType::F32);
            assert_near("n without V", &lengths, &columns(&sum), 1e-6);
            let magnitude = adapter.magnitude.val().reshape([1, d_out]);
            assert_near("m = n of W", &magnitude, &columns(&weight), 1e-6);
            assert_near("merged lengths", &columns(&adapter.merged(weight.clone())), &magnitude, 1e-6);
            // m = n is LoRA; m times c is the output times c.
            let (x, bias) = (normal("x", 6, d_in), Tensor::<1>::ones([d_out], &device()));
            let run = |m: Tensor<2>, bias: Option<Tensor<1>>| {
                let with = Dora { magnitude: Param::from_tensor(m.reshape([d_out])), ..adapter.clone() };
                with.forward(x.clone(), dense.clone(), bias, true)
            };
            let lora = adapter.lowrank.forward(x.clone(), dense.clone(), Some(bias.clone()), true);
            assert_near("m = n", &run(lengths, Some(bias.clone())), &lora, 1e-6);
            let ones = bias.clone().unsqueeze::<2>();
            let scaled = run(magnitude.clone() * 3.0, Some(bias.clone())) - ones;
            assert_near("m c", &scaled, &(run(magnitude, None) * 3.0), 1e-6);
        }
    }

    /// The two forms are one function, also of their gradients.
    #[test]
    fn a_built_weight_does_what_scaled_outputs_do() {
        let (weight, rows) = (weight(20, 33), 400);
        assert_eq!(Form::of(true, rows, [20, 33]), Form::Built);
        assert_eq!(Form::of(false, rows, [20, 33]), Form::Scaled);
        let (adapter, dy) = (dora(&weight, 4, 1.5), normal("dy", rows, 33));
        let run = |parts: &[usize]| {
            let adapter = adapter.clone().train();
            let x = Tensor::from_inner(normal("x", rows, 20)).require_grad();
            let weight = Weight::Dense(Tensor::from_inner(weight.clone()));
            let mut first = 0;
            let pieces = parts.iter().map(|&count| {
                first += count;
                adapter.forward(x.clone().narrow(0, first - count, count), weight.clone(), None, true)
            });
            let y = Tensor::cat(pieces.collect(), 0);
            let mut gradients = (y.clone() * Tensor::from_inner(dy.clone())).sum().backward();
            let magnitude = adapter.magnitude.val().grad_remove(&mut gradients).unwrap().reshape([1, 33]);
            let factors = [&adapter.lowrank.down, &adapter.lowrank.up].map(|factor| factor.val());
            let [down, up] = factors.map(|factor| factor.grad_remove(&mut gradients).unwrap());
            [y.inner(), x.grad_remove(&mut gradients).unwrap(), down, up, magnitude]
        };
        assert_eq!(Form::of(true, 8, [20, 33]), Form::Scaled);
        let (built, scaled) = (run(&[rows]), run(&[8; 50]));
        for (what, (built, scaled)) in ["y", "dx", "dA", "dB", "dm"].into_iter().zip(built.iter().zip(&scaled)) {
            assert_near(what, built, scaled, 2e-6);
        }
    }

    #[test]
    fn dora_survives_columns_without_length() {
        let mut values = linalg::host(weight(9, 6));
        for i in 0..9 {
            values[i * 6 + 2] = 0.0;
        }
        let weight = Tensor::<2>::from_data(TensorData::new(values, [9, 6]), &device());
        let adapter = dora(&weight, 3, 1.0);
        let y = adapter.forward(normal("x", 4, 9), Weight::Dense(weight.clone()), None, false);
        assert!(norm(&y).is_finite());
        assert!(norm(&adapter.merged(weight.clone())).is_finite());
        // V = 0: what A B adds is what W loses.
        let exact = svd(weight.clone(), 6);
        let gone = LowRank::new(exact.left * row(exact.values, &device()), -t(&exact.right), 1.0, 0.0);
        let adapter = Dora::stored(gone, Tensor::ones([6], &device()), &weight);
        let lengths = adapter.column_lengths(&Weight::Dense(weight), FloatDType::F32);
        assert!(linalg::host(lengths).iter().all(|&n| n > 0.0 && n < 1e-2));
    }

    #[test]
    fn dora_over_a_quantised_base_measures_that_base() {
        let (full, lost) = (weight(12, 10), normal("lost", 12, 10) * 0.1);
        let lora = Lora { r: 3, scale: 1.0, dropout: 0.0, init: LoraInit::KaimingUniform };
        let adapter = DoraConfig { lora }.init(&site(&full, None, Some(lost.clone()))).unwrap();
        let base = full - lost;
        assert_near("m", &adapter.magnitude.val().reshape([1, 10]), &base.clone().square().sum_dim(0).sqrt(), 1e-6);
        assert_near("start", &adapter.merged(base.clone()), &base, 1e-6);
    }
}
