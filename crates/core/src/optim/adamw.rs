//! AdamW: decoupled weight decay (arXiv 1711.05101), equal to `torch.optim.AdamW`, or in the form of the GaLore family.
//!
//! The update is in [`lowrank_kernels::adamw`]. State: two f32 moments, 8 bytes a trained value.
//!
//! | form | step | decay |
//! | --- | --- | --- |
//! | torch | `lr (m / c1) / (sqrt(v / c2) + eps)` | before the update |
//! | HF | `lr sqrt(c2) / c1 * m / (sqrt(v) + eps)` | after the update, on the updated weight |
//!
//! The steps are equal where `eps_torch = eps_hf / sqrt(c2)`, with `c1 = 1 - b1^t` and `c2 = 1 - b2^t`.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use lowrank_kernels as kernels;

use super::State;
use super::rules::AdamForm;

/// Hyper-parameters, with torch's defaults (weight decay: off).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
    /// Where eps is added and when the weight decays.
    pub form: AdamForm,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { betas: (0.9, 0.999), eps: 1e-8, form: AdamForm::Torch }
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

/// A parameter `[m, n]` (f32), its gradient of the same shape, and the rule of the step.
#[derive(Clone, Debug)]
pub struct Update {
    /// Name of the parameter.
    pub name: String,
    /// Its value before the step.
    pub parameter: Tensor<2>,
    /// Its gradient.
    pub gradient: Tensor<2>,
    /// How it is updated.
    pub rule: StepRule,
}

/// Parameters that are updated by the same numbers.
struct Group {
    key: (StepRule, u32),
    /// Where each came from, and its name.
    members: Vec<(usize, String)>,
    /// Parameter, moments, gradient.
    sets: Vec<[Tensor<2>; 4]>,
}

/// The eps of torch's form that makes the same step.
fn torch_eps(config: AdamWConfig, step: u32) -> f64 {
    match config.form {
        AdamForm::Torch => config.eps,
        AdamForm::Hf => config.eps / (1.0 - config.betas.1.powi(step as i32)).sqrt(),
    }
}

impl AdamW {
    /// An optimiser without state.
    pub fn new(config: AdamWConfig) -> Self {
        Self { config, state: BTreeMap::new() }
    }

    /// The new value of one parameter `[m, n]` (f32) by its gradient of the same shape.
    pub fn step(&mut self, name: &str, parameter: Tensor<2>, gradient: Tensor<2>, rule: StepRule) -> Tensor<2> {
        self.step_all(vec![Update { name: name.to_owned(), parameter, gradient, rule }], None).remove(0)
    }

    /// The new values of some parameters. Those with one rule are updated together, which on a GPU takes few launches; `factor`,
    /// one number on the device, multiplies every gradient too.
    pub fn step_all(&mut self, updates: Vec<Update>, factor: Option<&Tensor<1>>) -> Vec<Tensor<2>> {
        let (mut groups, mut stepped): (Vec<Group>, Vec<_>) = (vec![], updates.iter().map(|_| None).collect());
        for (position, Update { name, parameter, gradient, rule }) in updates.into_iter().enumerate() {
            let Moments { first, second, step } = self.state.remove(&name).unwrap_or_else(|| Moments {
                first: Tensor::zeros(parameter.dims(), &parameter.device()),
                second: Tensor::zeros(parameter.dims(), &parameter.device()),
                step: 0,
            });
            let key = (rule, step + 1);
            let found = groups.iter().position(|group| group.key == key).unwrap_or_else(|| {
                groups.push(Group { key, members: vec![], sets: vec![] });
                groups.len() - 1
            });
            groups[found].members.push((position, name));
            groups[found].sets.push([parameter, first, second, gradient]);
        }
        for Group { key: (rule, step), members, sets } in groups {
            let updated = kernels::adamw_all(sets, factor.cloned(), self.rule(rule, step));
            for ((position, name), [parameter, first, second]) in members.into_iter().zip(updated) {
                self.state.insert(name, Moments { first, second, step });
                stepped[position] = Some(self.decayed(parameter, rule));
            }
        }
        stepped.into_iter().flatten().collect()
    }

    fn decays_after(&self) -> bool {
        self.config.form == AdamForm::Hf
    }

    fn rule(&self, rule: StepRule, step: u32) -> kernels::AdamW {
        kernels::AdamW {
            learning_rate: rule.learning_rate,
            betas: self.config.betas,
            eps: torch_eps(self.config, step),
            weight_decay: if self.decays_after() { 0.0 } else { rule.weight_decay },
            step,
            gradient_scale: rule.gradient_scale,
        }
    }

    fn decayed(&self, parameter: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let decay = rule.learning_rate * rule.weight_decay;
        if self.decays_after() && decay > 0.0 { parameter * (1.0 - decay) } else { parameter }
    }

    /// The state of every parameter for a checkpoint.
    pub fn save(&self) -> BTreeMap<String, State> {
        let state = |moments: &Moments| {
            let mut state = State::default();
            state.tensors.insert("first".to_owned(), moments.first.clone());
            state.tensors.insert("second".to_owned(), moments.second.clone());
            state.numbers.insert("step".to_owned(), u64::from(moments.step));
            state
        };
        self.state.iter().map(|(name, moments)| (name.clone(), state(moments))).collect()
    }

    /// Restores one parameter of the given shape.
    ///
    /// # Errors
    /// Something is missing or has another shape.
    pub fn restore(&mut self, name: &str, dims: [usize; 2], mut state: State) -> Result<(), String> {
        let (first, second) = (state.tensor("first", dims)?, state.tensor("second", dims)?);
        let step = state.number("step")? as u32;
        self.state.insert(name.to_owned(), Moments { first, second, step });
        Ok(())
    }

    /// Bytes of all moments.
    pub fn state_bytes(&self) -> usize {
        self.state.values().map(|moments| 8 * moments.first.shape().num_elements()).sum()
    }
}
