//! VeRA: Vector-based Random Matrix Adaptation (arXiv 2310.11454).
//!
//! `y = x W + b + (((D(x) A) * d) B) * c`, with A and B random, frozen and shared by all layers.
//!
//! | paper | field | shape |
//! | --- | --- | --- |
//! | A (transposed) | `down`, the first `d_in` rows of [`VeraBases`] | `[d_in, r]` |
//! | `Lambda_d` | `core`, diagonal | `[1, r]` |
//! | B (transposed) | `up`, the first `d_out` columns of [`VeraBases`] | `[r, d_out]` |
//! | `Lambda_b` | `out_scale` | `[1, d_out]` |
//!
//! Trained: d and c, `r + d_out` values. Start: `d = d_initial`, `c = 0`, so the first output is the base's to the bit. Bases,
//! at the largest sizes of the model: `A ~ U(+-sqrt(6 / d_in))`, `B ~ U(+-sqrt(6 / r))` (Kaiming uniform for a rectifier, as
//! peft). There is no scale s. Flops as LoRA's, `2 t r (d_in + d_out)`; of x only `x A` is kept for the backward pass.
//!
//! peft draws its bases with torch's generator; ours are other numbers of the same law. Files of both hold the bases.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::{Device, FloatDType, Tensor};

use super::{Site, StartError};
use crate::LowRank;
use crate::lowrank::cast;
use crate::random::Stream;

/// Slices that were handed out, by their size.
type Slices = Arc<Mutex<Vec<(usize, Tensor<2>)>>>;

/// A and B of all layers of a model. Clones share them, and layers of equal size share one slice.
#[derive(Clone, Debug)]
pub struct VeraBases {
    down: Tensor<2>,
    up: Tensor<2>,
    downs: Slices,
    ups: Slices,
}

impl VeraBases {
    /// Bases for layers of up to the given sizes.
    pub fn new(d_in: usize, d_out: usize, r: usize, seed: u64, device: &Device) -> Self {
        let bound = |fan: usize| (6.0 / fan as f64).sqrt();
        let down = Stream::new(seed, "vera_A").uniform_tensor(d_in, r, bound(d_in), device);
        let up = Stream::new(seed, "vera_B").uniform_tensor(r, d_out, bound(r), device);
        Self::given(down, up)
    }

    /// Known bases, A `[d_in, r]` and B `[r, d_out]`: the transposes of peft's `vera_A` and `vera_B`.
    pub fn given(down: Tensor<2>, up: Tensor<2>) -> Self {
        Self { down, up, downs: Slices::default(), ups: Slices::default() }
    }

    /// The same in the type of a run, so that no forward pass has to cast them.
    #[must_use]
    pub fn cast(self, dtype: FloatDType) -> Self {
        Self::given(cast(self.down, dtype), cast(self.up, dtype))
    }

    /// A and B in full, `[d_in, r]` and `[r, d_out]`.
    pub fn full(&self) -> (Tensor<2>, Tensor<2>) {
        (self.down.clone(), self.up.clone())
    }

    /// The leading parts that a `[d_in, d_out]` layer uses.
    ///
    /// # Errors
    /// The layer is larger than the bases.
    pub fn slices(&self, module: &str, [d_in, d_out]: [usize; 2]) -> Result<(Tensor<2>, Tensor<2>), StartError> {
        let held = [self.down.dims()[0], self.up.dims()[1]];
        if d_in > held[0] || d_out > held[1] {
            return Err(StartError::BasesTooSmall {
                method: "vera",
                module: module.to_owned(),
                sides: "inputs, outputs",
                held,
                needed: [d_in, d_out],
            });
        }
        let down = slice(&self.downs, d_in, held[0], &self.down, 0);
        Ok((down, slice(&self.ups, d_out, held[1], &self.up, 1)))
    }
}

/// The first `size` of `all` rows (axis 0) or columns (axis 1), made once for each size.
fn slice(made: &Slices, size: usize, all: usize, full: &Tensor<2>, axis: usize) -> Tensor<2> {
    if size == all {
        return full.clone();
    }
    let mut made = made.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, slice)) = made.iter().find(|(known, _)| *known == size) {
        return slice.clone();
    }
    let slice = full.clone().narrow(axis, 0, size);
    made.push((size, slice.clone()));
    slice
}

/// What one projection gets.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Vera {
    /// Rank, that of the bases.
    pub r: usize,
    /// First value of d.
    pub d_initial: f64,
    /// Dropout of the delta's input.
    pub dropout: f64,
}

impl Default for Vera {
    fn default() -> Self {
        Self { r: 256, d_initial: 0.1, dropout: 0.0 }
    }
}

impl Vera {
    /// The delta of a layer.
    ///
    /// # Errors
    /// The bases are too small for the layer, or of another rank.
    pub fn init(&self, site: &Site<'_>, bases: &VeraBases) -> Result<LowRank, StartError> {
        let rank = bases.down.dims()[1];
        if rank != self.r || self.r == 0 {
            return Err(StartError::SharedRank {
                method: "vera",
                module: site.module.to_owned(),
                what: "the rank of the shared bases",
                expected: rank,
                got: self.r,
            });
        }
        let (down, up) = bases.slices(site.module, site.dims())?;
        let device = site.weight.device();
        let d = Tensor::full([1, self.r], self.d_initial, &device);
        let c = Tensor::zeros([1, site.dims()[1]], &device);
        Ok(LowRank::new(down, up, 1.0, self.dropout).with_core(d).with_out_scale(c).frozen_factors())
    }

    /// Trained values of a layer.
    pub fn parameters(&self, _d_in: usize, d_out: usize) -> usize {
        self.r + d_out
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::module::Module as _;
    use burn::tensor::Device;
    use lowrank_kernels as kernels;

    use super::*;
    use crate::adapters::checks::{assert_close, check_gradient, host, normal, site, trained_values};

    fn bases() -> VeraBases {
        VeraBases::new(12, 10, 4, 7, &Device::flex())
    }

    fn started(name: &str, d_in: usize, d_out: usize, bases: &VeraBases) -> LowRank {
        let vera = Vera { r: 4, ..Vera::default() };
        let weight = normal(name, d_in, d_out);
        let delta = vera.init(&site(name, &weight), bases).unwrap();
        assert_eq!(trained_values(&delta), vera.parameters(d_in, d_out));
        delta
    }

    #[test]
    fn starts_as_the_base_and_follows_the_formula() {
        for (d_in, d_out) in [(12, 10), (7, 5), (5, 10), (1, 3)] {
            let mut delta = started("a", d_in, d_out, &bases());
            let (x, w) = (normal("x", 3, d_in), normal("w", d_out, d_in).transpose());
            let base = kernels::linear(x.clone(), w.clone(), None);
            assert_eq!(host(delta.forward(x.clone(), w.clone().into(), None, true)), host(base.clone()));
            assert!(host(delta.core.clone().unwrap().val()).iter().all(|&d| d == 0.1));
            let (d, c) = (normal("d", 1, 4), normal("c", 1, d_out));
            delta.core = delta.core.map(|core| core.map(|_| d.clone()));
            delta.out_scale = delta.out_scale.map(|scale| scale.map(|_| c.clone()));
            let (a, b) = bases().full();
            let (a, b) = (a.narrow(0, 0, d_in), b.narrow(1, 0, d_out));
            let want = base + ((x.clone().matmul(a) * d).matmul(b)) * c;
            assert_close(delta.forward(x.clone(), w.clone().into(), None, false), want.clone(), 1e-5);
            assert_close(x.matmul(w + delta.delta()), want, 1e-5);
        }
    }

    #[test]
    fn layers_share_their_slices() {
        let bases = bases();
        for (name, d_in, d_out) in [("a", 7, 10), ("b", 7, 5), ("c", 12, 5), ("d", 7, 5)] {
            started(name, d_in, d_out, &bases);
        }
        // One slice for d_in = 7, one for d_out = 5; the full sizes are the bases themselves.
        assert_eq!(bases.downs.lock().unwrap().len(), 1);
        assert_eq!(bases.ups.lock().unwrap().len(), 1);
        let (a, b) = bases.full();
        let (small_a, small_b) = bases.slices("a", [7, 5]).unwrap();
        assert_eq!(host(small_a), host(a)[..7 * 4]);
        assert_eq!(host(small_b), host(b.narrow(1, 0, 5)));
    }

    #[test]
    fn bases_have_the_law_of_peft() {
        let (a, b) = VeraBases::new(300, 200, 50, 1, &Device::flex()).full();
        for (values, fan) in [(host(a), 300.0f64), (host(b), 50.0)] {
            let bound = (6.0 / fan).sqrt();
            let largest = values.iter().fold(0.0f64, |max, &v| max.max(f64::from(v).abs()));
            assert!(largest <= bound && largest > 0.999 * bound);
            let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / values.len() as f64;
            // bound^2 / 3; the standard error at 1e4 values is 0.9 %.
            assert!((variance / (bound * bound / 3.0) - 1.0).abs() < 0.036);
        }
    }

    #[test]
    fn too_small_bases_are_refused() {
        let weight = normal("w", 13, 10);
        let vera = Vera { r: 4, ..Vera::default() };
        let error = vera.init(&site("layers.0.q", &weight), &bases()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "layers.0.q: the shared bases of vera serve layers of up to [12, 10] (inputs, outputs), this one has [13, 10]"
        );
        let weight = normal("w", 12, 10);
        let error = Vera::default().init(&site("q", &weight), &bases()).unwrap_err();
        assert_eq!(error.to_string(), "q: vera expects r = 4 (the rank of the shared bases), got 256");
    }

    #[test]
    fn gradients_of_both_vectors_and_of_nothing_else() {
        let mut delta = started("a", 7, 5, &bases());
        delta.out_scale = delta.out_scale.map(|scale| scale.map(|_| normal("c", 1, 5)));
        let (x, w) = (normal("x", 6, 7), normal("w", 7, 5));
        let run = |delta: &LowRank| delta.forward(x.clone(), w.clone().into(), None, false);
        check_gradient(
            &delta,
            run,
            |delta| delta.core.clone().unwrap(),
            |mut delta, value| {
                delta.core = delta.core.map(|core| core.map(|_| value));
                delta
            },
        );
        check_gradient(
            &delta,
            run,
            |delta| delta.out_scale.clone().unwrap(),
            |mut delta, value| {
                delta.out_scale = delta.out_scale.map(|scale| scale.map(|_| value));
                delta
            },
        );
        let lifted = delta.clone().train();
        let gradients = run(&lifted).sum().backward();
        assert!(lifted.down.val().grad(&gradients).is_none() && lifted.up.val().grad(&gradients).is_none());
    }
}
