//! Optimisers: one file each, one row in [`METHODS`].
//!
//! Every trained parameter is a matrix with a name. [`Optimizer`] holds the state of all of them: matrices that a low-rank
//! method manages ([`MatrixOptimizer`]) and the others, which get [`AdamW`]. A low-rank method decides before each step what
//! the backward passes shall hand over for its matrix ([`Gradient`]): the dense gradient, a projected one, or its two factors.
//!
//! | part | what |
//! | --- | --- |
//! | [`subspace`] | sides and bases |
//! | [`rules`] | what turns a (projected) gradient into a step: AdamW, 8-bit AdamW, Adafactor, SGD, Muon |
//! | [`galore`], [`q_galore`], [`dct_adamw`], [`apollo`], [`fira`], [`ldadam`] | methods on one matrix |
//! | [`intrinsic`] | all matrices in one random subspace |

pub mod adamw;
pub mod apollo;
pub mod dct_adamw;
pub mod fira;
pub mod galore;
#[cfg(test)]
mod host_oracle;
pub mod intrinsic;
pub mod ldadam;
mod one_side;
pub mod q_galore;
pub mod rules;
pub mod schedule;
pub mod subspace;

use std::collections::BTreeMap;

use burn::tensor::{FloatDType, Tensor};
use lowrank_kernels as kernels;

pub use adamw::{AdamW, AdamWConfig, StepRule, Update};
pub use galore::{Galore, GaloreConfig};
pub use rules::{AdamForm, RuleConfig};
pub use schedule::{Schedule, ScheduleKind};
pub use subspace::{Basis, ProjType, Side};

use crate::base::PackedBase;
use crate::lowrank::cast;
use crate::projection::Gradient;
use crate::quant::{Quantisation, Rounding};
use crate::random::Stream;

/// Name (its config key and file), what it is, state values per matrix `[m, n]` at rank r with its basis on the input side.
pub const METHODS: &[(&str, &str, &str)] = &[
    ("adamw", "AdamW, arXiv 1711.05101, as torch.optim.AdamW", "2 m n"),
    ("galore", "GaLore, arXiv 2403.03507, with projected backward or published", "m r + 2 r n"),
    (
        "q_galore",
        "Q-GaLore, arXiv 2407.08296: int4 basis, lazy refresh, 8-bit Adam, rounded weights",
        "m r / 8 + r n / 2",
    ),
    ("dct_adamw", "DCT projection with column selection, arXiv 2505.17967", "2 r n"),
    ("apollo", "APOLLO and APOLLO-Mini, arXiv 2412.05270: scaled by what Adam does to a random projection", "2 r n"),
    ("fira", "Fira, arXiv 2410.01623: GaLore plus the scaled rest", "m r + 2 r n"),
    ("ldadam", "LDAdam, arXiv 2410.16103: a new basis every step, error feedback", "m n + m r + 2 r n"),
    (
        "intrinsic",
        "Intrinsic dimension, arXiv 1804.08838, 2012.13255: d numbers move all weights",
        "3 d in all, 3 L of the map",
    ),
];

/// The state of one parameter as it goes to a checkpoint. Floats among the numbers are stored by their bits.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Matrices in f32.
    pub tensors: BTreeMap<String, Tensor<2>>,
    /// Codes.
    pub bytes: BTreeMap<String, Vec<u8>>,
    /// Counters, and floats by their bits.
    pub numbers: BTreeMap<String, u64>,
}

impl State {
    /// A number.
    ///
    /// # Errors
    /// It is missing.
    pub fn number(&self, key: &str) -> Result<u64, String> {
        self.numbers.get(key).copied().ok_or_else(|| format!("{key} is missing"))
    }

    /// Takes a matrix out.
    ///
    /// # Errors
    /// It is missing or has another shape.
    pub fn tensor(&mut self, key: &str, dims: [usize; 2]) -> Result<Tensor<2>, String> {
        self.optional_tensor(key, dims)?.ok_or_else(|| format!("{key} is missing"))
    }

    /// Takes a matrix out where there is one.
    ///
    /// # Errors
    /// It has another shape.
    pub fn optional_tensor(&mut self, key: &str, dims: [usize; 2]) -> Result<Option<Tensor<2>>, String> {
        match self.tensors.remove(key) {
            Some(tensor) if tensor.dims() != dims => {
                Err(format!("{key} has shape {:?}, expected {dims:?}", tensor.dims()))
            }
            found => Ok(found),
        }
    }
}

/// What a method tells of one matrix.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// Share of the gradient's energy inside the subspace, `||R||^2 / ||G||^2`, in the last step.
    pub energy: Option<f64>,
    /// Bases chosen so far.
    pub refreshes: u64,
    /// Time spent on choosing them since the program started.
    pub refresh_seconds: f64,
    /// `||P_new^T P_old||^2 / r` at the last change of the basis: 1 where the subspace stayed.
    pub overlap: Option<f64>,
}

/// A low-rank method on one matrix.
pub trait MatrixOptimizer: std::fmt::Debug + Send {
    /// Says what the backward passes of the coming step shall hand over.
    fn collect(&mut self, micro_batches: usize) -> Gradient {
        let _ = micro_batches;
        Gradient::Full
    }

    /// Sees the factors x `[t, m]` and dy `[t, n]` of one micro batch and returns what it collects of them. Only called
    /// where [`MatrixOptimizer::collect`] asked for [`Gradient::Factors`].
    fn observe(&mut self, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        kernels::gemm(x.transpose(), dy, None, 1.0)
    }

    /// Square of the norm of the whole gradient, known or estimated from what was collected, `[1]`.
    fn squared_norm(&self, collected: &Tensor<2>) -> Tensor<1> {
        kernels::sum_squares(collected.clone())
    }

    /// What was collected for the coming step is multiplied by a number `[1]` that only the device knows. A method that has
    /// taken something of the gradient into its own state does the same there.
    fn rescaled(&mut self, factor: &Tensor<1>) {
        let _ = factor;
    }

    /// The coming step is not made: its gradient is not finite. What was seen of it is to be forgotten.
    fn leave_out(&mut self) {}

    /// The new weight `[m, n]` (f32) after a step with the sum of what was collected.
    fn step(&mut self, weight: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2>;

    /// Whether the coming step leaves the weight as it is; it is then handed over and taken back in any type.
    fn keeps_weight(&self) -> bool {
        false
    }

    /// How a layer acts between steps, where that is not by its weight alone.
    fn serving(&self) -> Option<Gradient> {
        None
    }

    /// The weight with every pending update in it, which is pending no more.
    fn settle(&mut self, weight: Tensor<2>) -> Tensor<2> {
        weight
    }

    /// The state for a checkpoint.
    fn save(&self) -> State;

    /// Goes on from a saved state, to the bit.
    ///
    /// # Errors
    /// Names what is missing or does not fit.
    fn restore(&mut self, state: State) -> Result<(), String>;

    /// What it has to tell.
    fn report(&self) -> Report {
        Report::default()
    }

    /// Bytes of the state.
    fn state_bytes(&self) -> usize;
}

/// How trained matrices of a low-rank method are stored between steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weights {
    /// f32.
    #[default]
    F32,
    /// bf16 with stochastic rounding after each step, so that updates below half a unit in the last place are not lost.
    Bf16,
    /// The values of 8-bit codes in groups with a scale and a zero, rounded stochastically after each step (Q-GaLore). A weight
    /// that is held as codes ([`PackedBase`]) takes [`Optimizer::step_packed`]; a dense one gets the same values.
    Int8 {
        /// Values that share a scale.
        group: usize,
    },
}

/// The optimiser of a run: the state of every trained parameter.
#[derive(Debug)]
pub struct Optimizer {
    plain: AdamW,
    matrices: BTreeMap<String, Box<dyn MatrixOptimizer>>,
    /// Overlaps reported before the program was last started, until a method has one of its own.
    overlaps: BTreeMap<String, f64>,
    weights: Weights,
    seed: u64,
    step: u64,
    /// What multiplies all gradients of this step, where only the device knows it.
    factor: Option<Tensor<1>>,
}

impl Optimizer {
    /// AdamW for every parameter.
    pub fn adamw(config: AdamWConfig) -> Self {
        Self {
            plain: AdamW::new(config),
            matrices: BTreeMap::new(),
            overlaps: BTreeMap::new(),
            weights: Weights::F32,
            seed: 0,
            step: 0,
            factor: None,
        }
    }

    /// The format of managed weights between steps; `seed` is that of the rounding.
    #[must_use]
    pub fn with_weights(mut self, weights: Weights, seed: u64) -> Self {
        (self.weights, self.seed) = (weights, seed);
        self
    }

    /// Gives the parameter `name` to a low-rank method.
    pub fn manage(&mut self, name: &str, method: Box<dyn MatrixOptimizer>) {
        self.matrices.insert(name.to_owned(), method);
    }

    /// Whether a low-rank method has the parameter.
    pub fn manages(&self, name: &str) -> bool {
        self.matrices.contains_key(name)
    }

    /// Starts step number `step` (from 0); `passes` tells in how many parts the gradient of a matrix will come. Says what each
    /// managed matrix wants collected.
    pub fn begin(&mut self, step: u64, passes: &dyn Fn(&str) -> usize) -> BTreeMap<String, Gradient> {
        (self.step, self.factor) = (step, None);
        let collect =
            |(name, method): (&String, &mut Box<dyn MatrixOptimizer>)| (name.clone(), method.collect(passes(name)));
        self.matrices.iter_mut().map(collect).collect()
    }

    /// Shows a managed matrix the factors of its gradient; returns what is to be accumulated.
    pub fn observe(&mut self, name: &str, x: Tensor<2>, dy: Tensor<2>) -> Tensor<2> {
        match self.matrices.get_mut(name) {
            Some(method) => method.observe(x, dy),
            None => kernels::gemm(x.transpose(), dy, None, 1.0),
        }
    }

    /// Square of the norm of a parameter's gradient, `[1]`.
    pub fn squared_norm(&self, name: &str, collected: &Tensor<2>) -> Tensor<1> {
        match self.matrices.get(name) {
            Some(method) => method.squared_norm(collected),
            None => kernels::sum_squares(collected.clone()),
        }
    }

    /// The squares of the norms of all gradients of a step, in parts.
    pub fn squared_norms(&self, collected: &BTreeMap<String, Tensor<2>>) -> Vec<Tensor<1>> {
        let (managed, plain): (Vec<_>, Vec<_>) = collected.iter().partition(|(name, _)| self.manages(name));
        let mut parts: Vec<_> =
            managed.into_iter().map(|(name, collected)| self.squared_norm(name, collected)).collect();
        if !plain.is_empty() {
            parts.push(kernels::sum_squares_all(plain.into_iter().map(|(_, collected)| collected.clone()).collect()));
        }
        parts
    }

    /// The gradients of the step that was begun count times a number `[1]` that only the device knows: clipping without a read.
    /// To be called once, before the step of any parameter, beside [`StepRule::gradient_scale`].
    pub fn clip(&mut self, factor: Tensor<1>) {
        self.matrices.values_mut().for_each(|method| method.rescaled(&factor));
        self.factor = Some(factor);
    }

    fn clipped(&self, collected: Tensor<2>) -> Tensor<2> {
        match &self.factor {
            Some(factor) => collected * factor.clone().reshape([1, 1]),
            None => collected,
        }
    }

    /// The step that was begun is not made: its gradients are not finite.
    pub fn leave_out(&mut self) {
        self.matrices.values_mut().for_each(|method| method.leave_out());
    }

    /// The new values of parameters that no low-rank method has, in few launches.
    pub fn step_plain(&mut self, updates: Vec<Update>) -> Vec<Tensor<2>> {
        self.plain.step_all(updates, self.factor.as_ref())
    }

    /// The new value of a parameter, in the type it had.
    pub fn step(&mut self, name: &str, parameter: Tensor<2>, collected: Tensor<2>, rule: StepRule) -> Tensor<2> {
        if !self.manages(name) {
            let update = Update { name: name.to_owned(), parameter, gradient: collected, rule };
            return self.step_plain(vec![update]).remove(0);
        }
        let collected = self.clipped(collected);
        let Some(method) = self.matrices.get_mut(name) else { unreachable!("it manages the parameter") };
        if method.keeps_weight() {
            return method.step(parameter, collected, rule);
        }
        let dtype = FloatDType::from(parameter.dtype());
        let updated = method.step(cast(parameter, FloatDType::F32), collected, rule);
        let stream = self.stream(name);
        match self.weights {
            Weights::F32 => updated,
            Weights::Bf16 => kernels::stochastic_round(updated, dtype, stream.bits(self.step)),
            Weights::Int8 { group } => {
                let rounding = self.rounding(name, updated.dims());
                Quantisation::trained(group).pack_rounded(updated, rounding).dense(FloatDType::F32)
            }
        }
    }

    /// The new codes of a parameter that is held as such: its values are there for this step only.
    pub fn step_packed(&mut self, name: &str, base: &PackedBase, collected: Tensor<2>, rule: StepRule) -> PackedBase {
        let values = base.weight.dense(FloatDType::F32);
        let clipped = self.clipped(collected.clone());
        let updated = match self.matrices.get_mut(name) {
            Some(method) => method.step(values, clipped, rule),
            None => self.step(name, values, collected, rule),
        };
        base.rounded(updated, self.rounding(name, base.weight.dims()))
    }

    /// The random numbers of a parameter's rounding.
    fn stream(&self, name: &str) -> Stream {
        Stream::new(self.seed, name)
    }

    /// Stochastic rounding in this step, with a number of its own for every value.
    fn rounding(&self, name: &str, dims: [usize; 2]) -> Rounding {
        self.stream(name).rounding(self.step * (dims[0] * dims[1]) as u64)
    }

    /// How layers act between steps, where that is not by their weights alone.
    pub fn serving(&self) -> BTreeMap<String, Gradient> {
        self.matrices.iter().filter_map(|(name, method)| Some((name.clone(), method.serving()?))).collect()
    }

    /// A parameter with every pending update in it.
    pub fn settle(&mut self, name: &str, parameter: Tensor<2>) -> Tensor<2> {
        match self.matrices.get_mut(name) {
            Some(method) if method.serving().is_some() => {
                let dtype = FloatDType::from(parameter.dtype());
                cast(method.settle(cast(parameter, FloatDType::F32)), dtype)
            }
            _ => parameter,
        }
    }

    /// The state of every parameter by name.
    pub fn save(&self) -> BTreeMap<String, State> {
        let mut states = self.plain.save();
        let reports = self.reports();
        states.extend(self.matrices.iter().map(|(name, method)| {
            let mut state = method.save();
            if let Some(overlap) = reports.get(name.as_str()).and_then(|report| report.overlap) {
                state.numbers.insert("reported_overlap".to_owned(), overlap.to_bits());
            }
            (name.clone(), state)
        }));
        states
    }

    /// Restores one parameter of the given shape.
    ///
    /// # Errors
    /// The state does not fit the method.
    pub fn restore(&mut self, name: &str, dims: [usize; 2], mut state: State) -> Result<(), String> {
        if let Some(overlap) = state.numbers.remove("reported_overlap") {
            self.overlaps.insert(name.to_owned(), f64::from_bits(overlap));
        }
        match self.matrices.get_mut(name) {
            Some(method) => method.restore(state),
            None => self.plain.restore(name, dims, state),
        }
    }

    /// What the low-rank methods tell, by parameter.
    pub fn reports(&self) -> BTreeMap<&str, Report> {
        let with_overlap = |name: &str, report: Report| {
            let overlap = report.overlap.or_else(|| self.overlaps.get(name).copied());
            Report { overlap, ..report }
        };
        self.matrices.iter().map(|(name, method)| (name.as_str(), with_overlap(name, method.report()))).collect()
    }

    /// Bytes of all state.
    pub fn state_bytes(&self) -> usize {
        self.plain.state_bytes() + self.matrices.values().map(|method| method.state_bytes()).sum::<usize>()
    }
}

#[cfg(test)]
mod tests;
