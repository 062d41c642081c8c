//! The kernels in CubeCL: one source for CUDA C++, PTX, SPIR-V, WGSL and MSL.
//!
//! | kernel | file | work per cube |
//! | --- | --- | --- |
//! | gated forward, backward | `gated.rs` | elementwise |
//! | RMS norm forward, backward | `rms_norm.rs` | one row |
//! | attention by chunks: softmax, its backward | `attention/chunks.rs` | one row of scores |
//! | attention by tiles: forward, two backward | `attention/tiles_*.rs` | one tile of queries or keys |
//!
//! Every kernel computes in f32 whatever the tensors' type and writes each output once. A launcher checks shapes, so that the
//! kernel does not. Kernels are opaque to Burn's fusion; that is why only those are here that a fused reference cannot match.

mod attention;
mod backend;
#[cfg(all(test, feature = "codegen"))]
mod codegen;
mod gated;
mod launch;
mod rms_norm;
