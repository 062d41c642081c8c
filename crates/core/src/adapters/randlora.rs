//! RandLoRA: full-rank updates from random bases (arXiv 2502.00987).
//!
//! With `m = min(d_in, d_out)`, `D = max(d_in, d_out)`, `n = ceil(m / r)`:
//!
//! ```text
//! Z = sum_b Bs[:, b, :] diag(lambda[:, b]) As diag(gamma[b, :])      [D, m]
//! y = x W + b + s D_p(x) Z^T     where d_in <= d_out, else with Z
//! ```
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | `Lambda_b` | `lambda[:, b]`, trained | `[r, n]` |
//! | `Gamma_b` | `gamma[b, :]`, trained | `[n, m]` |
//! | `A` | `small`, shared by all n products and all layers | `[r, m]` |
//! | `B_b` | columns `b r .. (b + 1) r` of `large`, shared by all layers of a size | `[D, n r]` |
//!
//! Trained: `n (r + m)` values, whatever D: smaller r means more of them. Start: `lambda = 0`, `gamma = 1 / max(n, m)`, so
//! the first output is the base's to the bit and gamma has no gradient until lambda moves. Bases: uniform, or in {-1, 0, 1}
//! with `P(-1) = P(1) = 1 / (2 s0)` (sparse: `s0 = 3`; very sparse: `s0 = sqrt(m_max)`, as peft's code, whose text says
//! twice that), divided by their measured standard deviation.
//!
//! The trained scales are applied to the small base, `U = diag(lambda) As diag(gamma)`, `[n r, m]`
//! ([`kernels::scaled_basis`]); the delta is then a product of two factors of rank `K = n r >= m`, and `lowrank_linear`
//! builds `V = W + s dW` for one product. Cost of a step, in multiply-adds, for t tokens and `W [d_in, d_out]` of P values:
//!
//! | | LoRA, rank r | RandLoRA |
//! | --- | --- | --- |
//! | y, dx | `2 t P` | `2 t P` |
//! | V, once where it is kept, else for y and for dx | | `K P`, else `2 K P` |
//! | `dW = x^T dy` | | `t P` |
//! | dU | | `K P` |
//! | factors | `3 t r (d_in + d_out)` | |
//!
//! dlambda and dgamma are sums over all of dU, and dU needs either dW or `t K (d_in + d_out)`, which is more: so a layer
//! takes `(3 t + 2 K) / (2 t)` of a frozen one, at least 1.5. SmolLM2-135M at rank 16 (K = 576, or 192 for k and v), all
//! linear layers: 1.66 times LoRA's at 2048 tokens, 1.52 with the output head, which costs both the same (1.78 and 1.63
//! where V is built twice), and 1.40 and 1.32 as t grows without bound. Only what neither count has (attention, norms, the
//! loss) takes the time closer to 1.4 than that.
//!
//! Saved: x, and V where it is no larger than x, else U (`n r m` values). Where the factors are cheaper (a few tokens), on
//! a packed base and with dropout: U and `x A`, `[t, K]`, as LoRA of rank K.
//!
//! Pairing: peft lays U out with k slow (row `k n + b`) and its bases with b slow (column `b r + k`) and multiplies the
//! two, so its row (k, b) meets another column. Columns are independent, so the law is the paper's. [`RandLoraBases`] holds
//! the bases in peft's order, as in its files, and every layer gets its columns in the order that the formula above asks
//! for; the permutation depends on the layer's n.

use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Module, Param};
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use lowrank_kernels::{self as kernels, Weight};

use super::{Site, StartError};
use crate::linalg;
use crate::lowrank::{cast, dropout_mask};
use crate::random::Stream;

/// Law of the random bases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Density {
    /// Uniform.
    #[default]
    Dense,
    /// One entry in three is not 0.
    Sparse,
    /// One entry in `sqrt(m_max)` is not 0.
    VerySparse,
}

/// The bases as one layer uses them.
#[derive(Clone, Debug)]
struct Slice {
    /// As, `[r, m]` in f32.
    small: Tensor<2>,
    /// Bs, `[D, n r]`, column `b r + k` for (b, k).
    large: Tensor<2>,
}

/// Slices that were made, by the sizes (m, D) of a layer.
type Slices = Arc<Mutex<Vec<([usize; 2], Slice)>>>;

/// The random bases of all layers of a model. Clones share them, and layers of equal sizes share one slice.
#[derive(Clone, Debug)]
pub struct RandLoraBases {
    /// `[r, m_max]`.
    small: Tensor<2>,
    /// `[D_max, n_max r]`, columns as in peft's file.
    large: Tensor<2>,
    /// Type of the large slices.
    dtype: FloatDType,
    slices: Slices,
}

/// Where a layer's column `p` is among the first `n r` columns of peft's file.
///
/// ```
/// use lowrank_core::adapters::randlora::peft_columns;
/// assert_eq!(peft_columns(3, 2), vec![0, 3, 1, 4, 2, 5]);
/// ```
pub fn peft_columns(n: usize, r: usize) -> Vec<usize> {
    (0..n * r).map(|p| (p % r) * n + p / r).collect()
}

/// Values divided by their standard deviation (of `n - 1` degrees of freedom).
fn normalised(mut values: Vec<f32>) -> Vec<f32> {
    let n = values.len() as f64;
    let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let square = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>();
    let deviation = (square / (n - 1.0).max(1.0)).sqrt();
    if deviation > 0.0 {
        values.iter_mut().for_each(|v| *v = (f64::from(*v) / deviation) as f32);
    }
    values
}

fn draw(stream: Stream, count: usize, density: Density, m_max: usize) -> Vec<f32> {
    let tail = match density {
        Density::Dense => return (0..count as u64).map(|i| (2.0 * stream.unit(i) - 1.0) as f32).collect(),
        Density::Sparse => 1.0 / 6.0,
        Density::VerySparse => 0.5 / (m_max as f64).sqrt(),
    };
    let ternary = |unit: f64| match unit {
        unit if unit < tail => -1.0,
        unit if unit > 1.0 - tail => 1.0,
        _ => 0.0,
    };
    (0..count as u64).map(|i| ternary(stream.unit(i))).collect()
}

impl RandLoraBases {
    /// Bases for layers of up to `d_in` inputs and `d_out` outputs (the largest of each).
    pub fn new(d_in: usize, d_out: usize, r: usize, density: Density, seed: u64, device: &Device) -> Self {
        let (m, wide) = (d_in.min(d_out), d_in.max(d_out));
        let n = m.div_ceil(r.max(1));
        let tensor = |name: &str, rows: usize, cols: usize| {
            let values = normalised(draw(Stream::new(seed, name), rows * cols, density, m));
            Tensor::from_data(TensorData::new(values, [rows, cols]), device)
        };
        Self::given(tensor("randlora_A", r, m), tensor("randlora_B", wide, n * r))
    }

    fn given(small: Tensor<2>, large: Tensor<2>) -> Self {
        let small = cast(small, FloatDType::F32);
        let dtype = large.dtype().into();
        Self { small, large, dtype, slices: Slices::default() }
    }

    /// The bases of an adapter file: peft's `randlora_A [r, 1, m_max]` and `randlora_B [D_max, n_max, r]`.
    pub fn from_peft(small: Tensor<3>, large: Tensor<3>) -> Self {
        let ([r, _, m], [wide, n, width]) = (small.dims(), large.dims());
        Self::given(small.reshape([r, m]), large.reshape([wide, n * width]))
    }

    /// `randlora_A` and `randlora_B` as peft stores them.
    pub fn to_peft(&self) -> (Tensor<3>, Tensor<3>) {
        let ([r, m], [wide, columns]) = (self.small.dims(), self.large.dims());
        (self.small.clone().reshape([r, 1, m]), self.large.clone().reshape([wide, columns / r.max(1), r]))
    }

    /// The same with large slices in the type of a run, so that no forward pass has to cast them.
    #[must_use]
    pub fn cast(self, dtype: FloatDType) -> Self {
        Self { dtype, slices: Slices::default(), ..self }
    }

    /// r.
    pub fn rank(&self) -> usize {
        self.small.dims()[0]
    }

    /// What a `[d_in, d_out]` layer uses.
    fn slice(&self, module: &str, [d_in, d_out]: [usize; 2]) -> Result<Slice, StartError> {
        let sizes = [d_in.min(d_out), d_in.max(d_out)];
        let held = [self.small.dims()[1], self.large.dims()[0]];
        if sizes[0] > held[0] || sizes[1] > held[1] {
            return Err(StartError::BasesTooSmall {
                method: "randlora",
                module: module.to_owned(),
                sides: "smaller side, larger side",
                held,
                needed: sizes,
            });
        }
        let mut slices = self.slices.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, slice)) = slices.iter().find(|(known, _)| *known == sizes) {
            return Ok(slice.clone());
        }
        let r = self.rank();
        let columns: Vec<i32> = peft_columns(sizes[0].div_ceil(r), r).into_iter().map(|column| column as i32).collect();
        let count = columns.len();
        let columns = Tensor::<1, Int>::from_data(TensorData::new(columns, [count]), &self.large.device());
        let slice = Slice {
            small: self.small.clone().narrow(1, 0, sizes[0]),
            large: cast(self.large.clone().narrow(0, 0, sizes[1]).select(1, columns), self.dtype),
        };
        slices.push((sizes, slice.clone()));
        Ok(slice)
    }
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RandLoraSettings {
    /// Rank of one product, that of the bases.
    pub r: usize,
    /// s, `alpha / r` in peft.
    pub scale: f32,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl Default for RandLoraSettings {
    fn default() -> Self {
        Self { r: 32, scale: 20.0, dropout: 0.0 }
    }
}

impl RandLoraSettings {
    /// The delta of a layer.
    ///
    /// # Errors
    /// The bases are too small for the layer, or of another rank.
    pub fn init(&self, site: &Site<'_>, bases: &RandLoraBases) -> Result<RandLora, StartError> {
        if bases.rank() != self.r || self.r == 0 {
            return Err(StartError::SharedRank {
                method: "randlora",
                module: site.module.to_owned(),
                what: "the rank of the shared bases",
                expected: bases.rank(),
                got: self.r,
            });
        }
        let [d_in, d_out] = site.dims();
        let m = d_in.min(d_out);
        let n = m.div_ceil(self.r);
        let device = site.weight.device();
        Ok(RandLora {
            lambda: Param::from_tensor(Tensor::zeros([self.r, n], &device)),
            gamma: Param::from_tensor(Tensor::full([n, m], 1.0 / n.max(m) as f64, &device)),
            bases: bases.slice(site.module, [d_in, d_out])?,
            is_small_first: d_in <= d_out,
            scale: self.scale,
            dropout: self.dropout,
        })
    }

    /// Trained values of a layer.
    pub fn parameters(&self, d_in: usize, d_out: usize) -> usize {
        let m = d_in.min(d_out);
        m.div_ceil(self.r.max(1)) * (self.r + m)
    }
}

/// A sum of scaled random products beside a base weight.
#[derive(Module, Debug)]
pub struct RandLora {
    /// Scales inside the products, `[r, n]`.
    pub lambda: Param<Tensor<2>>,
    /// Scales of the smaller side, `[n, m]`.
    pub gamma: Param<Tensor<2>>,
    /// Shared with the layers of equal sizes.
    #[module(skip)]
    bases: Slice,
    /// Whether the smaller side is that of the inputs.
    #[module(skip)]
    is_small_first: bool,
    /// s.
    #[module(skip)]
    pub scale: f32,
    /// Probability that an input of the delta is dropped in training.
    #[module(skip)]
    pub dropout: f64,
}

impl RandLora {
    /// `U[b r + k, j] = lambda[k, b] As[k, j] gamma[b, j]`, `[n r, m]`.
    fn scaled_small(&self) -> Tensor<2> {
        kernels::scaled_basis(self.bases.small.clone(), self.lambda.val(), self.gamma.val())
    }

    /// The two factors of the delta without s, `[d_in, n r]` and `[n r, d_out]`.
    pub fn factors(&self, dtype: FloatDType) -> (Tensor<2>, Tensor<2>) {
        let small = cast(self.scaled_small(), dtype);
        let large = cast(self.bases.large.clone(), dtype);
        if self.is_small_first { (small.transpose(), large.transpose()) } else { (large, small) }
    }

    /// `x W + b + s D_p(x) dW`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x.
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, training: bool) -> Tensor<2> {
        let dtype = x.dtype().into();
        let mask = (training && self.dropout > 0.0).then(|| dropout_mask(x.dims(), self.dropout, dtype, &x.device()));
        let (down, up) = self.factors(dtype);
        kernels::lowrank_linear(x, weight, bias, mask, down, up, self.scale)
    }

    /// `W + s dW` in f32.
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let (down, up) = self.factors(FloatDType::F32);
        cast(weight, FloatDType::F32) + down.matmul(up) * self.scale
    }

    /// Bytes of the bases that layers of equal sizes share.
    pub fn base_bytes(&self) -> usize {
        let bytes = |t: &Tensor<2>| t.shape().num_elements() * t.dtype().size();
        bytes(&self.bases.small) + bytes(&self.bases.large)
    }
}

/// Share of the entries of a basis that are not 0.
pub fn density(basis: &Tensor<2>) -> f64 {
    let values = linalg::host(basis.clone());
    values.iter().filter(|&&v| v != 0.0).count() as f64 / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::Device;

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, site, trained_values};

    const SIZES: [(usize, usize); 5] = [(6, 10), (10, 6), (7, 7), (5, 1), (2, 12)];

    fn bases(r: usize) -> RandLoraBases {
        RandLoraBases::new(10, 12, r, Density::Dense, 3, &Device::flex())
    }

    fn started(d_in: usize, d_out: usize, r: usize, bases: &RandLoraBases) -> RandLora {
        let settings = RandLoraSettings { r, scale: 1.7, dropout: 0.0 };
        let weight = normal("w", d_in, d_out);
        let delta = settings.init(&site("a", &weight), bases).unwrap();
        assert_eq!(trained_values(&delta), settings.parameters(d_in, d_out));
        delta
    }

    fn moved(mut delta: RandLora) -> RandLora {
        let ([r, n], [_, m]) = (delta.lambda.dims(), delta.gamma.dims());
        delta.lambda = delta.lambda.map(|_| normal("lambda", r, n));
        delta.gamma = delta.gamma.map(|_| normal("gamma", n, m));
        delta
    }

    /// peft's own arithmetic, value by value: its U with k slow meets its bases with b slow.
    fn peft_delta(delta: &RandLora, bases: &RandLoraBases, d_in: usize, d_out: usize) -> Vec<f64> {
        let (m, wide) = (d_in.min(d_out), d_in.max(d_out));
        let [r, n] = delta.lambda.dims();
        let [lambda, gamma] = [&delta.lambda, &delta.gamma].map(|p| host(p.val()));
        let (a, b) = bases.to_peft();
        let ([_, _, m_max], [_, n_max, _]) = (a.dims(), b.dims());
        let (a, b) = (host(a.reshape([r, m_max])), host(b.reshape([bases.large.dims()[0], n_max * r])));
        let mut out = vec![0.0f64; d_in * d_out];
        for row in 0..wide {
            for j in 0..m {
                let mut sum = 0.0;
                for i in 0..n * r {
                    let (k, block) = (i / n, i % n);
                    let scaled = f64::from(lambda[k * n + block]) * f64::from(a[k * m_max + j]);
                    sum += f64::from(b[row * n_max * r + i]) * scaled * f64::from(gamma[block * m + j]);
                }
                let at = if d_in <= d_out { j * d_out + row } else { row * d_out + j };
                out[at] = sum * f64::from(delta.scale);
            }
        }
        out
    }

    #[test]
    fn the_delta_is_the_one_of_peft_in_both_orientations() {
        for (d_in, d_out) in SIZES {
            for r in [1, 3, 4] {
                let bases = bases(r);
                let delta = moved(started(d_in, d_out, r, &bases));
                let want: Vec<f32> = peft_delta(&delta, &bases, d_in, d_out).into_iter().map(|v| v as f32).collect();
                let want = Tensor::<2>::from_data(TensorData::new(want, [d_in, d_out]), &Device::flex());
                let w = normal("w", d_in, d_out);
                assert_close(delta.merged(w.clone()) - w.clone(), want.clone(), 2e-6);
                let x = normal("x", 4, d_in);
                let y = delta.forward(x.clone(), w.clone().into(), None, false);
                assert_close(y, x.matmul(w + want), 2e-6);
            }
        }
    }

    #[test]
    fn files_of_peft_come_back_as_they_are() {
        let ours = bases(3);
        let (a, b) = ours.to_peft();
        assert_eq!((a.dims(), b.dims()), ([3, 1, 10], [12, 4, 3]));
        let back = RandLoraBases::from_peft(a, b);
        assert_eq!(host(back.small.clone()), host(ours.small.clone()));
        assert_eq!(host(back.large.clone()), host(ours.large.clone()));
        for (d_in, d_out) in SIZES {
            let [first, second] = [&ours, &back].map(|bases| moved(started(d_in, d_out, 3, bases)));
            let w = normal("w", d_in, d_out);
            assert_eq!(host(first.merged(w.clone())), host(second.merged(w)));
        }
    }

    #[test]
    fn starts_as_the_base_and_only_lambda_has_a_gradient() {
        for (d_in, d_out) in SIZES {
            let delta = started(d_in, d_out, 3, &bases(3));
            let (x, w) = (normal("x", 4, d_in), normal("w", d_out, d_in).transpose());
            let y = delta.forward(x.clone(), w.clone().into(), None, true);
            assert_eq!(host(y), host(kernels::linear(x.clone(), w.clone(), None)));
            let m = d_in.min(d_out) as f32;
            assert!(host(delta.gamma.val()).iter().all(|&g| g == 1.0 / m));
            let lifted = delta.train();
            let gradients = lifted.forward(x, w.into(), None, false).sum().backward();
            assert!(host(lifted.lambda.val().grad(&gradients).unwrap()).iter().any(|&g| g != 0.0));
            assert!(host(lifted.gamma.val().grad(&gradients).unwrap()).iter().all(|&g| g == 0.0));
        }
    }

    #[test]
    fn gradients_agree_with_differences() {
        for (d_in, d_out) in [(6, 10), (10, 6)] {
            let delta = moved(started(d_in, d_out, 3, &bases(3)));
            let (x, w) = (normal("x", 4, d_in), normal("w", d_in, d_out));
            let run = |delta: &RandLora| delta.forward(x.clone(), w.clone().into(), None, false);
            let set = |param: Param<Tensor<2>>, value: Tensor<2>| param.map(|_| value);
            check_gradient(&delta, run, |d| d.lambda.clone(), |d, v| RandLora { lambda: set(d.lambda, v), ..d });
            check_gradient(&delta, run, |d| d.gamma.clone(), |d, v| RandLora { gamma: set(d.gamma, v), ..d });
        }
    }

    #[test]
    fn the_update_has_full_rank() {
        for (d_in, d_out, r) in [(6, 10, 4), (10, 6, 2), (7, 7, 1)] {
            let delta = moved(started(d_in, d_out, r, &bases(r)));
            let update = delta.merged(Tensor::zeros([d_in, d_out], &Device::flex()));
            let values = linalg::svd(update, d_in.min(d_out)).values;
            // Rounding of f32 would leave 1e-7.
            assert!(values[values.len() - 1] > 1e-5 * values[0], "{values:?}");
        }
    }

    #[test]
    fn bases_have_unit_deviation_and_the_right_density() {
        for density in [Density::Dense, Density::Sparse, Density::VerySparse] {
            let bases = RandLoraBases::new(100, 160, 16, density, 5, &Device::flex());
            assert_eq!((bases.small.dims(), bases.large.dims()), ([16, 100], [160, 7 * 16]));
            for basis in [&bases.small, &bases.large] {
                let values = host(basis.clone());
                let n = values.len() as f64;
                let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
                let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (n - 1.0);
                assert!((variance - 1.0).abs() < 1e-5);
                let want: f64 = match density {
                    Density::Dense => 1.0,
                    Density::Sparse => 1.0 / 3.0,
                    Density::VerySparse => 0.1,
                };
                let sigma = (want * (1.0 - want) / n).sqrt();
                assert!((super::density(basis) - want).abs() <= 4.0 * sigma + 1e-12);
            }
        }
    }

    #[test]
    fn layers_of_a_size_share_one_slice() {
        let bases = bases(3);
        for (d_in, d_out) in [(6, 10), (10, 6), (6, 10), (7, 7)] {
            started(d_in, d_out, 3, &bases);
        }
        assert_eq!(bases.slices.lock().unwrap().len(), 2);
        let weight = normal("w", 11, 11);
        let settings = RandLoraSettings { r: 3, ..RandLoraSettings::default() };
        let error = settings.init(&site("q", &weight), &bases).unwrap_err();
        assert_eq!(
            error.to_string(),
            "q: the shared bases of randlora serve layers of up to [10, 12] (smaller side, larger side), this one has [11, 11]"
        );
    }

    #[test]
    fn counts_of_the_paper() {
        let settings = RandLoraSettings::default();
        assert_eq!(settings.parameters(4096, 4096), 528_384);
        assert_eq!(settings.parameters(4096, 14336), 528_384);
        assert_eq!(settings.parameters(768, 3072), 19_200);
    }
}
