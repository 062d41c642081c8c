//! What the CPU's own loops do faster than plain tensor operations.

use super::*;
use burn::backend::Flex;

type T = FloatTensor<Flex>;

impl LowRankOps for Flex {
    fn gemm(a: T, b: T, c: Maybe<Flex>, alpha: f32) -> T {
        gemm::cpu(a, b, c.option(), alpha)
    }
    fn packed_linear(x: T, w: PackedParts<Self>, bias: Maybe<Flex>) -> T {
        packed::cpu::linear(x, w, bias.option())
    }
    fn packed_linear_backward(dy: T, w: PackedParts<Self>) -> T {
        packed::cpu::input_gradient(dy, w)
    }
    fn dequantise(w: PackedParts<Self>, first: usize, rows: usize, dtype: FloatDType) -> T {
        packed::cpu::dequantise(w, first, rows, dtype)
    }
    fn column_scale(z: T, c: T, bias: Maybe<Flex>) -> (T, T) {
        column_scale::cpu(z, c, bias.option())
    }
    fn column_scale_backward(kept: T, c: T, dy: T, has_bias: bool) -> (T, T) {
        column_scale::backward_cpu(kept, c, dy, has_bias)
    }
    fn directed_weight(w: T, down: T, up: T, magnitude: T, scale: f32) -> (T, T, T) {
        directed_linear::cpu(w, down, up, magnitude, scale)
    }
    fn column_dots(a: T, b: T) -> T {
        directed_linear::dots_cpu(a, b)
    }
    fn block_rotation(x: T, turn: T) -> T {
        block_rotation::cpu(x, turn)
    }
    fn block_rotation_gradient(x: T, dy: T, block: usize) -> T {
        block_rotation::gradient_cpu(x, dy, block)
    }
    fn scaled_basis(a: T, lambda: T, gamma: T) -> T {
        scaled_basis::cpu(a, lambda, gamma)
    }
    fn scaled_basis_backward(a: T, lambda: T, gamma: T, dy: T) -> (T, T) {
        scaled_basis::backward_cpu(a, lambda, gamma, dy)
    }
    fn rms_norm(x: T, gamma: T, eps: f32, offset: f32) -> T {
        rms_norm::cpu(x, gamma, eps, offset)
    }
    fn rms_norm_backward(x: T, gamma: T, dy: T, eps: f32, offset: f32) -> (T, T) {
        rms_norm::backward_cpu(x, gamma, dy, eps, offset)
    }
    fn rotary(x: T, cos: T, sin: T, sign: f32) -> T {
        rotary::cpu(x, cos, sin, sign)
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
        attention::cpu::forward(q, k, v, ranges, scale, softcap, hints.keys)
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
        _hints: AttentionHints,
    ) -> (T, T, T) {
        attention::cpu::backward(q, k, v, out, lse, d_out, ranges, scale, softcap)
    }
    fn gated(gate: T, up: T, activation: Activation) -> T {
        gated::cpu(gate, up, activation)
    }
    fn gated_backward(gate: T, up: T, dy: T, activation: Activation) -> (T, T) {
        gated::backward_cpu(gate, up, dy, activation)
    }
    fn cross_entropy(logits: T, targets: IntTensor<Self>, softcap: f32) -> (T, T) {
        cross_entropy::cpu(logits, targets, softcap)
    }
    fn adamw(
        parameters: Tensors<Self>,
        first: Tensors<Self>,
        second: Tensors<Self>,
        gradients: Tensors<Self>,
        factor: Maybe<Self>,
        rule: adamw::AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        adamw::cpu([parameters, first, second, gradients], factor.option(), rule)
    }
    fn adam8(
        parameter: T,
        gradient: T,
        codes: IntTensor<Self>,
        absmax: T,
        _maps: T,
        block: usize,
        rule: adam8::Adam8,
    ) -> (T, IntTensor<Self>, T) {
        adam8::cpu(parameter, gradient, codes, absmax, block, rule)
    }
    fn stochastic_round(x: T, dtype: FloatDType, seed: u64) -> T {
        stochastic_round::cpu(x, dtype, seed)
    }
    fn pack_groups(values: T, layout: Layout, rounding: Rounding) -> (IntTensor<Self>, T, IntTensor<Self>) {
        groups::cpu(values, layout, rounding)
    }
    fn top_columns(scores: T, count: usize) -> IntTensor<Self> {
        top_columns::cpu(scores, count)
    }
    fn sums(x: Tensors<Self>, squared: bool) -> T {
        reduce::cpu(x, squared)
    }
}
