//! AdamW: decoupled weight decay (arXiv 1711.05101), equal to `torch.optim.AdamW`.
//!
//! The update is in [`lowrank_kernels::adamw`]. State: two f32 moments, 8 bytes a trained value.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

/// Hyper-parameters, with torch's defaults (weight decay: off).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8 }
    }
}

/// Moments of one parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    /// m, shape of the parameter.
    pub first: Tensor<2>,
    /// v, shape of the parameter.
    pub second: Tensor<2>,
    /// Steps taken.
    pub step: u32,
}

/// The optimiser with the state of every parameter it has seen.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    /// By parameter name.
    pub state: BTreeMap<String, Moments>,
}

/// What changes from parameter to parameter and step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepRule {
    /// Learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Multiplies the gradient (global-norm clipping).
    pub gradient_scale: f64,
}

impl AdamW {
    /// An optimiser without state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, state: BTreeMap::new() }
    }

    /// Updates one parameter `[m, n]` (f32) with its gradient of the same shape.
    pub fn step(&mut self, name: &str, parameter: Tensor<2>, gradient: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let Moments { first, second, step } = self.state.remove(name).unwrap_or_else(|| Moments {
            first: Tensor::zeros(parameter.dims(), &parameter.device()),
            second: Tensor::zeros(parameter.dims(), &parameter.device()),
            step: 0,
        });
        let step = step + 1;
        let rule = kernels::AdamW {
            learning_rate: rule.learning_rate,
            betas: self.config.betas,
            eps: self.config.eps,
            weight_decay: rule.weight_decay,
            step,
            gradient_scale: rule.gradient_scale,
        };
        let (parameter, first, second) = kernels::adamw(parameter, first, second, gradient, rule);
        self.state.insert(name.to_owned(), Moments { first, second, step });
        parameter
    }

    /// Bytes of all moments.
    pub fn state_bytes(&self) -> usize {
        self.state.values().map(|moments| 8 * moments.first.shape().num_elements()).sum()
    }
}
