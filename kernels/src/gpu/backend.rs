//! Which operations have a kernel of their own on GPU backends; the others run their reference.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn::tensor::FloatDType;
use burn_cubecl::CubeBackend;

use super::{
    adam8, adamw, attention, codes, cross_entropy, gated, groups, reduce, rms_norm, rotary, stochastic_round, thin,
    top_columns,
};
use crate::adam8::Adam8;
use crate::adamw::AdamW;
use crate::attention::AttentionHints;
use crate::gated::Activation;
use crate::groups::Rounding;
use crate::packed::{Layout, PackedParts};
use crate::{LowRankOps, Maybe, Tensors};

type T = FloatTensor<CubeBackend>;

impl LowRankOps for CubeBackend {
    fn thin_product(a: T, b: T, alpha: f32) -> T {
        thin::product(a, b, alpha)
    }
    fn dequantise(w: PackedParts<Self>, first: usize, rows: usize, dtype: FloatDType) -> T {
        codes::dequantise(w, first, rows, dtype)
    }
    fn packed_few(x: T, w: PackedParts<Self>) -> T {
        thin::packed(x, w)
    }
    fn packed_few_backward(dy: T, w: PackedParts<Self>) -> T {
        thin::packed_backward(dy, w)
    }
    fn rms_norm(x: T, gamma: T, eps: f32, offset: f32) -> T {
        rms_norm::forward(x, gamma, eps, offset)
    }
    fn rms_norm_backward(x: T, gamma: T, dy: T, eps: f32, offset: f32) -> (T, T) {
        rms_norm::backward(x, gamma, dy, eps, offset)
    }
    fn rms_norm_input_gradient(x: T, gamma: T, dy: T, eps: f32, offset: f32) -> T {
        rms_norm::input_gradient(x, gamma, dy, eps, offset)
    }
    fn gated(gate: T, up: T, activation: Activation) -> T {
        gated::forward(gate, up, activation)
    }
    fn gated_backward(gate: T, up: T, dy: T, activation: Activation) -> (T, T) {
        gated::backward(gate, up, dy, activation)
    }
    fn range_attention(
        q: T,
        k: T,
        v: T,
        ranges: IntTensor<Self>,
        scale: f32,
        softcap: f32,
        hints: AttentionHints,
    ) -> (T, T) {
        attention::forward([q, k, v, ranges], scale, softcap, hints)
    }
    fn range_attention_backward(
        q: T,
        k: T,
        v: T,
        out: T,
        lse: T,
        d_out: T,
        ranges: IntTensor<Self>,
        scale: f32,
        softcap: f32,
        hints: AttentionHints,
    ) -> (T, T, T) {
        attention::backward([q, k, v, ranges], [out, lse, d_out], scale, softcap, hints)
    }
    fn rotary(x: T, cos: T, sin: T, sign: f32) -> T {
        rotary::rotate(x, cos, sin, sign)
    }
    fn cross_entropy(logits: T, targets: IntTensor<Self>, softcap: f32) -> (T, T) {
        cross_entropy::forward(logits, targets, softcap)
    }
    fn adamw(
        parameters: Tensors<Self>,
        first: Tensors<Self>,
        second: Tensors<Self>,
        gradients: Tensors<Self>,
        factor: Maybe<Self>,
        rule: AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        let (p, m, v) = adamw::step([parameters.0, first.0, second.0, gradients.0], factor.option(), rule);
        (Tensors(p), Tensors(m), Tensors(v))
    }
    fn adam8(
        parameter: T,
        gradient: T,
        codes: IntTensor<Self>,
        absmax: T,
        maps: T,
        block: usize,
        rule: Adam8,
    ) -> (T, IntTensor<Self>, T) {
        if adam8::takes(block) {
            adam8::step(parameter, gradient, codes, absmax, maps, block, rule)
        } else {
            crate::adam8::reference::<Self>(parameter, gradient, codes, absmax, maps, block, rule)
        }
    }
    fn stochastic_round(x: T, dtype: FloatDType, seed: u64) -> T {
        match dtype {
            FloatDType::BF16 | FloatDType::F16 => stochastic_round::round(x, dtype, seed),
            _ => crate::stochastic_round::reference::<Self>(x, dtype, seed),
        }
    }
    fn pack_groups(values: T, layout: Layout, rounding: Rounding) -> (IntTensor<Self>, T, IntTensor<Self>) {
        groups::pack(values, layout, rounding)
    }
    fn top_columns(scores: T, count: usize) -> IntTensor<Self> {
        top_columns::largest(scores, count)
    }
    fn sums(x: Tensors<Self>, squared: bool) -> T {
        reduce::sums(x.0, squared)
    }
}
