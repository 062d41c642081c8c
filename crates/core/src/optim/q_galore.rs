//! Q-GaLore (arXiv 2407.08296): GaLore with an int4 basis, refreshes that become rare where the subspace has settled, 8-bit
//! Adam and int8 weights.
//!
//! * **Basis.** Asymmetric int4 in groups of 256 of the flattened array (`[r, m]` on the input side, `[n, r]` on the output
//!   side, as in the authors' code). Everything uses the dequantised basis, for projecting and for projecting back; it is not
//!   made orthonormal again.
//! * **Lazy refresh.** At a refresh the first direction before quantisation is compared with its predecessor:
//!   `c = |<u_old, u_new>|` (the authors' signed cosine depends on the sign an SVD happens to return). With the last five
//!   values at hand and their mean at least 0.4, the gap doubles. The next refresh is the next step divisible by the new gap.
//! * **Weights** are rounded stochastically: see [`super::Weights`].
//!
//! Basis and weights have the quantised values but are held in f32 here: what they cost in memory is GaLore's. State beside
//! GaLore's: one vector of length m or n and five numbers.

use std::collections::VecDeque;

use burn::tensor::{Tensor, TensorData};

use super::State;
use super::subspace::Basis;
use crate::linalg;
use crate::quant::Groups;

/// Hyper-parameters beyond GaLore's.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// Bits of the basis, 4 or 8.
    pub basis_bits: u8,
    /// Values that share a scale and a zero.
    pub group: usize,
    /// Mean similarity from which the gap grows.
    pub cos_threshold: f64,
    /// Factor of the gap.
    pub gamma_proj: u64,
    /// Similarities that are averaged.
    pub queue_size: usize,
}

impl Default for Quantised {
    fn default() -> Self {
        Self { basis_bits: 4, group: 256, cos_threshold: 0.4, gamma_proj: 2, queue_size: 5 }
    }
}

impl Quantised {
    /// The basis after quantisation and back.
    pub fn round_trip(&self, basis: Basis) -> Basis {
        let through = |values: Tensor<2>| {
            let (dims, device) = (values.dims(), values.device());
            let groups = Groups::quantise(&linalg::host(values), self.basis_bits, self.group);
            Tensor::from_data(TensorData::new(groups.dequantise(), dims), &device)
        };
        Basis { left: basis.left.map(|left| through(left.transpose()).transpose()), right: basis.right.map(through) }
    }
}

/// The gap of one matrix, and what decides when it grows.
#[derive(Clone, Debug)]
pub struct LazyGap {
    gap: u64,
    last: Option<Tensor<2>>,
    similarities: VecDeque<f64>,
}

impl LazyGap {
    /// Starts with the configured gap.
    pub fn new(config: &Quantised, gap: u64) -> Self {
        Self { gap, last: None, similarities: VecDeque::with_capacity(config.queue_size) }
    }

    /// Steps between refreshes now.
    pub fn gap(&self) -> u64 {
        self.gap
    }

    /// Compares the first direction of a new basis with the last one's.
    pub fn watch(&mut self, config: &Quantised, basis: Option<&Tensor<2>>) {
        let Some(basis) = basis else { return };
        let first = basis.clone().slice([0..basis.dims()[0], 0..1]);
        if let Some(last) = self.last.replace(first.clone()) {
            let cosine = f64::from((first * last).sum().into_scalar::<f32>()).abs();
            self.push(config, cosine);
        }
    }

    fn push(&mut self, config: &Quantised, cosine: f64) {
        if self.similarities.len() == config.queue_size {
            self.similarities.pop_front();
        }
        self.similarities.push_back(cosine);
        let mean = self.similarities.iter().sum::<f64>() / self.similarities.len() as f64;
        if self.similarities.len() == config.queue_size && mean >= config.cos_threshold {
            self.gap = self.gap.saturating_mul(config.gamma_proj);
        }
    }

    /// Writes gap, similarities and the last direction.
    pub fn save(&self, state: &mut State) {
        state.numbers.insert("gap".to_owned(), self.gap);
        state.numbers.insert("similarities".to_owned(), self.similarities.len() as u64);
        for (index, cosine) in self.similarities.iter().enumerate() {
            state.numbers.insert(format!("similarity_{index}"), cosine.to_bits());
        }
        if let Some(last) = &self.last {
            state.tensors.insert("first_direction".to_owned(), last.clone());
        }
    }

    /// Reads them back.
    ///
    /// # Errors
    /// Something is missing.
    pub fn restore(&mut self, state: &mut State) -> Result<(), String> {
        self.gap = state.number("gap")?;
        let count = state.number("similarities")?;
        self.similarities = (0..count)
            .map(|index| state.number(&format!("similarity_{index}")).map(f64::from_bits))
            .collect::<Result<_, _>>()?;
        self.last = state.tensors.remove("first_direction");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// With a direction that never moves and a gap of 200: refreshes at 0, 200, .. 1000 (six, five similarities), then at
    /// 1200, 1600, 3200 and 6400.
    #[test]
    fn the_gap_doubles_from_the_sixth_refresh_on() {
        let config = Quantised::default();
        let mut lazy = LazyGap::new(&config, 200);
        let basis = Tensor::<2>::from_floats([[1.0, 0.0], [0.0, 1.0]], &burn::tensor::Device::flex());
        let mut refreshes = vec![];
        for step in 0..8000u64 {
            if step.is_multiple_of(lazy.gap()) {
                refreshes.push(step);
                lazy.watch(&config, Some(&basis));
            }
        }
        assert_eq!(refreshes, [0, 200, 400, 600, 800, 1000, 1200, 1600, 3200, 6400]);
    }

    #[test]
    fn the_threshold_itself_doubles_and_four_values_never_do() {
        let config = Quantised::default();
        let mut lazy = LazyGap::new(&config, 10);
        for _ in 0..4 {
            lazy.push(&config, 1.0);
        }
        assert_eq!(lazy.gap(), 10);
        let mut lazy = LazyGap::new(&Quantised { cos_threshold: 0.5, ..config.clone() }, 10);
        for _ in 0..5 {
            lazy.push(&Quantised { cos_threshold: 0.5, ..config.clone() }, 0.5);
        }
        assert_eq!(lazy.gap(), 20);
    }

    #[test]
    fn the_sign_of_a_direction_does_not_matter() {
        let config = Quantised::default();
        let mut lazy = LazyGap::new(&config, 10);
        let device = burn::tensor::Device::flex();
        for step in 0..6 {
            let sign = if step % 2 == 0 { 1.0 } else { -1.0 };
            lazy.watch(&config, Some(&Tensor::<2>::from_floats([[sign], [0.0]], &device)));
        }
        assert_eq!(lazy.gap(), 20);
    }

    /// Measured on a random orthonormal 4096 x 1024 basis: error 0.109, `||P^T P - I||` 0.17; here a smaller one.
    #[test]
    fn an_int4_basis_is_a_tenth_off() {
        let device = burn::tensor::Device::flex();
        let basis = linalg::orthonormal(linalg::gaussian(1, "basis", 1024, 64, 1.0, &device));
        let config = Quantised::default();
        let through = config.round_trip(Basis { left: Some(basis.clone()), right: None }).left.unwrap();
        let error = linalg::host(through - basis.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        let relative = error / 64f64.sqrt();
        assert!((0.08..0.14).contains(&relative), "{relative}");
    }
}
