//! Adapters into weights.

use burn::module::Param;
use burn::tensor::{FloatDType, Tensor};
use lowrank_core::LowRank;
use lowrank_core::lowrank::cast;

use crate::network::Network;

/// Makes every adapter part of its weight. The sums are taken in f32 and rounded once.
pub fn merge<M: Network>(model: &mut M) {
    model.for_each_layer(&mut |_, mut layer| layer.merge());
    let adapted = model.embedding().and_then(|(_, embedding)| embedding.delta.take());
    if let Some(delta) = adapted {
        model.untie_head(); // the head stays the base's
        if let Some((_, embedding)) = model.embedding() {
            embedding.weight = merged_weight(embedding.weight.clone(), &delta);
        }
    }
}

fn merged_weight(weight: Param<Tensor<2>>, delta: &LowRank) -> Param<Tensor<2>> {
    weight.map(|weight| {
        let dtype = weight.dtype().into();
        cast(cast(weight, FloatDType::F32) + delta.delta(), dtype)
    })
}
