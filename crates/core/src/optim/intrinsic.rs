//! Intrinsic dimension: all weights move inside one random subspace of d dimensions (arXiv 1804.08838, 2012.13255).
//!
//! ```text
//! DID:   theta_i = theta_i0 + P_i v
//! SAID:  theta_i = theta_i0 + lam_i P_i v                    one lam for each matrix
//! ```
//!
//! v and lam are all that is trained, by Adam; d counts both. Every matrix has its own fixed map P_i, made by Fastfood
//! ([`Fastfood`]) from the seed and the matrix's name. Gradients by the exact adjoint: `dv = sum_i lam_i P_i^T dW_i`,
//! `dlam_i = <v, P_i^T dW_i>`.
//!
//! | symbol | where | shape |
//! | --- | --- | --- |
//! | v, its moments | [`Subspace`], shared by all matrices | `[1, d]` |
//! | lam_i, its moments | [`Intrinsic`] | `[1, 1]` |
//! | P_i | [`Fastfood`], `L = 2^ceil(log2 mn)` | gains `[L]`, permutation `[L]` twice |
//!
//! A backward pass forms `dW = x^T dy` of one matrix and keeps its projection alone, so the gradient of a step is one vector of
//! d. Each step adds `P_i (lam v - the same before the step)` to W; W itself is what a checkpoint stores. In arithmetic this is
//! full fine-tuning plus `O(L log L)` a matrix each way; only the optimiser state is small, beside the maps (about `12 L` bytes a
//! matrix, `20 L` where indices have 64 bits).
//!
//! Where it differs from the published code: that code scales the transform in its backward pass by `1 / sqrt(L)`, so its gradient
//! is the true one divided by L, matrix by matrix; here it is the true one. Its budget of SAID leaves one more value unused. Li
//! et al. use one map for the whole network, Aghajanyan et al. one for each tensor, as here. Matrices that are smaller than d see
//! only the first L entries of v. Norms, biases and embeddings are outside: frozen, or trained by the plain optimiser.
//!
//! A step needs the gradients of all matrices before the first of them moves: no updates during the backward pass. Weight decay
//! pulls v to 0, that is the weights to where they started; lam does not decay.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Device, Tensor};
use lowrank_kernels as kernels;

use super::{MatrixOptimizer, State, StepRule};
use crate::projection::Gradient;
use crate::random::Stream;

mod fastfood;
mod search;

pub use fastfood::{Fastfood, Hadamard, walsh_hadamard};
pub use search::{Summary, Target, grid, smallest};

/// Hyper-parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct IntrinsicConfig {
    /// d, all trained values together.
    pub dims: usize,
    /// Whether every matrix has a trained factor of its own.
    pub said: bool,
    /// Decay rates of the first and second moment.
    pub betas: (f64, f64),
    /// Added to the root of the corrected second moment.
    pub eps: f64,
}

impl Default for IntrinsicConfig {
    fn default() -> Self {
        Self { dims: 1000, said: false, betas: (0.9, 0.999), eps: 1e-8 }
    }
}

/// A value with its Adam moments.
#[derive(Clone, Debug)]
struct Trained {
    value: Tensor<2>,
    first: Tensor<2>,
    second: Tensor<2>,
    step: u32,
}

impl Trained {
    fn new(value: Tensor<2>) -> Self {
        Self { first: value.zeros_like(), second: value.zeros_like(), value, step: 0 }
    }

    fn update(&mut self, gradient: Tensor<2>, config: IntrinsicConfig, rule: StepRule) {
        self.step += 1;
        let rule = kernels::AdamW {
            learning_rate: rule.learning_rate,
            betas: config.betas,
            eps: config.eps,
            weight_decay: rule.weight_decay,
            step: self.step,
            gradient_scale: rule.gradient_scale,
        };
        let (value, first, second) =
            kernels::adamw(self.value.clone(), self.first.clone(), self.second.clone(), gradient, rule);
        (self.value, self.first, self.second) = (value, first, second);
    }

    fn save(&self, name: &str, state: &mut State) {
        let parts = [("", &self.value), (".first", &self.first), (".second", &self.second)];
        state.tensors.extend(parts.map(|(part, tensor)| (format!("{name}{part}"), tensor.clone())));
        state.numbers.insert(format!("{name}.step"), u64::from(self.step));
    }

    fn restored(name: &str, dims: [usize; 2], state: &mut State) -> Result<Self, String> {
        Ok(Self {
            value: state.tensor(name, dims)?,
            first: state.tensor(&format!("{name}.first"), dims)?,
            second: state.tensor(&format!("{name}.second"), dims)?,
            step: state.number(&format!("{name}.step"))? as u32,
        })
    }
}

#[derive(Debug)]
struct Shared {
    config: IntrinsicConfig,
    v: Trained,
    /// `sum_i lam_i P_i^T dW_i` of this step.
    gradient: Option<Tensor<2>>,
    /// v is yet to move in this step.
    is_open: bool,
    /// Matrices made so far.
    matrices: usize,
    transform: Hadamard,
}

/// The subspace of a model. Clones share it.
#[derive(Clone, Debug)]
pub struct Subspace {
    shared: Arc<Mutex<Shared>>,
    seed: u64,
    device: Device,
}

impl Subspace {
    /// A subspace that `count` matrices will share.
    ///
    /// # Errors
    /// d leaves nothing for v.
    pub fn new(config: IntrinsicConfig, seed: u64, count: usize, device: &Device) -> Result<Self, String> {
        let own = if config.said { count } else { 0 };
        if config.dims <= own {
            return Err(format!(
                "dims is {}, expected more than {own}{}",
                config.dims,
                if own > 0 { " (one of them for each matrix, the others for v)" } else { "" }
            ));
        }
        let shared = Shared {
            config,
            v: Trained::new(Tensor::zeros([1, config.dims - own], device)),
            gradient: None,
            is_open: false,
            matrices: 0,
            transform: Hadamard::default(),
        };
        Ok(Self { shared: Arc::new(Mutex::new(shared)), seed, device: device.clone() })
    }

    /// The optimiser of the matrix `name` of shape `[m, n]`.
    pub fn matrix(&self, name: &str, dims: [usize; 2]) -> Intrinsic {
        let mut shared = self.lock();
        let size = shared.v.value.dims()[1];
        let stream = |part: &str| Stream::new(self.seed, &format!("{name}.intrinsic.{part}"));
        let streams = [stream("signs"), stream("permutation"), stream("gains")];
        let map = Fastfood::new(dims[0] * dims[1], size, streams, &shared.transform, &self.device);
        shared.matrices += 1;
        Intrinsic {
            subspace: self.clone(),
            is_first: shared.matrices == 1,
            dims,
            map,
            lam: shared.config.said.then(|| Trained::new(Tensor::ones([1, 1], &self.device))),
            applied: None,
            steps: shared.v.step,
        }
    }

    /// v, `[1, d]`.
    pub fn v(&self) -> Tensor<2> {
        self.lock().v.value.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One matrix of a model that moves inside a [`Subspace`].
#[derive(Debug)]
pub struct Intrinsic {
    subspace: Subspace,
    /// Speaks for v in norms and checkpoints.
    is_first: bool,
    dims: [usize; 2],
    map: Fastfood,
    lam: Option<Trained>,
    /// `lam v` as it is in the weight; absent where it is that of the shared v.
    applied: Option<Tensor<2>>,
    /// Steps of v that are in the weight.
    steps: u32,
}

impl Intrinsic {
    /// lam, 1 without one of its own.
    pub fn lam(&self) -> Option<Tensor<2>> {
        self.lam.as_ref().map(|lam| lam.value.clone())
    }

    /// `lam v`.
    fn scaled(&self, v: Tensor<2>) -> Tensor<2> {
        match &self.lam {
            Some(lam) => v * lam.value.clone(),
            None => v,
        }
    }

    /// `P lam v`, `[m, n]`: what is added to the first weight in the end.
    pub fn offset(&self) -> Tensor<2> {
        self.map.apply(self.scaled(self.subspace.v())).reshape(self.dims)
    }
}

impl MatrixOptimizer for Intrinsic {
    fn collect(&mut self, _micro_batches: usize) -> Gradient {
        let v = {
            let mut shared = self.subspace.lock();
            shared.gradient = None;
            shared.is_open = true;
            shared.v.value.clone()
        };
        if self.applied.is_none() {
            self.applied = Some(self.scaled(v));
        }
        Gradient::factors()
    }

    /// Adds the projected gradient to that of v; returns the gradient of lam, `[1, 1]`.
    fn observe(&mut self, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        let [m, n] = self.dims;
        let dense = kernels::gemm(x.transpose(), dy, None, 1.0);
        let projected = self.map.adjoint(dense.reshape([1, m * n]));
        let mine = self.scaled(projected.clone());
        let mut shared = self.subspace.lock();
        shared.gradient = Some(match shared.gradient.take() {
            Some(sum) => sum + mine,
            None => mine,
        });
        (projected * shared.v.value.clone()).sum_dim(1)
    }

    fn squared_norm(&self, collected: &Tensor<2>) -> Tensor<1> {
        let mut square = kernels::sum_squares(collected.clone());
        if self.lam.is_none() {
            square = square.zeros_like();
        }
        match (&self.subspace.lock().gradient, self.is_first) {
            (Some(gradient), true) => square + kernels::sum_squares(gradient.clone()),
            _ => square,
        }
    }

    /// The gradient of v is shared: the first matrix speaks for it.
    fn rescaled(&mut self, factor: &Tensor<1>) {
        if self.is_first {
            let mut shared = self.subspace.lock();
            let gradient = shared.gradient.take();
            shared.gradient = gradient.map(|gradient| gradient * factor.clone().reshape([1, 1]));
        }
    }

    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        let (v, steps, config) = {
            let mut shared = self.subspace.lock();
            let config = shared.config;
            if let (true, Some(gradient)) = (shared.is_open, shared.gradient.take()) {
                shared.v.update(gradient, config, rule);
            }
            shared.is_open = false;
            (shared.v.value.clone(), shared.v.step, config)
        };
        if let Some(lam) = &mut self.lam {
            lam.update(collected, config, StepRule { weight_decay: 0.0, ..rule });
        }
        let now = self.scaled(v);
        let change = match self.applied.replace(now.clone()) {
            Some(before) => now - before,
            None => now,
        };
        self.steps = steps;
        weight + self.map.apply(change).reshape(self.dims)
    }

    fn save(&self) -> State {
        let mut state = State::default();
        let shared = self.subspace.lock();
        if self.is_first {
            shared.v.save("v", &mut state);
        }
        if let Some(lam) = &self.lam {
            lam.save("lam", &mut state);
        }
        state.numbers.insert("steps".to_owned(), u64::from(self.steps));
        if let (true, Some(applied)) = (self.steps != shared.v.step, &self.applied) {
            state.tensors.insert("applied".to_owned(), applied.clone());
        }
        state
    }

    fn restore(&mut self, mut state: State) -> Result<(), String> {
        let mut shared = self.subspace.lock();
        let size = [1, shared.v.value.dims()[1]];
        if self.is_first {
            shared.v = Trained::restored("v", size, &mut state)?;
        }
        drop(shared);
        if self.lam.is_some() {
            self.lam = Some(Trained::restored("lam", [1, 1], &mut state)?);
        }
        self.steps = state.number("steps")? as u32;
        self.applied = state.optional_tensor("applied", size)?;
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let v = self.subspace.v().dims()[1];
        let shared = if self.is_first { 12 * v } else { 0 };
        let own = if self.lam.is_some() { 12 + 4 * v } else { 0 };
        shared + own + self.map.bytes()
    }
}

#[cfg(test)]
mod tests;
