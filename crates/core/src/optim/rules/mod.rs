//! Rules: what turns the gradient that a method hands them, R, into a step. They know nothing of bases.
//!
//! | rule | state, bytes per value of R |
//! | --- | --- |
//! | [`adamw`] | 8 |
//! | [`adamw8bit`] | `2 + 8 / block`, and 8 below 4096 values |
//! | [`adafactor`] | about 0, and 4 with a first moment |
//! | [`sgd`] | 4, and 0 without momentum |
//! | [`muon`] | 4 |
//!
//! R is `[r, n]` with the basis on the input side, `[m, r]` on the output side. The published code holds transposed
//! weights, so its R is the transpose of this one on either side; that matters where values are grouped (8-bit blocks)
//! and for the scale of Muon.

pub mod adafactor;
pub mod adamw;
pub mod adamw8bit;
pub mod muon;
pub mod sgd;

use burn::tensor::Tensor;

pub use adafactor::Adafactor;
pub use adamw::{AdamForm, AdamW};
pub use adamw8bit::AdamW8bit;
pub use muon::Muon;
pub use sgd::Sgd;

use super::State;

/// A rule with its state for one matrix.
pub trait Rule: std::fmt::Debug + Send {
    /// The step to subtract, learning rate included, in the shape of the gradient.
    fn step(&mut self, gradient: Tensor<2>, learning_rate: f64) -> Tensor<2>;

    /// The first moment in f32; `None` where there is none (yet).
    fn momentum(&self) -> Option<Tensor<2>>;

    /// Takes the state to a new basis, where the rule can: `c = P_new^T P_old`, `[r, r]`.
    fn rotate(&mut self, c: &Tensor<2>) {
        let _ = c;
    }

    /// Writes the state; all keys begin with `rule.`.
    fn save(&self, into: &mut State);

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// Names what is missing or does not fit.
    fn restore(&mut self, from: &mut State) -> Result<(), String>;

    /// Bytes of the state.
    fn state_bytes(&self) -> usize;
}

/// A rule's name and settings.
#[derive(Clone, Debug, PartialEq)]
pub enum RuleConfig {
    /// See [`adamw`].
    AdamW {
        /// Decay rates of the moments.
        betas: (f64, f64),
        /// Added to the denominator.
        eps: f64,
        /// Where it is added.
        form: AdamForm,
    },
    /// See [`adamw8bit`].
    AdamW8bit {
        /// Decay rates of the moments.
        betas: (f64, f64),
        /// Added to the root of the corrected second moment.
        eps: f64,
        /// Values that share a scale.
        block: usize,
    },
    /// See [`adafactor`].
    Adafactor {
        /// Decay rate of the first moment, if there is to be one.
        beta1: Option<f64>,
        /// The second moment's rate at step t is `1 - t^-decay`.
        decay: f64,
        /// Added to the squares.
        eps: f64,
        /// Largest root mean square of a step before the learning rate.
        clip: f64,
    },
    /// See [`sgd`].
    Sgd {
        /// Factor of the buffer; 0 for none.
        momentum: f64,
        /// Looks one step ahead.
        nesterov: bool,
    },
    /// See [`muon`].
    Muon {
        /// Decay rate of the momentum.
        momentum: f64,
        /// Newton-Schulz iterations.
        steps: usize,
        /// Looks one step ahead.
        nesterov: bool,
    },
}

impl RuleConfig {
    /// GaLore's AdamW.
    pub fn galore_adamw() -> Self {
        Self::AdamW { betas: (0.9, 0.999), eps: 1e-6, form: AdamForm::Hf }
    }

    /// The 8-bit AdamW of today's bitsandbytes.
    pub fn adamw8bit() -> Self {
        Self::AdamW8bit { betas: (0.9, 0.999), eps: 1e-8, block: 256 }
    }

    /// GaLore's Adafactor.
    pub fn adafactor() -> Self {
        Self::Adafactor { beta1: None, decay: 0.8, eps: 1e-30, clip: 1.0 }
    }

    /// Muon as published.
    pub fn muon() -> Self {
        Self::Muon { momentum: 0.95, steps: 5, nesterov: true }
    }

    /// The rule without state. `rank_axis` is the axis of the gradient whose length is r: 0 with the basis on the input
    /// side, 1 on the output side.
    pub fn build(&self, rank_axis: usize) -> Box<dyn Rule> {
        match *self {
            Self::AdamW { betas, eps, form } => Box::new(AdamW::new(betas, eps, form, rank_axis)),
            Self::AdamW8bit { betas, eps, block } => Box::new(AdamW8bit::new(betas, eps, block, rank_axis)),
            Self::Adafactor { beta1, decay, eps, clip } => Box::new(Adafactor::new(beta1, decay, eps, clip)),
            Self::Sgd { momentum, nesterov } => Box::new(Sgd::new(momentum, nesterov, rank_axis)),
            Self::Muon { momentum, steps, nesterov } => Box::new(Muon::new(momentum, steps, nesterov, rank_axis)),
        }
    }
}

/// A tensor that goes with the state of one step or more, under one of the keys of a rule.
pub(super) fn save_tensor(into: &mut State, key: &str, tensor: Option<&Tensor<2>>) {
    if let Some(tensor) = tensor {
        into.tensors.insert(key.to_owned(), tensor.clone());
    }
}

/// Checks that two tensors of a saved state belong together.
pub(super) fn same_shape(what: &str, a: Option<&Tensor<2>>, b: Option<&Tensor<2>>) -> Result<(), String> {
    match (a.map(Tensor::dims), b.map(Tensor::dims)) {
        (a, b) if a == b => Ok(()),
        (a, b) => Err(format!("{what} have the shapes {a:?} and {b:?}")),
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![allow(clippy::unwrap_used)]
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::linalg::host;
    use crate::random::Stream;

    /// A matrix of normals.
    pub fn matrix(rows: usize, cols: usize, name: &str) -> Tensor<2> {
        Stream::new(1, name).normal_tensor(rows, cols, 1.0, &Device::flex())
    }

    /// A matrix of given values.
    pub fn of(values: Vec<f32>, dims: [usize; 2]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values, dims), &Device::flex())
    }

    /// Largest difference to values in f64.
    pub fn assert_near(got: &Tensor<2>, expected: &[f64], limit: f64) {
        let got = host(got.clone());
        assert_eq!(got.len(), expected.len());
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            assert!((f64::from(*got) - expected).abs() <= limit, "value {i}: {got} instead of {expected}");
        }
    }

    /// Every rule, on matrices of more and of fewer than 4096 values.
    fn all() -> Vec<RuleConfig> {
        vec![
            RuleConfig::galore_adamw(),
            RuleConfig::AdamW { betas: (0.9, 0.99), eps: 1e-8, form: AdamForm::Torch },
            RuleConfig::adamw8bit(),
            RuleConfig::adafactor(),
            RuleConfig::Adafactor { beta1: Some(0.9), decay: 0.8, eps: 1e-30, clip: 1.0 },
            RuleConfig::Sgd { momentum: 0.0, nesterov: false },
            RuleConfig::Sgd { momentum: 0.9, nesterov: false },
            RuleConfig::Sgd { momentum: 0.9, nesterov: true },
            RuleConfig::muon(),
        ]
    }

    #[test]
    fn a_restored_rule_goes_on_to_the_bit() {
        for config in all() {
            for (axis, dims) in [(0, [4, 24]), (1, [24, 4]), (0, [16, 300]), (1, [300, 16])] {
                let gradient = |step: usize| matrix(dims[0], dims[1], &format!("gradient {step}"));
                let mut rule = config.build(axis);
                for step in 0..2 {
                    let update = rule.step(gradient(step), 0.1);
                    assert_eq!(update.dims(), dims);
                }
                let mut state = State::default();
                rule.save(&mut state);
                assert!(state.tensors.keys().chain(state.bytes.keys()).all(|key| key.starts_with("rule.")));
                assert!(state.numbers.keys().all(|key| key.starts_with("rule.")));
                let mut restored = config.build(axis);
                restored.restore(&mut state).unwrap();
                assert_eq!(rule.state_bytes(), restored.state_bytes());
                assert_eq!(rule.momentum().map(host), restored.momentum().map(host), "{config:?}");
                for step in 2..4 {
                    let (a, b) = (rule.step(gradient(step), 0.1), restored.step(gradient(step), 0.1));
                    assert_eq!(host(a), host(b), "{config:?}, {dims:?}");
                }
            }
        }
    }

    #[test]
    fn an_unused_rule_can_be_saved_and_an_empty_state_is_refused_where_something_is_needed() {
        for config in all() {
            let rule = config.build(0);
            assert_eq!((rule.state_bytes(), rule.momentum().is_none()), (0, true));
            let mut state = State::default();
            rule.save(&mut state);
            config.build(0).restore(&mut state).unwrap();
            assert!(config.build(0).restore(&mut State::default()).unwrap_err().contains("rule."));
        }
    }

    /// On the output side everything is the transpose of the input side.
    #[test]
    fn both_sides_are_mirror_images() {
        for config in all() {
            if matches!(config, RuleConfig::AdamW8bit { .. } | RuleConfig::Muon { .. }) {
                continue; // blocks and Muon's scale follow the published code's transposed arrays on either side
            }
            let (mut input, mut output) = (config.build(0), config.build(1));
            let c = matrix(4, 4, "c").mul_scalar(0.3);
            for step in 0..3 {
                let gradient = matrix(4, 6, &format!("gradient {step}"));
                let a = input.step(gradient.clone(), 0.1);
                let b = output.step(gradient.transpose(), 0.1).transpose();
                let expected: Vec<f64> = host(a).into_iter().map(f64::from).collect();
                assert_near(&b, &expected, 1e-6);
                input.rotate(&c);
                output.rotate(&c);
            }
        }
    }
}
