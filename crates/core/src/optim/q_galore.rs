//! Q-GaLore (arXiv 2407.08296): GaLore with an int4 basis, refreshes that become rare where the subspace has settled, 8-bit
//! Adam and int8 weights, all of them held so.
//!
//! * **Basis.** Asymmetric int4 in groups of 256 of the flattened array (`[r, m]` on the input side, `[n, r]` on the output
//!   side, as in the authors' code). Everything uses the dequantised basis, for projecting and for projecting back; it is not
//!   made orthonormal again.
//! * **Lazy refresh.** At a refresh the first direction before quantisation is compared with its predecessor:
//!   `c = |<u_old, u_new>|` (the authors' signed cosine depends on the sign an SVD happens to return). With the last five
//!   values at hand and their mean at least 0.4, the gap doubles. The next refresh is the next step divisible by the new gap.
//! * **Weights** are held in 8 bits and rounded stochastically after each step: `W = round(W^ + update)`, where `W^` are the
//!   values of the codes, which forward and `dx` use too. Groups of 256 of the flattened `[m, n]` matrix get a new scale and zero
//!   from the values of each step ([`crate::quant::groups`]). A run starts from weights that were rounded to the nearest.
//!
//! Nothing dense is held: weights ([`crate::base::PackedBase`]) and basis ([`Directions::Packed`](crate::Directions)) are codes,
//! which products dequantise panel by panel (weights) or for the time of one product (bases). Only while a matrix is updated do
//! its values exist in f32: codes to f32, `W - scale P N` in place, codes again ([`lowrank_kernels::pack_groups`], on the device), so that
//! beside the codes there are up to `(5 + 5/g) m n + 4 m r` bytes, for one matrix at a time.
//!
//! Bytes of a matrix `[m, n]` with its basis on the input side, for groups of g (256), blocks of b (256) and a norm sketch of s (8)
//! columns; R is `[r, n]`, its M and V are codes on the host:
//!
//! ```text
//! W      (1 + 5/g) m n
//! P      (1/2 + 5/g) m r + 4 m s
//! M, V   (2 + 8/b) r n
//! R      4 (r + s) n                      until the update, which need not wait where gradients are not clipped
//! u      4 m                              the first direction, for the lazy gap
//! ```
//!
//! LLaMA 7B: 32 layers with `sum m n = 202 375 168`, `sum m = 35 584` and `sum n = 42 496`, r = 1024, in GiB:
//!
//! | | packed | in f32 |
//! | --- | --- | --- |
//! | W | 6.15 | 24.13 |
//! | P with the sketch | 0.60 | 4.38 |
//! | M, V | 2.63 | 2.63 |
//! | embedding, head and norms with f32 moments | 2.93 | 2.93 |
//! | together | 12.31 | 34.07 |
//!
//! To that come the gradients of one block, or of the head (0.49), the block's inputs (0.50 for 2048 tokens in bf16) and what one
//! rebuilt block keeps: `lowrank-train plan` adds them up, and its test asserts that the sum stays below 16 GiB.

use std::collections::VecDeque;

use burn::tensor::{Tensor, TensorData};
use lowrank_kernels::Packed;
use lowrank_kernels::packed::Order;

use super::State;
use super::subspace::Basis;
use crate::linalg;
use crate::quant::packed::{from_groups, to_groups};
use crate::quant::{Format, Groups, Quantisation};

/// Order of the codes of P: each direction by itself.
pub(super) const LEFT: Order = Order::Outputs;
/// Order of the codes of Q: as it lies, `[n, r]`.
pub(super) const RIGHT: Order = Order::Inputs;

/// Hyper-parameters beyond GaLore's.
#[derive(Clone, Debug, PartialEq)]
pub struct Quantised {
    /// Bits of the basis, 4 or 8.
    pub basis_bits: u8,
    /// Values that share a scale and a zero, a multiple of 8.
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
    /// P and Q as codes.
    pub fn pack(&self, basis: Basis) -> [Option<Packed>; 2] {
        let format = if self.basis_bits == 8 { Format::Int8 } else { Format::Int4 };
        let packed = |values: Tensor<2>, order: Order| {
            Quantisation { format, block: self.group, double: false, order }.pack_tensor(values)
        };
        [basis.left.map(|left| packed(left, LEFT)), basis.right.map(|right| packed(right, RIGHT))]
    }

    /// Reads the codes of a basis back, where there are any.
    ///
    /// # Errors
    /// A part is missing, or has another size than the matrix and the settings say.
    pub(super) fn restore_basis(
        &self,
        key: &str,
        dims: [usize; 2],
        order: Order,
        state: &mut State,
    ) -> Result<Option<Packed>, String> {
        let Some(codes) = state.bytes.remove(&format!("{key}.codes")) else { return Ok(None) };
        let (bits, group, len) = (self.basis_bits, self.group, dims[0] * dims[1]);
        let count = len.div_ceil(group);
        let scale = state.tensor(&format!("{key}.scale"), [1, count])?;
        let zero = state.bytes.remove(&format!("{key}.zero")).ok_or_else(|| format!("{key}.zero is missing"))?;
        let bytes = (len * usize::from(bits)).div_ceil(8);
        if (codes.len(), zero.len()) != (bytes, count) {
            let got = (codes.len(), zero.len());
            return Err(format!("the codes and zeros of {key} are {got:?} bytes, expected {:?}", (bytes, count)));
        }
        let device = scale.device();
        let groups = Groups { bits, codes, scale: linalg::host(scale), zero, group, len };
        Ok(Some(from_groups(&groups, dims, order, &device)))
    }
}

/// Adds the codes of a basis to a state.
pub(super) fn save_basis(key: &str, basis: &Packed, state: &mut State) {
    let Some(Groups { codes, scale, zero, .. }) = to_groups(basis) else { return };
    let scale = TensorData::new(scale, [1, zero.len()]);
    state.tensors.insert(format!("{key}.scale"), Tensor::from_data(scale, &basis.device()));
    state.bytes.insert(format!("{key}.codes"), codes);
    state.bytes.insert(format!("{key}.zero"), zero);
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
        let rows = basis.dims()[0];
        // Values of its own: a slice would keep the whole basis.
        let first = TensorData::new(linalg::host(basis.clone().slice([0..rows, 0..1])), [rows, 1]);
        let first = Tensor::<2>::from_data(first, &basis.device());
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
#[path = "q_galore_tests.rs"]
mod tests;
