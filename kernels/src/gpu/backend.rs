//! Which operations have a kernel of their own on GPU backends; the others run their reference.

use burn::backend::tensor::FloatTensor;
use burn_cubecl::CubeBackend;

use super::{gated, rms_norm};
use crate::LowRankOps;
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
}
