//! Kernels of `lowrank`: tensors in, tensors out. This crate knows no method and no model.
//!
//! | function | what | bound by | CPU | GPU |
//! | --- | --- | --- | --- | --- |
//! | [`linear`] | `x W + b`, no `dW` for a frozen W | arithmetic | gemm | Burn's matmul |
//! | [`lowrank_linear`] | `x W + b + s (D(x) A) B` | arithmetic | gemm, delta accumulated in place; `W + s A B` for large r | thin products own, sums merged into Burn's matmul |
//! | both on a [`Packed`] weight | the same, dequantised panel by panel | arithmetic | gemm on a scratch buffer | dequantising kernel and matmul; few tokens by the codes |
//! | [`projected_linear`] | `x W + b` with `P^T dW Q` as the gradient of W | arithmetic | gemm | as linear |
//! | [`packed_projected_linear`] | the same on codes, with a placeholder for the gradient | arithmetic | gemm | as packed |
//! | [`factored_linear`] | `x W + b` that hands over `x` and `dy` instead of `dW` | arithmetic | gemm | as linear |
//! | [`lowrank_shift`] | `x + s (x A) B` | arithmetic | gemm, accumulated into a copy of x | as lowrank_linear |
//! | [`column_scale`] | `z * c + b`, c trained | memory | in place | reference |
//! | [`directed_linear()`] | `x V diag(m / n)`, `V = W + s A B` with lengths n | arithmetic | one sweep over W, gemm | not used |
//! | [`block_rotation`] | `x + x blockdiag(E)` | arithmetic | gemm on the columns of each block | reference |
//! | [`scaled_basis`] | one basis under many diagonals | memory | one pass | reference |
//! | [`rms_norm`] | RMS normalisation | memory | one pass | own |
//! | [`rotary`] | rotary embedding | memory | one pass | own |
//! | [`attention`] | softmax attention over key ranges | arithmetic | tiles, log-sum-exp saved | own, three ways |
//! | [`gated`] | SwiGLU, GeGLU | memory | one pass | own |
//! | [`cross_entropy`] | loss and gradient of a chunk of logits | memory | in place | own, gradient in place |
//! | [`adamw`], [`adamw_all`] | optimiser step, of any number of tensors | memory | in place | own, in place, many tensors a launch |
//! | [`adam8()`] | optimiser step with moments in 8 bits | memory | in place | own, in place |
//! | [`stochastic_round`] | f32 to 16 bits, mean kept | memory | one pass | own |
//! | [`pack_groups`] | values to int8 or int4 in groups | memory | one pass | own |
//! | [`top_columns`] | indices of the largest scores | launches | sorts | own |
//! | [`sum_squares`], [`sum_squares_all`], [`sum_all`] | for gradient norms | memory | one pass | own, many tensors a launch |
//!
//! Every operation is a method of [`LowRankOps`] with a default body in plain tensor operations (the reference) and a hand-written
//! backward that serves all backends. CPU loops are in the file of the operation, CubeCL kernels in `gpu/`; where the table says
//! reference, Burn fuses the plain operations.

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
pub mod groups;
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
mod top_columns;
mod weight;

pub use api::*;
pub use extension::{LowRankOps, Maybe, Tensors};
mod api;
pub use packed::Packed;
pub use weight::Weight;

#[cfg(all(test, feature = "flex"))]
mod tests;
