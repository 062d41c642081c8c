//! What an optimiser does between two steps.

use burn::tensor::Tensor;
use lowrank_core::quant::Quantisation;
use lowrank_kernels::adam8::{Adam8, Moments8};
use lowrank_kernels::packed::Layout;
use lowrank_kernels::{self as kernels, AdamW, Rounding};

use super::{Inputs, Out, Sizes, Work, product, work};

/// In f32: parameter and both moments are read and written, the gradient is read.
pub fn adamw(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let dims = [s.hidden, s.ffn];
    let mut state = Some((inputs.precise(dims), inputs.precise(dims), inputs.positive(dims)));
    let (gradient, values) = (inputs.precise(dims), product(&dims));
    let rule =
        AdamW { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step: 2, gradient_scale: 0.5 };
    work(format!("{} x {}", dims[0], dims[1]), 14.0 * values, 28.0 * values, false, move || {
        // Nothing else may hold the state: the update is then made in place.
        let Some((parameter, first, second)) = state.take() else { return vec![] };
        let (parameter, first, second) = kernels::adamw(parameter, first, second, gradient.clone(), rule);
        state = Some((parameter.clone(), first.clone(), second.clone()));
        vec![Out::D2(parameter), Out::D2(first), Out::D2(second)]
    })
}

/// The factors of LoRA on the seven matrices of four blocks, about: launches decide.
const FACTORS: usize = 64;

fn factor(s: &Sizes, index: usize) -> [usize; 2] {
    if index.is_multiple_of(2) { [s.hidden, s.rank] } else { [s.rank, s.hidden] }
}

/// [`adamw`] of many small tensors.
pub fn adamw_all(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let all = 0..FACTORS;
    let mut state: Vec<[Tensor<2>; 3]> = all
        .clone()
        .map(|i| factor(s, i))
        .map(|dims| [inputs.precise(dims), inputs.precise(dims), inputs.positive(dims)])
        .collect();
    let gradients: Vec<Tensor<2>> = all.map(|i| inputs.precise(factor(s, i))).collect();
    let values = FACTORS as f64 * product(&factor(s, 0));
    let rule =
        AdamW { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step: 2, gradient_scale: 0.5 };
    work(format!("{FACTORS} of {} x {}", s.hidden, s.rank), 14.0 * values, 28.0 * values, false, move || {
        let sets = std::mem::take(&mut state).into_iter().zip(&gradients);
        let sets = sets.map(|([parameter, first, second], gradient)| [parameter, first, second, gradient.clone()]);
        state = kernels::adamw_all(sets.collect(), None, rule);
        state.iter().map(|set| Out::D2(set[0].clone())).collect()
    })
}

/// [`sum_squares`] of many small tensors.
pub fn sum_squares_all(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let gradients: Vec<Tensor<2>> = (0..FACTORS).map(|i| inputs.precise(factor(s, i))).collect();
    let values = FACTORS as f64 * product(&factor(s, 0));
    work(format!("{FACTORS} of {} x {}", s.hidden, s.rank), 2.0 * values, 4.0 * values, false, move || {
        vec![Out::D1(kernels::sum_squares_all(gradients.clone()))]
    })
}

/// As [`adamw`], with codes of a byte for the moments and a scale of each for 256 values. The new codes are not compared: where a device
/// divides inexactly, one may be the neighbour.
pub fn adam8(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    const BLOCK: usize = 256;
    let dims = [s.hidden, s.ffn];
    let (len, values) = (dims[0] * dims[1], product(&dims));
    let mut state = Some((inputs.precise(dims), Moments8::zeros(len, BLOCK, inputs.device())));
    let gradient = inputs.precise(dims);
    let rule = Adam8 { learning_rate: 0.1, betas: (0.9, 0.99), eps: 1e-8, weight_decay: 0.1, step: 2 };
    let bytes = 16.0 * values + 16.0 * len.div_ceil(BLOCK) as f64;
    work(format!("{} x {}, blocks of {BLOCK}", dims[0], dims[1]), 18.0 * values, bytes, false, move || {
        let Some((parameter, moments)) = state.take() else { return vec![] };
        let (parameter, moments) = kernels::adam8(parameter, gradient.clone(), moments, rule);
        state = Some((parameter.clone(), moments));
        vec![Out::D2(parameter)]
    })
}

/// The trained weight of Q-GaLore after a step.
pub fn pack_groups(inputs: &mut Inputs, s: &Sizes, rounding: Rounding) -> anyhow::Result<Work> {
    let dims = [s.hidden, s.ffn];
    let Quantisation { format, block, order, .. } = Quantisation::trained(256);
    let layout = Layout { format, block, dims, order, nested: None };
    let (weight, values): (Tensor<2>, f64) = (inputs.precise(dims), product(&dims));
    let bytes = 5.0 * values + 5.0 * layout.blocks() as f64;
    work(format!("{} x {}, int8 in groups of {block}", dims[0], dims[1]), 8.0 * values, bytes, false, move || {
        let codes = kernels::pack_groups(weight.clone(), layout, rounding);
        vec![Out::Rounded { weight: weight.clone(), codes: Box::new(codes) }]
    })
}

/// A quarter of the directions of a cosine basis.
pub fn top_columns(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (d, count) = (s.hidden, s.hidden / 4);
    let scores: Tensor<2> = inputs.positive([1, d]);
    work(format!("{count} of {d}"), 2.0 * product(&[d, d]), 8.0 * d as f64, false, move || {
        vec![Out::Indices(kernels::top_columns(scores.clone(), count))]
    })
}

pub fn stochastic_round(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let (t, d) = (s.tokens(), s.hidden);
    let (x, dtype) = (inputs.precise([t, d]), inputs.dtype());
    let bytes = (4.0 + inputs.width()) * product(&[t, d]);
    work(format!("{t} x {d}"), 2.0 * product(&[t, d]), bytes, false, move || {
        vec![Out::D2(kernels::stochastic_round(x.clone(), dtype, 1))]
    })
}

pub fn sum_squares(inputs: &mut Inputs, s: &Sizes) -> anyhow::Result<Work> {
    let dims = [s.hidden, s.ffn];
    let (x, values) = (inputs.precise(dims), product(&dims));
    work(format!("{} x {}", dims[0], dims[1]), 2.0 * values, 4.0 * values, false, move || {
        vec![Out::D1(kernels::sum_squares(x.clone()))]
    })
}
