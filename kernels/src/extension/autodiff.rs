//! The hand-written backward of each operation, once for all backends.

use super::*;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, AutodiffBackend};

impl<B: LowRankOps, C: CheckpointStrategy> LowRankOps for Autodiff<B, C> {
    fn dense_linear(x: FloatTensor<Self>, w: FloatTensor<Self>, bias: Maybe<Self>) -> FloatTensor<Self> {
        linear::autodiff::<B, C>(x, w, bias.option())
    }
    fn lowrank_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: Maybe<Self>,
        mask: Maybe<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        lowrank_linear::autodiff::<B, C>(x, w, bias.option(), mask.option(), down, up, scale)
    }
    fn packed_linear(x: FloatTensor<Self>, w: PackedParts<Self>, bias: Maybe<Self>) -> FloatTensor<Self> {
        packed::autodiff::autodiff::<B, C>(x, w, bias.option())
    }
    fn packed_lowrank_linear(
        x: FloatTensor<Self>,
        w: PackedParts<Self>,
        bias: Maybe<Self>,
        mask: Maybe<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let (constant, trained) = linear::split_bias::<B, C>(bias.option());
        let (w, mask) = (Operand::Packed(Box::new(packed::autodiff::inner::<B, C>(w))), mask.option());
        let mask = mask.map(|mask| mask.into_primitive());
        let y = lowrank_linear::factors::<B, C>(x, w, constant, mask, down, up, scale);
        linear::add_trained_bias::<B, C>(y, trained)
    }
    fn lowrank_shift(
        x: FloatTensor<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        lowrank_linear::factors::<B, C>(x, Operand::Identity, None, None, down, up, scale)
    }
    fn column_scale(
        z: FloatTensor<Self>,
        c: FloatTensor<Self>,
        bias: Maybe<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        column_scale::autodiff::<B, C>(z, c, bias.option())
    }
    fn directed_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        directed_linear::autodiff::<B, C>(x, w.into_primitive(), down, up, magnitude, scale)
    }
    fn block_rotation(x: FloatTensor<Self>, turn: FloatTensor<Self>) -> FloatTensor<Self> {
        block_rotation::autodiff::<B, C>(x, turn)
    }
    fn scaled_basis(a: FloatTensor<Self>, lambda: FloatTensor<Self>, gamma: FloatTensor<Self>) -> FloatTensor<Self> {
        scaled_basis::autodiff::<B, C>(a, lambda, gamma)
    }
    fn dequantise(w: PackedParts<Self>, first: usize, rows: usize, dtype: FloatDType) -> FloatTensor<Self> {
        Self::from_inner(B::dequantise(packed::autodiff::inner::<B, C>(w), first, rows, dtype))
    }
    fn projected_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: Maybe<Self>,
        left: Maybe<Self>,
        right: Maybe<Self>,
        up: Maybe<Self>,
        keep: f32,
    ) -> FloatTensor<Self> {
        let [bias, left, right, up] = [bias, left, right, up].map(Maybe::option);
        projected_linear::autodiff::<B, C>(x, w, bias, left, right, up, keep)
    }
    fn factored_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        bias: Maybe<Self>,
        down: Maybe<Self>,
        up: Maybe<Self>,
        keep: f32,
        x_slot: FloatTensor<Self>,
        dy_slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [bias, down, up] = [bias, down, up].map(Maybe::option);
        let w = Operand::Dense(w.into_primitive()); // its gradient leaves as two factors, not through its own node
        projected_linear::factored::<B, C>(x, w, bias, down, up, keep, x_slot, dy_slot)
    }
    fn packed_projected_linear(
        x: FloatTensor<Self>,
        w: PackedParts<Self>,
        bias: Maybe<Self>,
        left: Maybe<Self>,
        right: Maybe<Self>,
        up: Maybe<Self>,
        keep: f32,
        slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [bias, left, right, up] = [bias, left, right, up].map(Maybe::option);
        projected_linear::packed::<B, C>(x, w, bias, left, right, up, keep, slot)
    }
    fn packed_factored_linear(
        x: FloatTensor<Self>,
        w: PackedParts<Self>,
        bias: Maybe<Self>,
        down: Maybe<Self>,
        up: Maybe<Self>,
        keep: f32,
        x_slot: FloatTensor<Self>,
        dy_slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let [bias, down, up] = [bias, down, up].map(Maybe::option);
        let w = Operand::Packed(Box::new(packed::autodiff::inner::<B, C>(w)));
        projected_linear::factored::<B, C>(x, w, bias, down, up, keep, x_slot, dy_slot)
    }
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f32, offset: f32) -> FloatTensor<Self> {
        rms_norm::autodiff::<B, C>(x, gamma, eps, offset)
    }
    fn rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>, sign: f32) -> FloatTensor<Self> {
        rotary::autodiff::<B, C>(x, cos, sin, sign)
    }
    fn range_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        scale: f32,
        softcap: f32,
        hints: AttentionHints,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::autodiff::<B, C>(q, k, v, ranges, scale, softcap, hints)
    }
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        gated::autodiff::<B, C>(gate, up, activation)
    }
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        softcap: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        cross_entropy::autodiff::<B, C>(logits, targets, softcap)
    }
    // No gradient flows through a step of an optimiser.
    fn adamw(
        parameters: Tensors<Self>,
        first: Tensors<Self>,
        second: Tensors<Self>,
        gradients: Tensors<Self>,
        factor: Maybe<Self>,
        rule: adamw::AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        let [p, m, v, g] = [parameters, first, second, gradients].map(|all| all.map(|tensor| tensor.into_primitive()));
        let factor = Maybe::from_option(factor.option().map(|factor| factor.into_primitive()));
        let (p, m, v) = B::adamw(p, m, v, g, factor, rule);
        (p.map(Self::from_inner), m.map(Self::from_inner), v.map(Self::from_inner))
    }
    fn adam8(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        maps: FloatTensor<Self>,
        block: usize,
        rule: adam8::Adam8,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        let [p, g, absmax, maps] = [parameter, gradient, absmax, maps].map(|tensor| tensor.into_primitive());
        let (p, codes, absmax) = B::adam8(p, g, codes, absmax, maps, block, rule);
        (Self::from_inner(p), codes, Self::from_inner(absmax))
    }
    fn stochastic_round(x: FloatTensor<Self>, dtype: FloatDType, seed: u64) -> FloatTensor<Self> {
        Self::from_inner(B::stochastic_round(x.into_primitive(), dtype, seed))
    }
    fn pack_groups(
        values: FloatTensor<Self>,
        layout: Layout,
        rounding: Rounding,
    ) -> (IntTensor<Self>, FloatTensor<Self>, IntTensor<Self>) {
        let (codes, scale, zero) = B::pack_groups(values.into_primitive(), layout, rounding);
        (codes, Self::from_inner(scale), zero)
    }
    fn top_columns(scores: FloatTensor<Self>, count: usize) -> IntTensor<Self> {
        B::top_columns(scores.into_primitive(), count)
    }
    fn seed_gradient(out: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        linear::seed_autodiff::<B, C>(out, gradient)
    }
}
