//! HRA: Householder Reflection Adaptation (arXiv 2405.17484), in compact form.
//!
//! With unit columns `v_i = u_i / ||u_i||` and reflections `H_i = I - 2 v_i v_i^T`:
//!
//! ```text
//! y = (x H_{r-1} ... H_0) W + b = (x - ((x V) T) V^T) W + b,    T^-1 = I / 2 + strictly_lower(V^T V)
//! with Gram-Schmidt:  W' = (I - 2 Q Q^T) W, Q = orthonormal(V);  T = 2 (V^T V)^-1
//! ```
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | u_i | columns of `vectors` | `[d_in, r]` |
//!
//! Trained: `r d_in` values. The adapter acts on x, so any base works and no dense matrix is formed: `4 t d_in r` flops
//! beside the base ([`kernels::lowrank_shift`]), twice that in the backward pass; saved: x and `x V`. The reference
//! multiplies r dense `[d_in, d_in]` matrices in every forward pass. T comes from [`inverse`]: with its derivative, without
//! a power series. V and T are f32; products with x have the type of x.
//!
//! Start: pairs of equal columns, `U(+-1 / sqrt(r / 2))`, whose reflections cancel, so the first output is the base's up to
//! rounding. An odd r cannot cancel and starts at random, as in the reference: the start is then a reflection of W. So does
//! Gram-Schmidt, where the second column of a pair would be 0 / 0 (the reference starts it from rounding noise).
//!
//! Gram-Schmidt enters only by its projector `Q Q^T = V (V^T V)^-1 V^T`, which does not depend on the order of the columns;
//! so no loop over them is on the tape. All singular values and column norms of `W'` are those of W.

use burn::module::{Module, Param};
use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels::{self as kernels, Weight};

use super::{Site, StartError};
use crate::linalg::inverse;
use crate::lowrank::cast;

/// Keeps a zero vector from becoming infinite: its reflection is then the identity.
const TINY: f32 = 1e-24;

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HraSettings {
    /// Number of reflections.
    pub r: usize,
    /// Whether the vectors are made orthogonal.
    pub apply_gs: bool,
}

impl Default for HraSettings {
    fn default() -> Self {
        Self { r: 8, apply_gs: false }
    }
}

impl HraSettings {
    /// The adapter of a layer.
    ///
    /// # Errors
    /// r is 0, or Gram-Schmidt asks for more directions than there are.
    pub fn init(&self, site: &Site<'_>) -> Result<Hra, StartError> {
        let d_in = site.dims()[0];
        if self.r == 0 {
            return Err(StartError::ZeroRank { method: "hra", module: site.module.to_owned(), name: "r" });
        }
        if self.apply_gs && self.r > d_in {
            return Err(StartError::SharedRank {
                method: "hra",
                module: site.module.to_owned(),
                what: "at most d_in with apply_gs",
                expected: d_in,
                got: self.r,
            });
        }
        let device = site.weight.device();
        let random = |columns: usize| site.stream.uniform_tensor(d_in, columns, 1.0 / (columns as f64).sqrt(), &device);
        let vectors = if self.starts_as_identity() {
            let half = random(self.r / 2).reshape([d_in, self.r / 2, 1]);
            half.repeat_dim(2, 2).reshape([d_in, self.r])
        } else {
            random(self.r)
        };
        Ok(Hra { vectors: Param::from_tensor(vectors), apply_gs: self.apply_gs })
    }

    /// Whether the first output is that of the base.
    pub fn starts_as_identity(&self) -> bool {
        self.r.is_multiple_of(2) && !self.apply_gs
    }

    /// Trained values of a layer.
    pub fn parameters(&self, d_in: usize, _d_out: usize) -> usize {
        self.r * d_in
    }
}

/// Reflections of the input of a base layer.
#[derive(Module, Debug)]
pub struct Hra {
    /// u, `[d_in, r]`.
    pub vectors: Param<Tensor<2>>,
    /// Whether the vectors are made orthogonal.
    #[module(skip)]
    pub apply_gs: bool,
}

impl Hra {
    /// V and `T V^T`, `[d_in, r]` and `[r, d_in]`: the product of the reflections is `I - V T V^T`.
    fn factors(&self) -> (Tensor<2>, Tensor<2>) {
        let u = cast(self.vectors.val(), FloatDType::F32);
        let r = u.dims()[1];
        let v = u.clone() / ((u.clone() * u).sum_dim(0) + TINY).sqrt();
        let gram = v.clone().transpose().matmul(v.clone());
        let t = if self.apply_gs {
            inverse::inverse(gram.reshape([1, r, r])).reshape([r, r]) * 2.0
        } else {
            let device = gram.device();
            let below = Tensor::<2>::ones([r, r], &device).tril(-1);
            inverse::lower_triangular_inverse(gram * below + Tensor::<2>::eye(r, &device) * 0.5)
        };
        let turned = t.matmul(v.clone().transpose());
        (v, turned)
    }

    /// `(x R) W + b`.
    ///
    /// # Shapes
    /// `x [t, d_in]`, `weight [d_in, d_out]`, `bias [d_out]`; result `[t, d_out]` in the type of x.
    pub fn forward(&self, x: Tensor<2>, weight: Weight, bias: Option<Tensor<1>>, _training: bool) -> Tensor<2> {
        let dtype = x.dtype().into();
        let (v, turned) = self.factors();
        let reflected = kernels::lowrank_shift(x, cast(v, dtype), cast(turned, dtype), -1.0);
        kernels::linear(reflected, weight, bias)
    }

    /// `R W` in f32.
    pub fn merged(&self, weight: Tensor<2>) -> Tensor<2> {
        let weight = cast(weight, FloatDType::F32);
        let (v, turned) = self.factors();
        weight.clone() - v.matmul(turned.matmul(weight))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, site, trained_values};
    use crate::linalg;

    fn with_vectors(vectors: Tensor<2>, apply_gs: bool) -> Hra {
        Hra { vectors: Param::from_tensor(vectors), apply_gs }
    }

    /// `H_{r-1} ... H_0`, one dense reflection after the other, or `I - 2 Q Q^T` with Q by Gram and Schmidt.
    fn product(vectors: &Tensor<2>, apply_gs: bool) -> Tensor<2> {
        let [d, r] = vectors.dims();
        let values = host(vectors.clone());
        let mut columns: Vec<Vec<f64>> =
            (0..r).map(|i| (0..d).map(|row| f64::from(values[row * r + i])).collect()).collect();
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut all: Vec<f64> = (0..d * d).map(|i| if i % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
        for i in 0..r {
            let mut column = columns[i].clone();
            if apply_gs {
                for done in &columns[..i] {
                    let along = dot(done, &column);
                    column.iter_mut().zip(done).for_each(|(c, d)| *c -= along * d);
                }
            }
            let norm = dot(&column, &column).sqrt();
            column.iter_mut().for_each(|c| *c /= norm);
            // H_i from the left: later reflections meet x first.
            let rows: Vec<f64> = (0..d).map(|j| (0..d).map(|k| column[k] * all[k * d + j]).sum()).collect();
            for k in 0..d {
                for j in 0..d {
                    all[k * d + j] -= 2.0 * column[k] * rows[j];
                }
            }
            columns[i] = column;
        }
        let all: Vec<f32> = all.into_iter().map(|v| v as f32).collect();
        Tensor::from_data(TensorData::new(all, [d, d]), &Device::flex())
    }

    #[test]
    fn the_compact_form_is_the_product_of_the_reflections() {
        for (d, r) in [(9, 1), (9, 2), (9, 5), (12, 8), (3, 7)] {
            for apply_gs in [false, true] {
                if apply_gs && r > d {
                    continue;
                }
                let hra = with_vectors(normal("u", d, r), apply_gs);
                let rotation = product(&hra.vectors.val(), apply_gs);
                let (x, w) = (normal("x", 4, d), normal("w", d, 6));
                let want = rotation.matmul(w.clone());
                assert_close(hra.merged(w.clone()), want.clone(), 3e-6);
                let y = hra.forward(x.clone(), w.into(), None, true);
                assert_close(y, x.matmul(want), 3e-6);
            }
        }
    }

    #[test]
    fn even_starts_cancel_and_others_reflect() {
        for (r, apply_gs) in [(2, false), (8, false), (3, false), (4, true)] {
            let settings = HraSettings { r, apply_gs };
            let w = normal("w", 16, 5);
            let hra = settings.init(&site("a", &w)).unwrap();
            assert_eq!(trained_values(&hra), settings.parameters(16, 5));
            let x = normal("x", 4, 16);
            let base = x.clone().matmul(w.clone());
            let y = hra.forward(x, w.clone().into(), None, true);
            if settings.starts_as_identity() {
                assert_close(y, base, 1e-6);
                let values = host(hra.vectors.val());
                assert!(values.chunks(2).all(|pair| pair[0] == pair[1]));
                let bound = 1.0 / (r as f32 / 2.0).sqrt();
                assert!(values.iter().all(|v| v.abs() <= bound));
            } else {
                let moved = host((y - base).abs()).into_iter().fold(0.0, f32::max);
                assert!(moved > 0.1);
            }
        }
    }

    #[test]
    fn it_is_a_rotation_of_the_columns() {
        for apply_gs in [false, true] {
            let hra = with_vectors(normal("u", 16, 6), apply_gs);
            let eye = Tensor::<2>::eye(16, &Device::flex());
            let rotation = hra.merged(eye.clone());
            assert_close(rotation.clone().matmul(rotation.clone().transpose()), eye.clone(), 1e-5);
            if apply_gs {
                assert_close(rotation.clone().matmul(rotation.clone()), eye, 1e-5);
                assert_close(rotation.clone().transpose(), rotation.clone(), 1e-5);
            }
            let w = normal("w", 16, 7);
            let merged = hra.merged(w.clone());
            let norms = |w: &Tensor<2>| (w.clone() * w.clone()).sum_dim(0).sqrt();
            assert_close(norms(&merged), norms(&w), 1e-5);
            let [a, b] = [&merged, &w].map(|w| linalg::svd(w.clone(), 7).values);
            assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-5 * b));
            // The transpose takes it back.
            assert_close(rotation.transpose().matmul(merged), w, 1e-5);
        }
    }

    #[test]
    fn members_of_a_pair_can_be_exchanged_and_a_zero_vector_does_nothing() {
        let w = normal("w", 10, 4);
        let hra = HraSettings { r: 2, apply_gs: false }.init(&site("a", &w)).unwrap();
        let swapped = with_vectors(hra.vectors.val().flip([1]), false);
        assert_eq!(host(hra.merged(w.clone())), host(swapped.merged(w.clone())));
        let u = normal("u", 10, 3);
        let padded = Tensor::cat(vec![u.clone(), Tensor::zeros([10, 1], &Device::flex())], 1);
        assert_close(with_vectors(padded, false).merged(w.clone()), with_vectors(u, false).merged(w), 1e-6);
    }

    #[test]
    fn gradients_agree_with_differences() {
        for (vectors, apply_gs) in [
            (normal("u", 9, 5), false),
            (normal("u", 9, 4), true),
            (normal("u", 9, 2).reshape([9, 2, 1]).repeat_dim(2, 2).reshape([9, 4]), false),
        ] {
            let hra = with_vectors(vectors, apply_gs);
            let (x, w) = (normal("x", 4, 9), normal("w", 9, 6));
            let run = |hra: &Hra| hra.forward(x.clone(), w.clone().into(), None, true);
            check_gradient(&hra, run, |hra| hra.vectors.clone(), |hra, v| with_vectors(v, hra.apply_gs));
        }
    }

    #[test]
    fn impossible_numbers_of_reflections_are_refused() {
        let w = normal("w", 4, 4);
        let error = HraSettings { r: 0, apply_gs: false }.init(&site("q", &w)).unwrap_err();
        assert_eq!(error.to_string(), "q: r of hra is 0, expected at least 1");
        let error = HraSettings { r: 5, apply_gs: true }.init(&site("q", &w)).unwrap_err();
        assert_eq!(error.to_string(), "q: hra expects r = 4 (at most d_in with apply_gs), got 5");
    }
}
