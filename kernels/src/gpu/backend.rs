//! Which operations have a kernel of their own on GPU backends; the others run their reference.

use burn::backend::tensor::{FloatTensor, IntTensor};
use burn_cubecl::CubeBackend;

use super::{attention, gated, rms_norm};
use crate::LowRankOps;
use crate::attention::AttentionHints;
use crate::gated::Activation;

type T = FloatTensor<CubeBackend>;

impl LowRankOps for CubeBackend {
    fn rms_norm(x: T, gamma: T, eps: f32, offset: f32) -> T {
        rms_norm::forward(x, gamma, eps, offset)
    }
    fn rms_norm_backward(x: T, gamma: T, dy: T, eps: f32, offset: f32) -> (T, T) {
        rms_norm::backward(x, gamma, dy, eps, offset)
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
}
