//! Which operations have a kernel of their own on GPU backends; the others run their reference.

use burn::backend::tensor::FloatTensor;
use burn::tensor::FloatDType;
use burn_cubecl::CubeBackend;

use super::{codes, gated, rms_norm, thin};
use crate::LowRankOps;
use crate::gated::Activation;
use crate::packed::PackedParts;

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
    fn gated(gate: T, up: T, activation: Activation) -> T {
        gated::forward(gate, up, activation)
    }
    fn gated_backward(gate: T, up: T, dy: T, activation: Activation) -> (T, T) {
        gated::backward(gate, up, dy, activation)
    }
}
