//! The methods that the contract of adapters is checked on: one row a method, or one a variant of it.
#![allow(clippy::unwrap_used)]

use burn::tensor::Tensor;

use super::Site;
use super::corda::{Corda, CordaMethod};
use super::dora::DoraConfig;
use super::eora::Eora;
use super::hra::HraSettings;
use super::lora::{Lora, LoraInit};
use super::lora_sb::LoraSb;
use super::lora_xs::LoraXs;
use super::oft::{Cayley, OftSettings};
use super::olora::Olora;
use super::pissa::Pissa;
use super::randlora::{Density, RandLoraBases, RandLoraSettings};
use super::svfit::Svfit;
use super::testing::{device, normal};
use super::tucker::Tucker;
use super::vera::{Vera, VeraBases};
use crate::Delta;

/// Every start but those that say otherwise has this s.
const SCALE: f32 = 1.5;
/// f32 against f32, normwise; the worst seen is 1.4e-6.
pub(super) const CLOSE: f64 = 5e-6;

/// Step of differences where the output is curved.
const CURVED: f64 = 1.0 / 256.0;

/// How the first output differs from that of the layer without an adapter.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start {
    /// Not at all.
    Same,
    /// By this part of it at most: a part of the base has moved into the adapter, or the start is small.
    Near(f64),
    /// By what the method is for.
    Moved,
}

/// A method.
pub(super) struct Row {
    pub name: &'static str,
    pub start: Start,
    /// The adapter of a site at rank r, and the trained values it is said to have; none where the method does not fit.
    pub make: fn(&Site<'_>, usize) -> Option<(Delta, usize)>,
    /// Step of differences: large where the output is linear in every tensor, so that rounding is small.
    pub step: f64,
    /// The output where a gradient leaves a part of it out: of the second adapter, with that part of the first.
    pub held: Option<fn(&Delta, &Delta, &Inputs) -> Tensor<2>>,
}

/// What a layer is run on.
pub(super) struct Inputs {
    pub x: Tensor<2>,
    pub weight: Tensor<2>,
    pub bias: Tensor<1>,
}

fn lora(r: usize) -> Lora {
    Lora { r, scale: SCALE, dropout: 0.0, init: LoraInit::KaimingUniform }
}

pub(super) fn rows() -> Vec<Row> {
    let row = |name, start, make| Row { name, start, make, step: 1.0 / 16.0, held: None };
    vec![
        row("lora", Start::Same, |site, r| {
            let [d_in, d_out] = site.dims();
            Some((Delta::LowRank(lora(r).init(d_in, d_out, site.stream, &device())), r * (d_in + d_out)))
        }),
        Row {
            held: Some(dora_with_lengths_of),
            ..row("dora", Start::Near(1e-6), |site, r| {
                let ([d_in, d_out], method) = (site.dims(), DoraConfig { lora: lora(r) });
                Some((Delta::Dora(method.init(site).unwrap()), method.parameters(d_in, d_out)))
            })
        },
        row("pissa", Start::Near(CLOSE), |site, r| {
            let ([d_in, d_out], method) = (site.dims(), Pissa { r, scale: SCALE, dropout: 0.0, niter: None });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("pissa, randomised", Start::Near(CLOSE), |site, r| {
            let ([d_in, d_out], method) = (site.dims(), Pissa { r, scale: SCALE, dropout: 0.0, niter: Some(4) });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("olora", Start::Near(CLOSE), |site, r| {
            let ([d_in, d_out], method) = (site.dims(), Olora { r, scale: SCALE, dropout: 0.0 });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("corda, ipm", Start::Near(CLOSE), |site, r| corda(site, r, CordaMethod::Ipm)),
        row("corda, kpm", Start::Near(CLOSE), |site, r| corda(site, r, CordaMethod::Kpm)),
        row("eora", Start::Moved, |site, r| eora(site, r, true)),
        row("eora, frozen", Start::Moved, |site, r| eora(site, r, false)),
        row("lora_xs", Start::Near(2e-4), |site, r| {
            let ([d_in, d_out], method) = (site.dims(), LoraXs { r, scale: SCALE, dropout: 0.0 });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("lora_sb", Start::Moved, |site, r| {
            let ([d_in, d_out], method) = (site.dims(), LoraSb { r, scale: SCALE, dropout: 0.0, eta: 1e-3 });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("svfit", Start::Same, |site, r| {
            let ([d_in, d_out], method) = (site.dims(), Svfit { r, dropout: 0.0 });
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("vera", Start::Same, |site, r| {
            let ([d_in, d_out], method) = (site.dims(), Vera { r, d_initial: 0.1, dropout: 0.0 });
            let bases = VeraBases::new(d_in + 3, d_out + 1, r, 3, &device());
            Some((Delta::LowRank(method.init(site, &bases).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("randlora", Start::Near(CLOSE), |site, r| {
            let ([d_in, d_out], method) = (site.dims(), RandLoraSettings { r, scale: SCALE, dropout: 0.0 });
            let bases = RandLoraBases::new(d_in, d_out, r, Density::Dense, 3, &device());
            Some((Delta::RandLora(method.init(site, &bases).unwrap()), method.parameters(d_in, d_out)))
        }),
        row("tucker", Start::Same, |site, r| {
            let method = Tucker { r_in: r, r_out: r + 1, scale: SCALE, dropout: 0.0 };
            let [d_in, d_out] = site.dims();
            Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
        }),
        Row {
            step: CURVED,
            ..row("hra", Start::Near(CLOSE), |site, r| {
                // Pairs of reflections, which start as the identity; a few, as each adds a rounding.
                let ([d_in, d_out], method) = (site.dims(), HraSettings { r: 2 * r.min(4), apply_gs: false });
                Some((Delta::Hra(method.init(site).unwrap()), method.parameters(d_in, d_out)))
            })
        },
        Row { step: CURVED, ..row("oft", Start::Near(CLOSE), |site, _| oft(site, Cayley::Neumann(5))) },
        Row { step: CURVED, ..row("oft, exact", Start::Near(CLOSE), |site, _| oft(site, Cayley::Exact)) },
    ]
}

fn oft(site: &Site<'_>, cayley: Cayley) -> Option<(Delta, usize)> {
    let [d_in, d_out] = site.dims();
    let block = if d_in.is_multiple_of(8) { 8 } else { d_in };
    let method = OftSettings { block, cayley, coft: None, block_share: false };
    // A single input has nothing to turn.
    (d_in > 1).then(|| (Delta::Oft(method.init(site).unwrap()), method.parameters(d_in, d_out)))
}

fn corda(site: &Site<'_>, r: usize, method: CordaMethod) -> Option<(Delta, usize)> {
    let ([d_in, d_out], method) = (site.dims(), Corda { r, scale: SCALE, dropout: 0.0, method });
    Some((Delta::LowRank(method.init(site).unwrap()), method.parameters(d_in, d_out)))
}

fn eora(site: &Site<'_>, r: usize, trained: bool) -> Option<(Delta, usize)> {
    let [d_in, d_out] = site.dims();
    let lost = normal("lost", d_in, d_out) * 0.05;
    let site = Site { residual: Some(lost), ..site.clone() };
    let method = Eora { r, dropout: 0.0, trained };
    Some((Delta::LowRank(method.init(&site).unwrap()), method.parameters(d_in, d_out)))
}

/// `(x V) * (m / n_0) + b`.
fn dora_with_lengths_of(origin: &Delta, now: &Delta, inputs: &Inputs) -> Tensor<2> {
    let (Delta::Dora(origin), Delta::Dora(now)) = (origin, now) else { unreachable!("rows of dora") };
    let lengths = (inputs.weight.clone() + origin.lowrank.delta()).square().sum_dim(0).sqrt();
    let sum = inputs.weight.clone() + now.lowrank.delta();
    let ratio = now.magnitude.val().unsqueeze::<2>() / lengths;
    inputs.x.clone().matmul(sum) * ratio + inputs.bias.clone().unsqueeze::<2>()
}
