//! The kernels in CubeCL: one source for CUDA C++, PTX, SPIR-V, WGSL and MSL.
//!
//! | kernel | file | work per cube |
//! | --- | --- | --- |
//! | gated forward, backward | `gated.rs` | elementwise |
//! | RMS norm forward, backward | `rms_norm.rs` | one row |
//!
//! Every kernel computes in f32 whatever the tensors' type and writes each output once. A launcher checks shapes, so that the
//! kernel does not. Kernels are opaque to Burn's fusion; that is why only those are here that a fused reference cannot match.

mod backend;
#[cfg(all(test, feature = "codegen"))]
mod codegen;
mod gated;
mod launch;
mod rms_norm;
