//! AdamW with moments in 8 bits (arXiv 2110.02861), as bitsandbytes' blockwise AdamW; torch's form of eps.
//!
//! The step is [`lowrank_kernels::adam8()`], on the device: dequantise, update both moments, take the step from the
//! unrounded moments, quantise. Blocks run over the flattened transpose of R, which is the array of the published code
//! (`[n, r]` of the input side, `[r, m]` of the output side). Matrices of fewer than 4096 values keep f32 moments, as
//! there.
//!
//! State: `2 + 8 / block` bytes a value, 8 where the matrix is small.

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_kernels as kernels;

use super::adamw::rotate_moments;
use super::{AdamForm, AdamW, Rule};
use crate::linalg::host;
use crate::optim::State;
pub use crate::quant::adam8::{Adam8, Moments8};
use crate::quant::{Blockwise8, Map};

/// Fewer values than this are not quantised.
const SMALLEST: usize = 4096;

/// The moments of one matrix.
#[derive(Debug)]
pub struct AdamW8bit {
    betas: (f64, f64),
    eps: f64,
    block: usize,
    rank_axis: usize,
    /// For small matrices.
    full: AdamW,
    codes: Option<Codes>,
    step: u32,
}

#[derive(Debug)]
struct Codes {
    moments: kernels::adam8::Moments8,
    /// Shape of R; the moments belong to its transpose.
    dims: [usize; 2],
}

impl Codes {
    /// m and v in f32, in the shape of R.
    fn values(&self) -> (Tensor<2>, Tensor<2>) {
        let ([rows, cols], device) = (self.dims, self.moments.device());
        let tensor = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [cols, rows]), &device).transpose();
        let Moments8 { first, second } = Moments8::from_device(&self.moments);
        (tensor(first.dequantise(Map::signed())), tensor(second.dequantise(Map::unsigned())))
    }
}

impl AdamW8bit {
    /// Without state; `rank_axis` is the axis of the gradient that a basis spans.
    pub fn new(betas: (f64, f64), eps: f64, block: usize, rank_axis: usize) -> Self {
        let full = AdamW::new(betas, eps, AdamForm::Torch, rank_axis);
        Self { betas, eps, block: block.max(1), rank_axis, full, codes: None, step: 0 }
    }
}

impl Rule for AdamW8bit {
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2> {
        let (dims, device) = (gradient.dims(), gradient.device());
        let len = dims[0] * dims[1];
        if len < SMALLEST {
            return self.full.step(gradient, learning_rate);
        }
        let moments = match self.codes.take() {
            Some(codes) => codes.moments,
            None => kernels::adam8::Moments8::zeros(len, self.block, &device),
        };
        self.step += 1;
        // A parameter of zero and a negative learning rate leave the step to subtract.
        let rule = Adam8 {
            learning_rate: -learning_rate,
            betas: self.betas,
            eps: self.eps,
            weight_decay: 0.0,
            step: self.step,
        };
        let gradient = gradient.transpose();
        let (update, moments) = kernels::adam8(gradient.zeros_like(), gradient, moments, rule);
        self.codes = Some(Codes { moments, dims });
        update.transpose()
    }

    fn momentum(&self) -> Option<Tensor<2>> {
        self.codes.as_ref().map(|codes| codes.values().0).or_else(|| self.full.momentum())
    }

    fn rotate(&mut self, c: &Tensor<2>) {
        self.full.rotate(c);
        if let Some(codes) = &mut self.codes {
            let (first, second) = rotate_moments(codes.values(), c, self.rank_axis, self.betas, self.step);
            let mut moments = Moments8::zeros(codes.dims[0] * codes.dims[1], self.block);
            moments.set(&host(first.transpose()), &host(second.transpose()));
            codes.moments = moments.on_device(&codes.moments.device());
        }
    }

    fn save(&self, into: &mut State) {
        let Some(codes) = &self.codes else { return self.full.save(into) };
        let numbers = [
            ("rule.step", u64::from(self.step)),
            ("rule.rows", codes.dims[0] as u64),
            ("rule.cols", codes.dims[1] as u64),
            ("rule.block", codes.moments.block() as u64),
        ];
        into.numbers.extend(numbers.map(|(key, number)| (key.to_owned(), number)));
        let (Moments8 { first, second }, device) = (Moments8::from_device(&codes.moments), codes.moments.device());
        for (key, part) in [("rule.first", first), ("rule.second", second)] {
            into.bytes.insert(format!("{key}.codes"), part.codes);
            let blocks = part.absmax.len();
            let absmax = TensorData::new(part.absmax, [1, blocks]);
            into.tensors.insert(format!("{key}.absmax"), Tensor::from_data(absmax, &device));
        }
    }

    fn restore(&mut self, from: &mut State) -> Result<(), String> {
        if !from.bytes.contains_key("rule.first.codes") {
            self.codes = None;
            return self.full.restore(from);
        }
        let dims = [from.number("rule.rows")? as usize, from.number("rule.cols")? as usize];
        let (len, block) = (dims[0] * dims[1], from.number("rule.block")? as usize);
        if block != self.block {
            return Err(format!("rule.block is {block}, expected {}", self.block));
        }
        let mut part = |key: &str| -> Result<(Blockwise8, Device), String> {
            let codes = from.bytes.remove(&format!("{key}.codes")).ok_or_else(|| format!("{key}.codes is missing"))?;
            if codes.len() != len {
                return Err(format!("{key}.codes has {} values, expected {len}", codes.len()));
            }
            let absmax = from.tensor(&format!("{key}.absmax"), [1, len.div_ceil(block)])?;
            let device = absmax.device();
            Ok((Blockwise8 { codes, absmax: host(absmax), block }, device))
        };
        let (first, device) = part("rule.first")?;
        let (second, _) = part("rule.second")?;
        self.step = from.number("rule.step")? as u32;
        self.codes = Some(Codes { moments: Moments8 { first, second }.on_device(&device), dims });
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        self.codes.as_ref().map_or_else(|| self.full.state_bytes(), |codes| codes.moments.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_near, matrix};
    use super::*;

    #[test]
    fn small_matrices_have_the_moments_of_adamw() {
        let mut rule = AdamW8bit::new((0.9, 0.999), 1e-8, 256, 0);
        let mut plain = AdamW::new((0.9, 0.999), 1e-8, AdamForm::Torch, 0);
        for step in 0..3 {
            let gradient = matrix(8, 511, &format!("gradient {step}"));
            assert_eq!(host(rule.step(gradient.clone(), 0.1)), host(plain.step(gradient, 0.1)));
        }
        assert_eq!(rule.state_bytes(), 8 * 8 * 511);
    }

    #[test]
    fn large_ones_are_quantised_in_blocks_of_the_transpose() {
        let mut rule = AdamW8bit::new((0.9, 0.999), 1e-8, 256, 0);
        let mut plain = AdamW::new((0.9, 0.999), 1e-8, AdamForm::Torch, 0);
        let gradient = matrix(8, 512, "gradient");
        // The first step does not see the codes.
        let expected: Vec<f64> = host(plain.step(gradient.clone(), 0.1)).into_iter().map(f64::from).collect();
        assert_near(&rule.step(gradient.clone(), 0.1), &expected, 1e-6);
        assert_eq!(rule.state_bytes(), 2 * 4096 + 8 * 16);
        let values: Vec<f32> = host(gradient.transpose()).iter().map(|g| 0.1f64 as f32 * g).collect();
        let expected = Blockwise8::quantise(&values, Map::signed(), 256);
        let got =
            rule.codes.as_ref().map(|codes| Moments8::from_device(&codes.moments).first.absmax).unwrap_or_default();
        for (got, expected) in got.iter().zip(&expected.absmax) {
            assert!((got - expected).abs() < 1e-6);
        }
        let momentum = rule.momentum().map(host).unwrap_or_default();
        let plain = plain.momentum().map(host).unwrap_or_default();
        assert_eq!(momentum.len(), plain.len());
        for (got, expected) in momentum.iter().zip(&plain) {
            assert!((got - expected).abs() < 0.01, "{got} {expected}");
            assert!(got * expected >= 0.0);
        }
    }

    #[test]
    fn a_rotation_by_the_identity_moves_no_code_by_more_than_one() {
        let mut rule = AdamW8bit::new((0.9, 0.999), 1e-8, 256, 1);
        rule.step(matrix(600, 8, "gradient"), 0.1);
        let first = |codes: &Codes| Moments8::from_device(&codes.moments).first.codes;
        let codes = |rule: &AdamW8bit| rule.codes.as_ref().map(first).unwrap_or_default();
        let before = codes(&rule);
        rule.rotate(&Tensor::eye(8, &Device::flex()));
        let after = codes(&rule);
        assert!(before.len() == 4800 && before.iter().zip(&after).all(|(a, b)| a.abs_diff(*b) <= 1));
    }
}
