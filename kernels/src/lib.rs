//! Kernels of `lowrank`: tensors in, tensors out. This crate knows no method and no model.
//!
//! | function | what | bound by | reference | CPU |
//! | --- | --- | --- | --- | --- |
//! | [`linear`] | `x W + b`, no `dW` for a frozen W | arithmetic | yes | gemm |
//! | [`lowrank_linear`] | `x W + b + s (D(x) A) B` | arithmetic | yes | gemm, delta accumulated in place; `W + s A B` for large r |
//! | both on a [`Packed`] weight | the same, dequantised panel by panel | arithmetic | yes | gemm on a scratch buffer |
//! | [`projected_linear`] | `x W + b` with `P^T dW Q` as the gradient of W | arithmetic | yes | gemm |
//! | [`packed_projected_linear`] | the same on codes, with a placeholder for the gradient | arithmetic | yes | gemm |
//! | [`factored_linear`] | `x W + b` that hands over `x` and `dy` instead of `dW` | arithmetic | yes | gemm |
//! | [`lowrank_shift`] | `x + s (x A) B` | arithmetic | yes | gemm, accumulated into a copy of x |
//! | [`column_scale`] | `z * c + b`, c trained | memory | yes | in place |
//! | [`directed_linear()`] | `x V diag(m / n)`, `V = W + s A B` with lengths n | arithmetic | yes | one sweep over W, gemm |
//! | [`block_rotation`] | `x + x blockdiag(E)` | arithmetic | yes | gemm on the columns of each block |
//! | [`scaled_basis`] | one basis under many diagonals | memory | yes | one pass |
//! | [`rms_norm`] | RMS normalisation | memory | yes | one pass |
//! | [`rotary`] | rotary embedding | memory | yes | one pass |
//! | [`attention`] | softmax attention over key ranges | arithmetic | yes | tiles, log-sum-exp saved |
//! | [`gated`] | SwiGLU, GeGLU | memory | yes | one pass |
//! | [`cross_entropy`] | loss and gradient of a chunk of logits | memory | yes | in place |
//! | [`adamw`] | optimiser step | memory | yes | in place |
//! | [`adam8()`] | optimiser step with moments in 8 bits | memory | yes | in place |
//! | [`stochastic_round`] | f32 to 16 bits, mean kept | memory | yes | one pass |
//! | [`sum_squares`] | for gradient norms | memory | yes | one pass |
//!
//! Every operation is a method of [`LowRankOps`] with a default body in plain tensor operations (the reference, which GPUs run
//! where there is no kernel of ours) and a hand-written backward that serves all backends.

#[cfg(feature = "flex")]
mod cpu;

#[cfg(feature = "gpu")]
mod gpu;

mod extension;
mod plain;

pub mod adam8;
mod adamw;
mod attention;
mod block_rotation;
mod column_scale;
mod cross_entropy;
pub mod directed_linear;
mod gated;
mod gemm;
pub mod launches;
mod linear;
mod lowrank_linear;
pub mod map8;
pub mod merged_linear;
pub mod packed;
mod projected_linear;
mod reduce;
mod rms_norm;
mod rotary;
mod route;
mod scaled_basis;
mod stochastic_round;
mod weight;

pub use api::*;
pub use extension::{LowRankOps, Maybe};
mod api;
pub use packed::Packed;
pub use weight::Weight;

#[cfg(all(test, feature = "flex"))]
mod tests;
